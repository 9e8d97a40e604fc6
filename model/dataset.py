"""Rows of a json, jsonl or parquet file -> samples -> padded batches. One class; the stages differ by a small
spec.

    {"image": "a.jpg" | "a.jpg, b.jpg" | ["a.jpg", "b.jpg"],
     "conversations": [{"from": "human", "value": "..."}, ...]}

Letters: B rows, T tokens, t tokens of one row, n images of one row, M images in the batch, N tokens per
image, S pixels.
"""
import hashlib
import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas
import torch
from torch import Tensor
from torch.utils.data import Dataset

from model.model import IGNORE_INDEX
from model.prompt import IMAGE_MARK, check_length, normalise_turns, render_conversation
from model.vision_proj import placeholder_ids
from model.vision_utils import ImageProcessor, get_img_process, open_image


@dataclass(frozen=True)
class DatasetSpec:
    """How one stage's data differs from another's."""

    min_images: int = 1              # pictures per row, at least and at most
    max_images: int = 1
    max_rounds: int | None = None    # question-answer rounds to keep; None = all
    image_prefix: str = ""           # tried in front of a file name that is not found as it stands


PRETRAIN = DatasetSpec()
# v1 keeps the first round only, lest long texts drag a small model down. Its rows name 000000334872.jpg,
# while the files of sft_images.zip are called COCO_train2014_000000334872.jpg.
SFT = DatasetSpec(max_rounds=1, image_prefix="COCO_train2014_")
SFT_MULTI = DatasetSpec(max_images=2)
TEXT = DatasetSpec(min_images=0, max_images=0)      # a language model's conversations


