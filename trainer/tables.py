"""Tables of a gigabyte, of which most is images as base64 text: read row by row, each where it begins.

Tab-separated as pandas writes them: a header, and quotes around cells that hold tabs, quotes or line ends.
"""

import base64
import contextlib
import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from model.data.sources import MAX_EMBEDDED, Embedded
from model.data.steady import SteadyFile

QUOTED = re.compile(r"""['"]([^'"]+)['"]""")  # of a Python list of texts


class Table:
    """The rows of a .tsv file as {column: text}; table[i] is read anew at every access."""

    def __init__(self, path: Path):
        """Raises ValueError for a file that is empty."""
        self.path, self.file = path, SteadyFile(path)
        self.spans: list[tuple[int, int]] = []  # first byte and end of each row that scan() came by
        self.columns = next((fields for _, _, fields in read_records(path, "\t")), [])
        if not self.columns:
            raise ValueError(f"{path} is empty")

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, position: int) -> dict[str, str]:
        text = str(self.file[slice(*self.spans[position])], "utf-8")
        with long_cells():
            fields = next(csv.reader(io.StringIO(text, newline="\n"), delimiter="\t"))
        return self.name_cells(fields, position)

    def scan(self) -> Iterator[dict[str, str]]:
        """All rows in one pass, noting where each begins. Holds one at a time."""
        self.spans = []
        records = read_records(self.path, "\t")
        next(records)  # the header
        for start, end, fields in records:
            if fields:  # a blank line is no row
                self.spans.append((start, end))
                yield self.name_cells(fields, len(self.spans) - 1)

    def name_cells(self, fields: list[str], position: int) -> dict[str, str]:
        if len(fields) != len(self.columns):
            raise ValueError(
                f"{self.path}, row {position + 1}: it has {len(fields)} cells under "
                f"{len(self.columns)} columns; was the file copied as a whole?"
            )
        return dict(zip(self.columns, fields, strict=True))


def read_records(path: Path, delimiter: str, errors: str = "strict") -> Iterator[tuple[int, int, list[str]]]:
    """First byte, end and cells of every record of a table, one at a time. Raises ValueError, naming the
    file; errors: what becomes of bytes that are not UTF-8."""
    end = 0

    def lines() -> Iterator[str]:
        nonlocal end
        with open(path, "rb") as file:
            for line in file:
                end += len(line)
                yield str(line, "utf-8-sig" if end == len(line) else "utf-8", errors)

    start, reader = 0, csv.reader(lines(), delimiter=delimiter)
    while True:
        try:
            with long_cells():
                fields = next(reader, None)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text behind byte {start}: {error.reason}") from None
        except csv.Error as error:
            raise ValueError(f"{path}: cannot read the row behind byte {start}: {error}") from None
        if fields is None:
            return
        yield start, end, fields
        start = end


@contextlib.contextmanager
def long_cells() -> Iterator[None]:
    """Let the csv module, which has one limit for the whole process, read cells as long as images are."""
    before = csv.field_size_limit(MAX_EMBEDDED)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def split_images(cell: str) -> list[str]:
    """The images in a cell: one, or several as a Python list of texts."""
    cell = cell.strip()
    return QUOTED.findall(cell) if cell.startswith("[") else [cell] if cell else []


@dataclass(frozen=True)
class TableImage(Embedded):
    """An image in a cell of a Table, `number` of those there, decoded when it is asked for."""

    column: str = "image"

    def read(self) -> bytes:
        text = split_images(self.rows[self.position][self.column])[self.number]
        return base64.b64decode("".join(text.split()), validate=True)
