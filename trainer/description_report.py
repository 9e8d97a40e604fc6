"""Descriptions of many images in a file: in batches, over all processes, and after a kill it goes on.

    file      as it was named, or the folder of a set
    question  answer  tokens
    seconds   of its batch, divided by the images in it
    error     why it could not be described; there is then no answer
    content   fingerprint of the file or the set
    weights   fingerprint of the weights, CLIP and tokenizer
    settings  how the answer was sampled, and in which arithmetic

Where a report goes on, the last two, the question, and the content of files that it names must be those of
now: no two kinds of answers mix.
"""

import argparse
import contextlib
import csv
import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from model.chat import Chat
from model.data.video import open_images
from model.files import encode_text, fingerprint_file
from model.fingerprint import fingerprint, fingerprint_files
from model.printable import one_line
from trainer.describe import check_fitting, compose, list_shown, make_sampling
from trainer.distributed import Run
from trainer.logger import name_of, progress_bar
from trainer.script import AgreedError
from trainer.tables import read_records

COLUMNS = ("file", "question", "answer", "tokens", "seconds", "error", "content", "weights", "settings")
COMPARED = {"question": "another --prompt", "weights": "other weights", "settings": "other settings"}
Shown = tuple[Path, list[Path]]  # a name, and the files that are shown together


def describe_to_report(run: Run, args: argparse.Namespace, chat: Chat, weights: Path) -> None:
    """One row of --report for each image, set or video that has none yet. What cannot be read gets a row that
    says so; AgreedError at the end then says how many."""
    shown = list_shown(args)
    check_fitting(args, chat, shown)
    report = Report(args.report)
    done = run.from_main(lambda: find_done(report, shown, what_makes_it(args, chat, weights)))
    todo = [place for place, (name, _) in enumerate(shown) if key_of(name) not in done]
    num_bad = sum(done.get(key_of(name), False) for name, _ in shown)
    if len(todo) < len(shown):
        run.print(f"{len(shown) - len(todo):,} of {len(shown):,} are in {args.report} already")
    with progress_bar(total=len(todo), disable=not run.is_main) as bar:
        for places in share_out(todo, args.batch_size, run):
            mine = describe_batch(args, chat, shown, places) if places else []
            rows = [row for batch in run.gather_in_order({run.rank: mine}) for row in batch]
            if run.is_main:
                report.append(rows)
            bar.update(len(rows))
            num_bad += sum(run.share(sum(bool(row["error"]) for row in mine)))
    run.print(f"{len(shown) - num_bad:,} of {len(shown):,} described in {args.report}")
    if num_bad:
        raise AgreedError(f'{num_bad} of {len(shown)} could not be described: see "error" in {args.report}')


def find_done(report: "Report", shown: list[Shown], made_with: dict[str, str]) -> dict[str, bool]:
    """key_of() every file that has a row -> whether it could not be described. Raises ValueError as
    Report.read() does, and for a file that was changed since."""
    rows = report.read(made_with)
    for name, files in shown:
        row = rows.get(key_of(name))
        if row and row["content"] != fingerprint_files(files):
            raise report.refuse(f"describes {name} as it was before it was changed")
    return {key: bool(row["error"]) for key, row in rows.items()}