def read_rows(path: str | Path) -> list[dict]:
    """All rows of a data file. Raises FileNotFoundError or ValueError with the file, the line and the
    cure."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data file not found: {path} (README, 'Data'; name yours with --data_path)")
    try:
        if path.suffix == ".parquet":
            rows = read_parquet(path)
        elif path.suffix == ".jsonl":
            with open(path, encoding="utf-8") as lines:
                rows = [parse_line(line, number, path) for number, line in enumerate(lines, 1)
                        if line.strip()]
        else:
            rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        hint = "; one object per line is .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"{path} is not valid JSON: "
                         f"line {error.lineno} column {error.colno}: {error.msg}{hint}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold a list of rows, not one {type(rows).__name__}; "
                         "one row per line is .jsonl")
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def read_parquet(path: Path) -> list[dict]:
    try:
        return pandas.read_parquet(path).to_dict("records")
    except (OSError, ValueError) as error:      # pyarrow's errors are of these two kinds
        raise ValueError(f"cannot read {path}: {error}") from None


def parse_line(line: str, number: int, path: Path) -> dict:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: "
                         f"line {number} column {error.colno}: {error.msg}") from None


def image_names(row: dict) -> list[str]:
    """The pictures of a row: a list, or one string with commas between the names."""
    images = row.get("image")
    if isinstance(images, str):
        return [name.strip() for name in images.split(",") if name.strip()]
    return [str(name) for name in images] if isinstance(images, list | np.ndarray) else []


def check_row(row: dict, spec: DatasetSpec) -> tuple[list[str], list[dict]]:
    """The picture names and turns of a row that can be trained on. Raises ValueError saying what is wrong
    with it."""
    if not isinstance(row, dict):
        raise ValueError(f"it is a {type(row).__name__}, not an object")
    conversations = row.get("conversations")
    if not isinstance(conversations, list | np.ndarray) or not len(conversations):
        raise ValueError('it has no "conversations"')
    names, turns = image_names(row), list(conversations)
    roles = [role for role, _ in normalise_turns(turns)]
    if "user" not in roles or "assistant" not in roles:
        raise ValueError("its conversations lack a question or an answer")
    if spec.max_rounds:
        turns = first_rounds(turns, roles, spec.max_rounds)
    marks = sum(text.count(IMAGE_MARK) for role, text in normalise_turns(turns) if role == "user")
    if len(names) < spec.min_images:
        raise ValueError('it has no "image"')
    if len(names) > spec.max_images:
        raise ValueError(f"it has {len(names)} pictures, but this stage takes {spec.max_images or 'none'}")
    if marks != len(names):
        raise ValueError(f"it has {marks} {IMAGE_MARK} mark(s) for {len(names)} picture(s)")
    return names, turns


def first_rounds(turns: list[dict], roles: list[str], max_rounds: int) -> list[dict]:
    """Turns up to and including the max_rounds-th answer."""
    ends = [position for position, role in enumerate(roles) if role == "assistant"]
    return turns[:ends[min(max_rounds, len(ends)) - 1] + 1]


@dataclass
class BadSample:
    """Stands in for a sample that cannot be used. A value, not an exception: it must cross process borders in
    one line."""

    reason: str


class VLMDataset(Dataset):
    """Samples of one data file; a sample that cannot be used comes out as a BadSample naming file, row and
    reason."""

    def __init__(self, data_path: str | Path, spec: DatasetSpec, tokenizer, image_dir: str | Path = ".",
                 image_processor: ImageProcessor | None = None, num_image_tokens: int = 50,
                 max_seq_len: int = 512):
        self.rows = read_rows(data_path)
        self.data_path, self.spec, self.tokenizer, self.image_dir = (
            str(data_path), spec, tokenizer, Path(image_dir))
        self.image_processor, self.num_image_tokens, self.max_seq_len = (
            image_processor, num_image_tokens, max_seq_len)
        if spec.max_images and not self.image_dir.is_dir():
            raise FileNotFoundError(f"picture folder not found: {image_dir} (name it with --image_dir)")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """Tells one data file from another, whatever it is called."""
        return hashlib.blake2b(Path(self.data_path).read_bytes(), digest_size=8).hexdigest()

    def __getitem__(self, position: int) -> dict[str, Tensor] | BadSample:
        try:
            return self.sample(position)
        except (ValueError, FileNotFoundError) as error:
            return BadSample(self.name(position, error))

    def check_rows(self) -> None:
        """Raise ValueError for the first malformed row; better now than in the third hour. Opens no
        pictures."""
        for position, row in enumerate(self.rows):
            try:
                check_row(row, self.spec)
            except ValueError as error:
                raise ValueError(self.name(position, error)) from None

    def name(self, position: int, error: Exception) -> str:
        row = self.rows[position]
        label = f" (id {row['id']})" if isinstance(row, dict) and "id" in row else ""
        return f"{self.data_path}, row {position + 1}{label}: {error}"

    def sample(self, position: int) -> dict[str, Tensor]:
        """input_ids (t,), labels (t,), image_slots (n, N), pixel_values (n, 3, S, S)."""
        names, turns = check_row(self.rows[position], self.spec)
        sample = tokenize(turns, self.tokenizer, self.num_image_tokens, self.max_seq_len)
        pixels = [get_img_process(open_image(self.find_image(name)), self.image_processor) for name in names]
        side = self.image_processor.size if self.image_processor else 1
        return sample | {"pixel_values": torch.stack(pixels) if pixels else torch.zeros(0, 3, side, side)}

    def find_image(self, name: str) -> Path:
        path = self.image_dir / name
        prefixed = path.with_name(self.spec.image_prefix + path.name)
        return prefixed if not path.exists() and prefixed.exists() else path


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


def collate(samples: list[dict[str, Tensor] | BadSample]) -> dict:
    """Samples to one batch: input_ids (B, T), labels (B, T), image_slots (M, N) flat into B * T, pixel_values
    (M, 3, S, S), num_images (B,); and as plain numbers num_tokens, num_learnt (labels that count),
    bad_samples (why some were left out).

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
    return {
        "input_ids": input_ids,
        "labels": labels,
        "image_slots": flat_slots([sample["image_slots"] for sample in good], input_ids.shape[1]),
        "pixel_values": torch.cat([sample["pixel_values"] for sample in good]),
        "num_images": torch.tensor([len(sample["image_slots"]) for sample in good]),
        "num_tokens": sum(len(sample["input_ids"]) for sample in good),
        "num_learnt": int((labels != IGNORE_INDEX).sum()),
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
