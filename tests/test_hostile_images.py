"""Images that would cost gigabytes or minutes: refused, or decoded smaller, before they are decoded."""

import struct

import pytest
from making_images import RED, chunk, drawing, make_tiff, saved
from PIL import Image

from model import image_limits
from model.image_limits import FEWER_PIXELS
from model.images import open_image


def progressive(side: int, num_scans: int, **more) -> bytes:
    """A grey JPEG whose last scan is there so many times."""
    content = saved(Image.new("L", (side, side), 90), "JPEG", progressive=True, **more)
    scan = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + scan * num_scans + content[-2:]


def test_a_jpeg_of_thousands_of_scans_is_refused_before_it_is_decoded(tmp_path):
    """286 kB and 2,000 scans of 31 megapixels took a minute. Those of cameras and web pages have ten, and
    what follows an image (a film, another image) does not count."""
    (tmp_path / "bad.jpg").write_bytes(progressive(2000, 700))
    with pytest.raises(ValueError, match="bad.jpg: it is drawn in 706 passes over 4,000,000 pixels: save it"):
        open_image(tmp_path / "bad.jpg")
    (tmp_path / "good.jpg").write_bytes(progressive(2000, 9) + b"\xff\xda" * 700)
    assert open_image(tmp_path / "good.jpg").size == (2000, 2000)


def test_scans_behind_a_false_end_are_counted(tmp_path):
    """Two bytes that end an image may stand in a comment between its scans, where they end nothing."""
    content = progressive(2000, 700)
    place = content.rindex(b"\xff\xda")
    content = content[:place] + b"\xff\xfe\0\4\xff\xd9" + content[place:]
    first = content.index(b"\xff\xda")
    content = content[:first] + b"\xff\xfe\0\4\xff\xd9" + content[first:]
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(ValueError, match="bad.jpg: it is drawn in 706 passes"):
        open_image(tmp_path / "bad.jpg")


def test_large_images_of_several_scans_come_smaller(tmp_path, monkeypatch):
    """Their decoder holds all of them at once; one of a single scan holds a few rows."""
    monkeypatch.setattr(image_limits, "MAX_BUFFERED", 1000)
    drawing("RGB").resize((40, 26)).save(tmp_path / "several.jpg", progressive=True)
    drawing("RGB").resize((40, 26)).save(tmp_path / "single.jpg")
    assert open_image(tmp_path / "several.jpg").size == (20, 13)
    assert open_image(tmp_path / "single.jpg").size == (40, 26)
    drawing("RGB").resize((60, 60)).save(tmp_path / "several.jpg", progressive=True)
    with pytest.raises(ValueError, match="60 x 60 = 3,600 pixels: at most 2,000 are read"):
        open_image(tmp_path / "several.jpg")


def test_a_large_jpeg_2000_comes_at_a_half_or_a_quarter(tmp_path, monkeypatch):
    """In full, one just under the limit took 2.4 GB and 37 seconds."""
    monkeypatch.setattr(image_limits, "MAX_JPEG2000", 1000)
    for side, expected in ((31, 31), (40, 20), (80, 20)):
        Image.new("RGB", (side, side), RED).save(tmp_path / "a.jp2")
        image = open_image(tmp_path / "a.jp2")
        assert image.size == (expected, expected) and image.getpixel((9, 9)) == RED


def many_tags(count: int, size: int) -> bytes:
    """EXIF data, as a TIFF, in which all tags name the same bytes."""
    entries = b"".join(struct.pack("<HHII", 1000 + number, 1, size, 8) for number in range(count))
    return b"II*\0" + struct.pack("<IH", 8 + size, count) + entries + bytes(4)


