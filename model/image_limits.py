"""What an image may cost, checked in its file before any of it is decoded.

A file of a few kB can ask for gigabytes and minutes: a JPEG may be drawn in thousands of passes, a TIFF may
name the same megabyte in thousands of tags. Each format has a limit of its own, in millions of pixels, so
that an image takes at most about 1.5 GB and, on one core, 15 seconds:

    PNG, BMP, GIF, TIFF, PPM   128   large cameras have 102
    WebP, AVIF, HEIF            64   their decoders hold an image several times
    JPEG                       256   from 128 on at half the size; some phones have 200
    JPEG in several scans      128   from 64 on at half the size: its decoder holds all of it
    JPEG 2000                  256   from 16 on at a half, a quarter, ... of the size
"""

import io
import os
import re
import struct
from typing import IO

from PIL import Image

MAX_PIXELS = 128_000_000
MAX_SIDE = 1_000_000  # the memory of a resize grows with it
FEWER_PIXELS = {"WEBP": 64_000_000, "AVIF": 64_000_000, "HEIF": 64_000_000}
MAX_REDUCED = 256_000_000  # of a JPEG or JPEG 2000, which are decoded smaller
MAX_JPEG2000 = 16_000_000  # what is decoded of one: 20 bytes and up to 0.8 microseconds a pixel
MAX_BUFFERED = 64_000_000  # decoded in full of a JPEG in several scans
MAX_FRAME_PIXELS = 36_000_000  # of a video, whose decoder holds a dozen: 8K has 33 million
MAX_SCANNED = 2_500_000_000  # pixels x scans of a JPEG: 1 ns each; cameras and web pages use 10 to 18 scans
MAX_SLOW = 4_000_000  # pixels of a PPM that Pillow decodes in Python
MAX_BYTES = 1 << 30  # of a file
MAX_SIDE_DATA = 32 << 20  # bytes of a JPEG before its pixels: profiles, previews, what a camera notes
MAX_COMMENTS = 1 << 20  # bytes of a GIF before its pixels; Pillow joins them in quadratic time
MAX_CHUNKS = 200_000  # of a PNG; 8 microseconds each
MAX_VALUES = 1 << 20  # of one numeric tag of a TIFF: places of strips or tiles
BLOCK = 1 << 20
TIFF_HEAD = re.compile(rb"II[*+]\0|MM\0[*+]")
JPEG_MARK = re.compile(rb"\xff[^\0\1\xd0-\xd8\xff]", re.DOTALL)  # of one that has a content, or of the end
# Of a TIFF's types, in bytes.
TYPE_SIZES = dict(
    zip((*range(1, 14), 16, 17, 18), (1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 8, 8, 8), strict=True)
)
BYTES = (1, 2, 6, 7)  # types of a tag whose values are bytes or letters
FRAME_MARKS = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))  # of a JPEG


class TooLarge(ValueError):
    """An image that would need too much memory or time."""


def check_size(width: int, height: int, most: int) -> None:
    if max(width, height) > MAX_SIDE:
        raise TooLarge(
            f"{width} x {height} pixels: at most {MAX_SIDE:,} are read in a row or column; cut it into parts"
        )
    if width * height > most:
        raise TooLarge(
            f"{width} x {height} = {width * height:,} pixels: at most {most:,} are read; scale it down"
        )


def limit_of(form: str = "") -> int:
    """Pixels that are decoded of a format, or that an image in memory may have."""
    return min(MAX_PIXELS, FEWER_PIXELS.get(form, MAX_PIXELS))


