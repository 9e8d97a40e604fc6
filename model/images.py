"""Image files: decoded, upright, in RGB, on white paper, as a person would see them.

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

import contextlib
import io
import os
import struct
import warnings
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageFile

from model.data.sources import Embedded
from model.files import describe_placeholder_file
from model.names import IMAGE_SUFFIXES

# The only decoders that a file reaches, whatever its name: raster formats, in the order in which they are
# tried. Others run programs (EPS starts Ghostscript), or have no mark that a file could be known by.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "HEIF", "PPM")
# Of what is decoded: 0.5 GB, and up to 2.5 GB on the way. Large cameras have 102 million.
MAX_PIXELS = 128_000_000
MAX_REDUCED = 256_000_000  # of a JPEG or JPEG 2000, decoded at half its size. Some phones have 200 million.
MAX_SIDE = 1_000_000  # the memory of a resize grows with it
STRIP = 1 << 22  # pixels that are converted at a time
# Chunks of a PNG that decide what it shows.
SHOWN_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
AVIF_BRANDS = (b"avif", b"avis")
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


class TooLarge(ValueError):
    """An image whose pixels would need too much memory."""


def find_images(folder: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> list[Path]:
    """The image files of a folder by their names, in order. Hidden files are none: beside each `a.jpg` a Mac
    puts a `._a.jpg` that holds no image."""
    return sorted(
        path
        for path in folder.glob("*")
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and not path.is_dir()
    )


def check_is_file(path: str | Path, what: str = "image") -> None:
    if not os.path.isfile(path):  # a pipe would be waited for, a name with NUL or too long is refused
        if os.path.exists(path):
            raise ValueError(f"cannot read {what} {path}: not a file")
        raise FileNotFoundError(f"{what} not found: {path}")


def explain_damage(path: str | Path | Embedded, error: Exception | str) -> str:
    with contextlib.suppress(OSError):
        if not isinstance(path, Embedded) and (substitute := describe_placeholder_file(path)):
            return f"it {substitute}"
    if isinstance(error, MemoryError | Image.DecompressionBombError):
        return "its pixels need too much memory: scale it down"
    return str(error).replace(f" {str(path)!r}", "") or type(error).__name__


# ---- from a file to pixels ---------------------------------------------------------------------------------


def open_image(path: str | Path | Embedded, draft_side: int = 0) -> Image.Image:
    """Read and fully decode an image, in RGB. Raises FileNotFoundError or ValueError, naming its file,
    whatever is wrong with it.

    draft_side  if not 0: a JPEG may come smaller, but not below this side
    """
    if not isinstance(path, Embedded):
        check_is_file(path)
    try:
        with io.BytesIO(path.read()) if isinstance(path, Embedded) else open(path, "rb") as file:
            return to_rgb(decode(file, draft_side))
    except Exception as error:  # on damaged files Pillow, which alone works here, raises any type
        raise ValueError(f"cannot read image {path}: {explain_damage(path, error)}") from None


def decode(file: IO[bytes], draft_side: int = 0) -> Image.Image:
    """The pixels of an open image file, in the mode that they are stored in."""
    try:
        image = identify(file)
        reduce(image, draft_side)
        image.load()
    except TooLarge:
        raise
    except ValueError:
        # Pillow refuses a PNG with a text or a colour profile of more than 1 MB. Neither shows.
        file.seek(0)
        if not file.read(8).startswith(b"\x89PNG"):
            raise
        image = identify(without_texts(file))
        reduce(image)
        image.load()
    return image


def identify(file: IO[bytes]) -> Image.Image:
    """Pillow's image of a file; its header is read, its pixels are not.

    Unlike Image.open() it looks for FORMATS alone, and leaves it to reduce() what is too large.
    """
    load_decoders()
    head = file.read(32)
    brand = head[8:12] if head[4:8] == b"ftyp" else b""
    if brand in HEIF_BRANDS:
        register_heif()
    kind = ""
    for name in FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))
        with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):  # "not of my format"
            if factory is None or accept(head[:16]) is not True:
                continue
            kind = name
            file.seek(0)
            image = factory(file, "")
            if name == "PNG":
                mend_transparency(image, depth=head[24])
            return image
    if brand in HEIF_BRANDS and "HEIF" not in Image.OPEN:
        raise ValueError("it is a HEIC image: pip install pillow-heif, or save it as JPEG")
    if brand in AVIF_BRANDS and kind != "AVIF":
        raise ValueError('it is an AVIF image: pip install "pillow>=11.3", or save it as JPEG')
    if kind:
        raise ValueError(f"it is damaged, or a kind of {kind} that is not read here")
    raise ValueError(f"it is damaged, or in none of the formats that are read ({', '.join(FORMATS)})")


@cache
def load_decoders() -> None:
    """Once per process. What Pillow has to warn of, a user cannot change, or it ends in an error."""
    Image.init()
    warnings.filterwarnings("ignore", module=r"PIL\.")


@cache
def register_heif() -> None:
    """Let Pillow read HEIC images, the photographs of iPhones, where pillow-heif is installed."""
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()


def reduce(image: Image.Image, draft_side: int = 0) -> None:
    """Before an image is decoded: have it decoded smaller if it is a large JPEG or JPEG 2000. Raises
    TooLarge."""
    width, height = image.size
    is_jpeg, is_jpeg2000 = image.format in ("JPEG", "MPO"), image.format == "JPEG2000"
    check_size(width, height, MAX_REDUCED if is_jpeg or is_jpeg2000 else MAX_PIXELS)
    if is_jpeg and draft_side:
        image.draft(None, (draft_side, draft_side))
    elif width * height > MAX_PIXELS and is_jpeg:
        image.draft(None, (width // 2, height // 2))
    elif width * height > MAX_PIXELS:
        image.reduce = 1


def check_size(width: int, height: int, most: int) -> None:
    if max(width, height) > MAX_SIDE:
        raise TooLarge(
            f"{width} x {height} pixels: at most {MAX_SIDE:,} are read in a row or column; cut it into parts"
        )
    if width * height > most:
        raise TooLarge(
            f"{width} x {height} = {width * height:,} pixels: at most {most:,} are read; scale it down"
        )


def without_texts(file: IO[bytes]) -> IO[bytes]:
    """A PNG file with the chunks alone that decide what it shows."""
    kept = io.BytesIO()
    file.seek(0)
    kept.write(file.read(8))
    while len(head := file.read(8)) == 8:
        rest = int.from_bytes(head[:4], "big") + 4  # the content and its check sum
        if head[4:] in SHOWN_CHUNKS:
            kept.write(head + file.read(rest))
        else:
            file.seek(rest, os.SEEK_CUR)
    kept.seek(0)
    return kept


def mend_transparency(image: Image.Image, depth: int) -> None:
    """Of a PNG: Pillow brings pixels of any depth to 8 bits, but not the one that is transparent."""
    value = image.info.get("transparency")
    if value is None:
        return
    if image.mode == "1":
        image.info["transparency"] = 255 * bool(value)
    elif image.mode == "L" and depth < 8 and value < 1 << depth:
        image.info["transparency"] = value * 255 // ((1 << depth) - 1)
    elif image.mode == "RGB" and depth == 16:
        image.info["transparency"] = tuple(part >> 8 for part in value)


# ---- from pixels to RGB ------------------------------------------------------------------------------------


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as a person would see it: upright, on white paper, in RGB. One that is so already
    comes back itself. Raises ValueError for one that is too large, or whose white is not known."""
    check_size(*image.size, MAX_PIXELS)
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
        return TURNS.get(image.getexif().get(ORIENTATION))
    except MemoryError:
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
