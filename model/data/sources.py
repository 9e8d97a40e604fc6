"""What a row shows: from names as people's data hold them to the files that are meant, and images that stand
in the row itself."""

import base64
import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from model.data.schemas import Stored, find_images

ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)  # https:// and the like; C:/ is none
FILE_ADDRESS = re.compile(r"file:(//(localhost(?=/))?)?(/(?=[a-z]:))?", re.IGNORECASE)  # what a path follows

COMMA = re.compile(r"(?<!;base64),", re.IGNORECASE)  # between names; that of a data: address is none
DATA_ADDRESS = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)
# Base64 without an address: long, and it begins as images do (JPEG, PNG, GIF, WebP, BMP, TIFF).
BASE64 = re.compile(r"(/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk|SUkq|TU0A)[A-Za-z0-9+/\s]{40,}+[=\s]*+")


MAX_EMBEDDED = 256 << 20  # letters of base64: 192 MB


@dataclass(frozen=True)
class Embedded:
    """An image that stands in a row, as base64 or as bytes; stands where an image's path may stand. It is
    read when it is asked for: a data file may hold more of them than the memory does."""

    name: str
    rows: Sequence = field(compare=False, repr=False)
    position: int  # of the row
    number: int  # of the image among those that stand in the row
    stored: Stored | None = None  # where its bytes lie, if they were taken out of a table

    def __str__(self) -> str:
        return self.name

    def read(self) -> bytes:
        """What would be in its file. Raises ValueError if it is not base64, or too long."""
        if self.stored:
            if self.stored.length > MAX_EMBEDDED * 3 // 4:
                raise ValueError(
                    f"it has {self.stored.length:,} bytes: at most {MAX_EMBEDDED * 3 // 4:,} are read"
                )
            return self.rows.read_stored(self.stored)
        found = [name for name in file_names(self.rows[self.position], "image") if is_embedded(name)]
        text = "".join(DATA_ADDRESS.sub("", found[self.number], 1).split())
        if len(text) > MAX_EMBEDDED:
            raise ValueError(f"it has {len(text):,} letters of base64: at most {MAX_EMBEDDED:,} are read")
        return base64.b64decode(text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4), validate=True)

    def digest(self) -> bytes:
        """image_digest() of what would be in its file. Raises ValueError as read() does."""
        if self.stored and self.rows.images is not None:
            return bytes.fromhex(self.stored.digest)
        return image_digest(self.read())


def image_digest(content: bytes) -> bytes:
    """128 bits by which an image is known, in a file of its own as in a row."""
    return hashlib.blake2b(content, digest_size=16).digest()


def is_embedded(name: str | Stored) -> bool:
    """Is this no name but an image?"""
    return isinstance(name, Stored) or bool(DATA_ADDRESS.match(name) or BASE64.fullmatch(name))


def locate(
    names: Sequence[str | Stored], rows, position: int, find: Callable[[str], Path]
) -> list[Path | Embedded]:
    """The files that a row names, and the images that stand in it.

    rows  the Rows that it is from, at `position`
    find  from a name to a file
    """
    found: list[Path | Embedded] = []
    number = 0
    rows, position = rows.place(position)
    for name in names:
        if is_embedded(name):
            label = f"{number + 1} in {rows.name(position)}"
            found.append(Embedded(label, rows, position, number, name if isinstance(name, Stored) else None))
            number += 1
        else:
            found.append(find(name))
    return found


def file_names(
    row: dict, key: str, num_marks: int = 0, is_file: Callable[[str], bool] = lambda name: False
) -> list[str | Stored]:
    """The images ("image") or videos ("video") of a row: a list, or one string with commas between the
    names. Images that stand in the row come as they are: see is_embedded(); in which columns images are
    looked for, schemas.py says. Raises ValueError.

    A comma may also belong to a name: so it does in a string that as a whole names a file (is_file), unless
    its parts are just as many as the marks in the text.
    """
    given = find_images(row) if key == "image" else row.get(key)
    if given is None:
        return []
    names = [part for part in COMMA.split(given) if part.strip()] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str | Stored) for name in names):
        raise ValueError(f'its "{key}" must be a file name or a list of them, not {str(given)[:80]}')
    if isinstance(given, str) and len(names) not in (1, num_marks) and is_file(path_in(given, key)):
        names = [given]
    return [
        name if isinstance(name, Stored) else path_in(name, key)
        for name in names
        if isinstance(name, Stored) or name.strip()
    ]


def path_in(name: str, key: str) -> str:
    """The path in a name: file:// comes off. Raises ValueError for other addresses."""
    name = name.strip()
    if match := FILE_ADDRESS.match(name):
        return unquote(name[match.end() :], errors="surrogateescape")
    if is_embedded(name):
        if key != "image":
            raise ValueError(f'its "{key}" stands in the row: only images are read from there; name a file')
        return name
    if name[:5].lower() == "data:":
        raise ValueError(f'its "{key}" is a data: address without base64, which is not read: {name[:80]}')
    if ADDRESS.match(name):
        raise ValueError(f'its "{key}" is an address: download it, and put the file name there: {name[:80]}')
    return name


def find_file(folder: Path, name: str, prefix: str = "") -> Path:
    """The file that a name in a row means, in a folder. Where none is called just that, one may be whose
    accents are spelled otherwise (Macs), whose folders are not divided by backslashes (Windows), or that has
    a prefix in front."""
    path = folder / name
    if not prefix and name.isascii() and "\\" not in name:
        return path
    names = [name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))]
    names += [one.replace("\\", "/") for one in names]
    paths = [folder / one for one in dict.fromkeys(names)]
    paths += [one.with_name(prefix + one.name) for one in paths if prefix and one.name]
    # os.path and not Path: a name that no file system can hold is simply not there.
    return next((one for one in paths if os.path.exists(one)), path)
