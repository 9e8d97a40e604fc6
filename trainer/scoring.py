"""Questions with known answers: how many are answered right to the letter, and how many without seeing.

A control shows the model something else than the question is about; what it still gets right is guessed.

    real             the images and videos
    blank            features that are all zero
    shuffled         another question's: every image another image, every video another video
    swapped          the question's own images in the reverse order, where it has several and no video
    shuffled_frames  the frames of its videos in another order, where each has several

A control that says nothing about a question leaves it out.
"""

import argparse
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.chat import Chat
from model.data.formats import kind_of
from model.data.rows import Rows
from model.data.sources import Embedded, file_names, find_file, locate
from model.data.video import Frame, file_of, open_images
from model.files import encode_text, write_together
from model.generate import Sampling
from model.images import check_is_file
from model.printable import printable
from model.prompt import IMAGE_MARK, VIDEO_MARK, find_marks, normalise_turns, put_marks
from trainer.distributed import Run
from trainer.inputs import answers_path
from trainer.logger import progress_bar

TEXTS = ("question", "answer", "kind", "swapped_answer")  # of a question's row
FOLLOWS = "swapped_follows"  # in the report: answers that are right for the images as they were shown


@dataclass
class Question:
    """A row of a question file, and what it shows: for each of its marks an image, or a video's frames."""

    row: dict
    parts: list[list[Path | Frame]]
    turns: list[dict]


class ImageFeatures:
    """Features of all images of a question file, encoded once, whatever asks for them.

    They are encoded in fixed groups, so the same bits come out however the questions are shared out.
    """

    GROUP = 64

    def __init__(self, chat: Chat, images: list[Path | Frame]):
        self.chat, self.images = chat, list(dict.fromkeys(images))
        self.place = {image: number for number, image in enumerate(self.images)}
        self.groups: dict[int, Tensor] = {}

    def __getitem__(self, image: Path | Frame) -> Tensor:
        """(N, vision_dim)"""
        group, member = divmod(self.place[image], self.GROUP)
        if group not in self.groups:
            members = self.images[group * self.GROUP :][: self.GROUP]
            self.groups[group] = self.chat.encode(list(open_images(members)))
        return self.groups[group][member]


# ---- question files ----------------------------------------------------------------------------------------


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


def check_question_files(paths: Iterable[Path]) -> None:
    """Raise FileNotFoundError or ValueError, naming file and row, for the first question that could not be
    asked or scored: before a model is loaded, not when the others have been answered."""
    for path in paths:
        for _ in parse_questions(path):
            pass


def read_questions(path: Path, chat: Chat, max_frames: int) -> list[Question]:
    """The questions of a file; images and videos lie beside it. Raises FileNotFoundError or ValueError naming
    file and row."""
    questions, context = [], chat.decoder.config.max_seq_len
    for name, row, files, turns in parse_questions(path):
        try:
            parts, turns = chat.prepare(turns, files, max_frames)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        num_tokens = len(chat.render(turns).input_ids)
        if num_tokens >= context:
            raise ValueError(
                f"{name}: the question has {num_tokens} tokens with what it shows, but the model's context "
                f"holds {context} with the answer"
            )
        questions.append(Question(row, parts, turns))
    return questions


def parse_questions(path: Path) -> Iterator[tuple[str, dict, list[Path], list[dict]]]:
    """Of each row of a file: its name, the row, the files that it shows and its turns."""
    if not path.is_file():
        raise FileNotFoundError(f"question file not found: {path}")
    rows = Rows(path)
    for position in range(len(rows)):
        name = f"{path}, row {position + 1}"
        try:
            yield name, *parse_question(rows, position, path.parent)
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


# ---- controls ----------------------------------------------------------------------------------------------


def successors(count: int, seed: int) -> list[int]:
    """For each of `count` places another one, at random; alone, a place follows itself."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    after = dict(zip(order, order[1:] + order[:1], strict=True))
    return [after[place] for place in range(count)]


def find_stand_ins(questions: list[Question], seed: int) -> dict[Path, list[Path | Frame]]:
    """For every image another image of the file, and for every video another video's frames."""
    stand_ins = {}
    for is_video in (False, True):
        found = {
            file_of(part[0]): part
            for question in questions
            for part in question.parts
            if isinstance(part[0], Frame) == is_video
        }
        others = successors(len(found), seed)
        stand_ins |= {path: list(found.values())[other] for path, other in zip(found, others, strict=True)}
    return stand_ins


