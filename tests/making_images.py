"""Image files, byte by byte, and what a plain Pillow makes of them."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps

from model.images import open_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def chunk(name: bytes, content: bytes) -> bytes:
    checked = name + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))


def make_png(pixels: bytes, width: int, depth: int, kind: int, *chunks: bytes, after: bytes = b"") -> bytes:
    """A PNG of one row; kind: 0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGBA."""
    header = struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0)
    content = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(b"\0" + pixels)), after]
    return b"\x89PNG\r\n\x1a\n" + b"".join(content) + chunk(b"IEND", b"")


def make_tiff(
    pixels: bytes,
    width: int,
    bits: int | list[int],
    sample_format: int = 1,
    photometric: int = 1,
    order: str = "<",
    more: tuple = (),
) -> bytes:
    """A TIFF of one row, from its tags; bits: one for each sample of a pixel; more: (tag, type, value)."""
    bits = bits if isinstance(bits, list) else [bits]
    count, codes = len(bits), {3: "H", 4: "I", 8: "h", 11: "f"}
    tags = [
        (256, 3, [width]),
        (257, 3, [1]),
        (258, 3, bits),
        (259, 3, [1]),
        (262, 3, [photometric]),
        (273, 4, [8]),
        (277, 3, [count]),
        (278, 3, [1]),
        (279, 4, [len(pixels)]),
        (339, 3, [sample_format] * count),
        *((tag, code, [value]) for tag, code, value in more),
    ]
    pixels += b"\0" * (len(pixels) % 2)
    entries, long = b"", b""
    end = 8 + len(pixels) + 2 + 12 * len(tags) + 4
    for tag, code, values in sorted(tags):
        value = struct.pack(f"{order}{len(values)}{codes[code]}", *values)
        if len(value) > 4:
            value, long = struct.pack(f"{order}I", end + len(long)), long + value
        entries += struct.pack(f"{order}HHI", tag, code, len(values)) + value.ljust(4, b"\0")
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8 + len(pixels))
    return head + pixels + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + long


def saved(image: Image.Image, form: str, **more) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **more)
    return file.getvalue()


def greys(*values: int) -> list[tuple[int, int, int]]:
    return [(value,) * 3 for value in values]


def colours(*values: tuple, mode: str = "RGB") -> Image.Image:
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image


def trns(*values: int) -> bytes:
    return chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))


def shown(path) -> list[tuple[int, int, int]]:
    image = open_image(path)
    assert type(image) is Image.Image and image.mode == "RGB" and not image.info
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


def drawing(mode: str) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (23, 31, 4), dtype=np.uint8)
    image = Image.fromarray(values)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def plain_pillow(path, form: str) -> Image.Image:
    """How images were read before they had a room of their own; features of such files lie in caches."""
    with Image.open(path, formats=[form]) as image:
        image.load()
        image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
