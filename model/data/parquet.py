"""Rows of a parquet file, read by a process of their own.

The library that reads these files crashes on damaged ones, and a page of a few kB may say that it unpacks to
gigabytes. So a process with a bound of its memory reads them and hands over line after line of JSON, before a
line the bytes of the images in it; whatever becomes of it, the caller goes on.

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
from model.data.schemas import IMAGE_COLUMNS, STORED, TURN_COLUMNS
from model.data.sources import image_digest
from model.names import ROOT

# A file that unpacks to more than that many times its size was not written by people, but to fill a disk.
MOST_PACKED, SURELY_FITS = 200, 64 << 20
MAX_FOOTER, MAX_COLUMNS = 64 << 20, 1000  # bytes of a file's description, and columns there
BATCH, BATCH_BYTES = 4096, 512 << 20  # rows read at a time, fewer where all may hold the longest value
MAX_MEMORY = 4 << 30  # of the process, beyond what it has at its start
FAILED = b"!"  # what begins its last line, if it says what is wrong
BYTES = b"#"  # what begins a line that tells how many bytes follow it
BLOCK = 1 << 20  # of these, at a time
KEPT = (*IMAGE_COLUMNS, *TURN_COLUMNS)  # columns whose bytes are images


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


def read_parquet(path: Path, images: IO[bytes]) -> Iterator[bytes]:
    """Its rows, each as a line of JSON. Raises ValueError if it cannot be read, or unpacks to too much.

    images  where the bytes of images go, one after another; a row has {STORED: [offset, length, digest]}
            in their place
    """
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
            if line.startswith(BYTES):
                copy(process.stdout, images, int(line[1:]), bound)
                continue
            bound.add(len(line))
            yield line.removesuffix(b"\n")
        if process.wait():
            raise ValueError(f"cannot read {path}: it is damaged, or needs too much memory")
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


def copy(source: IO[bytes], target: IO[bytes], length: int, bound: Bound) -> None:
    """So many bytes, or all that there are."""
    while length and (block := source.read(min(length, BLOCK))):
        bound.add(len(block))
        target.write(block)
        length -= len(block)


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
    with library.ParquetFile(
        file, thrift_container_size_limit=1_000_000, pre_buffer=False, buffer_size=BLOCK
    ) as table:  # a group of rows may be as large as the file: it is read page by page
        batch_size, images = batch_size_of(table.metadata, bound), Images(output)
        for batch in table.iter_batches(batch_size=batch_size, use_threads=False):
            for row in batch.to_pylist():
                row |= {name: images.take_out(row[name]) for name in KEPT if name in row}
                output.write(json.dumps(row, ensure_ascii=False, default=plain).encode() + b"\n")


class Images:
    """Takes bytes out of rows, and writes them in front of these."""

    def __init__(self, output: IO[bytes]):
        self.output, self.end = output, 0

    def take_out(self, value: object) -> object:
        """The value with {STORED: ...} in the place of bytes."""
        if isinstance(value, list):
            return [self.take_out(one) for one in value]
        if isinstance(value, dict):  # the file's own columns cannot pass for a place
            return {name: self.take_out(one) for name, one in value.items() if name != STORED}
        if not isinstance(value, bytes):
            return value
        self.output.write(BYTES + b"%d\n" % len(value) + value)
        self.end += len(value)
        return {STORED: [self.end - len(value), len(value), image_digest(value).hex()]}


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
    """What JSON has no form for: dates and the like as text; bytes in other columns no row needs."""
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)


if __name__ == "__main__":
    main()