def reduce(image: Image.Image, file: IO[bytes], draft_side: int = 0) -> None:
    """Before an image is decoded: have it decoded smaller if it is a large JPEG or JPEG 2000. Raises
    TooLarge."""
    width, height = image.size
    if image.format == "JPEG":
        most = min(MAX_BUFFERED, MAX_PIXELS) if check_scans(file, width * height) else MAX_PIXELS
        check_size(width, height, most * MAX_REDUCED // MAX_PIXELS)
        if draft_side:
            image.draft(None, (draft_side, draft_side))
        elif width * height > most:
            image.draft(None, (width // 2, height // 2))
    elif image.format == "JPEG2000":
        check_size(width, height, MAX_REDUCED)
        halvings = 0
        while width * height >> 2 * halvings > min(MAX_JPEG2000, MAX_PIXELS):
            halvings += 1
        image.reduce = halvings
    else:
        check_size(width, height, limit_of(image.format))


def check_file(file: IO[bytes], form: str) -> None:
    """Raise TooLarge for a file that takes too long before its size in pixels is known."""
    size = file.seek(0, os.SEEK_END)
    if size > MAX_BYTES:
        raise TooLarge(f"its file has {size:,} bytes: at most {MAX_BYTES:,} are read")
    file.seek(0)
    if form == "JPEG":
        read_jpeg_head(file)
    elif form == "PNG":
        check_chunks(file)
    elif form == "GIF":
        check_comments(file)
    elif form == "TIFF":
        check_tags(file, 0)
    elif form == "PPM":
        check_ppm(file)
    elif form in ("AVIF", "HEIF"):
        check_all_tags(file.read())


# ---- JPEG --------------------------------------------------------------------------------------------------


def read_jpeg_head(file: IO[bytes]) -> tuple[bool, int]:
    """Whether the first scan holds all there is, and where its header begins. Raises TooLarge for what no
    camera or editor writes in front of it."""
    file.seek(2)
    exif, num_bytes, is_progressive, num_parts = b"", 0, False, 0
    while num_bytes <= MAX_SIDE_DATA:
        mark = file.read(2)
        if len(mark) < 2 or mark[0] != 0xFF:
            num_bytes += 1 << 10  # what Pillow searches byte by byte
            skipped = file.read(1 << 8)
            if not skipped:
                break
            continue_at = skipped.find(b"\xff")
            file.seek((continue_at if continue_at >= 0 else len(skipped)) - len(skipped), os.SEEK_CUR)
            continue
        if mark[1] == 0xFF or mark[1] in (0, 1) or 0xD0 <= mark[1] <= 0xD8:  # without a content
            num_bytes += 1 << 10
            file.seek(-1, os.SEEK_CUR) if mark[1] == 0xFF else None
            continue
        start = file.tell() - 2
        length = max(2, int.from_bytes(file.read(2), "big")) - 2
        num_bytes += length + 64
        if mark[1] == 0xDA:
            return not is_progressive and file.read(1) == bytes([num_parts]), start
        content = file.read(length)
        if mark[1] in FRAME_MARKS:
            is_progressive, num_parts = mark[1] in (0xC2, 0xC6, 0xCA, 0xCE), content[5] if length > 5 else 0
        elif mark[1] == 0xE1 and content.startswith(b"Exif\0\0"):
            exif += content[6:]
    else:
        raise TooLarge(f"more than {MAX_SIDE_DATA:,} bytes stand before its pixels: save it anew")
    if exif:
        check_tags(io.BytesIO(exif), 0)
    return True, file.tell()


def check_scans(file: IO[bytes], num_pixels: int) -> bool:
    """Is a JPEG drawn in several scans? Raises TooLarge if these are too many."""
    place = file.tell()
    is_single, start = read_jpeg_head(file)
    file.seek(start)
    num_scans, end = 0, b""
    while block := file.read(BLOCK):  # first quickly, which may count too many: a film may follow the image
        num_scans += (end + block).count(b"\xff\xda")
        end = block[-1:] if block[-1:] == b"\xff" else b""
    if num_scans * num_pixels > MAX_SCANNED:
        file.seek(start)
        num_scans = count_scans(file.read())
    file.seek(place)
    if num_scans * num_pixels > MAX_SCANNED:
        raise TooLarge(f"it is drawn in {num_scans:,} passes over {num_pixels:,} pixels: save it anew")
    return not is_single


def count_scans(data: bytes) -> int:
    """From the header of the first scan to the end of the image."""
    place = num_scans = 0
    while (match := JPEG_MARK.search(data, place)) and match[0] != b"\xff\xd9":
        num_scans += match[0] == b"\xff\xda"
        place = match.end() + max(2, int.from_bytes(data[match.end() : match.end() + 2], "big"))
    return num_scans


# ---- what other formats hold beside their pixels -----------------------------------------------------------


def check_chunks(file: IO[bytes]) -> None:
    """Of a PNG."""
    file.seek(8)
    for _ in range(MAX_CHUNKS):
        head = file.read(8)
        if len(head) < 8 or head[4:] == b"IEND":
            return
        file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    raise TooLarge(f"it is cut into more than {MAX_CHUNKS:,} chunks: save it anew")


def check_comments(file: IO[bytes]) -> None:
    """Of a GIF: what stands before its first image."""
    file.seek(10)
    flags = (file.read(1) or b"\0")[0]
    file.seek(13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0))
    start = file.tell()
    while file.read(1) == b"!":
        file.read(1)
        while (length := file.read(1)) not in (b"", b"\0"):
            file.seek(length[0], os.SEEK_CUR)
            if file.tell() - start > MAX_COMMENTS:
                raise TooLarge(f"more than {MAX_COMMENTS:,} bytes stand before its pixels: save it anew")


def check_ppm(file: IO[bytes]) -> None:
    """Of a PPM: those in letters, and with a largest value of their own, are decoded in Python."""
    head = re.sub(rb"#[^\r\n]*[\r\n]", b"", file.read(BLOCK)).split(None, 4)[:4]
    if (
        head
        and head[0] in (b"P1", b"P2", b"P3")
        or (head and head[0] in (b"P5", b"P6") and head[3:] not in ([b"255"], [b"65535"]))
    ):
        width, height = (int(word) if word.isdigit() and len(word) < 9 else 0 for word in head[1:3])
        check_size(width, height, min(MAX_SLOW, MAX_PIXELS))


def check_all_tags(data: bytes) -> None:
    """Wherever in a file a list of tags may begin."""
    for match in TIFF_HEAD.finditer(data):
        check_tags(io.BytesIO(data[match.start() :]), 0)


def check_tags(file: IO[bytes], start: int) -> None:
    """Of a TIFF, or of EXIF data, which are laid out like one: Pillow reads what every tag names, and several
    may name the same bytes. Raises TooLarge if they name many times what the file holds."""
    length = file.seek(0, os.SEEK_END) - start
    file.seek(start)
    head = file.read(16)
    order = "<" if head[:1] == b"I" else ">"
    is_big = len(head) == 16 and 43 in head[2:4]
    count_code, entry, width = ("Q", "HHQQ", 8) if is_big else ("H", "HHII", 4)
    try:
        (place,) = struct.unpack_from(order + ("Q" if is_big else "I"), head, 8 if is_big else 4)
        file.seek(start + min(place, length))
        (count,) = struct.unpack(order + count_code, file.read(struct.calcsize(count_code)))
    except struct.error:
        return
    if count > 1 << 16:
        raise TooLarge(f"it holds {count:,} tags: save it anew")
    named = 0
    for tag, kind, number, offset in struct.iter_unpack(
        order + entry, whole(file.read(count * struct.calcsize("<" + entry)), struct.calcsize("<" + entry))
    ):
        size = number * TYPE_SIZES.get(kind, 0)
        if kind not in BYTES and size and number > MAX_VALUES and number <= length:
            raise TooLarge(f"its tag {tag} holds {number:,} values: save it anew")
        if size > width:
            named += max(0, min(size, length - offset))
    if named > 4 * length + BLOCK:
        raise TooLarge(f"its tags name {named:,} bytes, but its file holds {length:,}: save it anew")


def whole(data: bytes, size: int) -> bytes:
    """As many entries of this size as are whole."""
    return data[: len(data) - len(data) % size]
