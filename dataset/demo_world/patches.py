"""Endless scenes without drawing one: what the encoder's frozen filters make of a scene, by addition.

The filters of the demo's CLIP are cosines, and they are linear. So what they say of a patch is a sum:

    paper + (colour - paper) x what they say of the pixels that a thing covers, for each of the things

A bank of some 27,000 drawn forms therefore makes as many different scenes as training can take, for the price
of a few products each; drawing and reading the images would cost a hundred times as much as a training step
has time for. Scenes here may hold more things than an image of the world, for each of them teaches.

Letters: S scenes, K things per scene at most, P = 49 patches, F = frequencies^2 cosines.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import torch
from PIL import Image, ImageChops, ImageFilter
from torch import Tensor

from dataset.demo_world.colours import COLOURS, MIN_CONTRAST, named_rgbs, unnamed_rgbs
from dataset.demo_world.cosines import AXES, MEAN, PATCHES_PER_SIDE, SIDE_PIXELS, STD, cosines, respond
from dataset.demo_world.paint import (
    choose_edges,
    draw_blur,
    draw_format,
    draw_noise,
    draw_papers,
    draw_slopes,
    draw_smoothness,
)
from dataset.demo_world.scenes import SINGLE_SPLITS, are_kept_apart, split_of
from dataset.demo_world.things import GAP, POSITIONS, SHAPES, SIDE, SIZES, Form, cover, make_form

UNNAMED = len(COLOURS)  # the number of a colour without a name
FORMS_AT_ONCE = 128
CANDIDATES = 12  # colours drawn for a thing, of which the first that stands out is taken
KNOWN = SINGLE_SPLITS.index("known")


def table_of_splits() -> np.ndarray:
    """(colours + 1, shapes, positions) -> number in SINGLE_SPLITS; an unnamed colour is always known."""
    return np.array(
        [
            [[SINGLE_SPLITS.index(split_of(c, s, p)) for p in POSITIONS] for s in SHAPES]
            for c in (*COLOURS, None)
        ]
    )


def table_of_sets() -> np.ndarray:
    """(things, things) with thing = colour * shapes + shape: whether training may show both in one scene."""
    things = [(colour, shape) for colour in (*COLOURS, None) for shape in SHAPES]
    return np.array([[not are_kept_apart(first, second) for second in things] for first in things])


SPLIT_TABLE, TOGETHER_TABLE = table_of_splits(), table_of_sets()


# ---- the bank ----


@dataclass(frozen=True)
class Bank:
    """What the cosines say of drawn forms, `each` of every (shape, position, size) in this order."""

    inside: Tensor  # (N, P, F) float16: of the pixels with the thing's own colour
    line: Tensor  # (N, P, F) float16: of those with its edge's
    circles: np.ndarray  # (N, 3): centre x, y and radius
    each: int

    def first(self, shape: np.ndarray, position: np.ndarray, size: np.ndarray) -> np.ndarray:
        """Where the forms of a kind begin."""
        return ((shape * len(POSITIONS) + position) * len(SIZES) + size) * self.each


def make_bank(
    each: int, frequencies: int, rng: np.random.Generator, clear: bool = False, thin: bool = False
) -> Bank:
    """`each` forms of every kind; see make_form."""
    kinds = [kind for kind in product(SHAPES, POSITIONS, SIZES) for _ in range(each)]
    inside, line, circles = [], [], []
    for start in range(0, len(kinds), FORMS_AT_ONCE):
        forms = [make_form(*kind, rng, clear, thin) for kind in kinds[start : start + FORMS_AT_ONCE]]
        circles += [(*form.centre, form.radius) for form in forms]
        masks = torch.from_numpy(np.stack([draw_form(form, rng) for form in forms]))  # (n, 2, 224, 224)
        for number, said in enumerate((inside, line)):
            said.append(respond(masks[:, number : number + 1], cosines(frequencies)).half())
    return Bank(torch.cat(inside), torch.cat(line), np.array(circles), each)


def draw_form(form: Form, rng: np.random.Generator) -> np.ndarray:
    """(2, 224, 224), 0..1: the pixels with the thing's own colour, and those with its edge's, as they are
    after an image of any of the FORMATS has been squashed."""
    masks = cover(form, *draw_format(rng), draw_smoothness(rng))
    return squash_masks(*masks, draw_blur(rng))


def squash_masks(inside: Image.Image, line: Image.Image | None, blur: float = 0.0) -> np.ndarray:
    """What things.cover() gave, as it is after the image has been squashed to CLIP's square."""
    line = line or Image.new("L", inside.size)
    own = ImageChops.multiply(inside, ImageChops.invert(line))  # the edge is painted over it
    masks = (mask.filter(ImageFilter.GaussianBlur(blur)) if blur else mask for mask in (own, line))
    squashed = [mask.resize((SIDE_PIXELS, SIDE_PIXELS), Image.Resampling.BICUBIC) for mask in masks]
    return np.stack(squashed).astype(np.float32) / 255


