"""Benchmarks as they are downloaded, known by their columns:

    POPE        one JSON object per line, {"question_id", "image", "text", "label": "yes" or "no"}, in a .json
                for each of three ways to choose what is asked about; the images are those of COCO's val2014
    VLMEvalKit  a .tsv with `index`, `question`, `answer`, and either `image` (base64, a Python list of
                those, or the index of a row that has the image) or `image_path`; perhaps `hint`, `category`.
                With columns A, B, C ... the answer is a letter (MMBench, MMStar, SEED, ScienceQA, AI2D);
                without them it is yes or no (MME, POPE.tsv), or open

A model of 27 M parameters cannot follow "answer with the letter". So options are not listed in the question,
but scored as answers, each in the words of the file.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from model.chat import mark_images
from model.data.formats import kind_of
from model.data.sources import Embedded, find_file
from model.images import check_is_file
from trainer.questions import Entry, QuestionFile
from trainer.tables import Table, TableImage, split_images

POPE = {"image", "text", "label"}
YES_NO = (("Yes", "No"), ("是", "否"), ("有", "没有"), ("对", "错"))
CHINESE = re.compile("[\u4e00-\u9fff]")
LONGEST_INDEX = 64  # letters; what is longer in a column of images is one
ROTATION = 1_000_000  # MMBench repeats a question with its options in another order, so much further on
MAX_LINE = 1 << 20
ALL = "all"  # the kind of questions that have none


def open_benchmark(path: Path, image_dir: Path | None) -> QuestionFile | None:
    """The questions of a benchmark's file; None for a file that is none. Raises FileNotFoundError or
    ValueError, naming file and row.

    image_dir  where its images are, if they are files; None = beside it
    """
    if not path.is_file():
        raise FileNotFoundError(f"question file not found: {path}")
    if kind_of(path) == ".tsv":
        return open_table(path, image_dir or path.parent)
    return open_pope(path, image_dir or path.parent) if is_pope(path) else None


def find_image(folder: Path, name: str, where: str) -> Path:
    try:
        image = find_file(folder, name)
        check_is_file(image)
    except (FileNotFoundError, ValueError) as error:
        raise FileNotFoundError(f"{where}: {error}: name the folder of the images with --image_dir") from None
    return image


def yes_no(answers: list[str], questions: list[str]) -> tuple[str, str] | None:
    """How yes and no are said in a file: as its answers do, but in Chinese where it asks in Chinese. None
    for other answers."""
    given = {answer.strip().casefold() for answer in answers if answer.strip()}
    pairs = [pair for pair in YES_NO if given <= {word.casefold() for word in pair}]
    if not pairs or not given:
        return None
    asks_in_chinese = sum(bool(CHINESE.search(question)) for question in questions) > len(questions) / 2
    return YES_NO[1] if pairs[0] == YES_NO[0] and asks_in_chinese else pairs[0]


def is_yes(answer: str) -> bool:
    return answer.strip().casefold() in {pair[0].casefold() for pair in YES_NO}


# ---- POPE --------------------------------------------------------------------------------------------------


def is_pope(path: Path) -> bool:
    with open(path, "rb") as file:
        first = file.readline(MAX_LINE)
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and row.keys() >= POPE and "question" not in row


def open_pope(path: Path, image_dir: Path) -> QuestionFile:
    rows = list(read_pope(path))
    yes, no = yes_no([row["label"] for _, row in rows], [row["text"] for _, row in rows]) or YES_NO[0]
    entries = []
    for number, row in rows:
        name = f"{path}, line {number}"
        asked = {
            "question": row["text"],
            "answer": yes if is_yes(row["label"]) else no,
            "kind": ALL,
            "choices": [yes, no],
        }
        image = find_image(image_dir, row["image"], name)
        entries.append(Entry(name, asked, [image], ask(row["text"], 1)))
    return QuestionFile(path, f"POPE ({yes} or {no})", entries, yes, is_benchmark=True)


def read_pope(path: Path) -> Iterator[tuple[int, dict]]:
    """The rows of a file, each with the number of its line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            if row is None:
                continue
            fits = isinstance(row, dict) and all(isinstance(row.get(key), str) for key in POPE)
            if not fits or row["label"].strip().casefold() not in ("yes", "no"):
                raise ValueError(
                    f'{path}, line {number}: a row of POPE has "image", "text" and a "label", yes or no'
                )
            yield number, row


