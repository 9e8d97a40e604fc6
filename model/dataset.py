"""Rows of a json, jsonl or parquet file -> samples -> padded batches. One class; the stages differ by a small
spec.

    {"image": "a.jpg" | "a.jpg, b.jpg" | ["a.jpg", "b.jpg"],
     "video": "a.mp4" | ..., in the same forms,
     "conversations": [{"from": "human", "value": "..."}, ...]}

A film counts as so many pictures as it has key frames (video.py); pictures and films are shown in the order
of the <image> and <video> marks in the text.

Letters: B rows, T tokens, t tokens of one row, n images of one row, M images in the batch, N tokens per
image, S pixels.
"""
import contextlib
import hashlib
import os
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from model.feature_store import FeatureStore
from model.model import IGNORE_INDEX
from model.prompt import (
    IMAGE_MARK,
    VIDEO_MARK,
    check_length,
    find_marks,
    normalise_turns,
    render_conversation,
)
from model.rows import Rows
from model.video import Frame, lay_out, load_pictures
from model.vision_proj import placeholder_ids
from model.vision_utils import ImageProcessor


@dataclass(frozen=True)
class DatasetSpec:
    """How one stage's data differs from another's."""

    min_images: int = 1              # pictures and films per row, at least
    max_images: int = 1              # pictures per row, at most
    max_frames: int = 0              # of each film, at most; 0 = no films, and <video> is a word like others
    frames_per_second: float = 1.0   # of a film that is short enough for it
    max_rounds: int | None = None    # question-answer rounds to keep; None = all
    image_prefix: str = ""           # tried in front of a file name that is not found as it stands


PRETRAIN = DatasetSpec()
# v1 keeps the first round only, lest long texts drag a small model down. Its rows name 000000334872.jpg,
# while the files of sft_images.zip are called COCO_train2014_000000334872.jpg.
SFT = DatasetSpec(max_rounds=1, image_prefix="COCO_train2014_")
SFT_MULTI = DatasetSpec(max_images=2, max_frames=8)
TEXT = DatasetSpec(min_images=0, max_images=0)      # a language model's conversations


def file_names(row: dict, key: str) -> list[str]:
    """The pictures ("image") or films ("video") of a row: a list, or one string with commas between the
    names. Raises ValueError."""
    given = row.get(key)
    if given is None:
        return []
    names = given.split(",") if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'its "{key}" must be a file name or a list of them, not {str(given)[:80]}')
    return [name.strip() for name in names if name.strip()]


