"""Rank, world size and device: decided once, known in one object. The model and the data never ask."""

import contextlib
import ctypes
import gc
import os
import platform
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import metadata

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from model.device import choose_device
from model.printable import printable
from trainer.script import AgreedError, place_in_run


@dataclass
class Run:
    """One process among world_size; use as a context manager, so that the process group is always closed."""

    rank: int
    world_size: int
    device: torch.device
    local_world_size: int = 1  # processes on this machine
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # until the end of the run

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, text: str = "") -> None:
        """Print once, on rank 0, above a progress bar if there is one. A log on a full disk or a closed
        terminal costs the text, not the run."""
        if self.is_main:
            with contextlib.suppress(OSError, UnicodeError):
                tqdm.write(printable(text))

    def sum(self, values: Tensor) -> Tensor:
        """Add up a small tensor over all ranks, in place. One on the CPU never waits for a GPU."""
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

    def gather_in_order(self, mine: dict[int, object]) -> list:
        """What all ranks found, by its number, in the order of the numbers, on rank 0; empty elsewhere."""
        parts = self.gather(mine) or []
        return [
            found
            for _, found in sorted(
                (item for part in parts for item in part.items()), key=lambda item: item[0]
            )
        ]

    def share(self, value) -> list:
        """The value of every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def check_agreement(self, mine: dict) -> None:
        """Raise AgreedError, with both values of what differs, unless all ranks hold the same."""
        everyone = self.share(mine)
        for rank, theirs in enumerate(everyone):
            names = [*everyone[0], *(name for name in theirs if name not in everyone[0])]
            differences = [
                f"{name} is {everyone[0].get(name)} on rank 0, {theirs.get(name)} on rank {rank}"
                for name in names
                if everyone[0].get(name) != theirs.get(name)
            ]
            if differences:
                raise AgreedError(
                    f"the processes of this run do not agree: {'; '.join(differences)}: "
                    "give all of them the same flags, files and versions"
                )

    def seed(self, seed: int, step: int) -> None:
        """Begin a step's own random stream: a function of seed, step and rank, so that a resumed run
        draws the same numbers, and no generator's state has to be gathered and kept."""
        torch.manual_seed(((seed * 1_000_003 + step) * 65_536 + self.rank) % 2**63)

    def from_main(self, make: Callable):
        """What make() returns on rank 0, on every rank: for what only one machine's disk may hold."""
        values = [make() if self.is_main else None]
        if self.world_size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def hold(self, context: contextlib.AbstractContextManager) -> None:
        """Enter a context on rank 0, until the run ends."""
        self.from_main(lambda: self.held.enter_context(context))

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, _kind, error: BaseException | None, _trace) -> None:
        self.held.close()
        if dist.is_initialized():
            # The process group must not outlive its name in a DDP module: that one frees it without giving up
            # Python's lock, and waits for a thread of gloo which may want the lock for its last tensor. So
            # whatever still holds a module goes first: the frames of an exception, and cycles.
            while error:
                traceback.clear_frames(error.__traceback__)
                error = error.__context__
            gc.collect()
            dist.destroy_process_group()


def versions() -> dict[str, str]:
    """Of what computes: other versions may round differently."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokenizers": metadata.version("tokenizers"),
        "pillow": metadata.version("pillow"),
    }


def retain_freed_memory() -> None:
    """Let the C library keep freed blocks of up to 32 MB for the next step.

    By default it hands them back to the system, which clears them and maps them in again page by page: on a
    CPU a twentieth of a step. Elsewhere than on Linux with glibc this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its largest
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def allow_open_files(wanted: int = 4096) -> None:
    """Raise the soft limit of open files as far as the system lets a user: loader workers need many."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < limit:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def start_run(device: str = "auto", timeout: float = 600) -> Run:
    """Join the process group if torchrun started this process, and choose the device.

    device   "auto" (CUDA if there is any, else CPU), "cpu", "cuda", "cuda:1", "mps"
    timeout  seconds after which a rank that does not answer is given up
    raises   ValueError if the device is not available
    """
    retain_freed_memory()
    allow_open_files()
    # The loader's workers are forked after the tokenizer's first use.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    place = place_in_run()
    chosen = choose_device(device, place.local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if place.world_size > 1:
        # Tensors on the GPU travel by nccl; those on the CPU by gloo, without waiting for the GPU.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout)
        )
    run = Run(place.rank, place.world_size, chosen, place.local_world_size)
    if run.world_size == 1 and os.environ.get("WORLD_SIZE", "1") != "1":
        run.print(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but RANK is not set: this is a run of "
            "one process (torchrun sets both)"
        )
    return run