# ---- scenes of it ----


@dataclass(frozen=True)
class Crowd:
    """S scenes of up to K things as numbers, all (S, K) but count (S,)."""

    count: np.ndarray
    colour: np.ndarray
    shape: np.ndarray
    position: np.ndarray
    size: np.ndarray
    form: np.ndarray  # index into the bank

    def things(self) -> tuple[np.ndarray, np.ndarray]:
        """Scene and place of every thing that there is."""
        return np.nonzero(np.arange(self.colour.shape[1]) < self.count[:, None])


def draw_crowd(
    counts: np.ndarray,
    bank: Bank,
    rng: np.random.Generator,
    colours: Sequence[int] = range(UNNAMED),
    shapes: Sequence[int] = range(len(SHAPES)),
    sizes: Sequence[int] = range(len(SIZES)),
    unnamed_share: float = 0.0,
    split: str = "known",
) -> Crowd:
    """Scenes of `counts` (S,) things without overlap, one after the other thrown anew until it fits.

    colours, shapes, sizes  numbers to choose from, one as often as another
    unnamed_share  of the things have a colour without a name
    split          of the first thing of each scene; the others are `known`. Never are two things side by side
                   that the world keeps apart
    A scene in which a thing finds no place keeps those before it.
    """
    counts = counts.copy()
    crowd = Crowd(counts, *(np.zeros((len(counts), counts.max()), int) for _ in range(5)))
    for k in range(counts.max()):
        waiting = np.flatnonzero(counts > k)
        for _ in range(200):
            if not len(waiting):
                break
            n = len(waiting)
            colour = np.where(rng.random(n) < unnamed_share, UNNAMED, rng.choice(colours, n))
            shape, size = rng.choice(shapes, n), rng.choice(sizes, n)
            position = rng.integers(len(POSITIONS), size=n)
            form = bank.first(shape, position, size) + rng.integers(bank.each, size=n)
            wanted = SINGLE_SPLITS.index(split) if k == 0 else KNOWN
            fits = SPLIT_TABLE[colour, shape, position] == wanted
            x, y, radius = bank.circles[form].T
            for other in range(k):
                there = bank.circles[crowd.form[waiting, other]]
                gap = np.hypot(x - there[:, 0], y - there[:, 1]) - radius - there[:, 2]
                ranks = colour * len(SHAPES) + shape
                other_ranks = crowd.colour[waiting, other] * len(SHAPES) + crowd.shape[waiting, other]
                fits &= (gap > GAP) & (position != crowd.position[waiting, other])
                fits &= TOGETHER_TABLE[ranks, other_ranks]
            placed = waiting[fits]
            for name, values in {
                "colour": colour,
                "shape": shape,
                "position": position,
                "size": size,
                "form": form,
            }.items():
                getattr(crowd, name)[placed, k] = values[fits]
            waiting = waiting[~fits]
        counts[waiting] = k
    return crowd


def cells(crowd: Crowd, bank: Bank, scene: np.ndarray, k: np.ndarray) -> np.ndarray:
    """The patch in which the centre of each of these things lies."""
    x, y = (bank.circles[crowd.form[scene, k], axis] * PATCHES_PER_SIDE / SIDE for axis in (0, 1))
    return y.astype(int) * PATCHES_PER_SIDE + x.astype(int)


