"""What mattered, laid over the image: warm where the answer loses without it, blue where it gains."""

import numpy as np
from PIL import Image

FLAT = 0.1  # nats; a map that stays below is drawn as flat as it is, not stretched until it shows noise
SPREAD = 0.45  # of a patch: how far its figure is smoothed over its neighbours
SIDE = 512  # of the drawing, its longer side
OPACITY = 0.82  # of the strongest colour
# From almost nothing to the most; each is told from white, black and grey paper alike.
WARM = ((255, 226, 130), (255, 178, 50), (248, 116, 25), (230, 48, 30), (200, 0, 62))
COLD = ((180, 225, 255), (110, 180, 250), (55, 125, 240), (40, 80, 215), (40, 40, 180))


def draw_heat(image: Image.Image, drops: np.ndarray, scale: float | None = None) -> Image.Image:
    """An image with a map of Explanation over it, for a page or a sheet.

    image    RGB
    drops    (S, S) nats, negative where the answer gains
    scale    the drop of the deepest colour; None: scale_of(drops). Maps that are compared want one scale.
    returns  RGB, SIDE pixels on its longer side
    """
    scale = scale or scale_of(drops)
    longer = max(image.size)
    size = tuple(max(1, round(length * SIDE / longer)) for length in image.size)
    shown = np.asarray(pale(image.resize(size, Image.Resampling.LANCZOS)), dtype=np.float32)
    heat = (smooth(drops, *size) / scale).clip(-1, 1)  # (height, width)
    opacity = OPACITY * np.abs(heat[..., None]) ** 0.75
    laid = (1 - opacity) * shown + opacity * colours_of(heat)
    return Image.fromarray(laid.round().astype(np.uint8))


def scale_of(*maps: np.ndarray) -> float:
    """Nats of the deepest colour for maps that are drawn alike: the largest drop, or FLAT."""
    return max(FLAT, *(float(np.abs(drops).max()) for drops in maps))


def colours_of(heat: np.ndarray) -> np.ndarray:
    """Shares of a scale, -1 to 1, to colours: (...) -> (..., 3) in 0..255"""
    places = np.linspace(0, 1, len(WARM))
    warm, cold = (
        np.stack([np.interp(np.abs(heat), places, channel) for channel in zip(*ramp, strict=True)], axis=-1)
        for ramp in (WARM, COLD)
    )
    return np.where(heat[..., None] < 0, cold, warm)


def pale(image: Image.Image) -> Image.Image:
    """An image with less colour and contrast, so that the colours laid over it are what is seen first."""
    grey = image.convert("L").convert("RGB")
    less = Image.blend(image, grey, 0.6)
    return Image.blend(less, Image.new("RGB", image.size, (128, 128, 128)), 0.15)


def smooth(drops: np.ndarray, width: int, height: int) -> np.ndarray:
    """(S, S) -> (height, width): every pixel the mean of all patches, near ones by far the most. Never beyond
    the smallest and the largest of them, as a cubic interpolation would be."""

    def weights(length: int, patches: int) -> np.ndarray:
        places = (np.arange(length) + 0.5) / length * patches
        distances = places[:, None] - (np.arange(patches) + 0.5)
        bells = np.exp(-0.5 * (distances / SPREAD) ** 2)
        return bells / bells.sum(1, keepdims=True)

    return weights(height, drops.shape[0]) @ drops @ weights(width, drops.shape[1]).T
