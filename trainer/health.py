"""Steps that are not finite, counted, and training states that must not be saved."""

import torch
from torch import Tensor, nn

from trainer.script import AgreedError

MAX_SKIPPED_SHARE = 0.1  # of the steps taken, once --max_bad_steps were skipped
CURE = "Lower --learning_rate, or compute in --dtype float32 or bfloat16"


class SkippedSteps:
    """Counts on the device, so that no step waits for the host: in all, and in a row."""

    def __init__(self, device: torch.device, max_bad_steps: int):
        self.counts, self.max_bad_steps = torch.zeros(2, dtype=torch.long, device=device), max_bad_steps

    def add(self, skipped: Tensor) -> None:
        self.counts = (self.counts + skipped) * torch.stack([torch.ones_like(skipped), skipped])

    def __int__(self) -> int:
        return int(self.counts[0])

    def check(self, step: int) -> None:
        """Raise AgreedError if the last steps were all skipped, or too many of the `step` steps taken."""
        in_all, in_a_row = self.counts.tolist()
        if in_a_row >= self.max_bad_steps:
            raise AgreedError(
                f"the loss or the gradient of the last {in_a_row} steps was not finite; they "
                f"were skipped, and the weights are as before. {CURE}"
            )
        if in_all >= self.max_bad_steps and in_all > MAX_SKIPPED_SHARE * step:
            raise AgreedError(
                f"the loss or the gradient of {in_all} of {step} steps was not finite; they were skipped. "
                f"Look for images or cached features that are not finite. {CURE}"
            )

    def summary(self) -> str:
        return f"; {int(self)} steps were not finite and skipped" if int(self) else ""


def check_finite(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise AgreedError if a weight or a moment of the optimizer is not finite: such a state is not saved."""
    named = list(model.named_parameters())
    named += [
        (f"{kind} of a parameter", value)
        for state in optimizer.state.values()
        for kind, value in state.items()
    ]
    for name, tensor in named:
        if not tensor.isfinite().all():
            raise AgreedError(
                f"the training state is no longer finite (first in {name}); it was not saved, and the last "
                f"good save is as it was. {CURE}"
            )