def with_exif(form: str, exif: bytes) -> bytes:
    """A small image of a format; where its EXIF data must be cut up, in several parts."""
    if form != "JPEG":
        return saved(drawing("RGB"), form, exif=exif)
    content = saved(drawing("RGB"), "JPEG")
    parts = [b"Exif\0\0" + exif[start : start + 65_000] for start in range(0, len(exif), 65_000)]
    segments = [b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part for part in parts]
    return content[:2] + b"".join(segments) + content[2:]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_tags_that_all_name_the_same_bytes_are_refused(tmp_path, form):
    """1 MB of them became 2 GB: Pillow keeps what every tag names."""
    exif = many_tags(4000, 200_000)
    exif = exif[:8] + bytes(200_000) + exif[8:]
    if form == "TIFF":
        content = make_tiff(b"\7", 1, 8)
        (place,) = struct.unpack_from("<I", content, 4)
        (count,) = struct.unpack_from("<H", content, place)
        own = content[place + 2 : place + 2 + 12 * count]
        content = b"II*\0" + struct.pack("<I", 200_008) + b"\7" + bytes(199_999)
        content += struct.pack("<H", 4000 + count) + own + exif[200_010:]
    else:
        content = with_exif(form, exif)
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match="its tags name .* bytes, but its file holds .*: save it anew"):
        open_image(tmp_path / "a")


def test_images_beside_whose_pixels_there_is_too_much_are_refused(tmp_path):
    """Pillow walks through all that byte by byte, or joins it in quadratic time: seconds for each MB."""
    jpeg, png, gif = (saved(drawing("L"), form) for form in ("JPEG", "PNG", "GIF"))
    comment = (b"\xff" + b"a" * 255) * 5000
    for content, words in (
        (jpeg[:2] + (b"\xff\xed\xff\xff" + bytes(65_533)) * 600 + jpeg[2:], "bytes stand before its pixels"),
        (jpeg[:2] + b"\xff\xe0\0\2" + b"a" * 9_000_000 + jpeg[2:], "bytes stand before its pixels"),
        (png[:33] + chunk(b"abCd", b"") * 250_000 + png[33:], "cut into more than 200,000 chunks"),
        (gif[:781] + b"!\xfe" + comment + b"\0" + gif[781:], "bytes stand before its pixels"),
        (b"P3 4000 2000 255\n0 0 0", "8,000,000 pixels: at most 4,000,000 are read"),
        (b"P6 # 255\n4000 2000 254\n" + bytes(999), "8,000,000 pixels: at most 4,000,000 are read"),
        (b"P6 4000 2000 255\n" + bytes(24_000_000), ""),
    ):
        (tmp_path / "a").write_bytes(content)
        if words:
            with pytest.raises(ValueError, match=words):
                open_image(tmp_path / "a")
        else:
            assert open_image(tmp_path / "a").size == (4000, 2000)


def test_a_file_of_endless_bytes_is_refused(tmp_path):
    with open(tmp_path / "a.png", "wb") as file:
        file.write(saved(drawing("RGB"), "PNG"))
        file.truncate(image_limits.MAX_BYTES + 1)  # takes no room
    with pytest.raises(ValueError, match="its file has 1,073,741,825 bytes: at most 1,073,741,824 are read"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("form", FEWER_PIXELS)
def test_decoders_that_hold_an_image_several_times_get_smaller_ones(tmp_path, monkeypatch, form):
    if form == "HEIF":
        pytest.importorskip("pillow_heif")
    monkeypatch.setitem(FEWER_PIXELS, form, 100)
    (tmp_path / "a").write_bytes(saved(drawing("RGB"), form))
    with pytest.raises(ValueError, match="31 x 23 = 713 pixels: at most 100 are read"):
        open_image(tmp_path / "a")


def test_only_the_first_frame_of_an_animation_is_decoded(tmp_path):
    frames = [Image.new("RGB", (64, 64), (number, 0, 0)) for number in range(0, 250, 10)]
    for form in ("GIF", "WEBP", "PNG", "TIFF"):
        frames[0].save(tmp_path / "a", form, save_all=True, append_images=frames[1:])
        assert open_image(tmp_path / "a").getpixel((9, 9))[0] < 10, form
