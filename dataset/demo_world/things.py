"""One thing of a demo image: what may be said about it, where its corners lie, and the pixels that it covers.

Lengths are in 128ths of the image's sides, whatever its size in pixels: x grows to the right, y downwards. A
thing stands anywhere in its region, in any of the widths of its size, turned a little, filled, filled with
an edge, or as a line alone; no two drawings of a word have the same corners.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from dataset.demo_world.colours import Rgb

SIDE = 128  # the unit square of all lengths
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
SIZES = {"large": (17.5, 27.0), "small": (8.0, 13.0)}  # radius, from - to; nothing in between
CLEAR_SIZES = {"large": (17.5, 27.0), "small": (9.5, 13.0)}
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
# Of columns and of rows. In the world's images a centre lies clearly in one, and no thing is a speck; the
# encoder, which shall see things anywhere, trains up to the borders.
CLEAR_BANDS, BANDS = ((0, 44), (52, 76), (84, SIDE)), ((0, 48), (48, 80), (80, SIDE))
MAX_TILT = 25.0  # degrees
MAX_TILTS = {"square": 16.0, "diamond": 16.0}  # turned by 45 they would be each other
STYLES = {"filled": 0.6, "edged": 0.2, "hollow": 0.2}  # and how often
LINE_WIDTHS = {"edged": (0.05, 0.12), "hollow": (0.1, 0.2)}  # of the radius
MIN_LINE = 1.2
# What a fine pen draws on a large sheet; the world's images have no such lines, the encoder learns them last.
THIN_LINE_WIDTHS = {"edged": (0.02, 0.12), "hollow": (0.03, 0.2)}
MIN_THIN_LINE = 0.5
GAP = 1.5  # at least so far apart are the circles around two things


@dataclass(frozen=True)
class Thing:
    """A coloured shape; `colour` is None where no word names it."""

    colour: str | None
    shape: str
    size: str
    position: str
    rgb: Rgb
    centre: tuple[float, float]
    radius: float
    corners: tuple[tuple[float, float], ...]  # around (0, 0), in radii, turned
    style: str = "filled"
    line: float = 0.0  # width of the edge, or of the whole of a hollow thing
    edge: Rgb = (0, 0, 0)


@dataclass(frozen=True)
class Form:
    """The part of a Thing that has no colour: enough to know which pixels it covers."""

    centre: tuple[float, float]
    radius: float
    corners: tuple[tuple[float, float], ...]
    style: str
    line: float


def make_form(
    shape: str,
    position: str,
    size: str,
    rng: np.random.Generator,
    clear: bool = True,
    thin: bool = False,
) -> Form:
    """A form that the three words fit, if wanted beyond doubt; thin: some of its lines are."""
    bands, sizes = (CLEAR_BANDS, CLEAR_SIZES) if clear else (BANDS, SIZES)
    radius = float(rng.uniform(*sizes[size]))
    column, row = POSITIONS[position]
    style = str(rng.choice(list(STYLES), p=list(STYLES.values())))
    line = 0.0
    widths, least = (THIN_LINE_WIDTHS, MIN_THIN_LINE) if thin else (LINE_WIDTHS, MIN_LINE)
    if style in widths:
        line = max(least, radius * float(rng.uniform(*widths[style])))
    max_tilt = MAX_TILTS.get(shape, MAX_TILT)
    tilt = math.radians(rng.uniform(-max_tilt, max_tilt))
    return Form(
        centre=(somewhere_in(bands[column], radius, rng), somewhere_in(bands[row], radius, rng)),
        radius=radius,
        corners=tuple(map(tuple, turn(outline(shape, rng), tilt).tolist())),
        style=style,
        line=line,
    )


def somewhere_in(band: tuple[float, float], radius: float, rng: np.random.Generator) -> float:
    """A coordinate in a band at which nothing of the thing is cut off."""
    low, high = band
    return float(rng.uniform(max(low, radius + 1), min(high, SIDE - 1 - radius)))


def outline(shape: str, rng: np.random.Generator) -> np.ndarray:
    """Corners (n, 2) of a shape on and in the unit circle, in proportions that vary as people draw."""
    if shape == "circle":
        return on_circles([1] * 60)
    if shape == "star":
        return on_circles([1, rng.uniform(0.36, 0.5)] * 5)
    if shape == "square":
        corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    elif shape == "triangle":
        half, foot = rng.uniform(0.85, 1), rng.uniform(0.55, 0.8)
        corners = np.array([(0, -1), (half, foot), (-half, foot)])
    elif shape == "diamond":
        half = rng.uniform(0.62, 1)
        corners = np.array([(0, -1), (half, 0), (0, 1), (-half, 0)])
    else:
        arm = rng.uniform(0.24, 0.38)  # half the width of a bar of the cross
        quarter = np.array([(-arm, -1), (arm, -1), (arm, -arm)])
        corners = np.concatenate([turn(quarter, math.pi / 2 * n) for n in range(4)])
    return corners / np.linalg.norm(corners, axis=1).max()


def on_circles(radii: list[float]) -> np.ndarray:
    """Corners at equal angles, clockwise from the top, at these distances from (0, 0)."""
    angles = 2 * math.pi * np.arange(len(radii)) / len(radii)
    return np.array(radii)[:, None] * np.stack([np.sin(angles), -np.cos(angles)], axis=1)


def turn(corners: np.ndarray, angle: float) -> np.ndarray:
    """Clockwise by an angle in radians."""
    sine, cosine = math.sin(angle), math.cos(angle)
    return corners @ np.array([[cosine, sine], [-sine, cosine]])


def cover(form: Thing | Form, width: int, height: int, smooth: int) -> tuple[Image.Image, Image.Image | None]:
    """What a form covers of an image of width x height pixels, 0..255: with its own colour, and with its
    edge's (None: it has none).

    smooth  1 for the jagged edges of a simple paint program; else drawn so many times as large and shrunk
    """
    scale = math.sqrt(width * height) / SIDE * smooth  # a circle stays round, whatever the image's sides
    x, y = form.centre[0] / SIDE * width * smooth, form.centre[1] / SIDE * height * smooth
    corners = [(x + form.radius * dx * scale, y + form.radius * dy * scale) for dx, dy in form.corners]
    size = (width * smooth, height * smooth)
    inside = line = None
    if form.style != "hollow":
        inside = Image.new("L", size)
        ImageDraw.Draw(inside).polygon(corners, fill=255)
    if form.style != "filled":
        line = Image.new("L", size)
        thickness = max(1, round(form.line * scale))
        ImageDraw.Draw(line).line([*corners, *corners[:2]], fill=255, width=thickness, joint="curve")
    inside, line = (image.reduce(smooth) if image and smooth > 1 else image for image in (inside, line))
    return (inside, line) if inside else (line, None)
