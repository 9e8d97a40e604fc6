"""The demo world itself: what exists, how an image is drawn, and which images are kept for the test.

An image shows one object on a light background, and all that can be said about it is four words: its
colour, shape, size and position. That is small enough to be learnt in minutes, and large enough to ask the
question that matters: does the model SEE, or does it guess? Three splits of test images answer it.

    known          new images of combinations that training has shown
    unseen         a quarter of the (colour, shape, position) triples: never drawn and never named in
                   training, although each of their pairs is. Who learnt colour, shape and position one by one
                   can answer.
    unseen_pairs   a few (colour, shape) pairs that training never brings together. Harder: a language model
                   that never wrote "purple star" is reluctant to start with it. Reported, not promised.

The recipe lives here as well: a `Preset` holds every size, step count and learning rate of the demo.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

# ---- what exists ----

Rgb = tuple[int, int, int]

COLOURS: dict[str, Rgb] = {  # no black: so small an encoder did not learn it
    "red": (215, 30, 50),
    "yellow": (245, 220, 50),
    "green": (40, 145, 55),
    "blue": (40, 75, 215),
    "purple": (125, 40, 165),
    "orange": (245, 130, 20),
    "pink": (250, 150, 195),
    "cyan": (45, 205, 225),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
SIZES = {"large": (24.0, 27.0), "small": (11.5, 13.0)}  # radius in pixels, from - to
# The encoder cuts an image into 7 x 7 patches. These are the centres of patches 1, 3 and 5: wherever an
# object lies, the patches around it see the same, and its position is a matter of WHICH patch, not of pixels.
GRID = (27.5, 64.0, 100.5)
POSITIONS = {  # name -> (column, row)
    "top_left": (0, 0),
    "top": (1, 0),
    "top_right": (2, 0),
    "left": (0, 1),
    "middle": (1, 1),
    "right": (2, 1),
    "bottom_left": (0, 2),
    "bottom": (1, 2),
    "bottom_right": (2, 2),
}

IMAGE_SIZE = 128
JPEG_QUALITY = 92
JITTER = 1.5  # pixels that an object may lie off its grid point, in x and in y
COLOUR_JITTER = 8  # how far a named colour may be off in each channel, of 255
UNNAMED_DISTANCE = 70  # how far an unnamed colour stays from all named ones, in RGB space
TEST_SPLITS = ("known", "unseen", "unseen_pairs")
SPLITS = ("train", *TEST_SPLITS)


# ---- the recipe ----


@dataclass(frozen=True)
class Stage:
    """One training run; the learning rate falls along a cosine to a tenth of `lr`."""

    steps: int
    batch_size: int
    lr: float


@dataclass(frozen=True)
class Preset:
    """Everything that decides how large the world is and how long the training takes."""

    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    sizes: tuple[str, ...]
    train_images: int
    held_out_pairs: int  # (colour, shape) pairs that training never brings together
    text_rows: int  # about one image; half as many about two, and three for each video
    # the rows of the last stage; each video makes three
    two_image_rows: int
    train_videos: int
    one_image_rows: int
    # the language model
    dim: int
    n_layers: int
    # the stages, in the order in which they run
    clip: Stage
    llm: Stage
    pretrain: Stage
    sft: Stage
    multi: Stage
    # what both presets share
    positions: tuple[str, ...] = tuple(POSITIONS)
    test_images: int = 200  # per test split
    test_videos: int = 400  # half of them movements
    unnamed_share: float = 0.25  # training images in a colour that no word names
    n_heads: int = 8
    n_kv_heads: int = 4
    # the encoder: 3 colour axes x frequencies^2 patch filters = 192 numbers per patch, which is its width
    clip_frequencies: int = 8
    clip_layers: int = 2
    clip_heads: int = 6
    clip_hidden_dim: int = 384
    clip_text_dim: int = 128
    clip_projection_dim: int = 128


PRESETS = {
    "full": Preset(  # six to seven minutes on two cores; learns everything
        colours=tuple(COLOURS),
        shapes=SHAPES,
        sizes=tuple(SIZES),
        train_images=4000,
        held_out_pairs=4,
        text_rows=6000,
        two_image_rows=2500,
        train_videos=1000,
        one_image_rows=500,
        dim=128,
        n_layers=4,
        clip=Stage(steps=600, batch_size=64, lr=1e-3),
        llm=Stage(steps=200, batch_size=32, lr=1.5e-3),
        pretrain=Stage(steps=300, batch_size=32, lr=1.5e-3),
        sft=Stage(steps=300, batch_size=32, lr=1.5e-3),
        multi=Stage(steps=600, batch_size=16, lr=2e-3),
    ),
    "tiny": Preset(  # under a minute, for the tests
        colours=("red", "yellow", "green", "blue"),
        shapes=("circle", "square", "triangle", "star"),
        sizes=("large",),
        train_images=1000,
        held_out_pairs=2,
        text_rows=6000,
        two_image_rows=400,
        train_videos=100,
        one_image_rows=100,
        test_videos=60,
        test_images=100,
        dim=96,
        n_layers=3,
        clip=Stage(steps=150, batch_size=48, lr=1.5e-3),
        llm=Stage(steps=60, batch_size=24, lr=2e-3),
        pretrain=Stage(steps=110, batch_size=24, lr=2e-3),
        sft=Stage(steps=160, batch_size=24, lr=2e-3),
        multi=Stage(steps=50, batch_size=16, lr=1e-3),
    ),
}


# ---- one image ----


@dataclass(frozen=True)
class Scene:
    """One image before it is drawn: what may be said about it, and the exact numbers behind the words."""

    colour: str | None  # None: a colour that no word names
    shape: str
    size: str
    position: str
    rgb: Rgb
    centre: tuple[float, float]  # x, y in pixels
    radius: float
    background: Rgb


def draw(scene: Scene) -> Image.Image:
    """The image of a scene, 128 x 128 RGB."""
    scale = 4  # draw the outline four times as large and shrink it: smooth edges
    mask = Image.new("L", (IMAGE_SIZE * scale, IMAGE_SIZE * scale))
    (x, y), radius = scene.centre, scene.radius
    corners = [((x + radius * dx) * scale, (y + radius * dy) * scale) for dx, dy in outline(scene.shape)]
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), scene.background)
    image.paste(scene.rgb, mask=mask.reduce(scale))
    return image


def outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape in units of its radius, y pointing down; all within -1..1, so nothing is cut off."""
    arm = 0.34  # half the width of a bar of the cross
    corners = {
        "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
        "triangle": [(0, -0.95), (1, 0.8), (-1, 0.8)],
        "diamond": [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)],
        "cross": [
            (-arm, -1),
            (arm, -1),
            (arm, -arm),
            (1, -arm),
            (1, arm),
            (arm, arm),
            (arm, 1),
            (-arm, 1),
            (-arm, arm),
            (-1, arm),
            (-1, -arm),
            (-arm, -arm),
        ],
    }
    if shape in corners:
        return corners[shape]
    radii = {"circle": [0.95] * 60, "star": [1, 0.42] * 5}[shape]
    angles = [2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [(r * math.sin(angle), -r * math.cos(angle)) for r, angle in zip(radii, angles, strict=True)]


# ---- all images ----

Triple = tuple[str | None, str, str]  # colour, shape, position


def make_splits(preset: Preset, seed: int) -> dict[str, list[Scene]]:
    """All scenes of the world by split: train, known, unseen, unseen_pairs. A seed is a world."""
    rng = np.random.default_rng(seed)
    triples = divide_triples(preset, rng)
    num_unnamed = round(preset.train_images * preset.unnamed_share)
    unnamed = [(None, shape, position) for shape in preset.shapes for position in preset.positions]
    train = make_scenes(triples["known"], preset, preset.train_images - num_unnamed, rng)
    train += make_scenes(unnamed, preset, num_unnamed, rng)
    splits = {"train": [train[i] for i in rng.permutation(len(train))]}
    for split in TEST_SPLITS:
        splits[split] = make_scenes(triples[split], preset, preset.test_images, rng)
    return splits


def divide_triples(preset: Preset, rng: np.random.Generator) -> dict[str, list[Triple]]:
    """Deal the (colour, shape, position) triples out to the test splits; training draws those of `known`.

    A triple is unseen where its three (shuffled) ranks add up to a multiple of four. As in a Latin square,
    that takes a quarter of all triples and never all triples of a pair; chance would, sooner or later.
    """
    names = (preset.colours, preset.shapes, preset.positions)
    colours, shapes, positions = ([str(name) for name in rng.permutation(group)] for group in names)
    # Paired off in order, so that no colour and no shape is in two of the held-out pairs.
    pairs = list(zip(colours, shapes, strict=False))[: preset.held_out_pairs]
    triples: dict[str, list[Triple]] = {split: [] for split in TEST_SPLITS}
    for i, colour in enumerate(colours):
        for j, shape in enumerate(shapes):
            for k, position in enumerate(positions):
                split = "known" if (i + j + k) % 4 else "unseen"
                if (colour, shape) in pairs:
                    split = "unseen_pairs"
                triples[split].append((colour, shape, position))
    return triples


def make_scenes(
    triples: Sequence[Triple], preset: Preset, count: int, rng: np.random.Generator
) -> list[Scene]:
    """`count` scenes in shuffled rounds over all triples and sizes, so that none is missing by bad luck."""
    kinds = [(*triple, size) for triple in triples for size in preset.sizes]
    rounds = math.ceil(count / len(kinds))
    order = [kinds[i] for _ in range(rounds) for i in rng.permutation(len(kinds))]
    return [make_scene(*kind, rng) for kind in order[:count]]


def make_scene(colour: str | None, shape: str, position: str, size: str, rng: np.random.Generator) -> Scene:
    column, row = POSITIONS[position]
    background = to_rgb(rng.integers(226, 251, 3))
    if colour is None:
        rgb = choose_unnamed_rgb(background, rng)
    else:
        rgb = to_rgb(COLOURS[colour] + rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, 3))
    dx, dy = rng.uniform(-JITTER, JITTER, 2)
    return Scene(
        colour=colour,
        shape=shape,
        size=size,
        position=position,
        rgb=rgb,
        background=background,
        centre=(GRID[column] + float(dx), GRID[row] + float(dy)),
        radius=float(rng.uniform(*SIZES[size])),
    )


def choose_unnamed_rgb(background: Rgb, rng: np.random.Generator) -> Rgb:
    """A colour far from every named one and from the background; two in five are grey.

    Objects without a colour word teach the encoder that shape and position are there without one as well.
    """
    taken = np.array([*COLOURS.values(), background])
    grey = rng.random() < 0.4
    while True:
        rgb = np.full(3, rng.integers(0, 256)) if grey else rng.integers(0, 256, 3)
        if np.linalg.norm(taken - rgb, axis=1).min() > UNNAMED_DISTANCE:
            return to_rgb(rgb)


def to_rgb(values: np.ndarray) -> Rgb:
    red, green, blue = (int(value) for value in values.clip(0, 255))
    return red, green, blue
