"""Image files: decoded, upright, in RGB, as a person would see them."""

import contextlib
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from model.files import describe_placeholder_file


def turn_upright(image: Image.Image) -> Image.Image:
    """As its EXIF data says; where they are damaged, the image is shown as it lies."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow raises SyntaxError, struct.error and others; the pixels are whole
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image mode to RGB as a person would see it: upright, transparency on white paper, 16 bits scaled
    to 8."""
    image = turn_upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode.startswith("I") and values.max(initial=0) > 255 else 255.0
        image = Image.fromarray((values.clip(0, top) * (255.0 / top)).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")


def check_is_file(path: str | Path, what: str = "image") -> None:
    if not os.path.isfile(path):  # a pipe would be waited for, a name with NUL or too long is refused
        if os.path.exists(path):
            raise ValueError(f"cannot read {what} {path}: not a file")
        raise FileNotFoundError(f"{what} not found: {path}")


def open_image(path: str | Path, draft_side: int = 0) -> Image.Image:
    """Read and fully decode an image file, in RGB. Raises FileNotFoundError or ValueError, naming the file,
    whatever is wrong with it.

    draft_side  if not 0: a JPEG may come smaller, but not below this side
    """
    check_is_file(path)
    try:
        with Image.open(path) as image:
            if draft_side:
                image.draft("RGB", (draft_side, draft_side))
            image.load()
            image = turn_upright(image)
    except Exception as error:  # on damaged files Pillow, which alone works here, raises any type
        raise ValueError(f"cannot read image {path}: {explain_damage(path, error)}") from None
    try:
        return to_rgb(image)
    except (ValueError, MemoryError) as error:  # a mode without a conversion; an image beyond the memory
        raise ValueError(f"cannot read image {path}: {explain_damage(path, error)}") from None


def explain_damage(path: str | Path, error: Exception | str) -> str:
    with contextlib.suppress(OSError):
        if substitute := describe_placeholder_file(path):
            return f"it {substitute}"
    return str(error).replace(f" {os.fspath(path)!r}", "") or type(error).__name__
