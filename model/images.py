"""Image files: found, opened and decoded, to RGB images as a person would see them.

What a file is follows from its first bytes alone: not from its name, nor from what this process has opened
or loaded before. Three files share the work: here a file becomes pixels, image_limits.py says before that
what it may cost, and image_modes.py turns pixels of any mode into RGB.
"""

import contextlib
import io
import os
import struct
import warnings
from functools import cache
from pathlib import Path
from typing import IO

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from model.data.sources import Embedded
from model.data.steady import LostFile
from model.files import describe_placeholder_file
from model.image_limits import TooLarge, check_file, reduce
from model.image_modes import to_rgb
from model.names import IMAGE_SUFFIXES

# The only decoders that a file reaches: of raster formats. Others of Pillow's run programs (EPS starts
# Ghostscript), or have no mark that a file could be known by. Not looked up in Pillow's own list, which any
# library of the process may change.
DECODERS = {
    "JPEG": JpegImagePlugin.JpegImageFile,  # of an MPO, which holds several, the first
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "JPEG2000": Jpeg2KImagePlugin.Jpeg2KImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
    "PPM": PpmImagePlugin.PpmImageFile,
}
FORMATS = (*DECODERS, "HEIF")  # that of pillow-heif, where it is installed
MARKS = (  # what a file begins with
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"MM*\0", "TIFF"),  # of programs that mix up the orders of bytes, as Pillow knows them
    (b"II\0*", "TIFF"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
    *((b"P%c" % letter, "PPM") for letter in b"0123456fy"),
)
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
AVIF_BRANDS = (b"avif", b"avis")
MOST_BRANDS = 256  # bytes of the list of brands
# Chunks of a PNG that decide what it shows.
SHOWN_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND")


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
    except LostFile:  # of a data file in which the image stands
        raise
    except Exception as error:  # on damaged files Pillow, which alone works here, raises any type
        raise ValueError(f"cannot read image {path}: {explain_damage(path, error)}") from None


def decode(file: IO[bytes], draft_side: int = 0) -> Image.Image:
    """The pixels of an open image file, in the mode that they are stored in."""
    try:
        image = identify(file)
        reduce(image, file, draft_side)
        image.load()
    except TooLarge:
        raise
    except ValueError:
        # Pillow refuses a PNG with a text or a colour profile of more than 1 MB. Neither shows.
        file.seek(0)
        if not file.read(8).startswith(b"\x89PNG"):
            raise
        file = without_texts(file)
        image = identify(file)
        reduce(image, file)
        image.load()
    return image


def identify(file: IO[bytes]) -> Image.Image:
    """Pillow's image of a file; its header is read, its pixels are not. Raises TooLarge if already that would
    take too long; what its pixels cost, reduce() knows.
    """
    ignore_warnings()
    head = file.read(MOST_BRANDS)
    kind = format_of(head)
    decoder = DECODERS.get(kind) or (kind and heif_decoder())
    if not kind:
        raise ValueError(f"it is damaged, or in none of the formats that are read ({', '.join(FORMATS)})")
    if not decoder:
        raise ValueError("it is a HEIC image: pip install pillow-heif, or save it as JPEG")
    if kind == "AVIF" and not AvifImagePlugin.SUPPORTED:
        raise ValueError("it is an AVIF image, and this Pillow was built without AVIF: save it as JPEG")
    check_file(file, kind)
    file.seek(0)
    try:
        image = decoder(file, "")
    except (SyntaxError, IndexError, TypeError, struct.error):
        raise ValueError(f"it is damaged, or a kind of {kind} that is not read here") from None
    if kind == "PNG":
        mend_transparency(image, depth=head[24])
    return image


def format_of(head: bytes) -> str:
    """One of FORMATS, by the first bytes of a file; "" for what is none."""
    if head[4:8] == b"ftyp":
        end = min(MOST_BRANDS, int.from_bytes(head[:4], "big"))
        brands = [head[8:12], *(head[start : start + 4] for start in range(16, end, 4))]
        if brands[0] in (b"mif1", b"msf1") and set(brands) & set(AVIF_BRANDS):  # a container of either
            return "AVIF"
        return "AVIF" if brands[0] in AVIF_BRANDS else "HEIF" if brands[0] in HEIF_BRANDS else ""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    return next((form for mark, form in MARKS if head.startswith(mark)), "")


@cache
def ignore_warnings() -> None:
    """Once per process. What Pillow has to warn of, a user cannot change, or it ends in an error."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


@cache
def heif_decoder() -> type | None:
    """That of HEIC images, the photographs of iPhones, where pillow-heif is installed."""
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        return None
    return HeifImageFile


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
