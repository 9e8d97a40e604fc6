"""Rows of a json, jsonl or parquet file that cost no memory: each is decoded when it is asked for.

A list of 595 k dicts takes gigabytes, and once more in every loader worker. Here the file itself is
memory-mapped and an index says where each row begins and ends; all processes share both. A large file is
indexed once, into a folder .NAME.index beside it, or where that cannot be written, in the user's cache:

    KEY.spans.npy   (R, 2) int64: the first byte of each row, and its end
    KEY.rows        the rows themselves as UTF-8 text, where the file is not (formats.py)
    KEY.json        their number and the file's fingerprint; written last
    KEY.NAME.json   what remember() keeps
    lock            held while any of these is written

The key holds the file's size and time; at every start the fingerprint of its content is compared too, so the
index of another file is never used.
"""

import codecs
import contextlib
import hashlib
import io
import json
import mmap
import os
import re
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from model.data.formats import LINES, LIST, form_of, kind_of, rewrite
from model.files import atomic_write, check_data_file, fingerprint_file
from model.locks import locked

VERSION = 3  # of the index and of what is remembered in it; another one does not find what this one wrote
SMALL = 4 << 20  # bytes; a smaller file is indexed in milliseconds, at every start and in memory
PACKED = 16  # a file compressed by gzip holds about so many times its size
MAX_DEPTH = 200  # levels of a row; json.loads() gives up somewhere below 1000, sooner in a worker than here
WINDOW = 16 << 20  # bytes decoded at a time while looking for the rows of a JSON list
SPACE, SPACE_BYTES = re.compile(r"[ \t\r\n]*"), re.compile(rb"[ \t\r\n]*")
DECODER = json.JSONDecoder()


