"""Experts in training: their balance loss over the global batch, and a record of how evenly they are used.

The model knows nothing of either: hooks on its gates gather what they decide. Of a model without experts
nothing is gathered, and every function here answers 0 or nothing.

Letters: B rows, T tokens, L target tokens, E experts, K chosen per token.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model.data.batch import IGNORE_INDEX
from model.moe import Gate
from model.transformer import Transformer
from trainer.distributed import Run


def balance_of(probabilities: Tensor, chosen: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """One layer's balance loss, summed over the rows, and the choices that each expert received.

    probabilities  (B, T, E)
    chosen         (B, T, K)
    counted        (B, T, 1), which tokens count
    returns        (), at even use 1 per row; (E,)

    It is DeepSeek's, sequence by sequence: the sum over the experts of E * (share of the choices that went to
    it) * (mean probability of it). Only the probabilities have a gradient.
    """
    E, K = probabilities.shape[-1], chosen.shape[-1]
    lengths = counted.sum(1).clamp(min=1)  # (B, 1)
    received = (F.one_hot(chosen, E).sum(2) * counted).sum(1)  # (B, E)
    mean = (probabilities * counted).sum(1) / lengths  # (B, E)
    return E * (received / (lengths * K) * mean).sum(), received.sum(0)


class Experts:
    """Gathers what the gates of a model decide, for the balance loss and the log. Counts stay on the device,
    so no step waits for the host."""

    def __init__(self, run: Run, model: Transformer):
        self.run, self.config = run, model.config
        self.decisions: list[tuple[Tensor, Tensor]] = []  # of one forward pass, layer by layer
        self.load = torch.zeros(
            model.config.n_layers, model.config.n_routed_experts, dtype=torch.long, device=run.device
        )  # choices since the last line of the log
        self.sums = torch.zeros(1 + self.load.numel(), device=run.device)  # of a step: balance loss, choices
        self.balance = self.sums[0]
        self.shown: dict = {}  # in the last line of the log
        for module in model.modules():
            if isinstance(module, Gate):
                module.register_forward_hook(self.note)

    def note(self, _gate: Gate, _inputs, output: tuple[Tensor, Tensor, Tensor]) -> None:
        if torch.is_grad_enabled():  # validation is not recorded
            probabilities, _weights, chosen = output
            self.decisions.append((probabilities, chosen))

    def balance_loss(self, batch: dict, num_rows: int) -> Tensor | float:
        """The part of one micro-batch in the balance loss, which is a mean over the num_rows rows of the
        global batch. Call it once after every forward pass."""
        if not self.config.use_moe:
            return 0.0
        labels, targets = batch["labels"].to(self.run.device), batch["target_positions"].to(self.run.device)
        total, load = 0.0, []
        for layer, counted in zip(self.decisions, self.counted_tokens(labels), strict=True):
            if layer[0].ndim == 2:  # the last layer, which is computed at the targets alone
                layer = [
                    part.new_zeros(labels.numel(), part.shape[-1])
                    .index_copy(0, targets, part)
                    .view(*labels.shape, -1)
                    for part in layer
                ]
            balance, received = balance_of(*layer, counted)
            total, load = total + balance, [*load, received]
        self.decisions = []
        total = self.config.aux_loss_alpha * total / max(1, num_rows)
        self.sums += torch.cat([total.detach().view(1), torch.stack(load).flatten()])
        return total

    def counted_tokens(self, labels: Tensor) -> list[Tensor]:
        """Which tokens count, (B, T, 1) for every layer: those up to a row's last target; in the last layer
        the targets themselves, since its experts see no others.

        Derived from the labels, because they alone say where a row ends: a batch that is padded further has
        the same balance.
        """
        is_target = labels != IGNORE_INDEX  # (B, T)
        place = torch.arange(1, labels.shape[1] + 1, device=labels.device)
        before = place <= (is_target * place).amax(1, keepdim=True)
        return [before.unsqueeze(-1)] * (self.config.n_layers - 1) + [is_target.unsqueeze(-1)]

    def end_step(self) -> None:
        """Add up what the micro-batches of a step, and all ranks, counted."""
        if self.config.use_moe:
            sums = self.run.sum(self.sums)
            self.balance, self.load = sums[0], self.load + sums[1:].long().view_as(self.load)
            self.sums = torch.zeros_like(sums)

    def read(self) -> dict:
        """What a line of the log says: the balance loss of the last step, and since the last line the share
        of the choices that each expert received, over all layers, and the least and most that any expert of
        any layer received. Waits for the device."""
        if not self.config.use_moe:
            return {}
        load, balance = self.load.cpu().double(), self.balance.item()
        shares = load / load.sum(1, keepdim=True).clamp(min=1)
        self.load = torch.zeros_like(self.load)
        self.shown = {
            "balance_loss": balance if math.isfinite(balance) else None,
            "expert_load": [round(share, 4) for share in shares.mean(0).tolist()],
            "expert_load_least": round(shares.min().item(), 4),
            "expert_load_most": round(shares.max().item(), 4),
        }
        return self.shown

    def summary(self) -> str:
        if not self.shown:
            return ""
        return (
            f"; of a layer's choices an expert received {self.shown['expert_load_least']:.0%} to "
            f"{self.shown['expert_load_most']:.0%}"
        )

    def state_dict(self) -> dict:
        return {"load": self.load.cpu()}

    def load_state_dict(self, state: dict) -> None:
        self.load = state["load"].to(self.run.device)
