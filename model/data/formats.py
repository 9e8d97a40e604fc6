"""What a data file is, and its rows as UTF-8 text where it is anything else.

A json or jsonl file in UTF-8 is read as it lies. One that is compressed by gzip, in UTF-16 or UTF-32 (as
Windows likes to write it), or a parquet file is rewritten, once: see Rows.
"""

import codecs
import contextlib
import glob
import gzip
import json
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from model.data.parquet import Bound, read_parquet
from model.files import check_data_file, describe_placeholder_file

LINES, LIST, PARQUET = (".jsonl", ".ndjson"), ".json", ".parquet"
BLOCK = 1 << 20  # bytes rewritten at a time
GZIP = b"\x1f\x8b"
OTHERS = {
    b"PK\x03\x04": "a zip archive",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
}


def data_files(path: str | Path) -> list[Path]:
    """The files that --data_path means: one; those of a folder; or those that a pattern matches; in the order
    of their names. Raises FileNotFoundError or ValueError with the cure."""
    path = Path(path)
    if path.is_dir():
        return files_of_folder(path)
    if path.exists() or not glob.has_magic(str(path)):
        check_data_file(path)
        return [path]
    found = sorted(
        file
        for file in map(Path, glob.glob(str(path), recursive=True))
        if file.is_file() and not file.name.startswith(".")
    )
    if not found:
        raise FileNotFoundError(f"no file matches {path} (name your data with --data_path)")
    return found


def files_of_folder(folder: Path) -> list[Path]:
    """Its data files, which must be of one kind: a .json file beside .parquet files is likely about them."""
    kinds = {LIST: LIST, PARQUET: PARQUET, **dict.fromkeys(LINES, LINES[0])}
    files = {kind: [] for kind in kinds.values()}
    for file in sorted(folder.iterdir()):
        if (kind := kinds.get(kind_of(file))) and file.is_file() and not file.name.startswith("."):
            files[kind].append(file)
    found = [kind for kind in files if files[kind]]
    if not found:
        raise FileNotFoundError(f"{folder} holds no .json, .jsonl or .parquet file")
    if len(found) > 1:
        raise ValueError(
            f"{folder} holds both {' and '.join(found)} files: name those that are meant, as in "
            f'--data_path "{folder / "*"}{found[-1]}"'
        )
    return files[found[0]]


@dataclass(frozen=True)
class Form:
    """How the rows stand in a file."""

    kind: str  # the ending that would say so: one of LINES, LIST or PARQUET
    is_gzip: bool = False
    encoding: str = "utf-8"

    @property
    def is_plain(self) -> bool:
        """Can the file be read as it lies?"""
        return self.kind != PARQUET and not self.is_gzip and self.encoding.startswith("utf-8")


def form_of(path: Path) -> Form:
    """What its first bytes say, and where those cannot, its name. Raises ValueError for what is not read."""
    if (what := describe_placeholder_file(path)) and what != "is empty":
        raise ValueError(f"{path} {what}")
    with open(path, "rb") as file:
        head = file.read(8)
    for start, name in OTHERS.items():
        if head.startswith(start):
            raise ValueError(
                f"{path} is {name}: unpack it, and name the .json, .jsonl or .parquet file inside"
            )
    is_gzip = head.startswith(GZIP)
    if is_gzip:
        with unpacking(path), gzip.open(path) as file:
            head = file.read(8)
    kind = PARQUET if head.startswith(b"PAR1") else kind_of(path)
    if is_gzip and kind == PARQUET:
        raise ValueError(f"{path}: a parquet file is compressed inside; unpack this one with gunzip")
    return Form(kind, is_gzip, json.detect_encoding(head))


def kind_of(path: Path) -> str:
    """The ending of a name, in small letters; that of rows.jsonl.gz is .jsonl."""
    endings = [suffix for suffix in path.suffixes if suffix.lower() != ".gz"]
    return endings[-1].lower() if endings else ""


def rewrite(path: Path, form: Form, file: IO[bytes], images: IO[bytes]) -> array | None:
    """Write the rows of a file that is not plain as UTF-8 text; of a parquet file, write the images in it
    apart, and return the spans of the rows (as Rows keeps them). Raises ValueError, naming the file, if it
    cannot be read."""
    if form.kind == PARQUET:
        return write_parquet_rows(path, file, images)
    decoder, bound = codecs.getincrementaldecoder(form.encoding)(), Bound(path)
    with unpacking(path), (gzip.open if form.is_gzip else open)(path, "rb") as source:
        while block := source.read(BLOCK):
            bound.add(len(block))
            file.write(block if form.encoding.startswith("utf-8") else decoder.decode(block).encode())
        file.write(decoder.decode(b"", final=True).encode())
    return None


@contextlib.contextmanager
def unpacking(path: Path) -> Iterator[None]:
    """Around whatever reads a file that may be damaged: what goes wrong becomes a ValueError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not {error.encoding.upper()} text: {error.reason}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"cannot unpack {path}: {error}; was it copied as a whole?") from None


def write_parquet_rows(path: Path, file: IO[bytes], images: IO[bytes]) -> array:
    """Write the rows of a parquet file as jsonl; returns their spans."""
    spans, end = array("q"), 0
    for line in read_parquet(path, images):
        file.write(line + b"\n")
        spans.extend((end, end + len(line)))
        end += len(line) + 1
    return spans
