"""From pixels of any mode to RGB: upright, on white paper, as a person would see them.

What a value of a pixel means follows from the file's mode and tags, never from the values that happen to be
in it: 255 in an image of 16 bits is nearly black, also where no brighter pixel stands beside it.

    8 bits and fewer    as Pillow converts them
    16-bit greys        65535 is white; of a TIFF with fewer bits (12), its largest number
    floats              0 is black, 1 is white, as image programs write them
    signed or 32-bit    have no white that all programs agree on: refused
    16-bit colours      Pillow keeps their upper 8 bits

A TIFF of floats, or of signed or 32-bit integers, may name its black and white itself (SMinSampleValue,
SMaxSampleValue).
"""

from io import BytesIO

import numpy as np
from PIL import Image, ImageFile

from model.image_limits import TooLarge, check_size, check_tags, limit_of

STRIP = 1 << 22  # pixels that are converted at a time
ORIENTATION = 0x0112  # in EXIF data
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Tags of a TIFF.
BITS, PHOTOMETRIC, SAMPLE_FORMAT, BLACK, WHITE = 258, 262, 339, 340, 341
WHITE_IS_ZERO, UNSIGNED = 0, 1


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as a person would see it: upright, on white paper, in RGB. One that is so already
    comes back itself. Raises ValueError for one that is too large, or whose white is not known."""
    check_size(*image.size, limit_of())
    image.load()
    turn, shown = find_turn(image), image
    if image.mode != "RGB" or image.has_transparency_data:
        shown = convert_in_strips(image)
    if turn is not None:
        shown = shown.transpose(turn)
    elif isinstance(shown, ImageFile.ImageFile):
        shown = shown.copy()  # without the decoder, which may hold the whole file
    if shown is not image:
        shown.info = {}  # EXIF data and colour profile no longer apply
    return shown


def find_turn(image: Image.Image) -> Image.Transpose | None:
    """What brings an image upright, by its EXIF data; where they are damaged, it is shown as it lies."""
    try:
        if exif := image.info.get("exif"):
            check_tags(BytesIO(exif.removeprefix(b"Exif\0\0")), 0)
        if "Raw profile type exif" in image.info:  # of a PNG, in hexadecimal letters
            check_tags(
                BytesIO(bytes.fromhex("".join(image.info["Raw profile type exif"].split("\n")[3:]))), 0
            )
        return TURNS.get(image.getexif().get(ORIENTATION))
    except (MemoryError, TooLarge):
        raise
    except Exception:  # Pillow raises SyntaxError, struct.error and others; the pixels are whole
        return None


def convert_in_strips(image: Image.Image) -> Image.Image:
    """To RGB, a few rows at a time: the steps between need several times the memory of the image."""
    values = grey_values(image) if image.mode == "F" or image.mode.startswith("I") else None
    width, height = image.size
    num_rows = max(1, STRIP // max(1, width))
    sheet = Image.new("RGB", image.size)
    for top in range(0, height, num_rows):
        strip = image.crop((0, top, width, min(top + num_rows, height)))
        if values:
            strip = to_8_bits(strip, *values)
        sheet.paste(convert_strip(strip), (0, top))
    return sheet


def convert_strip(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # Pillow has no direct way
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def grey_values(image: Image.Image) -> tuple[float, float, bool]:
    """Of a grey image of more than 8 bits: the values that are black and white, by its mode and by a TIFF's
    tags, and whether Pillow took numbers beyond 2^31 for negative ones. Raises ValueError if nobody says."""
    tags = getattr(image, "tag_v2", {})
    (bits, *_), (kind, *_) = tags.get(BITS, (16,)), tags.get(SAMPLE_FORMAT, (UNSIGNED,))
    named = [tags.get(tag, (np.nan,)) for tag in (BLACK, WHITE)]
    black, white = (values[0] if isinstance(values, tuple) else values for values in named)
    if image.mode != "F" and bits <= 16 and kind == UNSIGNED:
        black, white = 0, 2**bits - 1
    elif not black < white:
        if image.mode != "F":
            raise ValueError(
                f"{'' if kind == UNSIGNED else 'signed '}integers of {bits} bits do not say which value is "
                "white: save it with 8 or 16 bits, or with SMinSampleValue and SMaxSampleValue"
            )
        black, white = 0.0, 1.0
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        black, white = white, black
    return black, white, kind == UNSIGNED and bits == 32 and image.mode == "I"


def to_8_bits(image: Image.Image, black: float, white: float, is_unsigned: bool) -> Image.Image:
    values = np.asarray(image)
    transparent = image.info.get("transparency")
    if is_unsigned:
        values = values.view(np.uint32)
    shares = (values.astype(np.float64) - black) / (white - black)
    grey = Image.fromarray(np.rint(255 * np.nan_to_num(shares, nan=0.0).clip(0, 1)).astype(np.uint8))
    if transparent is None:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(255 * (values != transparent).astype(np.uint8))))
