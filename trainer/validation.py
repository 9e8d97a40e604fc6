"""The loss on rows that are never trained on, and what of it the images are worth.

The loss is measured three times on the same rows: with their images, with blank ones (features that are all
zero, as the control `blank` of 3-eval_chat.py), and with another row's. What the loss rises by without its
images is the visual gain of a row: arXiv 2602.17186 trains on the rows and tokens where it is large, arXiv
2603.01195 finds by it the rows that need no image, and those whose image misleads.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from model.data.batch import BadSample, collate
from trainer.distributed import Run
from trainer.loader import Loader
from trainer.logger import progress_bar
from trainer.script import AgreedError
from trainer.stand_ins import Numbered, find_stand_ins, resample


class RowLoss(NamedTuple):
    """What a row loses, summed over its targets, in nats."""

    place: int
    num_targets: int
    real: float
    blank: float | None = None  # None: it shows no image
    another: float | None = None  # None: nor does any other row show another one


class Validation:
    """Measures losses per target token over all rows of a set, shared out over the ranks.

    on_bad_sample  "stop" raises AgreedError at a row that cannot be used; "skip" leaves it out, every time
    seed           of which row stands in for which: the same at every measurement, on any number of processes
    """

    def __init__(
        self,
        run: Run,
        val_set: Dataset | None,
        batch_size: int,
        num_workers: int = 0,
        on_bad_sample: str = "stop",
        seed: int = 0,
    ):
        self.run, self.on_bad_sample, self.last = run, on_bad_sample, {}
        self.rows = Numbered(val_set) if val_set else None
        if val_set:
            self.stand_ins = find_stand_ins(self.rows.shown(), seed)
            # In this order most rows of a batch find their stand-in in it; the others are loaded with it.
            order = [*self.stand_ins, *(row for row in range(len(self.rows)) if row not in self.stand_ins)]
            starts = range(0, len(order), batch_size)[run.rank :: run.world_size]
            self.batches = [order[start : start + batch_size] for start in starts]
            loaded = [self.with_stand_ins(batch) for batch in self.batches]
            self.loader = Loader(self.rows, loaded, num_workers, make_batch=collate_places)

    def with_stand_ins(self, places: list[int]) -> list[int]:
        others = [self.stand_ins[place] for place in places if place in self.stand_ins]
        return list(dict.fromkeys([*places, *others]))

    def measure(self, trainer) -> dict:
        """mean_losses() of all rows, the same on every rank; {} without validation rows."""
        if not self.rows:
            return {}
        self.last = mean_losses(self.run.sum(sum_up(self.row_losses(trainer))))
        return self.last

    def row_losses(self, trainer, progress: str = "") -> list[RowLoss]:
        """Those of this rank's rows, every good one once.

        progress  what a bar is called that shows how far it is; "" = none
        """
        found, reasons, lost_files = [], [], []
        trainer.model.eval()
        hidden = not (progress and self.run.is_main)
        loaded = progress_bar(self.loader, total=len(self.batches), desc=progress, disable=hidden)
        for batch, mine in zip(loaded, self.batches, strict=True):
            reasons += batch["bad_samples"]
            lost_files += batch["lost_files"]
            found += [row for row in self.losses_of(trainer, batch) if row.place in mine]
        trainer.model.train()
        reasons, lost_files = (
            sum(parts, []) for parts in zip(*self.run.share((reasons, lost_files)), strict=True)
        )
        if lost_files:
            raise AgreedError(lost_files[0])
        if reasons and self.on_bad_sample == "stop":
            raise AgreedError(f"{reasons[0]} (--on_bad_sample skip would leave it out)")
        return found

    @torch.no_grad()
    def losses_of(self, trainer, batch: dict) -> list[RowLoss]:
        """Those of all rows of a batch, stand-ins included."""
        places, num_images = batch["places"], batch["num_images"].tolist()
        if not places:
            return []
        inputs = trainer.inputs(batch)
        features = inputs["image_features"]  # (M, N, V)
        num_targets, real = sum_by_row(trainer, inputs)
        blank = another = [0.0] * len(places)
        if sum(num_images):
            shown = dict(zip(places, features.split(num_images), strict=True))
            given = [
                resample(shown.get(self.stand_ins.get(place), own), len(own)) for place, own in shown.items()
            ]
            _, blank = sum_by_row(trainer, inputs | {"image_features": torch.zeros_like(features)})
            _, another = sum_by_row(trainer, inputs | {"image_features": torch.cat(given)})
        return [
            RowLoss(
                place,
                num_targets[row],
                real[row],
                blank[row] if num_images[row] else None,
                another[row] if self.stand_ins.get(place) in places else None,
            )
            for row, place in enumerate(places)
        ]

    def summary(self) -> str:
        return describe_worth(self.last)


def collate_places(samples: list[dict | BadSample]) -> dict:
    """collate(), and which row of the set each row of the batch is."""
    return collate(samples) | {
        "places": [sample["place"] for sample in samples if not isinstance(sample, BadSample)]
    }


def sum_by_row(trainer, inputs: dict) -> tuple[list[int], list[float]]:
    """The targets of each row of a batch, and its loss summed over them."""
    with trainer.autocast():
        logits, _ = trainer.model(**inputs)  # (L, V); the bare model: no DDP exchange
    positions, (B, T) = inputs["target_positions"], inputs["labels"].shape
    losses = F.cross_entropy(logits.float(), inputs["labels"].flatten()[positions], reduction="none")
    rows, losses = (positions // T).cpu(), losses.cpu().double()
    count = partial(torch.bincount, rows, minlength=B)
    return count().tolist(), count(losses).tolist()


def sum_up(rows: list[RowLoss]) -> Tensor:
    """Loss and targets, (4, 2) in float64: of all rows; of those that show images, as they are and blank; of
    those that have a stand-in, with its images."""
    sums = [[0.0, 0] for _ in range(4)]
    for row in rows:
        losses = (row.real, None if row.blank is None else row.real, row.blank, row.another)
        for line, loss in zip(sums, losses, strict=True):
            if loss is not None:
                line[0], line[1] = line[0] + loss, line[1] + row.num_targets
    return torch.tensor(sums, dtype=torch.float64)


def mean_losses(sums: Tensor) -> dict[str, float]:
    """What sum_up() adds up, per target.

    val_loss          of all rows, as they are; those without an image count here alone
    val_loss_real     of those that show images; and of the same rows
    val_loss_blank    with blank images
    val_loss_another  with another row's images; without the rows that no other could stand in for
    visual_gain       blank - real
    """
    names = ("val_loss", "val_loss_real", "val_loss_blank", "val_loss_another")
    losses = {
        name: loss / max(1, n)
        for name, (loss, n) in zip(names, sums.tolist(), strict=True)
        if n or name == "val_loss"
    }
    if "val_loss_blank" in losses:
        losses["visual_gain"] = losses["val_loss_blank"] - losses["val_loss_real"]
    return losses


def describe_worth(losses: dict[str, float]) -> str:
    """What they say of the images, in words; "" if no row shows one."""
    if "visual_gain" not in losses:
        return ""
    another = losses.get("val_loss_another")
    return (
        f"the image is worth {losses['visual_gain']:.2f} nats per token: real {losses['val_loss_real']:.2f}, "
        f"blank {losses['val_loss_blank']:.2f}, "
        + ("no other row to compare with" if another is None else f"another's {another:.2f}")
    )
