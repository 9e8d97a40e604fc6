"""Files that are whole or not there, locks, and what people often have in place of a binary file."""

import contextlib
import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

from model.download_table import find_download
from model.names import CLIP_CURE, TOKENIZER_CURE

READ_WHOLE = 1 << 30  # bytes
MAX_JSON, MAX_LEVELS = 64 << 20, 100  # bytes and levels of a file of settings
BLOCK, NUM_BLOCKS = 1 << 16, 4096


def atomic_write(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call write(file) on a temporary neighbour and move it into place: whatever happens, the old file or the
    new one is there, never half of one. Raises OSError, naming the file, if it cannot be written."""
    write_together({Path(path): write})


def write_together(
    writes: Mapping[Path, Callable[[IO[bytes]], object]], before_moving: Callable[[], None] = lambda: None
) -> None:
    """Several files, none of which is moved into place, in the order given, before all are written. Raises
    OSError, naming the file, if one of them cannot be; the files that were there are then as they were.

    before_moving  called once all are written
    """
    with contextlib.ExitStack() as stack:
        temporaries = {path: temporary_of(path) for path in writes}
        for path, write in writes.items():
            stack.callback(temporaries[path].unlink, missing_ok=True)
            with explaining(path), open(temporaries[path], "x+b") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        before_moving()
        for path, temporary in temporaries.items():
            with explaining(path):
                os.replace(temporary, path)
        for folder in {path.parent for path in writes}:
            sync_folder(folder)


@contextlib.contextmanager
def explaining(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save hides the system's error in a RuntimeError
        raise OSError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or find_cause(error)}; "
            "what was there before is as it was"
        ) from None


def temporary_of(path: Path) -> Path:
    """A name of its own: two processes that write one file must not write into each other's."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def remove_leftovers(folder: Path, stem: str) -> None:
    """What killed processes left of writing STEM.*, also of files that never came to be. For whoever holds
    these against all others."""
    for leftover in folder.glob(f".{glob.escape(stem)}.*.{'[0-9a-f]' * 8}.tmp"):
        leftover.unlink(missing_ok=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Have `target` replaced by what `source` is now, even if that is replaced later."""
    temporary = temporary_of(target)
    try:
        try:
            os.link(source, temporary)
        except OSError:  # not every file system can
            shutil.copy2(source, temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise OSError(f"cannot keep {source} as {target}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise OSError, naming the file, unless atomic_write() could write it now. Makes its folder."""
    if os.path.isdir(path):  # False, where Path.is_dir() raises, for a name that no file system can hold
        raise OSError(f"cannot write {path}: it is a folder")
    temporary = temporary_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(b"x")
        temporary.unlink()
    except FileExistsError as error:
        raise OSError(f"cannot write {path}: {error.filename} is no folder") from None
    except (OSError, ValueError) as error:
        raise OSError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None


def write_text(path: str | Path, text: str) -> None:
    atomic_write(path, lambda file: file.write(encode_text(text)))


def encode_text(text: str) -> bytes:
    """UTF-8. Half a surrogate pair, as which Python spells a byte of a file's name that is not UTF-8, becomes
    its escape, and JSON reads that back."""
    return text.encode(errors="backslashreplace")


def is_utf8(path: str | Path) -> bool:
    """Libraries in C++ and Rust open no file whose name is anything else."""
    return os.fsencode(path) == encode_text(os.fspath(path))


def sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut; a system that cannot (Windows) does without."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def find_cause(error: BaseException) -> str:
    """The system's words for what went wrong, from wherever they were wrapped."""
    while not getattr(error, "strerror", None) and (inner := error.__cause__ or error.__context__):
        error = inner
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


def read_json(path: Path, cure: str = "download it again") -> dict:
    """The object in a JSON file, in UTF-8 or as Windows programs write it. Raises ValueError, naming the
    file, if it holds none."""
    if (size := path.stat().st_size) > MAX_JSON:
        raise ValueError(f"{path} has {size:,} bytes, at most {MAX_JSON:,} are read: {cure}")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # not JSON, not even text, or nested without end
        raise ValueError(f"{path} is not valid JSON ({error}): {cure}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object, not a {type(values).__name__}: {cure}")
    depth, level = 0, [values]
    while level := [
        inner for value in level for inner in (value.values() if isinstance(value, dict) else value)
    ]:
        depth, level = depth + 1, [value for value in level if isinstance(value, dict | list)]
        if depth > MAX_LEVELS:  # what takes it apart, or compares it, could not
            raise ValueError(f"{path} is nested more than {MAX_LEVELS} levels deep: {cure}")
    return values


def fingerprint_file(path: Path) -> str:
    """16 hex digits that are equal for equal contents: of the whole file up to READ_WHOLE bytes (0.7 s), of a
    larger one its size and NUM_BLOCKS blocks spread over it."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with open(path, "rb") as file:
        if size <= READ_WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
        digest.update(size.to_bytes(8, "little"))
        for number in range(NUM_BLOCKS):
            file.seek((size - BLOCK) * number // (NUM_BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]


def check_weight_file(path: str | Path, cure: str) -> None:
    """Raise FileNotFoundError or ValueError if there is no binary file at `path`."""
    path = Path(path)
    if not os.path.isfile(path):  # also for a name that no file system can hold
        raise FileNotFoundError(f"{path} not found: {cure}")
    if placeholder := describe_placeholder_file(path):
        raise ValueError(f"{path} {placeholder}: {cure}")


def check_data_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"data file not found: {path} ({offer_download(path)}name yours with --data_path)"
        )


def check_image_dir(path: Path) -> None:
    if not path.is_dir():
        raise FileNotFoundError(
            f"image folder not found: {path} ({offer_download(path)}name yours with --image_dir)"
        )


def offer_download(path: Path) -> str:
    """The download that would bring it, in front of another cure; "" if none would."""
    command = find_download(path)
    return f"{command}, or " if command else ""


def check_tokenizer_folder(path: Path) -> None:
    if not (path / "tokenizer_config.json").is_file():
        raise FileNotFoundError(f"no tokenizer at {path}: {TOKENIZER_CURE}")


def check_clip_folder(path: Path) -> None:
    """Raise FileNotFoundError or ValueError unless a folder holds a config and a weight file."""
    if not path.is_dir():
        raise FileNotFoundError(f"no CLIP folder at {path}: {CLIP_CURE}, or name yours with --clip_path")
    check_model_folder(path, CLIP_CURE)


def check_model_folder(path: Path, cure: str) -> None:
    """Raise FileNotFoundError or ValueError unless a folder holds a config and a weight file."""
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} holds no config.json: {cure}")
    check_weight_file(path / "config.json", cure)
    names = [
        f"{name}{ending}"
        for name in ("model.safetensors", "pytorch_model.bin")  # the order in which they are looked for
        for ending in ("", ".index.json")
    ]
    weights = [path / name for name in names if (path / name).is_file()]
    if not weights:
        raise FileNotFoundError(f"{path} holds neither model.safetensors nor pytorch_model.bin: {cure}")
    check_weight_file(weights[0], cure)


def describe_placeholder_file(path: str | Path) -> str:
    """What people often have instead of a binary file, in words ("is empty"); "" if it is none of these."""
    with open(path, "rb") as file:
        head = file.read(64).lstrip().lower()
    if not head:
        return "is empty"
    if head.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer of a few bytes, not the file itself (run `git lfs pull` there)"
    return "is a web page, not the file itself" if head.startswith((b"<!doctype", b"<html")) else ""
