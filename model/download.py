"""Bring what is not part of this repository from the Hugging Face hub, to where the scripts look for it.

    python -m model.download --list                     # what there is: names, files, sizes, licences, places
    python -m model.download clip tokenizer vlm         # one after the other
    HF_ENDPOINT=https://hf-mirror.com python -m model.download data      # from a mirror

Where huggingface.co is slow or out of reach (in mainland China, say), set HF_ENDPOINT to a mirror, as above.

What is there already is not brought again. Before anything is transferred its size is printed and compared
with the room on the disk. A transfer that was cut, or interrupted with Ctrl-C, goes on from there at the next
call. What came is compared with the size and checksum in model/downloads.toml, or else with those that the
hub names; a wrong file is kept aside as NAME.wrong. Zips are unpacked beside themselves; one may be deleted
once it is unpacked (NAME.zip.unpacked remembers it). No account is needed, and no token is sent.
"""

import argparse
import difflib
import os
import shutil
import sys
from pathlib import Path

from model.download_table import TABLE, Download, Table, describe_size, read_table
from model.files import describe_placeholder_file, read_json, write_text
from model.hub import NOT_MEANT, Target, ask, find_wrong, list_targets, set_aside, transfer
from model.names import ROOT
from model.printable import format_bytes, one_line
from model.unpack import unpack_zip
from trainer.script import MOST_SHOWN, Parser, clean_exit

LINE = 100e6 / 8  # bytes per second of a line of 100 Mbit/s


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.prog, parser.fromfile_prefix_chars = "python -m model.download", None
    parser.usage = "%(prog)s NAME [NAME ...] [flags], or --list"
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to bring, by its name in --list")
    parser.add_argument("--list", action="store_true", help="print the table, and what of it is there")
    parser.add_argument(
        "--dir",
        type=Path,
        default=ROOT,
        help="folder under which everything is put (default: that of this repository)",
    )
    parser.add_argument(
        "--table",
        type=Path,
        default=TABLE,
        help="another table of downloads, for a mirror that names or keeps them otherwise "
        "(default: model/downloads.toml)",
    )
    args = parser.parse_args(argv)
    if not args.names and not args.list:
        parser.error("what is to be downloaded? Give names, or --list for what there is")
    return args


def choose(table: Table, names: list[str]) -> list[Download]:
    """Each once, in the order given. Raises ValueError for a name that is not in the table."""
    for name in names:
        if name not in table:
            near = difflib.get_close_matches(name, table, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(table)}"
            raise ValueError(f"no download is called {one_line(name)}: {hint}")
    return list(dict.fromkeys(download for name in names for download in table[name]))


def show(path: Path) -> str:
    """As people would type it."""
    return one_line(os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path), MOST_SHOWN)


# ---- what is there -----------------------------------------------------------------------------------------


def is_there(target: Target) -> bool:
    """Is the file there, or all that was in a zip? A pointer, a page or an empty file in its place is set
    aside. Raises ValueError for any other file, which may be somebody's work."""
    path = target.path
    if not path.is_file():
        return was_unpacked(target)
    if not (wrong := find_wrong(path, target)):
        known = "compared" if target.sha256 or target.git_sha1 else "its checksum is not known"
        print(f"{show(path)} is there ({known})")
        return True
    if describe_placeholder_file(path):
        print(f"{show(path)} {wrong}; it is kept as {set_aside(path, path).name}")
        return False
    raise ValueError(
        f"{show(path)} is there, but is not that of {target.download.repository.id}: it {wrong}. If it is "
        "yours, rename it, else delete it (or put the download elsewhere with --dir), and run this again"
    )


def record_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.unpacked")


def was_unpacked(target: Target) -> bool:
    """Is a zip gone, but as many files as it held are in their folder?"""
    record = record_of(target.path)
    if not target.source.unpack or not record.is_file():
        return False
    folder, number = target.path.parent / target.source.unpack, read_json(record).get("num_files")
    found = sum(len(files) for _, _, files in os.walk(folder))
    if is_enough := isinstance(number, int) and 0 < number <= found:
        print(f"{show(target.path)} is unpacked ({number:,} files in {show(folder)})")
    return is_enough


