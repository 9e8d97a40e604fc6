"""Files of questions with known answers: rows of our own, and the benchmarks that benchmark_files.py reads.

    {"image": "a.jpg" or several, or "video": "a.mp4", "question": "...", "answer": "...", "kind": "...",
     "choices": ["...", "..."], "swapped_answer": "..."}

The last two may be missing; the answer is then one of the choices. All rows are checked before a model is
loaded.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from model.data.formats import kind_of
from model.data.rows import Rows
from model.data.sources import Embedded, file_names, find_file, locate
from model.images import check_is_file
from model.prompt import IMAGE_MARK, VIDEO_MARK, find_marks, normalise_turns, put_marks
from trainer.benchmark_files import open_benchmark
from trainer.questions import Entry, QuestionFile

TEXTS = ("question", "answer", "kind", "swapped_answer")  # of a question's row


def open_question_files(
    paths: Iterable[Path], image_dir: Path | None = None, score: str | None = None
) -> dict[str, QuestionFile]:
    """All files, by what the report calls them. Raises FileNotFoundError or ValueError, naming file and row,
    for the first question that could not be asked or scored."""
    files = {
        name: open_benchmark(path, image_dir) or open_question_file(path)
        for name, path in name_files(paths).items()
    }
    for file in files.values():
        file.choose_score(score)
    return files


def open_question_file(path: Path) -> QuestionFile:
    """A file of our own rows; images and videos lie beside it."""
    return QuestionFile(path, "a question file", list(parse_questions(path)))


# ---- rows of our own ---------------------------------------------------------------------------------------


def name_files(paths: Iterable[Path]) -> dict[str, Path]:
    """Each file once, by what the report calls it: questions_x.jsonl is x. Files that would be called the
    same have as many folders in front as tell them apart."""
    files = {Path(os.path.abspath(path)): path for path in paths}

    def label(path: Path, num_folders: int) -> str:
        ending = kind_of(path)
        short = re.sub(rf"{re.escape(ending)}(\.gz)?$", "", path.name, flags=re.IGNORECASE)
        folders = path.parts[:-1][len(path.parts) - 1 - num_folders :]
        return "/".join([*folders, short.removeprefix("questions_")])

    def shortest(path: Path) -> str:
        for num_folders in range(len(path.parts) - 1):
            if [label(other, num_folders) for other in files].count(label(path, num_folders)) == 1:
                return label(path, num_folders)
        return str(path)  # x.json beside x.jsonl

    return {shortest(path): given for path, given in files.items()}


def parse_questions(path: Path) -> Iterator[Entry]:
    """The rows of a file of our own."""
    if not path.is_file():
        raise FileNotFoundError(f"question file not found: {path}")
    rows = Rows(path)
    for position in range(len(rows)):
        name = f"{path}, row {position + 1}"
        try:
            yield Entry(name, *parse_question(rows, position, path.parent))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{name}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def parse_question(rows: Rows, position: int, folder: Path) -> tuple[dict, list[Path | Embedded], list[dict]]:
    """A row of a question file, what it shows, and its turns."""
    row = rows[position]
    row = {name: value for name, value in row.items() if value is not None} if isinstance(row, dict) else {}
    row |= {name: as_text(name, row[name]) for name in TEXTS if name in row}
    shown = "video" if row.get("video") else "image"
    missing = [name for name in (shown, "question", "answer", "kind") if not row.get(name)]
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}")
    if "choices" in row:
        row["choices"] = check_choices(row)
    images, videos = (
        file_names(row, key, row["question"].count(mark), lambda name: find_file(folder, name).is_file())
        for key, mark in (("image", IMAGE_MARK), ("video", VIDEO_MARK))
    )
    turns = [{"from": "human", "value": put_marks(row["question"], len(images), len(videos))}]
    marks = find_marks(normalise_turns(turns)) if videos else [IMAGE_MARK] * len(images)
    names = {mark: iter(images if mark == IMAGE_MARK else videos) for mark in set(marks)}
    files = locate(
        [next(names[mark]) for mark in marks], rows, position, lambda name: find_file(folder, name)
    )
    for file, mark in zip(files, marks, strict=True):
        if not isinstance(file, Embedded):
            check_is_file(file, "image" if mark == IMAGE_MARK else "video")
    return row, files, turns


def as_text(name: str, value) -> str:
    """A number is compared, and reported, as the text that it is written as. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f'its "{name}" must be a text or a number, not {json.dumps(value)[:80]}')
    return str(value).strip() and str(value)


def check_choices(row: dict) -> list[str]:
    """The choices of a row as texts. Raises ValueError unless the answer is one of several different ones."""
    choices = row["choices"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(f'its "choices" must be a list of two or more, not {json.dumps(choices)[:80]}')
    texts = [as_text("choices", choice) for choice in choices]
    if "" in texts or len(set(texts)) < len(texts):
        raise ValueError('its "choices" hold an empty text, or the same one twice')
    if row["answer"] not in texts:
        raise ValueError(f'its "answer" {row["answer"][:80]!r} is none of its "choices"')
    return texts
