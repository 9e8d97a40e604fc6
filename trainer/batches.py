"""Which samples are trained on when, and on which rank."""
import argparse
import math
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from trainer.distributed import Run


class GlobalBatches(Sampler):
    """Which samples this rank loads, for the whole run: each once per epoch, every epoch in a new order.

    A global step takes the next batch_size * world_size * accumulation_steps samples of the epoch's order and
    deals them out, so the order does not depend on how many processes there are. An epoch's last step may
    hold fewer. It is a function of seed and step alone, so a run goes on at any `start_step`.

    lengths  of the samples, roughly; if given, a global step holds samples of like length, so that little is
             padded and no rank waits for another. Only the order differs: of every CHUNK steps the samples
             are sorted, cut into steps, and those steps shuffled.
    """

    CHUNK = 50

    def __init__(self, num_samples: int, args: argparse.Namespace, run: Run,
                 lengths: np.ndarray | None = None):
        self.lengths = None if lengths is None else torch.as_tensor(lengths)
        self.num_samples, self.seed, self.rank, self.world_size = (
            num_samples, args.seed, run.rank, run.world_size)
        self.accumulation_steps = args.accumulation_steps
        self.samples_per_step = args.batch_size * run.world_size * args.accumulation_steps
        self.steps_per_epoch = math.ceil(num_samples / self.samples_per_step)
        self.total_steps = args.max_steps or args.epochs * self.steps_per_epoch
        self.start_step = 0

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * self.accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.total_steps):
            epoch, place = divmod(step, self.steps_per_epoch)
            if place == 0 or step == self.start_step:
                order = self.epoch_order(torch.Generator().manual_seed(self.seed + epoch))
            samples = order[place * self.samples_per_step:][:self.samples_per_step]
            dealt = torch.tensor_split(samples, self.accumulation_steps * self.world_size)
            yield from (part.tolist() for part in dealt[self.rank::self.world_size])

    def epoch_order(self, generator: torch.Generator) -> Tensor:
        """All samples, in the order of one epoch."""
        order, S = torch.randperm(self.num_samples, generator=generator), self.samples_per_step
        if self.lengths is None:
            return order
        parts = []
        for chunk in order.split(self.CHUNK * S):
            chunk = chunk[self.lengths[chunk].argsort(stable=True)]
            steps = chunk[:len(chunk) // S * S].view(-1, S)
            shuffled = torch.randperm(len(steps), generator=generator)
            parts += [steps[shuffled].flatten(), chunk[len(steps) * S:]]
        return torch.cat(parts)


def by_step(loader: Iterable[dict], accumulation_steps: int) -> Iterator[list[dict]]:
    """The batches of one optimizer step at a time."""
    batches = iter(loader)
    while passes := list(islice(batches, accumulation_steps)):
        yield passes
