"""Which samples are trained on when, on which rank, and which are kept for validation."""

import math
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, Subset

from model.data.dataset import VLMDataset
from trainer.distributed import Run

LARGE, NUM_VALIDATED = 20_000, 128  # rows


class GlobalBatches(Sampler):
    """Which samples this rank loads, for the whole run: each once per epoch, every epoch in a new order.

    A global step takes the next batch_size * world_size * accumulation_steps samples of the epoch's order and
    deals them out, so the order does not depend on how many processes there are. An epoch's last step may
    hold fewer. It is a function of seed and step alone, so a run can resume at any `start_step`.

    max_steps  optimizer steps; 0 = as many as `epochs` take
    lengths    of the samples, roughly; if given, a global step holds samples of similar length, so that
               little is padded and no rank waits for another. Only the order differs: of every CHUNK steps
               the samples are sorted, cut into steps, and those steps shuffled.
    """

    CHUNK = 50

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        run: Run,
        *,
        accumulation_steps: int = 1,
        epochs: int = 1,
        max_steps: int = 0,
        seed: int = 0,
        lengths: np.ndarray | None = None,
    ):
        self.num_samples, self.seed, self.accumulation_steps = num_samples, seed, accumulation_steps
        self.rank, self.world_size = run.rank, run.world_size
        self.lengths = None if lengths is None else torch.as_tensor(lengths)
        self.samples_per_step = batch_size * run.world_size * accumulation_steps
        self.steps_per_epoch = math.ceil(num_samples / self.samples_per_step)
        self.total_steps = max_steps or epochs * self.steps_per_epoch
        self.start_step = 0

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * self.accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.total_steps):
            epoch, place = divmod(step, self.steps_per_epoch)
            if place == 0 or step == self.start_step:
                order = self.epoch_order(torch.Generator().manual_seed(self.seed + epoch))
            samples = order[place * self.samples_per_step :][: self.samples_per_step]
            dealt = torch.tensor_split(samples, self.accumulation_steps * self.world_size)
            yield from (part.tolist() for part in dealt[self.rank :: self.world_size])

    def epoch_order(self, generator: torch.Generator) -> Tensor:
        """All samples, in the order of one epoch."""
        order, S = torch.randperm(self.num_samples, generator=generator), self.samples_per_step
        if self.lengths is None:
            return order
        parts = []
        for chunk in order.split(self.CHUNK * S):
            chunk = chunk[self.lengths[chunk].argsort(stable=True)]
            steps = chunk[: len(chunk) // S * S].view(-1, S)
            shuffled = torch.randperm(len(steps), generator=generator)
            parts += [steps[shuffled].flatten(), chunk[len(steps) * S :]]
        return torch.cat(parts)


def spread(length: int, number: int) -> list[int]:
    """So many positions, or all there are, spread from the first to the last."""
    return [round(place) for place in np.linspace(0, length - 1, min(number, length))]


def group_micro_batches(batches: Iterable[dict], accumulation_steps: int) -> Iterator[list[dict]]:
    """The micro-batches of one optimizer step at a time."""
    batches = iter(batches)
    while micro_batches := list(islice(batches, accumulation_steps)):
        yield micro_batches


def automatic_share(num_rows: int, max_steps: int) -> float:
    """Of the rows for validation where no flag says: NUM_VALIDATED of a large file that a long run trains on,
    none else."""
    return NUM_VALIDATED / num_rows if num_rows >= LARGE and not max_steps else 0.0


def split_off(
    dataset: VLMDataset, val_dataset: VLMDataset | None, val_fraction: float, seed: int
) -> tuple[Dataset, Dataset | None]:
    """The rows to train on, and those for validation: a file of their own, a share of the same, or none.

    Raises ValueError if a share leaves one of the two without rows.
    """
    if not val_fraction:
        return dataset, val_dataset
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).numpy()
    count = round(val_fraction * len(dataset))
    if not 0 < count < len(dataset):
        raise ValueError(
            f"--val_fraction {val_fraction} of {len(dataset)} rows leaves "
            f"{'no row' if count else 'nothing'} to {'train' if count else 'validate'} on"
        )
    return Subset(dataset, order[count:]), Subset(dataset, order[:count])


def lengths_of(data: Dataset) -> np.ndarray:
    """The rough lengths of a data set, or of a part of one."""
    return lengths_of(data.dataset)[data.indices] if isinstance(data, Subset) else data.lengths()
