"""Colours as people name them: ranges of hue, not points.

A colour word covers whatever a paint program or a felt pen offers under that name, so every named colour here
is a box in hue, saturation and value, with gaps between the boxes wherever people disagree. Colours outside
all boxes (greys, browns, lime, magenta, ...) have no name: the encoder sees things in them too, and learns
that a shape is a shape in any colour.
"""

import numpy as np

Rgb = tuple[int, int, int]

# name -> hue in degrees, saturation, value (each from - to). No black: it is a paper here, not a colour.
COLOURS = {
    "red": ((-12, 8), (0.74, 1), (0.65, 1)),
    "yellow": ((48, 62), (0.62, 1), (0.85, 1)),
    "green": ((92, 158), (0.5, 1), (0.38, 1)),
    "blue": ((208, 248), (0.64, 1), (0.5, 1)),
    "purple": ((268, 302), (0.5, 1), (0.42, 0.9)),
    "orange": ((22, 39), (0.75, 1), (0.88, 1)),
    "pink": ((318, 352), (0.22, 0.6), (0.9, 1)),
    "cyan": ((172, 199), (0.5, 1), (0.75, 1)),
}
BOXES = np.array([np.concatenate(box) for box in COLOURS.values()], dtype=float)  # (8, 6)
HUE_MARGIN, OTHER_MARGIN = 10, 0.15  # an unnamed colour keeps off all boxes by these
GREY_SHARE = 0.4  # of the unnamed colours
MIN_CONTRAST = 70  # distance in RGB between a thing and its paper


def named_rgbs(numbers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """numbers (n,) into COLOURS -> colours (n, 3), 0..255, uniform in their boxes."""
    box = BOXES[numbers].reshape(-1, 3, 2)
    hue, saturation, value = rng.uniform(box[..., 0], box[..., 1]).T
    return from_hsv(hue, saturation, value)


def unnamed_rgbs(count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 3), 0..255: greys, and colours that nobody here has a word for."""
    rgbs, missing = np.zeros((count, 3)), np.arange(count)
    while len(missing):
        grey = rng.random(len(missing)) < GREY_SHARE
        any_colour = rng.integers(0, 256, (len(missing), 3))
        drawn = np.where(grey[:, None], any_colour[:, :1], any_colour)
        good = grey | ~is_near_a_name(drawn)
        rgbs[missing[good]] = drawn[good]
        missing = missing[~good]
    return rgbs


def is_near_a_name(rgbs: np.ndarray) -> np.ndarray:
    """(n, 3) -> (n,): whether a colour lies in a box, or so near that somebody might use its name."""
    hue, saturation, value = to_hsv(rgbs)
    low, high = BOXES[:, 0], BOXES[:, 1]
    off_centre = np.abs((hue[:, None] - (low + high) / 2 + 180) % 360 - 180)  # hues are a circle
    return (
        (off_centre < (high - low) / 2 + HUE_MARGIN)
        & (saturation[:, None] > BOXES[:, 2] - OTHER_MARGIN)
        & (value[:, None] > BOXES[:, 4] - OTHER_MARGIN)
    ).any(1)


def from_hsv(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Hue in degrees, the others 0..1, each (n,) -> (n, 3), 0..255."""
    offset = (np.array([5, 3, 1]) + hue[:, None] / 60) % 6
    fall = np.clip(np.minimum(offset, 4 - offset), 0, 1)
    return 255 * value[:, None] * (1 - saturation[:, None] * fall)


def to_hsv(rgbs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n, 3), 0..255 -> hue in degrees, saturation and value 0..1, each (n,)."""
    red, green, blue = rgbs.T / 255
    value = rgbs.max(1) / 255
    chroma = value - rgbs.min(1) / 255
    width = np.maximum(chroma, 1e-9)
    hue = np.where(
        value == red,
        (green - blue) / width % 6,
        np.where(value == green, (blue - red) / width + 2, (red - green) / width + 4),
    )
    return 60 * hue, chroma / np.maximum(value, 1e-9), value


def to_rgb(values: np.ndarray) -> Rgb:
    red, green, blue = (round(float(value)) for value in np.clip(values, 0, 255))
    return red, green, blue
