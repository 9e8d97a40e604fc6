"""Rows of a data file -> samples. One class; the stages differ by a small spec (spec.py).

    {"image": "a.jpg" | "a.jpg, b.jpg" | ["a.jpg", "b.jpg"],
     "video": "a.mp4" | ..., in the same forms,
     "conversations": [{"from": "human", "value": "..."}, ...]}

A video counts as so many images as it has key frames (video.py); images and videos are shown in the order of
the <image> and <video> marks in the text.

Letters: t tokens of one row, n images of one row, N tokens per image, S pixels, V CLIP width.
"""

import contextlib
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from model.data.batch import IGNORE_INDEX, BadSample
from model.data.feature_store import FeatureStore
from model.data.rows import Rows
from model.data.spec import DatasetSpec
from model.data.video import Frame, expand_videos, load_images
from model.files import check_image_dir
from model.prompt import IMAGE_MARK, VIDEO_MARK, Renderer, find_marks, normalise_turns
from model.vision_utils import ImageProcessor


def file_names(row: dict, key: str) -> list[str]:
    """The images ("image") or videos ("video") of a row: a list, or one string with commas between the
    names. Raises ValueError."""
    given = row.get(key)
    if given is None:
        return []
    names = given.split(",") if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'its "{key}" must be a file name or a list of them, not {str(given)[:80]}')
    return [name.strip() for name in names if name.strip()]


def check_row(row: dict, spec: DatasetSpec) -> tuple[list[str], list[dict]]:
    """The names of images and videos, in the order of their marks, and the turns of a row that can be
    trained on. Raises ValueError saying what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f"it is a {type(row).__name__}, not an object")
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise ValueError('it has no "conversations"')
    images, videos = file_names(row, "image"), file_names(row, "video")
    texts = normalise_turns(turns)
    answers = [position for position, (role, _) in enumerate(texts) if role == "assistant"]
    if not answers or all(role != "user" for role, _ in texts):
        raise ValueError("its conversations lack a question or an answer")
    if spec.max_rounds:
        end = answers[: spec.max_rounds][-1] + 1
        turns, texts = turns[:end], texts[:end]
    if any(role == "assistant" and not text.strip() for role, text in texts):
        raise ValueError("it has an empty answer")
    if len(images) + len(videos) < spec.min_images:
        raise ValueError('it has no "image"')
    if len(images) > spec.max_images:
        raise ValueError(f"it has {len(images)} images, but this stage takes {spec.max_images or 'none'}")
    if videos and not spec.max_frames:
        raise ValueError(f"it has {len(videos)} video(s), but this stage takes none")
    marks = [mark for mark in find_marks(texts) if mark == IMAGE_MARK or spec.max_frames]
    for mark, names, what in ((IMAGE_MARK, images, "image"), (VIDEO_MARK, videos, "video")):
        if marks.count(mark) != len(names):
            raise ValueError(f"it has {marks.count(mark)} {mark} mark(s) for {len(names)} {what}(s)")
    files = {IMAGE_MARK: iter(images), VIDEO_MARK: iter(videos)}
    return [next(files[mark]) for mark in marks], turns


class VLMDataset(Dataset):
    """Samples of one data file; a sample that cannot be used comes out as a BadSample naming file, row and
    reason. Any other exception is a mistake in the program."""

    def __init__(
        self,
        data_path: str | Path,
        spec: DatasetSpec,
        renderer: Renderer,
        image_dir: str | Path = ".",
        image_processor: ImageProcessor | None = None,
    ):
        self.rows = Rows(data_path)
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
        except (ValueError, FileNotFoundError) as error:
            return BadSample(f"{self.name(position)}: {one_line(str(error))}")

    def check_rows(self) -> None:
        """Raise ValueError for the first malformed row; better now than in the third hour. Opens no images.
        The verdict on a large file is kept with its index."""
        problem = self.rows.remember(f"checked-{self.spec_key()}", self.first_problem)
        if problem:
            position, reason = problem
            raise ValueError(f"{self.name(position)}: {reason}")

    def first_problem(self) -> tuple[int, str] | None:
        for position, row in enumerate(self.rows):
            try:
                check_row(row, self.spec)
            except ValueError as error:
                return position, one_line(str(error))
        return None

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
            names, turns = check_row(row, self.spec)
        except ValueError:
            return 0
        # Videos are not opened here: each counts as if it were long.
        num_videos = len(file_names(row, "video"))
        num_images = len(names) + (self.spec.max_frames - 1) * num_videos
        # A token is about three bytes, of Chinese as of English.
        return (
            self.renderer.num_image_tokens * num_images
            + sum(len(text.encode(errors="replace")) for _, text in normalise_turns(turns)) // 3
        )

    def spec_key(self) -> str:
        return hashlib.blake2b(repr(self.spec).encode(), digest_size=4).hexdigest()

    def name(self, position: int) -> str:
        """How a person finds the row."""
        label = ""
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a bad row may have no id
            label = f" (id {one_line(str(self.rows[position]['id']), 80)})"
        return f"{self.rows.path}, row {position + 1}{label}"

    def sample(self, position: int) -> dict[str, Tensor]:
        """input_ids (t,), labels (t,), image_slots (n, N), and pixel_values (n, 3, S, S), or image_features
        (n, N, V) if there is a feature store."""
        images, turns = self.expand(*check_row(self.rows[position], self.spec))
        sample = tokenize(turns, self.renderer)
        if len(sample["image_slots"]) != len(images):
            raise ValueError(
                f"its prompt holds {len(sample['image_slots'])} image placeholder(s) for "
                f"{len(images)} image(s)"
            )
        return sample | self.load(images)

    def expand(self, names: list[str], turns: list[dict]) -> tuple[list[Path | Frame], list[dict]]:
        """From what check_row() returns: the images and the frames of videos, in reading order, and turns
        with one image mark for each. Raises FileNotFoundError or ValueError if a video cannot be read."""
        paths = [self.find_image(name) for name in names]
        if not self.spec.max_frames:
            return paths, turns
        parts, turns = expand_videos(
            turns, paths, self.renderer, self.spec.max_frames, self.spec.frames_per_second
        )
        return [image for part in parts for image in part], turns

    def load(self, images: list[Path | Frame]) -> dict[str, Tensor]:
        if self.feature_store is not None and images:
            return {"image_features": self.read_features(images)}
        side = self.image_processor.size if self.image_processor else 1
        pixels = load_images(images, self.image_processor)
        return {"pixel_values": torch.stack(pixels) if pixels else torch.zeros(0, 3, side, side)}

    def read_features(self, images: list[Path | Frame]) -> Tensor:
        features: list[Tensor | None] = [None] * len(images)
        with contextlib.suppress(ValueError, FileNotFoundError):
            features = self.feature_store.read_all(images)
        lost = [image for image, found in zip(images, features, strict=True) if found is None]
        if lost:
            load_images(images, self.image_processor)  # raises, and says why, if a file is at fault
            raise ValueError(f"{lost[0]} was replaced after the images had been encoded: start again")
        return torch.stack(features)

    def find_image(self, name: str) -> Path:
        path = self.image_dir / name
        # os.path and not Path: a name that no file system can hold is simply not there.
        if not self.spec.image_prefix or not path.name or os.path.exists(path):
            return path
        prefixed = path.with_name(self.spec.image_prefix + path.name)
        return prefixed if os.path.exists(prefixed) else path


def one_line(text: str, limit: int = 300) -> str:
    """Text from the data as a terminal can show it: without line ends, control characters and surrogates."""
    shown = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text[:limit])
    return shown + "..." if len(text) > limit else shown


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
