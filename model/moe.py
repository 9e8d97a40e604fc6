"""Mixture of experts: several feed-forwards in place of one, of which every token uses a few (DeepSeekMoE,
Dai et al. 2024). A dense model needs nothing of this.

    probabilities = softmax(gate(x))                       one per expert
    out = shared(x) + sum of weight * expert(x)            over the likeliest experts of the token

Letters: R tokens of all rows, D model width, E experts, K chosen per token.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.LMConfig import LMConfig

Experts = Sequence[Callable[[Tensor], Tensor]]


class Gate(nn.Linear):
    """Decides which experts a token uses. What it decides is gathered from outside, by hooks
    (trainer/experts.py)."""

    def __init__(self, config: LMConfig):
        super().__init__(config.dim, config.n_routed_experts, bias=False)
        self.num_chosen, self.normalise = config.num_experts_per_tok, config.norm_topk_prob

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., D) -> probabilities of all experts (..., E), and of the chosen ones weights (..., K) and
        numbers (..., K). In fp32 whatever --dtype says: in half precision near ties fall at random."""
        with torch.autocast(x.device.type, enabled=False):
            probabilities = F.linear(x.float(), self.weight.float()).softmax(-1)
        weights, chosen = probabilities.topk(self.num_chosen, dim=-1)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return probabilities, weights, chosen


class MixtureOfExperts(nn.Module):
    """Takes the place of a block's FeedForward; parameter names are v1's.

    make_expert  makes one feed-forward from the config
    """

    def __init__(self, config: LMConfig, make_expert: Callable[[LMConfig], nn.Module]):
        super().__init__()
        self.experts = nn.ModuleList(make_expert(config) for _ in range(config.n_routed_experts))
        self.gate = Gate(config)
        self.shared_experts = make_expert(config) if config.n_shared_experts else None

    def compute(self, experts: Experts, rows: Tensor, counts: Tensor) -> Tensor:
        return one_by_one(experts, rows, counts)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)"""
        _, weights, chosen = self.gate(x)
        rows = x.flatten(0, -2)  # (R, D); R is 0 in the last layer of a batch without targets
        out = mix(rows, weights.flatten(0, -2), chosen.flatten(0, -2), self.experts, self.compute)
        if self.shared_experts is not None:
            out = out + self.shared_experts(rows)
        return out.view_as(x)


def mix(
    rows: Tensor,
    weights: Tensor,
    chosen: Tensor,
    experts: Experts,
    compute: Callable[[Experts, Tensor, Tensor], Tensor],
) -> Tensor:
    """The weighted sum of the chosen experts' outputs for each row.

    rows             (R, D)
    weights, chosen  (R, K)
    compute          experts, copies of the rows (R * K, D) sorted by expert, how many each expert has (E,)
                     -> the experts' outputs (R * K, D)
    returns          (R, D)
    """
    E, K = len(experts), chosen.shape[1]
    order = chosen.flatten().argsort(stable=True)  # (R * K,)
    counts = (chosen.reshape(-1, 1) == torch.arange(E, device=chosen.device)).sum(0)  # (E,)
    row = order // K
    outputs = compute(experts, rows.index_select(0, row), counts)  # (R * K, D)
    outputs = outputs * weights.flatten()[order].unsqueeze(1).type_as(outputs)
    return outputs.new_zeros(rows.shape).index_add(0, row, outputs)


def one_by_one(experts: Experts, rows: Tensor, counts: Tensor) -> Tensor:
    """Each expert's own rows, one product after another. An expert without rows still takes part: its
    gradient is then zero, not absent, and DDP waits for every gradient."""
    parts = rows.split(counts.tolist())
    return torch.cat([expert(part) for expert, part in zip(experts, parts, strict=True)])
