"""Which samples are trained on when, and on which rank."""
import argparse
import math
from collections.abc import Iterator
from itertools import islice

import torch
from torch.utils.data import DataLoader, Sampler

from trainer.distributed import Run


class GlobalBatches(Sampler):
    """Which samples this rank loads, for the whole run: each once per epoch, every epoch in a new order.

    A global step takes the next batch_size * world_size * accumulation_steps samples of the epoch's order and
    deals them out, so the order does not depend on how many processes there are. An epoch's last step may
    hold fewer. It is a function of seed and step alone, so a run goes on at any `start_step`.
    """

    def __init__(self, num_samples: int, args: argparse.Namespace, run: Run):
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
                order = torch.randperm(self.num_samples,
                                       generator=torch.Generator().manual_seed(self.seed + epoch))
            samples = order[place * self.samples_per_step:][:self.samples_per_step]
            dealt = torch.tensor_split(samples, self.accumulation_steps * self.world_size)
            yield from (part.tolist() for part in dealt[self.rank::self.world_size])


def by_step(loader: DataLoader, accumulation_steps: int) -> Iterator[list[dict]]:
    """The batches of one optimizer step at a time."""
    batches = iter(loader)
    while passes := list(islice(batches, accumulation_steps)):
        yield passes
