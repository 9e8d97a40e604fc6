"""Zips from elsewhere, unpacked so that nothing is written outside of their folder."""

import contextlib
import os
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from model.download_table import leads_out
from model.files import temporary_of
from model.printable import one_line

IS_UTF8 = 0x800  # the flag of a member whose name is UTF-8
ENCODINGS = ("utf-8", "gb18030")  # tried for names without it, before that of DOS
LEFT_OUT = re.compile(r"^__MACOSX/|(^|/)\.DS_Store$")  # what a Mac adds

Progress = Callable[[Iterable], Iterable]


def unpack_zip(path: Path, folder: Path, wanted: str, progress: Progress = iter) -> tuple[int, int]:
    """Unpack into `folder` what is not there yet, by its size; (number of files, of which were written).

    wanted    folder in it where the files are looked for: files of no such folder go into it; "." = as named
    progress  wraps the list of what is to be written, for a bar
    raises    ValueError, and nothing is written, for a name that leads out of the folder, or a zip that
              cannot be read; OSError where something cannot be written, or has no room
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = plan(archive, folder, wanted)
            missing = [member for member in members if not is_there(*member)]
            check_room(folder, sum(info.file_size for info, _ in missing))
            for info, target in progress(missing):
                write_member(archive, info, target)
            return len(members), len(missing)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        reason = one_line(str(error)) or "it ends too early"
        raise ValueError(f"cannot unpack {path} ({reason}): delete it and download it again") from None


def plan(archive: zipfile.ZipFile, folder: Path, wanted: str) -> list[tuple[zipfile.ZipInfo, Path]]:
    """What is a file in it, and where it goes. Raises ValueError for what must not be unpacked."""
    members = [info for info in archive.infolist() if not info.is_dir()]
    named = dict(zip(names_of(members), members, strict=True))
    for name, info in named.items():
        if leads_out(name) or stat.S_ISLNK(info.external_attr >> 16):
            reason = "leads out of its folder" if leads_out(name) else "is a link"
            raise ValueError(f"{archive.filename}: {one_line(name)} {reason}; nothing was unpacked")
    into = folder if any(name.startswith(f"{wanted}/") for name in named) else folder / wanted
    return [(info, into / name) for name, info in named.items() if not LEFT_OUT.search(name)]


def names_of(members: list[zipfile.ZipInfo]) -> list[str]:
    """Their names, whatever wrote them: zips of Chinese systems have GBK, and do not say so. One name can be
    text in several encodings, so the encoding is one that fits all."""
    names = [info.filename for info in members]
    for encoding in ENCODINGS:
        with contextlib.suppress(UnicodeError):  # zipfile reads what is not marked as cp437
            names = [
                name if info.flag_bits & IS_UTF8 else name.encode("cp437").decode(encoding)
                for name, info in zip(names, members, strict=True)
            ]
            break
    return [name.replace("\\", "/") for name in names]


def is_there(info: zipfile.ZipInfo, target: Path) -> bool:
    try:
        return target.stat().st_size == info.file_size
    except OSError:
        return False


def check_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise OSError(
            f"{folder}: {num_bytes:,} bytes are to be unpacked, {free:,} are free: make room, run this again"
        )


def write_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    temporary = temporary_of(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(info) as source, open(temporary, "xb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
        os.replace(temporary, target)
    except OSError as error:
        raise OSError(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
