"""Rank, world size and device: decided once, known in one object. The model and the data never ask."""
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from model.device import choose_device


@dataclass
class Run:
    """One process among world_size; use as a context manager, so that the process group is always closed."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, text: str = "") -> None:
        """Print once, on rank 0, above a progress bar if there is one."""
        if self.is_main:
            tqdm.write(text)

    def sum(self, values: Tensor) -> Tensor:
        """Add up a small tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value) -> list | None:
        """The value of every rank, in rank order, on rank 0; None elsewhere."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values)
        return values

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def start_run(device: str = "auto") -> Run:
    """Join the process group if torchrun started this process, and choose the device.

    device  "auto" (CUDA if there is any, else CPU), "cpu", "cuda", "cuda:1", "mps"
    raises  ValueError if the device cannot be had
    """
    # The loader's workers are forked after the tokenizer's first use.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if "RANK" in os.environ and world_size > 1:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    return Run(rank, world_size, chosen)
