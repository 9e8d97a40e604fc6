"""The loss on rows that are never trained on."""

import torch
from torch.utils.data import Dataset

from trainer.distributed import Run
from trainer.loader import Loader
from trainer.script import AgreedError


class Validation:
    """Measures the loss per target token over all validation rows, shared out over the ranks.

    on_bad_sample  "stop" raises AgreedError at a row that cannot be used; "skip" leaves it out, every time
    """

    def __init__(
        self,
        run: Run,
        val_set: Dataset | None,
        batch_size: int,
        num_workers: int = 0,
        on_bad_sample: str = "stop",
    ):
        self.run, self.loader, self.on_bad_sample = run, None, on_bad_sample
        if val_set:
            starts = range(0, len(val_set), batch_size)
            batches = [range(start, min(start + batch_size, len(val_set))) for start in starts]
            self.loader = Loader(val_set, batches[run.rank :: run.world_size], num_workers)

    @torch.no_grad()
    def measure(self, trainer) -> dict:
        """{"val_loss": ...}, the same on every rank; empty without validation rows."""
        if not self.loader:
            return {}
        sums, reasons, lost_files = torch.zeros(2, dtype=torch.float64), [], []
        trainer.model.eval()
        for batch in self.loader:
            reasons += batch["bad_samples"]
            lost_files += batch["lost_files"]
            loss = trainer.loss(batch, trainer.model)  # the bare model: no DDP exchange
            sums += torch.tensor([loss.item() * batch["num_targets"], batch["num_targets"]])
        trainer.model.train()
        reasons, lost_files = (
            sum(parts, []) for parts in zip(*self.run.share((reasons, lost_files)), strict=True)
        )
        if lost_files:
            raise AgreedError(lost_files[0])
        if reasons and self.on_bad_sample == "stop":
            raise AgreedError(f"{reasons[0]} (--on_bad_sample skip would leave it out)")
        loss, num_targets = self.run.sum(sums).tolist()
        return {"val_loss": loss / max(1, num_targets)}