def describe_download(download: Download, root: Path) -> list[str]:
    """Lines of --list."""
    repository, place = download.repository, root / download.place
    found = []
    for source in download.files:
        paths = [path for path in place.glob(source.name) if not NOT_MEANT.search(path.name)]
        found.append(bool(paths) or record_of(place / source.name).is_file())
    if all(source.is_pattern for source in download.files):  # not each of them need fit a file
        found = [any(found)]
    count = "there" if all(found) else f"{sum(found)} of {len(found)} there" if any(found) else "not there"
    revision = "main, no commit is known" if repository.revision == "main" else repository.revision[:12]
    return [
        f"{download.name:17} {download.what}: {describe_size([download])}; {count}",
        f"{'':17} {', '.join(source.name for source in download.files)} of {repository.id} ({revision})",
        f"{'':17} to {', '.join(download.places())}; licence: {download.licence}",
    ]


def print_table(table: Table, root: Path) -> None:
    for name, downloads in table.items():
        if downloads[0].name == name:
            print("\n".join(describe_download(downloads[0], root)))
        else:
            print(f"{name:17} {' and '.join(one.name for one in downloads)}: {describe_size(downloads)}")


# ---- bringing it -------------------------------------------------------------------------------------------


def is_zip(target: Target) -> bool:
    return bool(target.source.unpack) and target.name.endswith(".zip")


def check_room(targets: list[Target]) -> None:
    """Raise OSError unless each disk has room for what is still to come, and for the content of zips: images,
    which a zip makes no smaller."""
    needed: dict[int, int] = {}
    folders: dict[int, Path] = {}
    for target in targets:
        folder = next(parent for parent in target.path.parents if parent.is_dir())
        disk = folder.stat().st_dev
        size = target.size or target.source.num_bytes or 0
        needed[disk] = needed.get(disk, 0) + size * (2 if is_zip(target) else 1) - target.arrived
        folders[disk] = folder
    for disk, folder in folders.items():
        free = shutil.disk_usage(folder).free
        if needed[disk] > free:
            raise OSError(
                f"{show(folder)}: {format_bytes(needed[disk])} are needed (with room to unpack), "
                f"{format_bytes(free)} are free: make room, or put the download elsewhere with --dir; "
                "nothing was transferred"
            )


def announce(targets: list[Target]) -> None:
    to_come = sum((target.size or 0) - target.arrived for target in targets)
    arrived = sum(target.arrived for target in targets)
    more = f", {format_bytes(arrived)} arrived earlier" if arrived else ""
    minutes = to_come / LINE / 60
    time = f"{minutes:.0f} minute(s)" if minutes >= 1 else "less than a minute"
    print(
        f"{len(targets)} file(s) to transfer, {format_bytes(to_come)}{more}: {time} at 100 Mbit/s", flush=True
    )


def unpack(target: Target) -> None:
    from huggingface_hub.utils import tqdm

    number, written = unpack_zip(
        target.path,
        target.path.parent,
        target.source.unpack,
        lambda members: tqdm(members, desc=f"unpacking {target.path.name}", unit=" files", disable=None),
    )
    write_text(record_of(target.path), f'{{"num_files": {number}}}\n')
    folder = target.path.parent / target.source.unpack
    print(f"{show(target.path)}: {number:,} files in {show(folder)}, {written:,} of them new")


def fetch(downloads: list[Download], root: Path, problems: list[str]) -> None:
    """Bring all that is missing. What is wrong with one file is added to `problems`, and the others come all
    the same; raises OSError for what keeps them away, too: no network, no room."""

    def attempt(do, *arguments):
        try:
            return do(*arguments)
        except ValueError as error:
            problems.append(str(error))
            return None

    def is_missing(target: Target) -> bool:
        if not (there := is_there(target)):
            ask(target)
        return not there

    targets = [target for one in downloads for target in attempt(list_targets, one, root) or []]
    missing = {target: None for target in targets if attempt(is_missing, target)}
    if missing:
        check_room([*missing])
        announce([*missing])
    for target in targets:
        if target in missing:
            attempt(transfer, target)
            if target.path.is_file():
                print(f"{show(target.path)} has come", flush=True)
        if is_zip(target) and target.path.is_file():
            attempt(unpack, target)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    table = read_table(args.table)
    if args.list:
        print_table(table, args.dir)
        return
    problems: list[str] = []
    try:
        fetch(choose(table, args.names), args.dir, problems)
    except KeyboardInterrupt:
        print("\ninterrupted: what has arrived is kept, the same command goes on from there", file=sys.stderr)
        raise
    except OSError as error:
        problems.append(str(error))
    for problem in problems:
        print(f"error: {one_line(problem, MOST_SHOWN)}", file=sys.stderr, flush=True)
    if problems:
        sys.exit(2)


if __name__ == "__main__":
    clean_exit(main)