def see(crowd: Crowd, bank: Bank, frequencies: int, rng: np.random.Generator) -> Tensor:
    """What the cosines say of the crowd on papers and in colours by chance: (S, P, 3, F)."""
    S = len(crowd.count)
    papers, colours = dress(crowd, rng)
    edges, slopes = choose_edges(colours, rng), draw_slopes(S, rng)
    return compose(crowd, bank, papers, colours, edges, slopes) + noise(S, frequencies, rng)


def compose(
    crowd: Crowd, bank: Bank, papers: np.ndarray, colours: np.ndarray, edges: np.ndarray, slopes: np.ndarray
) -> Tensor:
    """What the cosines say of these scenes, (S, P, 3, F), from papers (S, 3), colours and edges (S, K, 3) and
    the light's slopes (S, 2), all 0..255: the same as of the drawn images, but for rounding and clipping."""
    paper = on_axes(papers)
    flat, right, down = say_of_light(math.isqrt(bank.inside.shape[-1]))  # (P, F) each
    said = paper[:, None, :, None] * flat[:, None]  # (S, P, 3, F)
    slopes = torch.from_numpy(slopes).float() / 255
    light = slopes[:, :1, None] * right + slopes[:, 1:, None] * down  # (S, P, F)
    said += light[:, :, None] * ((1 / STD) @ AXES.T)[:, None]
    for k in range(crowd.colour.shape[1]):
        there = np.flatnonzero(crowd.count > k)
        form = torch.from_numpy(crowd.form[there, k])
        for rgbs, masks in ((colours, bank.inside), (edges, bank.line)):
            contrast = on_axes(rgbs[there, k]) - paper[there]
            said[there] += contrast[:, None, :, None] * masks[form].float()[:, :, None]
    return said


def dress(crowd: Crowd, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Papers (S, 3) and colours (S, K, 3), 0..255, every thing standing out from its paper."""
    S, K = crowd.colour.shape
    papers, colours = np.zeros((S, 3)), np.zeros((S, K, 3))
    exists = np.arange(K) < crowd.count[:, None]
    bare = np.arange(S)
    while len(bare):
        papers[bare] = draw_papers(len(bare), rng)
        number = np.broadcast_to(crowd.colour[bare][..., None], (len(bare), K, CANDIDATES)).reshape(-1)
        drawn = named_rgbs(np.minimum(number, UNNAMED - 1), rng)
        drawn[number == UNNAMED] = unnamed_rgbs(int((number == UNNAMED).sum()), rng)
        drawn = drawn.reshape(len(bare), K, CANDIDATES, 3)
        stands_out = np.linalg.norm(drawn - papers[bare][:, None, None], axis=-1) > MIN_CONTRAST
        first = stands_out.argmax(-1)
        colours[bare] = np.take_along_axis(drawn, first[..., None, None], axis=2)[:, :, 0]
        bare = bare[~(stands_out.any(-1) | ~exists[bare]).all(1)]
    return papers, colours


def noise(count: int, frequencies: int, rng: np.random.Generator) -> Tensor:
    """White on the images' pixels, so that its strength in each cosine is known."""
    deviation = draw_noise(count, rng) / 255
    strength = cosines(frequencies).flatten(1).norm(dim=1) * (SIDE_PIXELS / SIDE)  # of a pixel, enlarged
    by_axis = (AXES / STD).norm(dim=1)
    drawn = torch.from_numpy(
        rng.standard_normal((count, PATCHES_PER_SIDE**2, 3, frequencies**2), dtype=np.float32)
    )
    return drawn * strength * by_axis[:, None] * torch.from_numpy(deviation).float()[:, None, None, None]


@cache
def say_of_light(frequencies: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the cosines say of a white image, and of light that grows from -1 to 1 to the right, or downwards:
    (P, F) each."""
    ramp = torch.linspace(-1, 1, SIDE_PIXELS).expand(SIDE_PIXELS, -1)
    flat, right, down = respond(
        torch.stack([torch.ones_like(ramp), ramp, ramp.T])[:, None], cosines(frequencies)
    )
    return flat, right, down


def on_axes(rgbs: np.ndarray) -> Tensor:
    """Colours (..., 3), 0..255, as CLIP's input has them, on the three axes of the filters."""
    return ((torch.from_numpy(np.asarray(rgbs)).float() / 255 - MEAN) / STD) @ AXES.T
