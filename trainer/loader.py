"""Batches from the processes that load them, and what is told when one of those dies."""
import contextlib
import signal
from collections.abc import Iterator
from multiprocessing import connection

import torch
from torch.utils.data import DataLoader, Sampler

from model.dataset import VLMDataset, check_row, collate


def load_batches(dataset: VLMDataset, batches: Sampler, num_workers: int,
                 pin_memory: bool = False) -> Iterator[dict]:
    """Batches of the dataset in the sampler's order, loaded by num_workers processes (0 = this one).

    raises  ValueError if a worker dies, naming the sample that it held
    """
    dataset.held = torch.full((num_workers,), -1).share_memory_() if num_workers else None
    loader = iter(DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=collate,
                             pin_memory=pin_memory))
    if num_workers:
        # PyTorch's handler raises in the middle of whatever this process does, an optimizer step or a save
        # included. Without it a death is noticed here, within five seconds.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    while True:
        try:
            batch = next(loader)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:      # the last two: in the middle of a message
            raise tell_of_death(dataset, loader) or error from None
        yield batch


def tell_of_death(dataset: VLMDataset, loader: Iterator) -> ValueError | None:
    """The message about the first dead worker, if there is one."""
    workers = getattr(loader, "_workers", [])       # PyTorch has no public name for them
    connection.wait([process.sentinel for process in workers], timeout=1)       # it may be dying still
    for worker, process in enumerate(workers):
        if process.exitcode:
            position, cause = int(dataset.held[worker]), f"exit status {process.exitcode}"
            with contextlib.suppress(ValueError):
                cause = signal.Signals(-process.exitcode).name
            return ValueError(
                f"loader worker {worker} died ({cause}) while it held {describe_held(dataset, position)}; "
                "if memory ran out, fewer --num_workers need less "
                "(in a container, see also its limit and its /dev/shm)")
    return None


def describe_held(dataset: VLMDataset, position: int) -> str:
    if position < 0:
        return "no sample"
    pictures = ""
    with contextlib.suppress(ValueError):       # a bad row: its name must do
        pictures = ", ".join(check_row(dataset.rows[position], dataset.spec)[0])
    return f"{dataset.name(position)}{pictures and f' with {pictures}'}"
