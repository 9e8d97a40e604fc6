"""The work that a training step cannot do without; machine.matmul_speed() says how fast it could be done."""

import torch
from torch import Tensor
from transformers import CLIPVisionConfig

from model.data.batch import IGNORE_INDEX
from model.LMConfig import LMConfig


def row_lengths(batch: dict) -> Tensor:
    """(B,): a row ends with its last target token."""
    places = torch.arange(1, batch["labels"].shape[1] + 1)
    return torch.where(batch["labels"] != IGNORE_INDEX, places, 0).amax(1)


def needed_flops(batch: dict, config: LMConfig, vision: CLIPVisionConfig, with_clip: bool) -> float:
    """Operations of the matrix products of one step, at the rows' real lengths."""
    D, L, N, V = config.dim, config.n_layers, config.num_image_tokens, config.vision_dim
    tokens, targets = row_lengths(batch).double(), batch["num_targets"]
    attention = 2 * D * D + 2 * D * config.n_kv_heads * config.head_dim
    feed_forward = 3 * D * config.hidden_dim
    num_images = len(batch["image_slots"])
    forward = (
        2 * tokens.sum() * (L * attention + (L - 1) * feed_forward)
        + 2 * targets * (feed_forward + config.vocab_size * D)
        + 2 * L * D * tokens.square().sum()  # scores and their use, half of each being masked
        + 2 * num_images * N * V * D
    )
    per_image = 2 * (N - 1) * 3 * vision.patch_size**2 * V + vision.num_hidden_layers * (
        2 * N * (4 * V * V + 2 * V * vision.intermediate_size) + 4 * N * N * V
    )
    return float(3 * forward + with_clip * num_images * per_image)