# ---- VLMEvalKit --------------------------------------------------------------------------------------------


def open_table(path: Path, image_dir: Path) -> QuestionFile:
    table = Table(path)
    columns = set(table.columns)
    if not columns >= {"question", "answer"} or not columns & {"image", "image_path"}:
        raise ValueError(
            f"{path}: a table of VLMEvalKit has the columns question, answer (test splits, whose answers are "
            f"kept back, cannot be scored) and image or image_path; it has {', '.join(table.columns)[:200]}"
        )
    rows, sources = read_table(table)
    letters = sorted(column for column in columns if re.fullmatch("[A-Z]", column))
    said = yes_no([row["answer"] for row in rows], [row["question"] for row in rows])
    schema = "open answers"
    if letters:
        said, schema = None, f"options {letters[0]} to {letters[-1]}"
    elif said:
        schema = f"{said[0]} or {said[1]}"
    file = QuestionFile(path, f"VLMEvalKit ({schema})", [], said[0] if said else "", is_benchmark=True)
    indices = {row.get("index") for row in rows}
    for position, row in enumerate(rows):
        reason = why_not(row, letters, sources[position], indices)
        if reason:
            file.left_out[reason] += 1
        else:
            images = locate_images(table, position, row, sources[position], image_dir)
            file.entries.append(make_entry(path, position, row, images, letters, said))
    if not file.entries:
        raise ValueError(f"{path}: none of its questions can be scored: {file.count_left_out()}")
    return file


def read_table(table: Table) -> tuple[list[dict], list[list[tuple[int, int]]]]:
    """The rows of a table without their images, and where those are: row and number there of each."""
    rows, cells = [], []
    for row in table.scan():
        cell = row.pop("image", "").strip()
        cells.append(cell if len(cell) <= LONGEST_INDEX else len(split_images(cell)))
        rows.append(row)
    places = {row.get("index"): place for place, row in enumerate(rows) if isinstance(cells[place], int)}
    sources = []
    for place, cell in enumerate(cells):
        source = place if isinstance(cell, int) else places.get(cell)
        sources.append([] if source is None else [(source, number) for number in range(cells[source])])
    return rows, sources


def why_not(row: dict, letters: list[str], sources: list, indices: set) -> str:
    """Why a row cannot be asked; "" if it can."""
    index, answer = row.get("index", ""), row["answer"].strip()
    if not sources and not row.get("image_path", "").strip():
        return "without an image"
    if not row["question"].strip():
        return "without a question"
    if not answer:
        return "without an answer"
    if index.isdecimal() and int(index) >= ROTATION and str(int(index) % ROTATION) in indices:
        return "that repeat others with rotated options"
    if letters and len(options_of(row, letters)) < 2:
        return "without options"
    if letters and answer not in options_of(row, letters):
        return "whose answer is none of their options"
    return ""


def options_of(row: dict, letters: list[str]) -> dict[str, str]:
    return {letter: row[letter].strip() for letter in letters if row[letter].strip()}


def locate_images(
    table: Table, position: int, row: dict, sources: list[tuple[int, int]], image_dir: Path
) -> list[Path | Embedded]:
    name = f"{table.path}, row {position + 1}"
    if not sources:
        return [find_image(image_dir, path, name) for path in split_images(row["image_path"])]
    return [
        TableImage(f"{number + 1} in {table.path}, row {source + 1}", table, source, number)
        for source, number in sources
    ]


def make_entry(
    path: Path,
    position: int,
    row: dict,
    images: list[Path | Embedded],
    letters: list[str],
    said: tuple[str, str] | None,
) -> Entry:
    question, hint, answer = (row.get(key, "").strip() for key in ("question", "hint", "answer"))
    asked = {"question": question, "answer": answer, "kind": row.get("category", "").strip() or ALL}
    if letters:
        options = options_of(row, letters)
        asked |= {"answer": options[answer], "choices": list(options.values())}
    elif said:
        asked |= {"answer": said[not is_yes(answer)], "choices": list(said)}
    if row.get("index"):
        asked["index"] = row["index"]
    full = ask(f"{hint}\n{question}", len(images)) if hint else ask(question, len(images))
    return Entry(
        f"{path}, row {position + 1}", asked, images, full, ask(question, len(images)) if hint else None
    )


def ask(question: str, num_images: int) -> list[dict]:
    return [{"from": "human", "value": mark_images(question, num_images)}]
