"""Files that stay in use for hours, while somebody else may write to them.

A mapping of a file that is cut ends the process with SIGBUS, without a word and without a save. So these are
read piece by piece, and each time it is looked at whether they are what they were when they were opened. One
that is replaced by another of its name goes on being read as it was: the open file is the old one.
"""

import os
import threading
from pathlib import Path


class LostFile(OSError):
    """A file in use was changed, cut or damaged, or cannot be read any more. That is no bad sample: nothing
    that it gives from now on can be trusted, so no flag passes over it, and the run ends."""


class SteadyFile:
    """A file, open for reading, as a sequence of bytes: file[start:end].

    raises  OSError if it cannot be opened; later LostFile, with its name, if it was changed since
    """

    def __init__(self, path: str | Path):
        self.path, self.lock = Path(path), threading.Lock()
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115
        self.version = self.version_now()
        self.size = self.version[0]

    def version_now(self) -> tuple[int, int]:
        status = os.fstat(self.file.fileno())
        return status.st_size, status.st_mtime_ns

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> bytes:
        start, end, _ = part.indices(self.size)
        return self.read(start, max(0, end - start))

    def read(self, start: int, length: int) -> bytes:
        """The bytes from `start` on, all of them."""
        try:
            content = piece = self.read_piece(start, length)
            while piece and len(content) < length:  # more than 2 GB, which the system gives in parts
                piece = self.read_piece(start + len(content), length - len(content))
                content += piece
            is_same = self.version_now() == self.version  # asked last: a change meanwhile counts too
        except OSError as error:
            raise LostFile(f"{self.path} cannot be read any more: {error.strerror or error}") from None
        if not is_same or len(content) < length:
            raise changed(self.path)
        return content

    def read_piece(self, start: int, length: int) -> bytes:
        if hasattr(os, "pread"):  # processes that share the open file do not move each other's place in it
            return os.pread(self.file.fileno(), length, start)
        with self.lock:  # Windows, where no two processes share one
            self.file.seek(start)
            return self.file.read(length)


def changed(path: Path) -> LostFile:
    return LostFile(f"{path} was changed while it was in use: put it back as it was")
