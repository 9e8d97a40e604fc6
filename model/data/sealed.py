"""The small files of an index or a cache. Each ends with the check sum of what it holds and of whose it is: a
damaged one is never used, nor another's that came here under its name."""

import hashlib

from model.seal import MARK, NUM_DIGITS


def seal(content: bytes, owner: str) -> bytes:
    """The content as it is written; owner: what the file belongs to."""
    return content + MARK + digits_of(content, owner)


def unseal(sealed: bytes, owner: str) -> bytes:
    """The content of what seal() made. Raises ValueError for anything else."""
    content = sealed[: -len(MARK) - NUM_DIGITS]
    if not content or sealed != seal(content, owner):
        raise ValueError("its check sum is another")
    return content


def digits_of(content: bytes, owner: str) -> bytes:
    return hashlib.sha256(owner.encode(errors="surrogateescape") + b"\0" + content).hexdigest().encode()
