"""Rows of a parquet file, read by a process of their own.

The library that reads these files crashes on damaged ones, and a page of a few kB may say that it unpacks to
gigabytes. So a process with a bound of its memory reads them and hands over line after line of JSON; whatever
becomes of it, the caller goes on.

Imports nothing heavy, for the process itself loads this file.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from model.bounds import bound_memory
from model.names import ROOT

# A file that unpacks to more than that many times its size was not written by people, but to fill a disk.
MOST_PACKED, SURELY_FITS = 200, 64 << 20
MAX_FOOTER, MAX_COLUMNS = 64 << 20, 1000  # bytes of a file's description, and columns there
BATCH, BATCH_BYTES = 4096, 512 << 20  # rows read at a time, fewer where all may hold the longest value
MAX_MEMORY = 4 << 30  # of the process, beyond what it has at its start
FAILED = b"!"  # what begins its last line, if it says what is wrong


class Bound:
    """How much a file may unpack to."""

    def __init__(self, path: Path):
        self.path, self.size, self.total = path, path.stat().st_size, 0

    def add(self, num_bytes: int) -> None:
        """Raise ValueError if that is too much."""
        self.total += num_bytes
        if self.total > max(SURELY_FITS, MOST_PACKED * self.size):
            raise ValueError(
                f"cannot read {self.path}: its {self.size:,} bytes unpack to more than {MOST_PACKED} times "
                "as many, which no rows of data do; look inside, and unpack it yourself if all is well"
            )


def read_parquet(path: Path) -> Iterator[bytes]:
    """Its rows, each as a line of JSON. Raises ValueError if it cannot be read, or unpacks to too much."""
    bound = Bound(path)
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, os.path.abspath(path)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        for line in process.stdout:
            if line.startswith(FAILED):
                raise ValueError(f"cannot read {path}: {line[1:].decode().strip()}")
            bound.add(len(line))
            yield line.removesuffix(b"\n")
        if process.wait():
            raise ValueError(f"cannot read {path}: it is damaged, or needs too much memory")
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


# ---- in the process ----------------------------------------------------------------------------------------


def main() -> None:
    path, output = Path(sys.argv[1]), sys.stdout.buffer
    try:
        import pyarrow.parquet

        pyarrow.set_cpu_count(1)
        bound_memory(MAX_MEMORY)
        with open(path, "rb") as file:
            write_rows(pyarrow.parquet, file, Bound(path), output)
    except BrokenPipeError:  # nobody wants more
        os._exit(1)
    except MemoryError:
        output.write(FAILED + b"its rows need too much memory\n")
    except Exception as error:  # the library raises any type
        reason = str(error).partition(f"cannot read {path}: ")[2] or str(error) or type(error).__name__
        output.write(FAILED + " ".join(reason.split())[:1000].encode(errors="replace") + b"\n")
    output.flush()
    os._exit(0)  # a library that has read damage need not clean up


def write_rows(library, file: IO[bytes], bound: Bound, output: IO[bytes]) -> None:
    check_footer(file)
    with library.ParquetFile(file, thrift_container_size_limit=1_000_000) as table:
        batch_size = batch_size_of(table.metadata, bound)
        for batch in table.iter_batches(batch_size=batch_size, use_threads=False):
            for row in batch.to_pylist():
                output.write(json.dumps(row, ensure_ascii=False, default=plain).encode() + b"\n")


def check_footer(file: IO[bytes]) -> None:
    """Raise ValueError for a description that would fill the memory, before it is read."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 8))
    size = int.from_bytes(file.read(4), "little")
    if size > MAX_FOOTER:
        raise ValueError(
            f"the description of its columns has {size:,} bytes: at most {MAX_FOOTER:,} are read"
        )
    file.seek(0)


def batch_size_of(metadata, bound: Bound) -> int:
    """How many rows may be read at a time: a value of a few kB in the file can stand in all of them. Raises
    ValueError."""
    if metadata.num_columns > MAX_COLUMNS:
        raise ValueError(f"it has {metadata.num_columns:,} columns: at most {MAX_COLUMNS:,} are read")
    longest = 1
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        size = sum(group.column(place).total_uncompressed_size for place in range(group.num_columns))
        bound.add(max(0, size))
        longest = max(longest, size)
    return max(1, min(BATCH, BATCH_BYTES // longest))


def plain(value: object) -> str:
    """What JSON has no form for: dates and the like as text; bytes are no text and no row needs them."""
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)


if __name__ == "__main__":
    main()
