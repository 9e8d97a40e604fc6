"""Rows of a data file -> samples. One class; the stages differ by a small spec (spec.py).

    {"image": "a.jpg" | "a.jpg, b.jpg" | ["a.jpg", "b.jpg"],
     "video": "a.mp4" | ..., in the same forms (sources.py: images may also stand in the row, as base64),
     "conversations": [{"from": "human", "value": "..."}, ...], or the same as JSON text}

Rows of other schemas, and images as bytes, are read as the documented row that they amount to (schemas.py).
A video counts as so many images as it has key frames (video.py); images and videos are shown in the order of
the <image> and <video> marks in the text.

Letters: t tokens of one row, n images of one row, N tokens per image, S pixels, V CLIP width.
"""

import contextlib
import hashlib
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from model.data.batch import IGNORE_INDEX, BadSample
from model.data.feature_store import FeatureStore
from model.data.schemas import IMAGE_COLUMNS, SHEET, Stored, find_turns, list_columns
from model.data.shards import open_rows
from model.data.sources import Embedded, file_names, find_file, locate
from model.data.spec import DatasetSpec
from model.data.steady import LostFile
from model.data.video import Frame, expand_videos, load_images
from model.files import check_image_dir
from model.printable import one_line
from model.prompt import IMAGE_MARK, VIDEO_MARK, Renderer, find_marks, normalise_turns, put_marks
from model.vision_utils import ImageProcessor

# What the content of a row, an image or a video can cause, in the decoders and in what is computed of it.
CONTENT = (ValueError, OSError, MemoryError, ArithmeticError, RecursionError, EOFError, struct.error)


def check_row(
    row: dict, spec: DatasetSpec, is_file: Callable[[str], bool] = lambda name: False
) -> tuple[list[str | Stored], list[dict]]:
    """The names of images and videos, in the order of their marks, and the turns of a row that can be
    trained on. Where a schema knows no marks, all stand before the first question. Raises ValueError saying
    what is wrong with the row.

    is_file  is there a file of that name? Asked only where a comma may belong to a name
    """
    if not isinstance(row, dict):
        raise ValueError(f"it is a {type(row).__name__}, not an object")
    turns, has_marks = find_turns(row)
    texts = normalise_turns(turns)
    answers = [position for position, (role, _) in enumerate(texts) if role == "assistant"]
    if not answers or all(role != "user" for role, _ in texts):
        raise ValueError("its conversations lack a question or an answer")
    if spec.max_rounds:
        end = answers[: spec.max_rounds][-1] + 1
        turns, texts = turns[:end], texts[:end]
    if any(role == "assistant" and not text.strip() for role, text in texts):
        raise ValueError("it has an empty answer")
    marks = marks_in(texts, spec)
    images, videos = (
        file_names(row, key, marks.count(mark), is_file)
        for key, mark in (("image", IMAGE_MARK), ("video", VIDEO_MARK))
    )
    if len(images) + len(videos) < spec.min_images:
        raise ValueError(
            f'it has no "image": its columns are {list_columns(row)}; images are read from '
            f"{', '.join(IMAGE_COLUMNS)} ({SHEET}); --min_images 0 takes rows of text alone"
        )
    if len(images) > spec.max_images:
        raise ValueError(
            f"it has {len(images)} images, but this stage takes {spec.max_images or 'none'}"
            f"{no_such_file(row, 'image')}"
        )
    if videos and not spec.max_frames:
        raise ValueError(f"it has {len(videos)} video(s), but this stage takes none")
    if not marks and not has_marks:
        turns = mark_first_question(turns, len(images), len(videos))
        marks = marks_in(normalise_turns(turns), spec)
    for mark, names, what in ((IMAGE_MARK, images, "image"), (VIDEO_MARK, videos, "video")):
        if marks.count(mark) != len(names):
            raise ValueError(
                f"it has {marks.count(mark)} {mark} mark(s) for {len(names)} {what}(s)"
                f"{no_such_file(row, what)}"
            )
    files = {IMAGE_MARK: iter(images), VIDEO_MARK: iter(videos)}
    return [next(files[mark]) for mark in marks], turns


