"""What a row shows: from names as people's data hold them to the files that are meant."""

import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)  # https:// and the like; C:/ is none
FILE_ADDRESS = re.compile(r"file:(//(localhost(?=/))?)?(/(?=[a-z]:))?", re.IGNORECASE)  # what a path follows


def file_names(
    row: dict, key: str, num_marks: int = 0, is_file: Callable[[str], bool] = lambda name: False
) -> list[str]:
    """The images ("image") or videos ("video") of a row: a list, or one string with commas between the
    names. Raises ValueError.

    A comma may also belong to a name: so it does in a string that as a whole names a file (is_file), unless
    its parts are just as many as the marks in the text.
    """
    given = row.get(key)
    if given is None:
        return []
    names = [part for part in given.split(",") if part.strip()] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'its "{key}" must be a file name or a list of them, not {str(given)[:80]}')
    if isinstance(given, str) and len(names) not in (1, num_marks) and is_file(path_in(given, key)):
        names = [given]
    return [path_in(name, key) for name in names if name.strip()]


def path_in(name: str, key: str) -> str:
    """The path in a name: file:// comes off. Raises ValueError for other addresses."""
    name = name.strip()
    if match := FILE_ADDRESS.match(name):
        return unquote(name[match.end() :], errors="surrogateescape")
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
