"""The check sum at the end of a file, so that a damaged one is never used in silence.

A sealed file ends with MARK and 64 hex digits: the SHA-256 of everything before them. What torch.save writes
is a zip archive; the seal is its comment, which other programs pass over. By hand:

    head -c -64 out/512_vlm_sft.pth | sha256sum; tail -c 64 out/512_vlm_sft.pth
"""

import hashlib
import os
import zipfile
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import IO

MARK, NUM_DIGITS = b"minimind-v sha256 ", 64
BLOCK = 1 << 20  # bytes read at a time


def seal_archive(file: IO[bytes], members: Mapping[str, bytes] | None = None) -> None:
    """Put members into the top folder of an open zip archive, and the seal at its end. 0.1 s per 100 MB."""
    with zipfile.ZipFile(file, "a") as archive:
        folder = archive.namelist()[0].split("/")[0]
        for name, content in (members or {}).items():
            archive.writestr(f"{folder}/{name}", content)
        archive.comment = MARK + b"0" * NUM_DIGITS
    digest = digest_of(file)
    file.seek(-NUM_DIGITS, os.SEEK_END)
    file.write(digest)


def digest_of(file: IO[bytes]) -> bytes:
    """The digits that belong to an open file."""
    left, digest = file.seek(0, os.SEEK_END) - NUM_DIGITS, hashlib.sha256()
    file.seek(0)
    while left > 0 and (block := file.read(min(BLOCK, left))):
        digest.update(block)
        left -= len(block)
    return digest.hexdigest().encode()


def check_seal(path: Path, cure: str) -> bool:
    """Raise ValueError for a file that was damaged after it had been written; the zip format's check sums
    have to do for an archive without a seal, as v1's weights are. Returns whether there is a seal."""
    try:
        status = path.stat()
        return is_sealed(path, (status.st_ino, status.st_size, status.st_mtime_ns))
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged ({error}): {cure}") from None


@lru_cache(maxsize=64)  # weights are looked at several times while they are loaded
def is_sealed(path: Path, _version: tuple) -> bool:
    with open(path, "rb") as file:
        file.seek(-min(len(MARK) + NUM_DIGITS, file.seek(0, os.SEEK_END)), os.SEEK_END)
        tail = file.read()
        if tail.startswith(MARK):
            if digest_of(file) != tail[len(MARK) :]:
                raise ValueError("its check sum is another")
            return True
        file.seek(0)
        if file.read(4) == b"PK\x03\x04":
            with zipfile.ZipFile(file) as archive:
                if name := archive.testzip():
                    raise ValueError(f"the check sum of {name} in it is another")
    return False