def marks_in(texts: list[tuple[str, str]], spec: DatasetSpec) -> list[str]:
    """The marks in the questions; where a stage takes no videos, "<video>" is a word like any other."""
    return [mark for mark in find_marks(texts) if mark == IMAGE_MARK or spec.max_frames]


def mark_first_question(turns: list[dict], num_images: int, num_videos: int) -> list[dict]:
    """The same turns, with a mark for each image and video in front of the first question."""
    texts = normalise_turns(turns)
    first = next(place for place, (role, _) in enumerate(texts) if role == "user")
    question = {"role": "user", "content": put_marks(texts[first][1], num_images, num_videos)}
    return [*turns[:first], question, *turns[first + 1 :]]


def no_such_file(row: dict, key: str) -> str:
    """For a message about the number of names: a string with commas may have been meant as one."""
    given = row.get(key)
    return f'; there is no file called "{given[:80]}"' if isinstance(given, str) and "," in given else ""


class VLMDataset(Dataset):
    """Samples of one data file; a sample that cannot be used comes out as a BadSample naming file, row and
    reason, whatever is in its files. Any exception but CONTENT is a mistake in the program."""

    def __init__(
        self,
        data_path: str | Path,
        spec: DatasetSpec,
        renderer: Renderer,
        image_dir: str | Path = ".",
        image_processor: ImageProcessor | None = None,
    ):
        self.rows = open_rows(data_path)
        self.spec, self.renderer, self.image_dir = spec, renderer, Path(image_dir)
        self.image_processor = image_processor
        self.feature_store: FeatureStore | None = None  # set it, and samples bring features, not pixels
        if spec.max_images:
            check_image_dir(self.image_dir)
        if renderer.tokenizer:  # trainer.check reads rows without one, too
            renderer.check_context(spec.max_images)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict[str, Tensor] | BadSample:
        try:
            return self.sample(position)
        except LostFile as error:
            return BadSample(one_line(str(error), 1000), ends_run=True)
        except CONTENT as error:
            return BadSample(f"{self.name(position)}: {reason_of(error)}")

    def check_rows(self) -> None:
        """Raise ValueError for the first malformed row; better now than in the third hour. Opens no images.
        The verdict on a large file is kept with its index."""
        problem = self.rows.remember(f"checked-{self.spec_key()}", self.first_problem)
        if problem and not self.problem_of(self.rows[problem[0]]):
            problem = self.first_problem()  # a file that was missing then may be there now
        if problem:
            position, reason = problem
            raise ValueError(f"{self.name(position)}: {reason}")

    def first_problem(self) -> tuple[int, str] | None:
        for position, row in enumerate(self.rows):
            if reason := self.problem_of(row):
                return position, reason
        return None

    def problem_of(self, row) -> str:
        """What is wrong with a row, as far as it shows without its images; "" if nothing is."""
        try:
            self.check(row)
        except LostFile:
            raise
        except CONTENT as error:
            return reason_of(error)
        return ""

    def check(self, row) -> tuple[list[str], list[dict]]:
        """check_row() for this stage and this folder of images."""
        return check_row(row, self.spec, lambda name: os.path.isfile(self.find_image(name)))

    def lengths(self) -> np.ndarray:
        """Roughly how many tokens each row has, (rows,), without a tokenizer: to sort by. Those of a large
        file are kept with its index."""
        return np.array(
            self.rows.remember(
                f"lengths-{self.renderer.num_image_tokens}-{self.spec_key()}",
                lambda: [self.rough_length(row) for row in self.rows],
            )
        )

    def rough_length(self, row) -> int:
        try:
            names, turns = self.check(row)
        except LostFile:
            raise
        except CONTENT:
            return 0
        texts = normalise_turns(turns)
        # Videos are not opened here: each counts as if it were long.
        num_videos = find_marks(texts).count(VIDEO_MARK) if self.spec.max_frames else 0
        num_images = len(names) + (self.spec.max_frames - 1) * num_videos
        # A token is about three bytes, of Chinese as of English.
        return (
            self.renderer.num_image_tokens * num_images
            + sum(len(text.encode(errors="replace")) for _, text in texts) // 3
        )

    def spec_key(self) -> str:
        return hashlib.blake2b(repr(self.spec).encode(), digest_size=4).hexdigest()

    def name(self, position: int) -> str:
        """How a person finds the row."""
        label = ""
        with contextlib.suppress(*CONTENT, KeyError, TypeError):  # a bad row may have no id
            label = f" (id {one_line(str(self.rows[position]['id']), 80)})"
        return f"{self.rows.name(position)}{label}"

    def sample(self, position: int) -> dict[str, Tensor]:
        """input_ids (t,), labels (t,), image_slots (n, N), and pixel_values (n, 3, S, S), or image_features
        (n, N, V) if there is a feature store."""
        images, turns = self.expand(position)
        sample = tokenize(turns, self.renderer)
        if len(sample["image_slots"]) != len(images):
            raise ValueError(
                f"its prompt holds {len(sample['image_slots'])} image placeholder(s) for "
                f"{len(images)} image(s)"
            )
        return sample | self.load(images)

    def expand(self, position: int) -> tuple[list[Path | Embedded | Frame], list[dict]]:
        """Of a row the images and the frames of videos, in reading order, and turns with one image mark for
        each. Raises ValueError for a bad row, and FileNotFoundError or ValueError if a video cannot be
        read."""
        names, turns = self.check(self.rows[position])
        paths = locate(names, self.rows, position, self.find_image)
        if not self.spec.max_frames:
            return paths, turns
        parts, turns = expand_videos(
            turns, paths, self.renderer, self.spec.max_frames, self.spec.frames_per_second
        )
        return [image for part in parts for image in part], turns

    def load(self, images: list[Path | Embedded | Frame]) -> dict[str, Tensor]:
        if self.feature_store is not None and images:
            return {"image_features": self.read_features(images)}
        side = self.image_processor.size if self.image_processor else 1
        pixels = load_images(images, self.image_processor)
        return {"pixel_values": torch.stack(pixels) if pixels else torch.zeros(0, 3, side, side)}

    def read_features(self, images: list[Path | Embedded | Frame]) -> Tensor:
        features: list[Tensor | None] = [None] * len(images)
        with contextlib.suppress(ValueError, FileNotFoundError):
            features = self.feature_store.read_all(images)
        lost = [image for image, found in zip(images, features, strict=True) if found is None]
        if lost:
            load_images(images, self.image_processor)  # raises, and says why, if a file is at fault
            raise ValueError(f"{lost[0]} was replaced after the images had been encoded: start again")
        return torch.stack(features)

    def find_image(self, name: str) -> Path:
        return find_file(self.image_dir, name, self.spec.image_prefix)


def reason_of(error: Exception) -> str:
    """Why a row is bad, in one line."""
    words = {MemoryError: "it needs too much memory", RecursionError: "it is nested too deeply"}
    return words.get(type(error)) or one_line(str(error) or type(error).__name__)


def tokenize(turns: list[dict], renderer: Renderer) -> dict[str, Tensor | int]:
    """A conversation as ids and labels: input_ids (t,), labels (t,), image_slots (n, N); and full_length, its
    tokens if there were no limit: beyond max_seq_len, an answer lost its end."""
    prompt = renderer.render(turns)
    end = renderer.end_of(prompt)
    ids, mask = torch.tensor(prompt.input_ids[:end]), torch.tensor(prompt.answer_mask[:end])
    return {
        "input_ids": ids[:-1],  # the one place where labels are shifted: position t learns token t + 1
        "labels": ids.masked_fill(~mask, IGNORE_INDEX)[1:],
        "image_slots": torch.tensor(prompt.image_slots, dtype=torch.long).view(-1, renderer.num_image_tokens),
        "full_length": 1 + prompt.target_positions()[-1],
    }
