"""Where the rows of a json or jsonl file begin and end, found without holding the file in memory.

Letters: R rows.
"""

import codecs
import hashlib
import json
import re
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from model.data.formats import LINES, LIST, kind_of
from model.data.steady import SteadyFile

MAX_DEPTH = 200  # levels of a row; json.loads() gives up somewhere below 1000, sooner in a worker than here
MAX_ROW = 256 << 20  # bytes; images may stand in a row, but one without end would fill the memory
WINDOW = 16 << 20  # bytes decoded at a time
SPACE, SPACE_BYTES = re.compile(r"[ \t\r\n]*"), re.compile(rb"[ \t\r\n]*")
DECODER = json.JSONDecoder()
CONTINUATION = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that begin no character


def find_rows(data: SteadyFile | bytes, path: Path) -> array:
    """First byte and end of every row of a json or jsonl file, one after the other; path: its name in
    messages. Raises ValueError with the file, the line and the cure."""
    check_text(data, path)
    return line_spans(data, path) if kind_of(path) in LINES else list_spans(data, path)


def add_digests(data: SteadyFile | bytes, spans: array) -> np.ndarray:
    """(R, 3) int64: of each row its first byte, its end, and the digest of what stands between them."""
    table = np.empty((len(spans) // 2, 3), np.int64)
    table[:, :2] = np.frombuffer(spans, np.int64).reshape(-1, 2)
    base, window = 0, memoryview(b"")
    for row, (start, end) in enumerate(table[:, :2].tolist()):
        if end > base + len(window):
            base, window = start, memoryview(data[start : max(end, start + WINDOW)])
        table[row, 2] = digest_of(window[start - base : end - base])
    return table


def digest_of(row: bytes | memoryview) -> int:
    """64 bits, by which a row that was changed is known."""
    return int.from_bytes(hashlib.sha256(row).digest()[:8], "little", signed=True)


def check_text(data: SteadyFile | bytes, path: Path) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(data), WINDOW):
        block = data[start : start + WINDOW]
        try:
            decoder.decode(block, final=start + WINDOW >= len(data))
        except UnicodeDecodeError as error:
            # The object begins with what the window before left over of a character.
            position = start + error.start + len(block) - len(error.object)
            line, _ = place_of(data, position)
            raise ValueError(
                f"{path} is not UTF-8 text: byte {position}, in line {line}: {error.reason}"
            ) from None


# ---- one row per line --------------------------------------------------------------------------------------


def line_spans(data: SteadyFile | bytes, path: Path) -> array:
    """The rows of a jsonl file; blank lines are none."""
    spans = array("q")
    for start, line in read_lines(data, path):
        if line.strip():
            try:
                text = str(line, "latin-1")
                check_depth(DECODER.decode(text), text, 0, len(text))
            except (ValueError, RecursionError) as error:
                raise not_json(path, data, start, 0, error) from None
            spans.extend((start, start + len(line)))
    return spans


def read_lines(data: SteadyFile | bytes, path: Path) -> Iterator[tuple[int, bytes]]:
    """(first byte, bytes without the end) of every line."""
    start, size = first_byte(data), WINDOW
    while start < len(data):
        block = data[start : start + size]
        end = len(block) if start + len(block) == len(data) else block.rfind(b"\n") + 1
        if not end:  # no line ends in this window
            size = grow(size, path, data, start)
            continue
        at = start
        for line in block[:end].split(b"\n"):
            yield at, line
            at += len(line) + 1
        start, size = start + end, WINDOW


def grow(size: int, path: Path, data: SteadyFile | bytes, start: int) -> int:
    """The size of a larger window, for a row that does not fit. Raises ValueError if it is without end."""
    if size >= MAX_ROW:
        line, column = place_of(data, start)
        raise ValueError(
            f"{path}: the row that begins in line {line} column {column} has more than {MAX_ROW:,} bytes"
        )
    return 2 * size


# ---- a list ------------------------------------------------------------------------------------------------


def list_spans(data: SteadyFile | bytes, path: Path) -> array:
    """The elements of a JSON list, read through windows that keep the memory small however large the file."""
    base = skip_space(data, first_byte(data))
    if data[base : base + 1] != b"[":
        refuse_other(data, path)
    spans, base, size = array("q"), base + 1, WINDOW
    closing = skip_space(data, base)
    at, error = closing + 1 - base, None
    while data[closing : closing + 1] != b"]":
        text = str(data[base : base + size], "latin-1")
        at, error = read_elements(text, base, spans)
        if not error:
            break
        # Otherwise it may be the window that ends too early.
        if isinstance(error, RecursionError) or base + len(text) == len(data):
            raise not_json(path, data, base, at, error)
        base, size = base + at, WINDOW if at else grow(size, path, data, base)
    end = skip_space(data, base + at)
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


def first_byte(data: SteadyFile | bytes) -> int:
    """Where the text begins: behind the mark that some Windows programs put in front."""
    return len(codecs.BOM_UTF8) if data[:3] == codecs.BOM_UTF8 else 0


def skip_space(data: SteadyFile | bytes, at: int) -> int:
    """The first byte from `at` on that is no space; the end of the file if there is none."""
    while block := data[at : at + WINDOW // 1024 + 1]:
        length = SPACE_BYTES.match(block).end()
        at += length
        if length < len(block):
            break
    return at


# ---- what is wrong with a file -----------------------------------------------------------------------------


def refuse_other(data: SteadyFile | bytes, path: Path) -> None:
    """Raise the ValueError that fits a file which is no JSON list."""
    start = first_byte(data)
    if len(data) <= MAX_ROW:
        try:
            value = DECODER.decode(str(data[start:], "latin-1"))
        except (ValueError, RecursionError) as error:
            raise not_json(path, data, start, 0, error) from None
        found = f"one {type(value).__name__}"
    else:
        found = "something else"
    raise ValueError(f"{path} must hold a list of rows, not {found}; one row per line is .jsonl")


def not_json(path: Path, data: SteadyFile | bytes, base: int, at: int, error: Exception) -> ValueError:
    """One line about an error at byte base + at, or where the error itself says, counted from base."""
    line, column = place_of(data, base + getattr(error, "pos", at))
    reason, hint, kind = getattr(error, "msg", str(error)), "", kind_of(path)
    if isinstance(error, RecursionError):
        reason = f"nested too deeply, more than {MAX_DEPTH} levels"
    elif reason == "Extra data" and kind not in LINES:
        hint = "; one object per line is .jsonl"
    elif kind not in (LIST, *LINES):
        hint = "; rows are read from .json, .jsonl and .parquet files"
    return ValueError(f"{path} is not valid JSON: line {line} column {column}: {reason}{hint}")


def place_of(data: SteadyFile | bytes, position: int) -> tuple[int, int]:
    """Line and column of a byte, as editors count them."""
    line, column = 1, 1
    for start in range(first_byte(data), position, WINDOW):
        block = data[start : min(start + WINDOW, position)]
        before, line_end, last = block.rpartition(b"\n")
        if line_end:
            line, column = line + 1 + before.count(b"\n"), 1
        column += len(last.translate(None, CONTINUATION))
    return line, column
