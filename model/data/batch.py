"""Samples of any length -> one padded batch.

Letters: B rows, T tokens, t tokens of one row, n images of one row, M images in the batch, N tokens per
image, S pixels, V CLIP width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import get_worker_info

IGNORE_INDEX = -100  # the label of a token that is no target


@dataclass
class BadSample:
    """Stands in for a sample that cannot be used. A value, not an exception, because it has
    to cross process borders."""

    reason: str
    ends_run: bool = False  # a file that is in use was changed (steady.py): no flag leaves that out


def pad_rows(rows: list[Tensor], value: int, multiple: int = 1) -> Tensor:
    """Ragged rows (t,) to one (B, T) tensor, padded on the right to the longest, and on to a multiple."""
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
    return F.pad(padded, (0, -padded.shape[1] % multiple), value=value)


def flat_slots(image_slots: list[Tensor], T: int) -> Tensor:
    """Per-row slots (n, N) to flat indices into B * T, (M, N)."""
    return torch.cat([slots + row * T for row, slots in enumerate(image_slots)])


def join_images(pixels: list[Tensor]) -> Tensor:
    """Images per row (n, 3, S, S) to one (M, 3, S, S); in a loader worker directly in the shared memory
    that hands them over, which saves 20 MB and a copy per batch of 32."""
    numel = sum(part.numel() for part in pixels)
    if get_worker_info() is None or not numel:
        return torch.cat(pixels)
    storage = pixels[0].untyped_storage()._new_shared(numel * pixels[0].itemsize)  # as default_collate does
    shared = pixels[0].new(storage).resize_(sum(map(len, pixels)), *pixels[0].shape[1:])
    return torch.cat(pixels, out=shared)


def collate(samples: list[dict[str, Tensor] | BadSample], multiple: int = 1) -> dict:
    """Samples of a VLMDataset to one batch.

    multiple  rows are padded to a multiple of this many tokens

    returns a dict with
        input_ids         (B, T)
        labels            (B, T)
        image_slots       (M, N), flat indices into B * T
        target_positions  (L,), where labels are not IGNORE_INDEX, flat indices into B * T
        pixel_values      (M, 3, S, S), or image_features (M, N, V) from a feature cache
        num_images        (B,)
    and as plain numbers num_rows, num_tokens, num_targets, and three lists: full_lengths, what the rows would
    have without max_seq_len; bad_samples, reasons; and lost_files, reasons to end the run.

    A batch without any usable sample becomes one row without targets, so that every rank takes every step.
    """
    good = [sample for sample in samples if not isinstance(sample, BadSample)]
    bad = [sample for sample in samples if isinstance(sample, BadSample)]
    if not good:
        good = [
            {
                "input_ids": torch.zeros(1, dtype=torch.long),
                "labels": torch.tensor([IGNORE_INDEX]),
                "image_slots": torch.zeros(0, 1, dtype=torch.long),
                "pixel_values": torch.zeros(0, 3, 1, 1),
            }
        ]
    input_ids = pad_rows([sample["input_ids"] for sample in good], 0, multiple)  # padding is never seen
    labels = pad_rows([sample["labels"] for sample in good], IGNORE_INDEX, multiple)
    target_positions = (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
    # Rows of text alone bring no features, even where those of all others come from a cache.
    images = "image_features" if any("image_features" in sample for sample in good) else "pixel_values"
    for row, sample in enumerate(good):  # VLMDataset checks this too; here it holds whoever made the samples
        num_images = len(sample.get(images, ()))
        assert num_images == len(sample["image_slots"]), f"row {row}: {num_images} image(s)"
    return {
        "input_ids": input_ids,
        "labels": labels,
        "image_slots": flat_slots([sample["image_slots"] for sample in good], input_ids.shape[1]),
        "target_positions": target_positions,
        images: join_images([sample[images] for sample in good if images in sample]),
        "num_images": torch.tensor([len(sample["image_slots"]) for sample in good]),
        "num_rows": len(samples) - len(bad),
        "num_tokens": sum(len(sample["input_ids"]) for sample in good),
        "num_targets": len(target_positions),
        "full_lengths": [sample["full_length"] for sample in good if "full_length" in sample],
        "bad_samples": [sample.reason for sample in bad if not sample.ends_run],
        "lost_files": [sample.reason for sample in bad if sample.ends_run],
    }