def check_row(row: dict, spec: DatasetSpec) -> tuple[list[str], list[dict]]:
    """The names of pictures and films, in the order of their marks, and the turns of a row that can be
    trained on. Raises ValueError saying what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f"it is a {type(row).__name__}, not an object")
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise ValueError('it has no "conversations"')
    pictures, films = file_names(row, "image"), file_names(row, "video")
    texts = normalise_turns(turns)
    answers = [position for position, (role, _) in enumerate(texts) if role == "assistant"]
    if not answers or all(role != "user" for role, _ in texts):
        raise ValueError("its conversations lack a question or an answer")
    if spec.max_rounds:
        end = answers[:spec.max_rounds][-1] + 1
        turns, texts = turns[:end], texts[:end]
    if any(role == "assistant" and not text.strip() for role, text in texts):
        raise ValueError("it has an empty answer")
    if len(pictures) + len(films) < spec.min_images:
        raise ValueError('it has no "image"')
    if len(pictures) > spec.max_images:
        raise ValueError(f"it has {len(pictures)} pictures, but this stage takes {spec.max_images or 'none'}")
    if films and not spec.max_frames:
        raise ValueError(f"it has {len(films)} film(s), but this stage takes none")
    marks = [mark for mark in find_marks(texts) if mark == IMAGE_MARK or spec.max_frames]
    for mark, names, what in ((IMAGE_MARK, pictures, "picture"), (VIDEO_MARK, films, "film")):
        if marks.count(mark) != len(names):
            raise ValueError(f"it has {marks.count(mark)} {mark} mark(s) for {len(names)} {what}(s)")
    files = {IMAGE_MARK: iter(pictures), VIDEO_MARK: iter(films)}
    return [next(files[mark]) for mark in marks], turns


@dataclass
class BadSample:
    """Stands in for a sample that cannot be used. A value, not an exception: it must cross process borders in
    one line."""

    reason: str


class VLMDataset(Dataset):
    """Samples of one data file; a sample that cannot be used comes out as a BadSample naming file, row and
    reason. Any other exception is a mistake in the program."""

    def __init__(self, data_path: str | Path, spec: DatasetSpec, tokenizer, image_dir: str | Path = ".",
                 image_processor: ImageProcessor | None = None, num_image_tokens: int = 50,
                 max_seq_len: int = 512):
        self.rows = Rows(data_path)
        self.spec, self.tokenizer, self.image_dir = spec, tokenizer, Path(image_dir)
        self.image_processor, self.num_image_tokens, self.max_seq_len = (
            image_processor, num_image_tokens, max_seq_len)
        self.feature_store: FeatureStore | None = None      # set it, and samples bring features, not pixels
        # One int64 per loader worker, in shared memory: the sample it works on, or -1.
        self.held: Tensor | None = None
        if spec.max_images and not self.image_dir.is_dir():
            raise FileNotFoundError(f"picture folder not found: {image_dir} (name it with --image_dir)")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict[str, Tensor] | BadSample:
        self.hold(position)
        try:
            return self.sample(position)
        except (ValueError, FileNotFoundError) as error:
            return BadSample(f"{self.name(position)}: {one_line(str(error))}")
        finally:
            self.hold(-1)

    def hold(self, position: int) -> None:
        """Leave word of what this process works on, for whoever finds it dead."""
        worker = get_worker_info()
        if worker and self.held is not None:
            self.held[worker.id] = position

    def check_rows(self) -> None:
        """Raise ValueError for the first malformed row; better now than in the third hour. Opens no pictures.
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
        return np.array(self.rows.remember(f"lengths-{self.num_image_tokens}-{self.spec_key()}",
                                           lambda: [self.rough_length(row) for row in self.rows]))

    def rough_length(self, row) -> int:
        try:
            names, turns = check_row(row, self.spec)
        except ValueError:
            return 0
        # Films are not opened here: each counts as if it were long.
        num_films = len(file_names(row, "video"))
        num_images = len(names) + (self.spec.max_frames - 1) * num_films
        # A token is about three bytes, of Chinese as of English.
        return (self.num_image_tokens * num_images
                + sum(len(text.encode(errors="replace")) for _, text in normalise_turns(turns)) // 3)

    def spec_key(self) -> str:
        return hashlib.blake2b(repr(self.spec).encode(), digest_size=4).hexdigest()

    def name(self, position: int) -> str:
        """How a person finds the row."""
        label = ""
        with contextlib.suppress(ValueError, KeyError, TypeError):      # a bad row may have no id
            label = f" (id {one_line(str(self.rows[position]['id']), 80)})"
        return f"{self.rows.path}, row {position + 1}{label}"

    def sample(self, position: int) -> dict[str, Tensor]:
        """input_ids (t,), labels (t,), image_slots (n, N), and pixel_values (n, 3, S, S), or image_features
        (n, N, V) if there is a feature store."""
        pictures, turns = self.what_is_shown(*check_row(self.rows[position], self.spec))
        sample = tokenize(turns, self.tokenizer, self.num_image_tokens, self.max_seq_len)
        return sample | self.images(pictures)

    def what_is_shown(self, names: list[str], turns: list[dict]) -> tuple[list[Path | Frame], list[dict]]:
        """From what check_row() returns: the pictures and the frames of films, in reading order, and turns
        with one image mark for each. Raises FileNotFoundError or ValueError if a film cannot be read."""
        paths = [self.find_image(name) for name in names]
        if not self.spec.max_frames:
            return paths, turns
        parts, turns = lay_out(turns, paths, self.tokenizer, self.num_image_tokens, self.max_seq_len,
                               self.spec.max_frames, self.spec.frames_per_second)
        return [picture for part in parts for picture in part], turns

    def images(self, pictures: list[Path | Frame]) -> dict[str, Tensor]:
        if self.feature_store is not None and pictures:
            return {"image_features": self.read_features(pictures)}
        side = self.image_processor.size if self.image_processor else 1
        pixels = load_pictures(pictures, self.image_processor)
        return {"pixel_values": torch.stack(pixels) if pixels else torch.zeros(0, 3, side, side)}

    def read_features(self, pictures: list[Path | Frame]) -> Tensor:
        features: list[Tensor | None] = [None] * len(pictures)
        with contextlib.suppress(ValueError, FileNotFoundError):
            features = self.feature_store.read_all(pictures)
        lost = [picture for picture, found in zip(pictures, features, strict=True) if found is None]
        if lost:
            load_pictures(pictures, self.image_processor)       # raises, and says why, if a file is at fault
            raise ValueError(f"{lost[0]} was replaced after the pictures had been encoded: start again")
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


def tokenize(turns: list[dict], tokenizer, num_image_tokens: int, max_seq_len: int) -> dict[str, Tensor]:
    """A conversation as ids and labels: input_ids (t,), labels (t,), image_slots (n, N)."""
    prompt = render_conversation(turns, tokenizer, num_image_tokens)
    end = check_length(prompt, max_seq_len)
    ids, mask = torch.tensor(prompt.input_ids[:end]), torch.tensor(prompt.answer_mask[:end])
    return {
        "input_ids": ids[:-1],        # the one place where labels are shifted: position t learns token t + 1
        "labels": ids.masked_fill(~mask, IGNORE_INDEX)[1:],
        "image_slots": torch.tensor(prompt.image_slots, dtype=torch.long).view(-1, num_image_tokens),
    }


def pad_rows(rows: list[Tensor], value: int) -> Tensor:
    """Ragged rows (t,) to one (B, T) tensor, padded on the right to the longest."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def flat_slots(image_slots: list[Tensor], T: int) -> Tensor:
    """Per-row slots (n, N) to flat indices into B * T, (M, N)."""
    return torch.cat([slots + row * T for row, slots in enumerate(image_slots)])


def join_pictures(pixels: list[Tensor]) -> Tensor:
    """Pictures per row (n, 3, S, S) to one (M, 3, S, S); in a loader worker directly in the shared memory
    that hands them over, which saves 20 MB and a copy per batch of 32."""
    numel = sum(part.numel() for part in pixels)
    if get_worker_info() is None or not numel:
        return torch.cat(pixels)
    storage = pixels[0].untyped_storage()._new_shared(numel * pixels[0].itemsize)   # as default_collate does
    shared = pixels[0].new(storage).resize_(sum(map(len, pixels)), *pixels[0].shape[1:])
    return torch.cat(pixels, out=shared)


def collate(samples: list[dict[str, Tensor] | BadSample]) -> dict:
    """Samples to one batch: input_ids (B, T), labels (B, T), image_slots (M, N) flat into B * T, learnt (L,)
    flat into B * T, pixel_values (M, 3, S, S) or image_features (M, N, V), num_images (B,); and as plain
    numbers num_tokens, num_learnt (labels that count), bad_samples (why some were left out).

    A batch without any usable sample becomes one row with nothing to learn, so that every rank takes every
    step.
    """
    good = [sample for sample in samples if not isinstance(sample, BadSample)]
    bad = [sample.reason for sample in samples if isinstance(sample, BadSample)]
    if not good:
        good = [{"input_ids": torch.zeros(1, dtype=torch.long), "labels": torch.tensor([IGNORE_INDEX]),
                 "image_slots": torch.zeros(0, 1, dtype=torch.long), "pixel_values": torch.zeros(0, 3, 1, 1)}]
    # What stands in the padding is never seen.
    input_ids = pad_rows([sample["input_ids"] for sample in good], 0)
    labels = pad_rows([sample["labels"] for sample in good], IGNORE_INDEX)
    learnt = (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
    images = "image_features" if "image_features" in good[0] else "pixel_values"
    return {
        "input_ids": input_ids,
        "labels": labels,
        "image_slots": flat_slots([sample["image_slots"] for sample in good], input_ids.shape[1]),
        "learnt": learnt,
        images: join_pictures([sample[images] for sample in good]),
        "num_images": torch.tensor([len(sample["image_slots"]) for sample in good]),
        "num_tokens": sum(len(sample["input_ids"]) for sample in good),
        "num_learnt": len(learnt),
        "bad_samples": bad,
    }


def decode_sample(sample: dict[str, Tensor], tokenizer) -> str:
    """A sample as one line of text: [[what is learnt]], and <image x50> for the placeholder of a picture.

    Raises ValueError if other ids stand where a picture's features will be written.
    """
    slots = sample["image_slots"]
    if not (sample["input_ids"][slots] == torch.tensor(placeholder_ids(slots.shape[1]))).all():
        raise ValueError("other ids stand where the placeholder of a picture should")
    ids = [*sample["input_ids"].tolist(), int(sample["labels"][-1])]
    kinds = ["told", *("learnt" if label != IGNORE_INDEX else "told" for label in sample["labels"].tolist())]
    for number, places in enumerate(slots.tolist()):
        for place in places:
            kinds[place] = f"image {number}"
    text = ""
    for kind, group in groupby(zip(kinds, ids, strict=True), key=lambda pair: pair[0]):
        run = [token for _, token in group]
        part = tokenizer.decode(run)
        text += {"told": part, "learnt": f"[[{part}]]"}.get(kind, f"<image x{len(run)}>")
    return text.replace("\n", "\\n")