class Rows:
    """The rows of a data file, as a read-only sequence; any row that is JSON comes out, dict or not.

    rows[i]        decoded anew at every access
    fingerprint    hex digits that are equal for equal files, wherever they lie and whenever they were written
    index_seconds  how long a large file took to index; 0 if its index was there
    raises         FileNotFoundError or ValueError with the file, the line and the cure
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        check_data_file(self.path)
        status, started, self.form = self.path.stat(), time.perf_counter(), form_of(self.path)
        self.key = f"{status.st_size}-{status.st_mtime_ns}-v{VERSION}"
        self.folder: Path | None = None  # where the index lies; None = in memory alone
        self.index_seconds = 0.0
        if status.st_size < (SMALL // PACKED if self.form.is_gzip else SMALL):
            self.build(None)
        elif not any(self.load(folder) for folder in index_folders(self.path)):
            self.load_or_build()
            self.index_seconds = time.perf_counter() - started

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, position: int):
        start, end = self.spans[position].tolist()
        try:
            return json.loads(str(self.data[start:end], "utf-8"))
        except (ValueError, RecursionError):
            raise ValueError(f"{self.path} was changed while it was in use") from None

    def __reduce__(self):
        # Workers that are spawned, not forked, open the file and the index themselves.
        return reopen, (self.path, self.fingerprint)

    def remember(self, name: str, make: Callable[[], object]):
        """What make() returns (JSON), worked out once for this file as it is and kept with its index."""
        if self.folder is None:
            return make()
        path = self.file(self.folder, f"{name}.json")
        with contextlib.suppress(OSError, ValueError):
            return json.loads(path.read_text())
        value = make()
        with contextlib.suppress(OSError), locked(self.folder):
            atomic_write(path, lambda file: file.write(json.dumps(value).encode()))
        return value

    def file(self, folder: Path, suffix: str) -> Path:
        return folder / f"{self.key}.{suffix}"

    def load(self, folder: Path) -> bool:
        """Use the index in this folder, if there is a whole one for the file as it is now."""
        try:
            facts = json.loads(self.file(folder, "json").read_text())
            # A plain view: np.memmap's own indexing is several times slower.
            spans = np.load(self.file(folder, "spans.npy"), mmap_mode="r").view(np.ndarray)
            data = map_file(self.path if self.form.is_plain else self.file(folder, "rows"))
            whole = spans.shape == (facts["num_rows"], 2) and len(data) == facts["num_bytes"]
            whole = whole and facts["fingerprint"] == fingerprint_file(self.path)
        except (OSError, ValueError, KeyError, TypeError, EOFError):
            return False
        if whole:
            self.data, self.spans, self.fingerprint, self.folder = data, spans, facts["fingerprint"], folder
        return whole

    def load_or_build(self) -> None:
        """Build the index in the first folder that can be written, or in memory. Of several processes one
        builds, the others wait for it."""
        for folder in index_folders(self.path):
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(locked(folder))
                except OSError:
                    continue
                if not self.load(folder):
                    self.build(folder)
                return
        self.build(None)

    def build(self, folder: Path | None) -> None:
        """Find all rows, and check that each is valid JSON. A folder that cannot be written does no harm."""
        if folder:
            for old in folder.glob("*-v*.*"):
                if not old.name.startswith(self.key):
                    old.unlink(missing_ok=True)
        source, spans = (self.path, None) if self.form.is_plain else self.convert(folder)
        if spans is None:
            spans = find_rows(source, self.path)
        self.data = map_file(source)
        if not spans:
            raise ValueError(f"{self.path} holds no rows")
        self.fingerprint = fingerprint_file(self.path)
        status = self.path.stat()
        if self.key != f"{status.st_size}-{status.st_mtime_ns}-v{VERSION}":
            raise ValueError(f"{self.path} was changed while it was read")
        self.spans = np.frombuffer(spans, dtype=np.int64).reshape(-1, 2)
        if folder:
            with contextlib.suppress(OSError):
                self.save(folder)

    def save(self, folder: Path) -> None:
        facts = {"num_rows": len(self), "num_bytes": len(self.data), "fingerprint": self.fingerprint}
        atomic_write(self.file(folder, "spans.npy"), lambda file: np.save(file, self.spans))
        atomic_write(self.file(folder, "json"), lambda file: file.write(json.dumps(facts).encode()))
        self.load(folder)

    def convert(self, folder: Path | None) -> tuple[Path | bytes, array | None]:
        """The rows of a file that is not plain as UTF-8 text, in the index or in memory; and their spans, if
        they are known already."""
        found: list[array | None] = []
        if folder:
            with contextlib.suppress(OSError):
                target = self.file(folder, "rows")
                atomic_write(target, lambda file: found.append(rewrite(self.path, self.form, file)))
                return target, found[-1]
        buffer = io.BytesIO()
        spans = rewrite(self.path, self.form, buffer)
        return buffer.getvalue(), spans


def reopen(path: Path, fingerprint: str) -> Rows:
    rows = Rows(path)
    if rows.fingerprint != fingerprint:
        raise ValueError(f"{path} was changed while it was in use")
    return rows


def index_folders(path: Path) -> Iterator[Path]:
    """Where the index of a file may lie: beside it, or where that cannot be written, in the user's cache."""
    yield path.with_name(f".{path.name}.index")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if cache.is_absolute():
        place = hashlib.blake2b(os.fsencode(path.resolve()), digest_size=8).hexdigest()
        yield cache / "minimind-v" / f"{path.name}-{place}.index"


def map_file(source: Path | bytes) -> mmap.mmap | bytes:
    if isinstance(source, bytes):
        return source
    with open(source, "rb") as file:
        empty = os.fstat(file.fileno()).st_size == 0  # nothing cannot be mapped
        return b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def find_rows(source: Path | bytes, path: Path) -> array:
    """First byte and end of every row of a json or jsonl file, one after the other; path: its name in
    messages."""
    # A mapping of its own: the pages that are read here do not stay in this process.
    data = map_file(source)
    check_text(data, path)
    return line_spans(data, path) if kind_of(path) in LINES else list_spans(data, path)


def check_text(data: mmap.mmap | bytes, path: Path) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(data), WINDOW):
        try:
            decoder.decode(data[start : start + WINDOW], final=start + WINDOW >= len(data))
        except UnicodeDecodeError as error:
            # The object begins with what the window before left over of a character.
            position = start + error.start + len(data[start : start + WINDOW]) - len(error.object)
            line = data[:position].count(b"\n") + 1
            raise ValueError(
                f"{path} is not UTF-8 text: byte {position}, in line {line}: {error.reason}"
            ) from None


def line_spans(data: mmap.mmap | bytes, path: Path) -> array:
    """The rows of a jsonl file; blank lines are none."""
    spans, start = array("q"), first_byte(data)
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        line = data[start:end]
        if line.strip():
            try:
                text = str(line, "latin-1")
                check_depth(DECODER.decode(text), text, 0, len(text))
            except (ValueError, RecursionError) as error:
                raise not_json(path, data, start, 0, error) from None
            spans.extend((start, end))
        start = end + 1
    return spans


