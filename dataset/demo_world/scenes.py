"""What the images of the demo world show, and which of them are kept for the test.

An image shows one to three things on a paper. All that can be said of a thing is four words, its colour,
shape, size and position. That is small enough to be learnt in minutes, and large enough to ask the question
that matters: does the model SEE, or does it guess? What it is asked about was never drawn in training, by a
rule that is the same for every seed, so that the encoder, which is trained once for all, keeps to it too.

    known           new images of combinations that training has shown
    unseen          a quarter of the (colour, shape, position) triples: never drawn and never named in
                    training, although each of their pairs is. Who learnt colour, shape and position one by
                    one can answer.
    unseen_pairs    four (colour, shape) pairs that training never brings together. Harder: a language model
                    that never wrote "purple star" is reluctant to start with it. Reported, not promised.
    several_known   new images of two and three things
    several_unseen  the same with two things side by side (a red star and a blue circle, say) that no training
                    image shows together; a fifth of all pairs of things
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from dataset.demo_world import paint
from dataset.demo_world.colours import (
    BOXES,
    COLOURS,
    MIN_CONTRAST,
    Rgb,
    from_hsv,
    named_rgbs,
    to_hsv,
    to_rgb,
    unnamed_rgbs,
)
from dataset.demo_world.recipe import Preset
from dataset.demo_world.things import GAP, POSITIONS, SHAPES, SIDE, Form, Thing, cover, make_form

HELD_OUT_PAIRS = (("purple", "star"), ("yellow", "triangle"), ("blue", "square"), ("pink", "diamond"))
SINGLE_SPLITS = ("known", "unseen", "unseen_pairs")
SEVERAL_SPLITS = ("several_known", "several_unseen")
TEST_SPLITS = (*SINGLE_SPLITS, *SEVERAL_SPLITS)
SPLITS = ("train", *TEST_SPLITS)
HOW_MANY = (2, 2, 3)  # things in the images of several, in turn
SEVERAL_TESTS = 1.5  # times as many test images of several things: 200 of two, 100 of three

PNG_SHARE = 0.3
JPEG_QUALITY = (75, 96)
# Of the mean of R, G and B, between a thing and its paper. Where little but the hue differs, outlines are
# hard to see; the encoder, whose filters are of brightness above all, trains on such images, mistaking many.
MIN_BRIGHTNESS_CONTRAST = 25
# In RGB, from every colour of another name. Pink lies between red and purple: half of all wrong colours were
# salmons and mauves, most of them small and with a dark edge.
MIN_NAME_DISTANCE = {"pink": 60}
TRIES = 60  # for a place without overlap, or a colour that stands out, before another scene is begun


@dataclass(frozen=True)
class Paper:
    """What lies behind the things, and the light on it all, growing rightwards and downwards by `slope`."""

    rgb: Rgb
    slope: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Scene:
    """One image before it is drawn; its things in reading order."""

    things: tuple[Thing, ...]
    paper: Paper
    width: int = SIDE
    height: int = SIDE
    smooth: int = paint.SMOOTH
    blur: float = 0.0
    noise: float = 0.0
    seed: int = 0  # of the noise
    quality: int | None = 92  # of the JPEG; None: a PNG

    @property
    def suffix(self) -> str:
        return "jpg" if self.quality else "png"


# ---- what is held out, whatever the seed ----

Triple = tuple[str | None, str, str]  # colour, shape, position
Kind = tuple[str | None, str, str, str]  # and size


def split_of(colour: str | None, shape: str, position: str) -> str:
    """Which of SINGLE_SPLITS a triple belongs to; training draws those of `known`.

    A triple is unseen where its three ranks add up to a multiple of four. As in a Latin square, that takes a
    quarter of all triples and never all triples of a pair; chance would, sooner or later.
    """
    if colour is None:
        return "known"
    if (colour, shape) in HELD_OUT_PAIRS:
        return "unseen_pairs"
    ranks = list(COLOURS).index(colour) + SHAPES.index(shape) + list(POSITIONS).index(position)
    return "known" if ranks % 4 else "unseen"


def are_kept_apart(first: tuple[str | None, str], second: tuple[str | None, str]) -> bool:
    """Whether training never shows two (colour, shape) side by side."""
    if first[0] is None or second[0] is None:
        return False
    ranks = [
        list(COLOURS).index(colour) * len(SHAPES) + SHAPES.index(shape) for colour, shape in (first, second)
    ]
    return sum(ranks) % 5 == 0


def holds_a_set_kept_apart(kinds: Sequence[Kind] | Sequence[Triple]) -> bool:
    return any(are_kept_apart(first[:2], second[:2]) for first, second in combinations(kinds, 2))


def divide_triples(preset: Preset) -> dict[str, list[Triple]]:
    """All (colour, shape, position) triples of a preset's world by split."""
    triples: dict[str, list[Triple]] = {split: [] for split in SINGLE_SPLITS}
    for colour in preset.colours:
        for shape in preset.shapes:
            for position in POSITIONS:
                triples[split_of(colour, shape, position)].append((colour, shape, position))
    return triples


