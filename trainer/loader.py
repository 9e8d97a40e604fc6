"""Batches from the processes that load them, and an explanation when one of those dies."""

import contextlib
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, get_worker_info

from model.data.batch import collate
from model.data.sources import is_embedded
from trainer.interrupt import ignore_interrupts

FILES_PER_WORKER = 32  # descriptors: pipes, and one for each tensor of the batches under way


def fitting_workers(
    num_workers: int, batch_bytes: int, shared_memory: Path = Path("/dev/shm")
) -> tuple[int, str]:
    """As many workers as the system has room for, at most num_workers; and in words why they are fewer.

    batch_bytes    of one batch as a worker hands it over, in shared memory; three are under way at a time
    shared_memory  where that lies, if it has a size of its own: containers often give it 64 MB
    """
    fitting, reason = num_workers, ""
    with contextlib.suppress(OSError):  # elsewhere than on Linux there is no such place
        free = shutil.disk_usage(shared_memory).free
        fitting = min(num_workers, int(0.9 * free) // max(1, 3 * batch_bytes))
        reason = f"{shared_memory} has {free / 1e6:,.0f} MB free (docker run --shm-size, or --ipc=host)"
    with contextlib.suppress(ImportError):  # Windows
        import resource

        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if files != resource.RLIM_INFINITY and (files - 64) // FILES_PER_WORKER < fitting:
            fitting = max(0, (files - 64) // FILES_PER_WORKER)
            reason = f"this process may open {files} files only (ulimit -n)"
    if fitting >= num_workers:
        return num_workers, ""
    return fitting, f"{fitting} loader workers instead of {num_workers}: {reason}"


class WorkerDied(ValueError):
    """A process that loads samples is gone, or has no memory; the message says what it held, or what
    helps."""


class Watched(Dataset):
    """A data set whose workers leave word of the sample they work on, for whoever finds one dead."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self.held: Tensor | None = None  # one int64 per worker, in shared memory: its sample, or -1

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int):
        self.hold(position)
        try:
            return self.dataset[position]
        finally:
            self.hold(-1)

    def hold(self, position: int) -> None:
        worker = get_worker_info()
        if worker:
            self.held[worker.id] = position

    def describe(self, worker: int) -> str:
        """The sample that a worker held, by name."""
        position, data = int(self.held[worker]), self.dataset
        if position < 0:
            return "no sample"
        if isinstance(data, Subset):
            position, data = int(data.indices[position]), data.dataset
        images = ""
        with contextlib.suppress(ValueError, OSError):  # a bad row, or none any more: its name must do
            names, _ = data.check(data.rows[position])
            images = ", ".join("an image in the row" if is_embedded(name) else name for name in names)
        return f"{data.name(position)}{images and f' with {images}'}"


class Loader:
    """Batches of a VLMDataset or a Subset of one, loaded by num_workers processes (0 = this one).

    batches     lists of positions
    make_batch  from samples to a batch
    raises      WorkerDied
    """

    def __init__(
        self,
        dataset: Dataset,
        batches: Iterable,
        num_workers: int,
        pin_memory: bool = False,
        make_batch: Callable[[list], dict] = collate,
    ):
        self.watched = Watched(dataset)
        self.loader = DataLoader(
            self.watched,
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=make_batch,
            pin_memory=pin_memory,
            worker_init_fn=ignore_interrupts,
        )

    def __iter__(self) -> Iterator[dict]:
        # The workers, which start here, write into it; one tensor for each round of workers.
        self.watched.held = torch.full((self.loader.num_workers,), -1).share_memory_()
        batches = iter(self.loader)
        if self.loader.num_workers and hasattr(signal, "SIGCHLD"):  # Windows has none
            # PyTorch's handler raises in the middle of whatever this process does, an optimizer step or a
            # save included. Without it a death is noticed here, within five seconds.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, MemoryError, OSError, EOFError) as error:  # the last two: within a message
                raise explain_death(self.watched, batches) or explain_memory(error) or error from None
            yield batch


def to_device(batch: dict, device: torch.device) -> dict:
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def prefetch(batches: Iterable[dict], device: torch.device) -> Iterator[dict]:
    """The batches on the device. To a GPU each is copied on a stream of its own while the one before it is
    computed with."""
    if device.type != "cuda":
        yield from (to_device(batch, device) for batch in batches)
        return
    stream, ahead = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(stream):
            copied = to_device(batch, device), stream.record_event()
        if ahead:
            yield arrived(*ahead)
        ahead = copied
    if ahead:
        yield arrived(*ahead)


def arrived(batch: dict, event) -> dict:
    """The batch, for work that is queued from now on; that work waits for the copy, the host does not."""
    current = torch.cuda.current_stream()
    current.wait_event(event)
    for value in batch.values():
        if isinstance(value, Tensor):
            value.record_stream(current)  # or its memory could be given away when the batch is dropped
    return batch


def explain_death(watched: Watched, batches: Iterator) -> WorkerDied | None:
    """The message about the first dead worker, if there is one."""
    workers = getattr(batches, "_workers", [])  # PyTorch has no public name for them
    connection.wait([process.sentinel for process in workers], timeout=1)  # it may be dying still
    for worker, process in enumerate(workers):
        if process.exitcode:
            cause = f"exit status {process.exitcode}"
            with contextlib.suppress(ValueError):
                cause = signal.Signals(-process.exitcode).name
            return WorkerDied(
                f"loader worker {worker} died ({cause}) while it held {watched.describe(worker)}; "
                "if memory ran out, fewer --num_workers need less "
                "(in a container, see also its limit and its /dev/shm)"
            )
    return None


def explain_memory(error: Exception) -> WorkerDied | None:
    """The message about a batch that did not fit into memory, if that is what the error says."""
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return WorkerDied("there is no memory left to load a batch: lower --num_workers or --batch_size")
    return None
