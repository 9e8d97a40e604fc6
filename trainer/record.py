"""A file of JSON lines that grows while a run trains; a resumed run goes on where its save stands."""

import contextlib
import json
import os
from pathlib import Path
from typing import TextIO

from trainer.distributed import Run


class Record:
    """Writes on rank 0 only; other ranks may call everything too. Whatever fails here costs the record, never
    the run."""

    def __init__(self, path: Path, run: Run, length: int = 0):
        """length: what sync() said at the save that the run resumes from; what was written after it is
        dropped, since those steps come again."""
        self.path, self.run, self.length = path, run, length
        self.file: TextIO | None = None

    def write(self, values: dict) -> None:
        """Add a line about a step."""
        if not self.run.is_main:
            return
        try:
            if self.file and os.fstat(self.file.fileno()).st_nlink == 0:
                self.run.print(f"{self.path} was removed: the record begins anew at step {values['step']}")
                self.file, self.length = None, 0
            self.file = self.file or self.open()
            self.file.write(json.dumps(values, ensure_ascii=False) + "\n")
            self.length = os.fstat(self.file.fileno()).st_size
        except OSError as error:
            self.run.print(f"cannot write {self.path}: {error.strerror}")

    def open(self) -> TextIO:
        """Opened by the first line only: a run that fails before it leaves that of an earlier run alone."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found = self.path.stat().st_size if self.path.is_file() else 0
        if not self.length:
            self.path.unlink(missing_ok=True)  # an earlier run's, which may be kept under another name
        elif found < self.length:
            self.run.print(f"{self.path} lacks steps that were recorded before: it was cut or removed")
        # Line-buffered, so every step is on disk at once.
        file = open(self.path, "a", encoding="utf-8", errors="backslashreplace", buffering=1)  # noqa: SIM115
        file.truncate(min(self.length, found))
        return file

    def sync(self) -> int:
        """The length of what is recorded, all of it on disk."""
        if self.file:
            with contextlib.suppress(OSError):
                os.fsync(self.file.fileno())
        return self.length

    def close(self) -> bool:
        """Was there anything to close?"""
        if not self.file:
            return False
        self.file.close()
        return True
