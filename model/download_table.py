"""The table of what `python -m model.download` fetches: model/downloads.toml, read, checked and shown.

Imports nothing heavy: every "not found" of the scripts asks it which download would help.
"""

import os
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from model.names import ROOT
from model.printable import format_bytes

TABLE = ROOT / "model/downloads.toml"
COMMAND = "python -m model.download"
SHA256, COMMIT = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class Repository:
    """Of the hub. revision: a commit, or "main" where none is known"""

    id: str
    kind: str
    revision: str
    licence: str


@dataclass(frozen=True)
class Source:
    """A file of a repository, or several by a pattern.

    name    as it is there, with its folders
    size    bytes; about: where they are only roughly known; None = unknown
    sha256  hex digits, "" = unknown
    unpack  of a zip, the folder beside it where its images belong; "" = it is no zip, or stays as it is
    """

    name: str
    size: int | None = None
    about: int | None = None
    sha256: str = ""
    unpack: str = ""

    @property
    def is_pattern(self) -> bool:
        return "*" in self.name

    @property
    def num_bytes(self) -> int | None:
        return self.size if self.about is None else self.about


@dataclass(frozen=True)
class Download:
    """What a name of the command stands for. Files lie in place / Source.name, from the repository's root."""

    name: str
    what: str
    repository: Repository
    files: tuple[Source, ...]
    place: str = ""
    about: int | None = None
    licence: str = ""

    def places(self) -> list[str]:
        """Where its files come to lie, as people should look for them; of several in a folder, the folder."""
        if self.place and all("/" not in source.name and not source.unpack for source in self.files):
            return [self.place + "/"]
        found = []
        for source in self.files:
            path = PurePosixPath(self.place, source.name)
            found.append(f"{path.parent}/" if source.is_pattern else str(path))
            if source.unpack and not source.is_pattern:
                found[-1] = f"{path.with_name(source.unpack)}/"
        return found


Table = dict[str, list[Download]]


def read_table(path: Path = TABLE) -> Table:
    """Name -> its downloads: one, or those it includes. Raises FileNotFoundError or ValueError, naming the
    file and the place in it."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no table {path}")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        repositories = {name: Repository(**entry) for name, entry in values["repositories"].items()}
        single = {
            name: make_download(name, entry, repositories)
            for name, entry in values["downloads"].items()
            if "includes" not in entry
        }
        return {
            name: [single[one] for one in entry.get("includes", [name])]
            for name, entry in values["downloads"].items()
        }
    except KeyError as error:
        raise ValueError(
            f"{path}: {error} is missing (model/downloads.toml says what a table holds)"
        ) from None
    except (ValueError, TypeError, AttributeError) as error:  # of TOML, of a dataclass, of what is no table
        raise ValueError(f"{path} is no table of downloads: {error}") from None


def make_download(name: str, entry: dict, repositories: dict[str, Repository]) -> Download:
    """Raises ValueError for what would lead out of the repository, or would compare with nonsense."""
    files = tuple(Source(**values) for values in entry["files"])
    for source in files:
        if any(map(leads_out, (entry.get("place") or ".", source.name, source.unpack or "."))):
            raise ValueError(f"{name}: {source.name!r} leads out of its folder")
        if not all(isinstance(number, int | None) for number in (source.size, source.about)):
            raise ValueError(f"{name}: the size of {source.name} is no number of bytes")
        if source.sha256 and not SHA256.fullmatch(source.sha256):
            raise ValueError(f"{name}: {source.sha256} is no SHA-256 of 64 hex digits")
    repository = repositories[entry["from"]]
    more = {"licence": repository.licence} | {
        key: entry[key] for key in ("place", "about", "licence") if key in entry
    }
    return Download(name, entry["what"], repository, files, **more)


def leads_out(name: str) -> bool:
    """Would a name lead out of the folder that it belongs to, on this system or another?"""
    parts = name.replace("\\", "/").split("/")
    return ".." in parts or "\0" in name or not parts[0] or bool(PureWindowsPath(name).anchor)


def find_download(path: str | Path) -> str:
    """The command that brings what should lie at `path`, a file or a folder; "" if none does."""
    wanted = os.path.relpath(path, ROOT) if os.path.isabs(path) else os.path.normpath(path)
    wanted = wanted.replace(os.sep, "/")
    for name, downloads in read_table().items():
        places = downloads[0].places() if len(downloads) == 1 else []
        if any(
            wanted == place or (place.endswith("/") and f"{wanted}/".startswith(place)) for place in places
        ):
            return f"{COMMAND} {name}"
    return ""


# ---- shown -------------------------------------------------------------------------------------------------


def describe_size(downloads: Iterable[Download]) -> str:
    """ "714 MB", "2.99 GB and 2 files of unknown size" """
    known, unknown = 0, 0
    for download in downloads:
        sizes = [download.about] if download.about else [source.num_bytes for source in download.files]
        known += sum(filter(None, sizes))
        unknown += sizes.count(None)
    if not known:
        return "size not known"
    more = f" and {unknown} file{'s' * (unknown > 1)} of unknown size" if unknown else ""
    return format_bytes(known) + more


def command_line(table: Table, names: list[str]) -> str:
    """As README shows it, with what it will transfer."""
    size = describe_size(download for name in names for download in table[name])
    return f"{COMMAND + ' ' + ' '.join(names):50}  # {size}"


def markdown_lines(table: Table) -> list[str]:
    """README's list of downloads."""
    lines = ["| name | what | size | goes to | licence |", "|---|---|---|---|---|"]
    for name, downloads in table.items():
        if downloads[0].name != name:
            names = " and ".join(f"`{download.name}`" for download in downloads)
            lines.append(f"| `{name}` | {names} | {describe_size(downloads)} | | |")
            continue
        places = ", ".join(f"`{place}`" for place in downloads[0].places())
        size = describe_size(downloads)
        lines.append(f"| `{name}` | {downloads[0].what} | {size} | {places} | {downloads[0].licence} |")
    return lines
