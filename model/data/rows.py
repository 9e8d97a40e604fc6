"""Rows of a json, jsonl or parquet file that cost no memory: each is decoded when it is asked for.

A list of 595 k dicts takes gigabytes, and once more in every loader worker. Here the file itself is read, row
by row, and an index says where each begins and ends. A large file is indexed once, into a folder .NAME.index
beside it, or where that cannot be written, in the user's cache:

    KEY.spans.npy   (R, 3) int64: the first byte of each row, its end, and a digest of what stands there
    KEY.rows        the rows themselves as UTF-8 text, where the file is not (formats.py)
    KEY.images      the bytes of the images in a parquet file, one after another: rows are read in any order,
                    and parquet gives none of them without unpacking hundreds
    KEY.json        their number and the file's fingerprint; written last
    KEY.NAME.json   what remember() keeps
    lock            held while any of these is written

The key holds the file's size and time; at every start the fingerprint of its content is compared too, so the
index of another file is never used. Its files are sealed (sealed.py): a damaged one is made anew. And a row
is held against its digest whenever it is read, and so is an image: nothing is trained on that is not what was
indexed.

Letters: R rows.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from model.data.formats import PARQUET, form_of, rewrite
from model.data.schemas import Stored
from model.data.sealed import seal, unseal
from model.data.sources import image_digest
from model.data.spans import add_digests, digest_of, find_rows
from model.data.steady import LostFile, SteadyFile, changed
from model.files import atomic_write, check_data_file, fingerprint_file
from model.locks import locked

VERSION = 5  # of the index and of what is remembered in it; another one does not find what this one wrote
SMALL = 4 << 20  # bytes; a smaller file is indexed in milliseconds, at every start and in memory
PACKED = 16  # a file compressed by gzip holds about so many times its size
MAX_IN_MEMORY = 256 << 20  # bytes of images, where no index can be written


class Rows:
    """The rows of a data file, as a read-only sequence; any row that is JSON comes out, dict or not.

    rows[i]        decoded anew at every access; raises LostFile once the file is not what it was
    fingerprint    hex digits that are equal for equal files, wherever they lie and whenever they were written
    index_seconds  how long a large file took to index; 0 if its index was there
    images         the bytes of the images that were taken out of the file; None if it is read as it lies
    raises         FileNotFoundError or ValueError with the file, the line and the cure
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        check_data_file(self.path)
        started, self.form = time.perf_counter(), form_of(self.path)
        self.source = SteadyFile(self.path)
        self.key = "{}-{}".format(*self.source.version) + f"-v{VERSION}"
        self.folder: Path | None = None  # where the index lies; None = in memory alone
        self.images: SteadyFile | bytes | None = None
        self.index_seconds = 0.0
        if len(self.source) < (SMALL // PACKED if self.form.is_gzip else SMALL):
            self.build(None)
        elif not any(self.load(folder) for folder in index_folders(self.path)):
            self.load_or_build()
            self.index_seconds = time.perf_counter() - started
        if self.data is not self.source:
            self.source.file.close()  # there may be thousands of such files

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, position: int):
        start, end, digest = self.spans[position].tolist()
        row = self.data[start:end]
        if digest_of(row) != digest:
            raise self.damage()
        return json.loads(str(row, "utf-8"))

    def damage(self) -> LostFile:
        """Why a row is not what was indexed."""
        return changed(self.path) if self.data is self.source else damaged(self.data)

    def place(self, position: int) -> tuple["Rows", int]:
        """The rows of one file in which a row stands, and where there."""
        return self, position

    def name(self, position: int) -> str:
        """How a person finds a row."""
        return f"{self.path}, row {position + 1}"

    def read_stored(self, stored: Stored) -> bytes:
        """An image that was taken out of the file. Raises ValueError if this row only says so."""
        if self.images is None:
            raise ValueError("its bytes are not in this file")
        content = self.images[stored.offset : stored.offset + stored.length]
        if image_digest(content).hex() != stored.digest:
            raise damaged(self.images)
        return content

    def __reduce__(self):
        # Workers that are spawned, not forked, open the file and the index themselves.
        return reopen, (self.path, self.fingerprint, len(self))

    def remember(self, name: str, make: Callable[[], object]):
        """What make() returns (JSON), worked out once for this file as it is and kept with its index."""
        if self.folder is None:
            return make()
        path, owner = self.file(self.folder, f"{name}.json"), f"{self.fingerprint} {name}"
        with contextlib.suppress(OSError, ValueError):
            return json.loads(unseal(path.read_bytes(), owner))
        value = make()
        with contextlib.suppress(OSError), locked(self.folder):
            write(path, json.dumps(value).encode(), owner)
        return value

    def file(self, folder: Path, suffix: str) -> Path:
        return folder / f"{self.key}.{suffix}"

    def load(self, folder: Path) -> bool:
        """Use the index in this folder, if there is a whole one for the file as it is now."""
        try:
            facts = json.loads(unseal(self.file(folder, "json").read_bytes(), "facts"))
            content = unseal(self.file(folder, "spans.npy").read_bytes(), facts["fingerprint"])
            data = self.source
            if not self.form.is_plain:
                data = SteadyFile(self.file(folder, "rows"))
                if fingerprint_file(data.path) != facts["rows"]:
                    return False
            images = b""
            if facts["images"]:  # each is held against its digest when it is read
                images = SteadyFile(self.file(folder, "images"))
                if len(images) != facts["images"]:
                    return False
            if facts["fingerprint"] != fingerprint_file(self.path) or not self.is_in_place():
                return False
        except (OSError, ValueError, KeyError):
            return False
        self.data, self.spans = data, np.load(io.BytesIO(content))
        self.images = None if self.form.is_plain else images
        self.fingerprint, self.folder = facts["fingerprint"], folder
        return True

    def is_in_place(self) -> bool:
        """Is the file of this name the one that is open here, unchanged?"""
        status = os.fstat(self.source.file.fileno())
        return os.path.samestat(status, self.path.stat()) and self.source.version_now() == self.source.version

    def load_or_build(self) -> None:
        """Build the index in the first folder that has room for it, or in memory. Of several processes one
        builds, the others wait for it."""
        for folder in index_folders(self.path):
            try:
                with locked(folder):
                    if not self.load(folder):
                        self.build(folder)
                return
            except LostFile:
                raise
            except OSError:
                continue
        self.build(None)

    def build(self, folder: Path | None) -> None:
        """Find all rows, and check that each is valid JSON. Raises OSError for a folder without room for rows
        that have to be rewritten; an index that cannot be kept does no harm."""
        if folder:
            clear(folder, self.key)
        try:
            self.data, spans = (self.source, None) if self.form.is_plain else self.convert(folder)
            if spans is None:
                spans = find_rows(self.data, self.path)
            if not spans:
                raise ValueError(f"{self.path} holds no rows")
            self.spans = add_digests(self.data, spans)
            self.fingerprint = fingerprint_file(self.path)
        except MemoryError:
            raise ValueError(f"{self.path} holds rows that do not fit into memory") from None
        if not self.is_in_place():
            raise ValueError(f"{self.path} was changed while it was read")
        if folder and isinstance(self.data, SteadyFile):
            with contextlib.suppress(OSError):
                self.save(folder)

    def save(self, folder: Path) -> None:
        facts, table = {"num_rows": len(self), "fingerprint": self.fingerprint}, io.BytesIO()
        facts["images"] = len(self.images or b"")
        if self.data is not self.source:
            facts["rows"] = fingerprint_file(self.data.path)
        np.save(table, self.spans)
        write(self.file(folder, "spans.npy"), table.getvalue(), self.fingerprint)
        write(self.file(folder, "json"), json.dumps(facts).encode(), "facts")
        self.folder = folder

    def convert(self, folder: Path | None) -> tuple[SteadyFile | bytes, array | None]:
        """The rows of a file that is not plain as UTF-8 text, in the index or in memory; and their spans, if
        they are known already. So are its images."""
        if not folder:
            buffer, images = io.BytesIO(), InMemory(self.path)
            spans = rewrite(self.path, self.form, buffer, images)
            self.images = images.getvalue()
            return buffer.getvalue(), spans
        if self.form.kind == PARQUET and shutil.disk_usage(folder).free < self.path.stat().st_size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        target, images, found = self.file(folder, "rows"), self.file(folder, "images"), []
        atomic_write(
            images,
            lambda bytes_file: atomic_write(
                target, lambda file: found.append(rewrite(self.path, self.form, file, bytes_file))
            ),
        )
        self.images = SteadyFile(images) if images.stat().st_size else b""
        if not self.images:
            images.unlink()
        return SteadyFile(target), found[-1]