def list_spans(data: mmap.mmap | bytes, path: Path) -> array:
    """The elements of a JSON list, read through windows that keep the memory small however large the file."""
    base = SPACE_BYTES.match(data, first_byte(data)).end()
    if data[base : base + 1] != b"[":
        refuse_other(data, path)
    spans, base, size = array("q"), base + 1, WINDOW
    closing = SPACE_BYTES.match(data, base).end()
    at, error = closing + 1 - base, None
    while data[closing : closing + 1] != b"]":
        text = str(data[base : base + size], "latin-1")
        at, error = read_elements(text, base, spans)
        if not error:
            break
        # Otherwise it may be the window that ends too early.
        if isinstance(error, RecursionError) or base + len(text) == len(data):
            raise not_json(path, data, base, at, error)
        base, size = base + at, WINDOW if at else 2 * size
    end = SPACE_BYTES.match(data, base + at).end()
    if end < len(data):
        raise not_json(path, data, end, 0, ValueError("Extra data"))
    return spans


def read_elements(text: str, base: int, spans: array) -> tuple[int, Exception | None]:
    """Add the spans of a list's elements, up to the end of the list or the first element that is not whole.

    text     bytes of the file from `base` on, decoded as latin-1: each is one character, so that positions in
             the text are positions in the file
    returns  where the next element would begin, and what is wrong with it; None at the end of the list
    """
    at = 0
    while True:
        try:
            start = SPACE.match(text, at).end()
            row, end = DECODER.raw_decode(text, start)
            check_depth(row, text, start, end)
            stop = SPACE.match(text, end).end()
            if text[stop : stop + 1] not in (",", "]"):  # a number may go on behind the window
                raise json.JSONDecodeError("Expecting ',' delimiter", text, stop)
        except RecursionError as error:
            return start, error
        except ValueError as error:
            return at, error
        spans.extend((base + start, base + end))
        at = stop + 1
        if text[stop] == "]":
            return at, None


def check_depth(row: object, text: str, start: int, end: int) -> None:
    """Raise RecursionError, as the decoder does, for a row of more than MAX_DEPTH levels; text[start:end] is
    its JSON."""
    if text.count("{", start, end) + text.count("[", start, end) <= MAX_DEPTH:  # nearly always
        return
    depth, level = 0, [row]
    while level := [value for value in level if isinstance(value, dict | list)]:
        depth += 1
        level = [inner for value in level for inner in (value.values() if isinstance(value, dict) else value)]
    if depth > MAX_DEPTH:
        raise RecursionError


def first_byte(data: mmap.mmap | bytes) -> int:
    """Where the text begins: behind the mark that some Windows programs put in front."""
    return len(codecs.BOM_UTF8) if data[:3] == codecs.BOM_UTF8 else 0


def refuse_other(data: mmap.mmap | bytes, path: Path) -> None:
    """Raise the ValueError that fits a file which is no JSON list."""
    start = first_byte(data)
    try:
        value = DECODER.decode(str(data[start:], "latin-1"))
    except (ValueError, RecursionError) as error:
        raise not_json(path, data, start, 0, error) from None
    raise ValueError(
        f"{path} must hold a list of rows, not one {type(value).__name__}; one row per line is .jsonl"
    )


def not_json(path: Path, data: mmap.mmap | bytes, base: int, at: int, error: Exception) -> ValueError:
    """One line about an error at byte base + at, or where the error itself says, counted from base."""
    position = base + getattr(error, "pos", at)
    line_start = data.rfind(b"\n", 0, position) + 1
    line = data[:position].count(b"\n") + 1
    column = len(str(data[line_start:position], "utf-8-sig", "replace")) + 1
    reason, hint, kind = getattr(error, "msg", str(error)), "", kind_of(path)
    if isinstance(error, RecursionError):
        reason = f"nested too deeply, more than {MAX_DEPTH} levels"
    elif reason == "Extra data" and kind not in LINES:
        hint = "; one object per line is .jsonl"
    elif kind not in (LIST, *LINES):
        hint = "; rows are read from .json, .jsonl and .parquet files"
    return ValueError(f"{path} is not valid JSON: line {line} column {column}: {reason}{hint}")