# ---- all scenes ----


def make_splits(preset: Preset, seed: int) -> dict[str, list[Scene]]:
    """All scenes of a world by split, training's in mixed order. A seed is a world."""
    rng = np.random.default_rng(seed)
    triples = divide_triples(preset)
    unnamed = [(None, shape, position) for shape in preset.shapes for position in POSITIONS]
    num_several = round(preset.train_images * preset.several_share)
    num_unnamed = round(preset.train_images * preset.unnamed_share)
    train = [
        *make_singles(triples["known"], preset, preset.train_images - num_several - num_unnamed, rng),
        *make_singles(unnamed, preset, num_unnamed, rng),
        *make_several(triples["known"], preset, num_several, rng),
    ]
    splits = {"train": [train[i] for i in rng.permutation(len(train))]}
    for split in SINGLE_SPLITS:
        splits[split] = make_singles(triples[split], preset, preset.test_images, rng)
    for split in SEVERAL_SPLITS:
        count = math.ceil(preset.test_images * SEVERAL_TESTS)
        splits[split] = make_several(triples["known"], preset, count, rng, split == "several_unseen")
    return splits


def make_singles(
    triples: Sequence[Triple], preset: Preset, count: int, rng: np.random.Generator
) -> list[Scene]:
    """`count` scenes of one thing, in shuffled rounds over all triples and sizes, so that none is missing by
    bad luck."""
    kinds = [(*triple, size) for triple in triples for size in preset.sizes]
    rounds = math.ceil(count / len(kinds))
    order = [kinds[i] for _ in range(rounds) for i in rng.permutation(len(kinds))]
    return [make_scene([kind], rng) for kind in order[:count]]


