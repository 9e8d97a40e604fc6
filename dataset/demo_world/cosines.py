"""The patch filters of the demo's CLIP: cosines, JPEG's, on three colour axes. They are not learnt.

So every patch arrives as a readable description of itself, from coarse to fine, and since the filters are
linear and known, patches.py can say what they make of a scene that was never drawn.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from model.vision_utils import OPENAI_MEAN, OPENAI_STD

SIDE_PIXELS, PATCH_SIDE = 224, 32  # ViT-B/32's, hence its 50 tokens per image
PATCHES_PER_SIDE = SIDE_PIXELS // PATCH_SIDE
# Brightness, red against green, yellow against blue.
AXES = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1, -1, 0], [0.5, 0.5, -1]])
MEAN, STD = torch.tensor(OPENAI_MEAN), torch.tensor(OPENAI_STD)


@cache
def cosines(frequencies: int) -> Tensor:
    """The lowest n x n frequencies of the two-dimensional DCT-II, (n * n, 1, 32, 32), not normalised."""
    u, x = torch.arange(frequencies)[:, None], torch.arange(PATCH_SIDE)
    rows = torch.cos(math.pi * (2 * x + 1) * u / (2 * PATCH_SIDE))  # (n, 32)
    return torch.einsum("vy,ux->vuyx", rows, rows).reshape(-1, 1, PATCH_SIDE, PATCH_SIDE)


def respond(fields: Tensor, filters: Tensor) -> Tensor:
    """Fields (B, C, 224, 224) through filters (F, C, 32, 32), patch by patch: (B, 49, F)."""
    return F.conv2d(fields, filters, stride=PATCH_SIDE).flatten(2).transpose(1, 2)


def frequency_sums(frequencies: int) -> Tensor:
    """u + v of each cosine: how fine it is, (n * n,)."""
    u = torch.arange(frequencies)
    return (u[:, None] + u).flatten()


def chosen_filters(frequencies: int, coarse: int) -> Tensor:
    """Which (axis, cosine) the encoder has, as flat indices into 3 x n * n: every cosine of brightness, where
    shapes are, and the `coarse` lowest of both colour axes, for a colour is a large thing."""
    sums = frequency_sums(frequencies)
    lowest = torch.argsort(sums, stable=True)[:coarse].sort().values
    return torch.cat([torch.arange(frequencies**2), *(axis * frequencies**2 + lowest for axis in (1, 2))])


def loudness(frequencies: int, coarse: int) -> Tensor:
    """How loud each chosen filter shall be. The colours' fine cosines fall off steeply, or they shout down
    the few that tell the colour; those of brightness do not, for a shape is nothing but fine cosines
    (measured: with one law for both, shapes took three times as many steps)."""
    sums = frequency_sums(frequencies)
    by_axis = torch.stack([4 / (3 + 0.9 * sums), *[4 / (3 + 3 * sums)] * 2]).flatten()
    return by_axis[chosen_filters(frequencies, coarse)]


def filter_weights(frequencies: int, coarse: int, rms: Tensor) -> Tensor:
    """The patch convolution (W, 3, 32, 32), each filter as loud as it shall be; rms (W,) of what they say."""
    axes = AXES[:, None, :, None, None] * cosines(frequencies)[None]  # (3, n * n, 3, 32, 32)
    chosen = axes.flatten(0, 1)[chosen_filters(frequencies, coarse)]
    return chosen * (loudness(frequencies, coarse) / rms)[:, None, None, None]