def share_out(todo: list[int], batch_size: int, run: Run) -> Iterator[list[int]]:
    """This rank's batches, as many as every other rank's; the last ones may be empty. A batch has its place
    in the folder, not among what is left: what was described before a kill changes no other batch."""
    batches: dict[int, list[int]] = {}
    for place in todo:
        batches.setdefault(place // batch_size, []).append(place)
    parts = list(batches.values())
    for first in range(0, len(parts), run.world_size):
        yield next(iter(parts[first + run.rank : first + run.rank + 1]), [])


def describe_batch(args: argparse.Namespace, chat: Chat, shown: list[Shown], places: list[int]) -> list[dict]:
    """The rows of a batch, in order; places: of its members in `shown`."""
    started = time.perf_counter()
    rows, good, turns, pixels = [], [], [], []
    for place in places:
        name, files = shown[place]
        told = {"file": str(name), "question": args.prompt, "content": fingerprint_files(files)}
        rows.append(dict.fromkeys(COLUMNS[:7]) | told)
        asked, images = compose(args, chat, files)
        try:
            if not files:
                raise ValueError("it holds no images")
            pixels.append(chat.read_pixels(open_images(images)))
        except (ValueError, FileNotFoundError) as error:
            rows[-1]["error"] = one_line(str(error))
            continue
        good.append(place)
        turns.append(asked)
    if good:
        features = chat.encode_pixels(torch.cat(pixels)).split([len(part) for part in pixels])
        answers = chat.answer_ids(turns, list(features), make_sampling(args), streams=good)
        seconds = round((time.perf_counter() - started) / len(good), 4)
        for row, ids in zip([row for row in rows if not row["error"]], answers, strict=True):
            row |= {"answer": chat.read(ids), "tokens": len(ids), "seconds": seconds}
    return rows


def what_makes_it(args: argparse.Namespace, chat: Chat, weights: Path) -> dict[str, str]:
    """The values of now of the columns COMPARED."""
    files = [weights]
    if weights.is_dir():
        files = sorted(path for path in weights.iterdir() if path.suffix in (".safetensors", ".bin", ".json"))
    sampling = make_sampling(args)
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens", "seed")
    settings = [name_of(chat.decoder.dtype), *(f"{name} {getattr(sampling, name)}" for name in names)]
    if args.video:
        settings.append(f"max_frames {args.max_frames}")
    inputs = [text for _, text in sorted(chat.inputs.items())]
    return {
        "question": args.prompt,
        "weights": fingerprint(*map(fingerprint_file, files), *inputs),
        "settings": ", ".join(settings),
    }


def key_of(name: str | Path) -> str:
    """By which a file is known again, from wherever and however it is named."""
    return os.path.abspath(encode_text(str(name)).decode())


# ---- the file ----------------------------------------------------------------------------------------------


class Report:
    """Rows in a .jsonl or .csv file, to which whole batches are added."""

    def __init__(self, path: Path):
        self.path, self.is_csv = path, path.suffix.lower() == ".csv"
        self.made_with: dict[str, str] = {}

    def read(self, made_with: dict[str, str]) -> dict[str, dict]:
        """key_of() every file that has a row -> the row. A row of which a kill left a part is cut off.

        made_with  what the columns COMPARED hold from now on
        raises     ValueError, naming the report, if it is of another kind
        """
        self.made_with = made_with
        if not self.path.exists():
            return {}
        rows, end, size = {}, 0, self.path.stat().st_size
        for stop, row in self.parse():
            if row is None:
                if stop < size or not (end or self.begins_as_ours()):
                    raise self.refuse(f"is no report of descriptions (behind byte {end})")
                os.truncate(self.path, end)
                break
            if row:
                self.check(row)
                rows[key_of(row["file"])] = row
            end = stop
        return rows

    def parse(self) -> Iterator[tuple[int, dict | None]]:
        """The end of every row, and the row; {} for the header of a .csv, None for what is no whole row."""
        if not self.is_csv:
            with open(self.path, "rb") as file:
                end = 0
                for line in file:
                    end += len(line)
                    yield end, parse_line(line)
            return
        with open(self.path, "rb") as file:
            for start, end, fields in read_records(self.path, ",", errors="replace"):
                file.seek(end - 1)
                is_whole = len(fields) == len(COLUMNS) and file.read(1) == b"\n"
                is_whole &= start > 0 or tuple(fields) == COLUMNS
                yield end, (dict(zip(COLUMNS, fields, strict=True)) if start else {}) if is_whole else None

    def begins_as_ours(self) -> bool:
        ours = b",".join(name.encode() for name in COLUMNS) if self.is_csv else b'{"file": '
        with open(self.path, "rb") as file:
            found = file.read(len(ours))
        return found == ours[: len(found)]

    def check(self, row: dict) -> None:
        texts = ("file", "content", *COMPARED)
        if not all(isinstance(row.get(name), str) for name in texts) or "error" not in row:
            raise self.refuse("is no report of descriptions")
        for name, what in COMPARED.items():
            if row[name] != self.made_with[name]:
                was, now = (one_line(value, 200) for value in (row[name], self.made_with[name]))
                raise self.refuse(f"was made with {what} ({was}; now {now})")

    def refuse(self, what: str) -> ValueError:
        return ValueError(f"--report: {self.path} {what}: give another one, or remove it")

    def append(self, rows: list[dict]) -> None:
        """Raises OSError, naming the report, if it cannot be written; what was in it stays."""
        rows = [row | self.made_with for row in rows]
        if self.is_csv:
            is_new = not self.path.exists() or not self.path.stat().st_size
            text = make_csv(rows, is_new)
        else:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        try:
            with open(self.path, "ab") as file:
                file.write(encode_text(text))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(f"--report: cannot write {self.path}: {error.strerror or error}") from None


def parse_line(line: bytes) -> dict | None:
    with contextlib.suppress(ValueError, RecursionError):
        row = json.loads(line)
        if isinstance(row, dict) and row and line.endswith(b"\n"):
            return row
    return None


def make_csv(rows: list[dict], with_header: bool) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)  # its lines end in \r\n, as the standard of this format has it
    if with_header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