class InMemory(io.BytesIO):
    """Images of a file whose index no folder has room for."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def write(self, content: bytes) -> int:
        if self.tell() + len(content) > MAX_IN_MEMORY:
            raise ValueError(
                f"{self.path}: its images need a copy beside it or in the user's cache, and neither has room "
                "for that many bytes: make room, or let XDG_CACHE_HOME name a folder that has"
            )
        return super().write(content)


def damaged(file: SteadyFile) -> LostFile:
    return LostFile(f"{file.path} is damaged: remove it, and it is made anew")


def write(path: Path, content: bytes, owner: str) -> None:
    atomic_write(path, lambda file: file.write(seal(content, owner)))


def clear(folder: Path, key: str) -> None:
    """Remove what was written for the file as it was before, and what killed processes left. For whoever has
    the lock."""
    for old in (*folder.glob("*-v*.*"), *folder.glob(".*.tmp")):
        if not old.name.startswith(key):
            with contextlib.suppress(OSError):  # Windows removes no file that is in use
                old.unlink()


class Gone:
    """In a worker that opens the rows itself, and finds them no longer what they were when the run began."""

    def __init__(self, path: Path, num_rows: int):
        self.path, self.num_rows = path, num_rows

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, position: int):
        raise changed(self.path)


def reopen(path: Path, fingerprint: str, num_rows: int) -> Rows | Gone:
    with contextlib.suppress(OSError, ValueError):
        rows = Rows(path)
        if rows.fingerprint == fingerprint:
            return rows
    return Gone(path, num_rows)


def index_folders(path: Path) -> Iterator[Path]:
    """Where the index of a file may lie: beside it, or where that cannot be written, in the user's cache."""
    yield path.with_name(f".{path.name}.index")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if cache.is_absolute():
        place = hashlib.blake2b(os.fsencode(path.resolve()), digest_size=8).hexdigest()
        yield cache / "minimind-v" / f"{path.name}-{place}.index"