def make_several(
    triples: Sequence[Triple],
    preset: Preset,
    count: int,
    rng: np.random.Generator,
    kept_apart: bool = False,
) -> list[Scene]:
    """`count` scenes of two, two and three things in turn; with `kept_apart` each holds a set that training
    never shows, else none does."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        kinds = choose_kinds(triples, preset, HOW_MANY[len(scenes) % len(HOW_MANY)], rng)
        if holds_a_set_kept_apart(kinds) == kept_apart and (scene := try_scene(kinds, rng)):
            scenes.append(scene)
    return scenes


def choose_kinds(
    triples: Sequence[Triple], preset: Preset, count: int, rng: np.random.Generator
) -> list[Kind]:
    """`count` kinds of thing at as many positions, no colour-shape pair twice."""
    kinds: list[Kind] = []
    while len(kinds) < count:
        colour, shape, position = triples[int(rng.integers(len(triples)))]
        if any((colour, shape) == kind[:2] or position == kind[2] for kind in kinds):
            continue
        kinds.append((colour, shape, position, preset.sizes[int(rng.integers(len(preset.sizes)))]))
    return kinds


def make_scene(kinds: Sequence[Kind], rng: np.random.Generator) -> Scene:
    """A scene of these kinds of things, begun anew until they fit."""
    while not (scene := try_scene(kinds, rng)):
        pass
    return scene


def try_scene(kinds: Sequence[Kind], rng: np.random.Generator) -> Scene | None:
    """A scene of these kinds of things; None where they found no room, or no colour that stands out."""
    paper, size = make_paper(rng), paint.draw_format(rng)
    things: list[Thing] = []
    for kind in sorted(kinds, key=lambda kind: list(POSITIONS).index(kind[2])):
        thing = place(kind, things, paper, size, rng)
        if thing is None:
            return None
        things.append(thing)
    return Scene(
        things=tuple(things),
        paper=paper,
        width=size[0],
        height=size[1],
        smooth=paint.draw_smoothness(rng),
        blur=paint.draw_blur(rng),
        noise=float(paint.draw_noise(1, rng)[0]),
        seed=int(rng.integers(2**32)),
        quality=None if rng.random() < PNG_SHARE else int(rng.integers(*JPEG_QUALITY)),
    )


def make_paper(rng: np.random.Generator) -> Paper:
    right, down = paint.draw_slopes(1, rng)[0]
    return Paper(to_rgb(paint.draw_papers(1, rng)[0]), (float(right), float(down)))


def place(
    kind: Kind, others: Sequence[Thing], paper: Paper, size: tuple[int, int], rng: np.random.Generator
) -> Thing | None:
    """A thing of this kind beside the others, in a colour that stands out; None if there is none."""
    colour, shape, position, _ = kind
    rgb = choose_rgb(colour, paper, rng)
    if rgb is None:
        return None
    for _ in range(TRIES):
        form = make_form(shape, position, kind[3], rng)
        if has_room(form, others, size):
            edge = to_rgb(paint.choose_edges(np.array(rgb), rng))
            return Thing(colour, shape, kind[3], position, rgb, edge=edge, **vars(form))
    return None


def has_room(form: Form | Thing, others: Sequence[Thing], size: tuple[int, int]) -> bool:
    """Whether a thing lies wholly within an image of so many pixels, and clear of the others in it."""
    width, height = size
    unit = math.sqrt(width * height) / SIDE

    def circle(one: Form | Thing) -> tuple[float, float, float]:
        x, y = one.centre
        return x / SIDE * width, y / SIDE * height, (one.radius + one.line / 2) * unit

    x, y, reach = circle(form)
    if min(x, y, width - x, height - y) < reach + 1.5:  # a line is up to half a pixel wider than it should be
        return False
    there = map(circle, others)
    return all(math.hypot(x - left, y - top) > reach + far + GAP * unit for left, top, far in there)


def choose_rgb(colour: str | None, paper: Paper, rng: np.random.Generator) -> Rgb | None:
    """A colour of this name (None: without one) that stands out from the paper and is no border case."""
    for _ in range(TRIES):
        drawn = (
            named_rgbs(np.array([list(COLOURS).index(colour)]), rng) if colour else unnamed_rgbs(1, rng)
        )[0]
        contrast = drawn - paper.rgb
        stands_out = (
            np.linalg.norm(contrast) > MIN_CONTRAST and abs(contrast.mean()) > MIN_BRIGHTNESS_CONTRAST
        )
        margin = MIN_NAME_DISTANCE.get(colour, 0)
        if stands_out and (not margin or distance_to_others(drawn, colour) > margin):
            return to_rgb(drawn)
    return None


def distance_to_others(rgb: np.ndarray, colour: str | None) -> float:
    """How far (3,), 0..255, is from colours that bear another name: in RGB, to those whose hue, saturation
    and value differ no more than they must (others may be a little nearer)."""
    others = BOXES[[name != colour for name in COLOURS]]  # (n, 6)
    hue, saturation, value = to_hsv(rgb[None].astype(float))
    middle, half = (others[:, 0] + others[:, 1]) / 2, (others[:, 1] - others[:, 0]) / 2
    off_centre = (hue - middle + 180) % 360 - 180  # hues are a circle
    nearest = from_hsv(
        middle + np.clip(off_centre, -half, half),
        np.clip(saturation, others[:, 2], others[:, 3]),
        np.clip(value, others[:, 4], others[:, 5]),
    )
    return float(np.linalg.norm(nearest - rgb, axis=1).min())


# ---- one image ----


def draw(scene: Scene) -> Image.Image:
    """The image of a scene, RGB."""
    size = (scene.width, scene.height)
    image = Image.new("RGB", size, scene.paper.rgb)
    for thing in scene.things:
        inside, line = cover(thing, *size, scene.smooth)
        image.paste(thing.rgb, mask=inside)
        if line:
            image.paste(thing.edge, mask=line)
    if scene.blur:
        image = image.filter(ImageFilter.GaussianBlur(scene.blur))
    if scene.noise or scene.paper.slope != (0.0, 0.0):
        pixels = np.asarray(image) + light_on(scene)[..., None]
        if scene.noise:
            rng = np.random.default_rng(scene.seed)
            pixels += scene.noise * rng.standard_normal(pixels.shape, dtype=np.float32)
        image = Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
    return image


def light_on(scene: Scene) -> np.ndarray:
    """What the light adds to each pixel, (height, width)."""
    right, down = scene.paper.slope
    light = np.linspace(-down, down, scene.height)[:, None] + np.linspace(-right, right, scene.width)
    return light.astype(np.float32)


def save(scene: Scene, path: Path) -> None:
    """Draw and write; the path ends in scene.suffix."""
    if scene.quality:
        draw(scene).save(path, quality=scene.quality)
    else:
        draw(scene).save(path, compress_level=1)
