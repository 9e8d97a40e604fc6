"""Mixture of experts: in place of one feed-forward several, of which every token chooses a few (DeepSeekMoE,
Dai et al. 2024). A dense model needs nothing of this.

    probabilities = softmax(gate(x))                       one per expert
    out = shared(x) + sum of weight * expert(x)            over the likeliest experts of the token

Letters: B rows, T tokens, R tokens of all rows, D model width, W feed-forward width, E experts, K chosen per
token.
"""
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.lean import SwiGLU
from model.LMConfig import LMConfig

Experts = Sequence[Callable[[Tensor], Tensor]]
ALIGNMENT = 8       # bf16 numbers in the 16 bytes at which a group of grouped_mm's backward pass may begin


class Routing:
    """What the gates of all layers decided in one forward pass; the model fills it.

    counted  (B, T, 1) which tokens count: neither padding nor what follows the last learnt one of a row
    lengths  (B, 1) how many those are
    balance  () the balance loss, summed over the rows and layers; at even use 1 per row and layer
    load     (n_layers, E) choices that each expert received
    """

    def __init__(self):
        self.balance: Tensor | float = 0.0
        self.layers: list[Tensor] = []

    def begin(self, is_learnt: Tensor) -> None:
        """is_learnt (B, T). Derived from the labels, because they alone tell where a row ends: a batch that
        is padded further has the same balance."""
        place = torch.arange(1, is_learnt.shape[1] + 1, device=is_learnt.device)
        lengths = (is_learnt * place).amax(1, keepdim=True)
        self.counted, self.lengths = (place <= lengths).unsqueeze(-1), lengths.clamp(min=1)

    def add(self, probabilities: Tensor, chosen: Tensor) -> None:
        """One layer's probabilities (B, T, E) and choices (B, T, K).

        Its balance is DeepSeek's, sequence by sequence: the sum over the experts of E * (share of the choices
        that went to it) * (mean probability of it). Only the probabilities have a gradient.
        """
        E, K = probabilities.shape[-1], chosen.shape[-1]
        received = (F.one_hot(chosen, E).sum(2) * self.counted).sum(1)                            # (B, E)
        share = received / (self.lengths * K)
        mean = (probabilities * self.counted).sum(1) / self.lengths                               # (B, E)
        self.balance = self.balance + E * (share * mean).sum()
        self.layers.append(received.sum(0))

    @property
    def load(self) -> Tensor:
        return torch.stack(self.layers)


def route(x: Tensor, gate: nn.Linear, config: LMConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Which experts x (..., D) goes to: probabilities of all (..., E), and of the chosen ones the weights
    (..., K) and numbers (..., K). In fp32 whatever --dtype says: in half precision near ties fall at random.
    """
    with torch.autocast(x.device.type, enabled=False):
        probabilities = F.linear(x.float(), gate.weight.float()).softmax(-1)
    weights, chosen = probabilities.topk(config.num_experts_per_tok, dim=-1)
    if config.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return probabilities, weights, chosen


class MixtureOfExperts(nn.Module):
    """Takes the place of a block's FeedForward; parameter names are v1's.

    make_expert  makes one feed-forward from the config
    """

    def __init__(self, config: LMConfig, make_expert: Callable[[LMConfig], nn.Module]):
        super().__init__()
        self.config = config
        self.experts = nn.ModuleList(make_expert(config) for _ in range(config.n_routed_experts))
        self.gate = nn.Linear(config.dim, config.n_routed_experts, bias=False)
        self.shared_experts = make_expert(config) if config.n_shared_experts else None

    def forward(self, x: Tensor, keep: Tensor | None = None, routing: Routing | None = None) -> Tensor:
        """x (B, T, D) to the same shape; with `keep` (L,) the experts answer only at those positions of
        B * T, (L, D), although all of them are routed and count in `routing`."""
        probabilities, weights, chosen = route(x, self.gate, self.config)
        if routing is not None:
            routing.add(probabilities, chosen)
        rows, weights, chosen = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, weights, chosen))
        if keep is not None:
            rows, weights, chosen = rows[keep], weights[keep], chosen[keep]
        out = mix(rows, weights, chosen, self.experts, grouped if can_group(x) else one_by_one)
        if self.shared_experts is not None:
            out = out + self.shared_experts(rows)
        return out if keep is not None else out.view_as(x)


def mix(rows: Tensor, weights: Tensor, chosen: Tensor, experts: Experts,
        compute: Callable[[Experts, Tensor, Tensor], Tensor]) -> Tensor:
    """The weighted sum of what the chosen experts say of each row.

    rows             (R, D)
    weights, chosen  (R, K)
    compute          experts, copies of the rows (R * K, D) sorted by expert, how many each expert has (E,)
                     -> what the experts say of them (R * K, D)
    returns          (R, D)
    """
    E, K = len(experts), chosen.shape[1]
    order = chosen.flatten().argsort(stable=True)                                                 # (R * K,)
    counts = (chosen.reshape(-1, 1) == torch.arange(E, device=chosen.device)).sum(0)              # (E,)
    row = order // K
    said = compute(experts, rows.index_select(0, row), counts)                                    # (R * K, D)
    said = said * weights.flatten()[order].unsqueeze(1).type_as(said)
    return said.new_zeros(rows.shape).index_add(0, row, said)


def one_by_one(experts: Experts, rows: Tensor, counts: Tensor) -> Tensor:
    """Each expert's own rows, one product after another. An expert without rows takes part all the same: its
    gradient is then zero, not absent, and DDP waits for every gradient."""
    parts = rows.split(counts.tolist())
    return torch.cat([expert(part) for expert, part in zip(experts, parts, strict=True)])


def can_group(x: Tensor) -> bool:
    """Are all experts computed in one kernel? GPUs of compute capability 8 do so, in bfloat16.

    On a CPU the loop is as fast: at 512 wide the loop, products padded to the busiest expert, and grouped_mm
    took the same time within what the machine's own load moved, and the loop alone copies no weights.
    """
    return (x.device.type == "cuda" and x.dtype == torch.bfloat16 and hasattr(F, "grouped_mm")
            and torch.cuda.get_device_capability(x.device) >= (8, 0))


def grouped(experts: nn.ModuleList, rows: Tensor, counts: Tensor) -> Tensor:
    """All experts in two grouped products. The host never learns how many rows each has, so it need not wait
    for the GPU: the rows are spread over a buffer that is large enough for any split."""
    def stack(*names: str) -> Tensor:       # (E, D, W): W adds up where there are several names
        return torch.stack([torch.cat([getattr(expert, name).weight.to(rows.dtype) for name in names])
                            for expert in experts]).mT
    padded = (counts + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    ends = padded.cumsum(0)
    number = torch.arange(len(rows), device=rows.device)
    expert = torch.searchsorted(counts.cumsum(0), number, right=True)
    place = number + (ends - padded - counts.cumsum(0) + counts)[expert]
    size = (len(rows) // ALIGNMENT + len(experts) + 2) * ALIGNMENT      # beyond the last end it is idle
    buffer = rows.new_zeros(size, rows.shape[1]).index_copy(0, place, rows)
    ends = ends.to(torch.int32)
    gate, up = F.grouped_mm(buffer, stack("w1", "w3"), offs=ends).chunk(2, dim=-1)
    return F.grouped_mm(SwiGLU.apply(gate, up), stack("w2"), offs=ends).index_select(0, place)