def resample(frames: list, count: int) -> list:
    """So many of them, at the middles of equal parts: a video of another length, frame by frame."""
    return [frames[(2 * number + 1) * len(frames) // (2 * count)] for number in range(count)]


def show(
    question: Question, control: str, stand_ins: dict[Path, list[Path | Frame]], seed: int
) -> list[Path | Frame] | None:
    """The images and frames that the model is given, in reading order; None if the control says nothing
    about this question."""
    parts = question.parts
    if control == "shuffled":
        others = [stand_ins[file_of(part[0])] for part in parts]
        if any(file_of(other[0]) == file_of(part[0]) for other, part in zip(others, parts, strict=True)):
            return None
        parts = [resample(other, len(part)) for other, part in zip(others, parts, strict=True)]
    videos = [part for part in parts if isinstance(part[0], Frame)]
    if control == "swapped":
        if videos or len(parts) < 2:
            return None
        parts = parts[::-1]
    if control == "shuffled_frames":
        if not videos or any(len(video) < 2 for video in videos):
            return None
        parts = [[part[place] for place in successors(len(part), seed)] for part in parts]
    return [image for part in parts for image in part]


# ---- answers and scores ------------------------------------------------------------------------------------


def answer_questions(
    run: Run,
    args: argparse.Namespace,
    chat: Chat,
    asked: list[tuple[Question, list]],
    features: ImageFeatures,
    control: str,
    sampling: Callable[[int], Sampling],
) -> list[str]:
    """Answers in the order of the questions, on rank 0. Whole batches go to one rank each, so that every
    answer is computed in the same batch, and comes out the same, whatever the number of processes.

    asked  questions, each with the images that the model is given
    """
    starts = range(0, len(asked), args.batch_size)
    mine = {}
    for start in progress_bar(starts[run.rank :: run.world_size], desc=control, disable=not run.is_main):
        batch = asked[start : start + args.batch_size]
        shown = [torch.stack([features[image] for image in given]) for _, given in batch]  # (n, N, V) each
        if control == "blank":
            shown = [torch.zeros_like(part) for part in shown]
        mine[start] = chat.answer_batch([question.turns for question, _ in batch], shown, sampling(start))
    return [answer for answers in run.gather_in_order(mine) for answer in answers]


def score_questions(
    run: Run, args: argparse.Namespace, chat: Chat, sampling: Callable[[int], Sampling]
) -> None:
    """Exact matches per file, kind and control: printed as a table, and written to --report.

    sampling  for the questions of a batch, by the number of the first
    """
    files = {
        split: read_questions(path, chat, args.max_frames)
        for split, path in name_files(args.questions).items()
    }
    records = []
    for split, questions in files.items():
        features = ImageFeatures(
            chat, [image for question in questions for part in question.parts for image in part]
        )
        stand_ins = find_stand_ins(questions, args.seed)
        for control in dict.fromkeys(args.control):
            shown = [
                show(question, control, stand_ins, args.seed + number)
                for number, question in enumerate(questions)
            ]
            asked = [(question, given) for question, given in zip(questions, shown, strict=True) if given]
            if not asked:
                run.print(f"{split}: the control {control} says nothing about its questions; left out")
            answers = answer_questions(run, args, chat, asked, features, control, sampling)
            if run.is_main:
                records += [
                    record_of(split, control, question, answer)
                    for (question, _), answer in zip(asked, answers, strict=True)
                ]
    if run.is_main:
        report_scores(records, args.report)


def record_of(split: str, control: str, question: Question, given: str) -> dict:
    """What the report keeps of one answer."""
    row, files = question.row, [file_of(part[0]) for part in question.parts]
    record = {
        "split": split,
        "kind": row["kind"],
        "control": control,
        "image": [
            str(file)
            for file, part in zip(files, question.parts, strict=True)
            if not isinstance(part[0], Frame)
        ],
        "question": row["question"],
        "answer": row["answer"],
        "given": given,
        "right": given == row["answer"].strip(),
    }
    if row.get("video"):
        record["video"] = [str(file) for file in files if str(file) not in record["image"]]
    if control == "swapped" and row.get("swapped_answer"):
        record |= {"swapped_answer": row["swapped_answer"], "follows": given == row["swapped_answer"].strip()}
    return record


def report_scores(records: list[dict], report_path: Path | None) -> None:
    import pandas  # only here: it takes longer to import than an answer to come

    scores = [(record["split"], record["kind"], record["control"], record["right"]) for record in records]
    scores += [
        (record["split"], record["kind"], FOLLOWS, record["follows"])
        for record in records
        if "follows" in record
    ]
    table = pandas.DataFrame(scores, columns=["split", "kind", "control", "right"]).pivot_table(
        index=["split", "kind"], columns="control", values="right", aggfunc="mean", sort=False, observed=True
    )
    print(printable(table.to_string(float_format="{:.3f}".format, na_rep="")))
    if not report_path:
        return
    report: dict = {}
    for (split, kind), values in table.iterrows():
        report.setdefault(split, {})[kind] = {
            control: round(float(score), 4) for control, score in values.dropna().items()
        }
    report_path.parent.mkdir(parents=True, exist_ok=True)
    answers = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    scores = json.dumps(report, indent=1) + "\n"
    write_together(  # or a report could stand beside another's answers
        {
            answers_path(report_path): lambda file: file.write(encode_text(answers)),
            report_path: lambda file: file.write(encode_text(scores)),
        }
    )
