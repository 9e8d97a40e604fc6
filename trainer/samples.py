"""Rows and samples, looked at one by one: which are bad, what they measure, how they read."""

import contextlib
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from model.data.batch import IGNORE_INDEX, BadSample
from model.data.dataset import VLMDataset
from model.vision_proj import PLACEHOLDER, placeholder_ids
from trainer.batches import spread


class Measured(NamedTuple):
    """Of a sample: tokens as trained on, those of them that are targets, bytes of pixels, and the tokens it
    would have without --max_seq_len."""

    num_tokens: int
    num_targets: int
    num_bytes: int
    full_length: int


def well_formed(dataset: VLMDataset, number: int) -> list[list[dict]]:
    """The conversations of some rows."""
    found = []
    for position in spread(len(dataset), number):
        with contextlib.suppress(ValueError, RecursionError, MemoryError):
            found.append(dataset.check(dataset.rows[position])[1])
    return found


def bad_rows(dataset: VLMDataset) -> list[int]:
    """Positions of the rows that are malformed."""
    try:
        dataset.check_rows()  # finds the first, or none
    except ValueError:
        return [position for position, row in enumerate(dataset.rows) if dataset.problem_of(row)]
    return []


def measure(samples: list[dict[str, Tensor] | BadSample]) -> list[Measured | str]:
    """Instead of a batch: what each sample measures, or why it cannot be used."""
    return [
        sample.reason
        if isinstance(sample, BadSample)
        else Measured(
            len(sample["input_ids"]),
            int((sample["labels"] != IGNORE_INDEX).sum()),
            sample["pixel_values"].nbytes,
            sample["full_length"],
        )
        for sample in samples
    ]


def decode_sample(sample: dict[str, Tensor], tokenizer, placeholder: tuple[int, int] = PLACEHOLDER) -> str:
    """A sample as one line of text: [[targets]], and <image x50> for the placeholder of an image.

    Raises ValueError if other ids stand where an image's features will be written.
    """
    slots = sample["image_slots"]
    if not (sample["input_ids"][slots] == torch.tensor(placeholder_ids(slots.shape[1], placeholder))).all():
        raise ValueError("other ids stand where the placeholder of an image should")
    ids = [*sample["input_ids"].tolist(), int(sample["labels"][-1])]
    kinds = [
        "given",
        *("target" if label != IGNORE_INDEX else "given" for label in sample["labels"].tolist()),
    ]
    for number, places in enumerate(slots.tolist()):
        for place in places:
            kinds[place] = f"image {number}"
    text = ""
    for kind, group in groupby(zip(kinds, ids, strict=True), key=lambda pair: pair[0]):
        run = [token for _, token in group]
        part = tokenizer.decode(run)
        text += {"given": part, "target": f"[[{part}]]"}.get(kind, f"<image x{len(run)}>")
    return text.replace("\n", "\\n")
