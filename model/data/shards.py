"""The rows of a data set that lies in several files, one after another, as if they were one."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from model.data.formats import data_files
from model.data.rows import Rows
from model.fingerprint import fingerprint

FILES_PER_PART, OTHER_FILES = 2, 1024  # that a process holds open: of the rows of one file, and else


class Shards:
    """Stands where Rows may stand, and does what Rows does, over the files that a folder or a pattern names.

    path         that folder or pattern
    fingerprint  of the files in their order, wherever they lie and whatever they are called
    """

    def __init__(self, path: str | Path, files: Sequence[Path]):
        allow_open_files(OTHER_FILES + FILES_PER_PART * len(files))
        self.path, self.parts = Path(path), [Rows(file) for file in files]
        self.ends = np.cumsum([len(part) for part in self.parts])
        self.fingerprint = fingerprint(*(part.fingerprint for part in self.parts))
        self.index_seconds = sum(part.index_seconds for part in self.parts)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, position: int):
        part, position = self.place(position)
        return part[position]

    def place(self, position: int) -> tuple[Rows, int]:
        """The rows of one file in which a row stands, and where there."""
        position = range(len(self))[position]  # from the end, too; IndexError beyond it
        number = int(np.searchsorted(self.ends, position, side="right"))
        part = self.parts[number]
        return part, position - int(self.ends[number]) + len(part)

    def name(self, position: int) -> str:
        """How a person finds a row: in its file."""
        part, position = self.place(position)
        return part.name(position)

    def remember(self, name: str, make: Callable[[], object]):
        """What make() returns (JSON), kept with the index of the first file for just these files."""
        return self.parts[0].remember(f"{name}-{self.fingerprint}", make)


def allow_open_files(number: int) -> None:
    """Have the system let this process and those that it starts open so many files, if it may."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY and soft < number:
            most = number if hard == resource.RLIM_INFINITY else min(number, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def open_rows(path: str | Path) -> Rows | Shards:
    """The rows of a file, of all data files in a folder, or of those that a pattern matches. Raises
    FileNotFoundError or ValueError, naming the file and the cure."""
    files = data_files(path)
    return Rows(files[0]) if files == [Path(path)] else Shards(path, files)
