"""What a demo image is made of besides its things: paper, light, pens, noise, blur and pixels.

The images that are drawn (scenes.py) and those that are only computed for the encoder (patches.py) take all
of it from here, so that the encoder trains on what it will be shown. Colours are 0..255.
"""

import numpy as np

# Width and height in pixels, and how often; small ones are quick to draw and to read.
FORMATS = {(128, 128): 0.5, (160, 120): 0.15, (120, 160): 0.15, (224, 224): 0.1, (240, 180): 0.1}
PAPERS = {"white": 0.25, "light": 0.35, "dark": 0.25, "any": 0.15}
GRADED_SHARE, MAX_SLOPE = 0.3, 35.0  # of papers that grow lighter to one side, and by how much, of 255
NOISY_SHARE, MAX_NOISE = 0.5, 9.0  # standard deviation, of 255
BLURRED_SHARE, MAX_BLUR = 0.2, 0.8  # radius in pixels
EDGE_GREYS, DARKER_SHARE, DARKER = (0, 0, 0, 40, 255), 0.3, (0.3, 0.7)
JAGGED_SHARE = 0.2
SMOOTH = 3  # times as large is drawn what is not jagged, and shrunk


def draw_format(rng: np.random.Generator) -> tuple[int, int]:
    formats = list(FORMATS)
    return formats[int(rng.choice(len(formats), p=list(FORMATS.values())))]


def draw_smoothness(rng: np.random.Generator) -> int:
    """1 for the jagged edges of a simple paint program, else SMOOTH."""
    return 1 if rng.random() < JAGGED_SHARE else SMOOTH


def draw_blur(rng: np.random.Generator) -> float:
    return float(rng.uniform(0, MAX_BLUR)) if rng.random() < BLURRED_SHARE else 0.0


def draw_noise(count: int, rng: np.random.Generator) -> np.ndarray:
    """Standard deviations (count,)."""
    return rng.uniform(0, MAX_NOISE, count) * (rng.random(count) < NOISY_SHARE)


def draw_papers(count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 3)"""
    kind = rng.choice(len(PAPERS), count, p=list(PAPERS.values()))
    tints = {
        "white": np.full((count, 3), 255),
        "light": rng.integers(215, 256, (count, 3)),
        "dark": rng.integers(0, 70, (count, 3)),
        "any": rng.integers(0, 256, (count, 1)) + rng.integers(-12, 13, (count, 3)),
    }
    return np.stack([tints[name] for name in PAPERS])[kind, np.arange(count)].clip(0, 255)


def draw_slopes(count: int, rng: np.random.Generator) -> np.ndarray:
    """How much lighter each image grows to the right and downwards, (count, 2)."""
    return rng.uniform(-MAX_SLOPE, MAX_SLOPE, (count, 2)) * (rng.random((count, 1)) < GRADED_SHARE)


def choose_edges(colours: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The pens that things of these colours (..., 3) are edged with: black, grey or white, or a darker tone
    of the thing's own; any other would be a second colour, and "what colour is it?" a bad question."""
    shape = (*colours.shape[:-1], 1)
    darker = colours * rng.uniform(*DARKER, shape)
    return np.where(rng.random(shape) < DARKER_SHARE, darker, rng.choice(EDGE_GREYS, shape))
