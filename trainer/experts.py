"""Experts in training: their balance loss over the global batch, and a record of how evenly they are used."""
import math

import torch
from torch import Tensor

from model.LMConfig import LMConfig
from model.moe import Routing
from trainer.distributed import Run


class ExpertRecord:
    """Counts which experts were chosen since the last line of the log, over all ranks and on the device, so
    that no step waits for the host. Of a model without experts it records nothing."""

    def __init__(self, run: Run, config: LMConfig):
        self.run, self.config = run, config
        self.load = torch.zeros(config.n_layers, config.n_routed_experts, dtype=torch.long, device=run.device)
        self.sums = torch.zeros(1 + self.load.numel(), device=run.device)   # of a step: balance loss, choices
        self.balance = self.sums[0]
        self.shown: dict = {}       # in the last line of the log

    def new_routing(self) -> Routing | None:
        return Routing() if self.config.use_moe else None

    def balance_loss(self, routing: Routing | None, num_rows: int) -> Tensor | float:
        """One batch's part of the balance loss, which is a mean over the num_rows rows of the global
        batch."""
        if routing is None:
            return 0.0
        balance = self.config.aux_loss_alpha * routing.balance / max(1, num_rows)
        self.sums += torch.cat([balance.detach().view(1), routing.load.flatten()])
        return balance

    def end_step(self) -> None:
        """Add up what the batches of a step, and all ranks, counted."""
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
        self.shown = {"balance_loss": balance if math.isfinite(balance) else None,
                      "expert_load": [round(share, 4) for share in shares.mean(0).tolist()],
                      "expert_load_least": round(shares.min().item(), 4),
                      "expert_load_most": round(shares.max().item(), 4)}
        return self.shown

    def summary(self) -> str:
        if not self.shown:
            return ""
        return (f"; of a layer's choices an expert received {self.shown['expert_load_least']:.0%} to "
                f"{self.shown['expert_load_most']:.0%}")

    def state_dict(self) -> dict:
        return {"load": self.load.cpu()}

    def load_state_dict(self, state: dict) -> None:
        self.load = state["load"].to(self.run.device)
