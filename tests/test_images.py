"""Image files: what every mode shows, and that ordinary files show what they always did."""

import struct

import numpy as np
import pytest
from making_images import (
    BLUE,
    GREEN,
    RED,
    WHITE,
    chunk,
    colours,
    drawing,
    greys,
    make_png,
    make_tiff,
    plain_pillow,
    saved,
    shown,
    trns,
)
from PIL import Image, ImageCms

from model import image_modes
from model.images import open_image, to_rgb

PALETTE = chunk(b"PLTE", bytes((*RED, *GREEN, *BLUE)))
EXACT = {  # a file -> what it shows
    # Greys of 16 bits. The scale was once guessed from the values: 255 came out white, 256 black.
    "png 16 bits, dark": (make_png(struct.pack(">3H", 0, 128, 255), 3, 16, 0), greys(0, 0, 1)),
    "png 16 bits": (make_png(struct.pack(">4H", 256, 257, 32896, 65535), 4, 16, 0), greys(1, 1, 128, 255)),
    "png 16 bits, transparent": (
        make_png(struct.pack(">3H", 256, 257, 4000), 3, 16, 0, trns(257)),
        greys(1, 255, 16),
    ),
    "png 16 bits, alpha": (make_png(struct.pack(">4H", 0, 65535, 0, 0), 2, 16, 4), greys(0, 255)),
    "png 16 bits, RGB": (make_png(struct.pack(">3H", 0x12FF, 255, 65535), 1, 16, 2), [(0x12, 0, 255)]),
    "png 16 bits, RGBA": (make_png(struct.pack(">8H", *(9,) * 7, 65535), 2, 16, 6), greys(255, 0)),
    # Pillow scales the pixels to 8 bits, but compares them with the transparent colour as the file has it.
    "png 16 bits, RGB, transparent": (
        make_png(struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0, 0, 0), 2, 16, 2, trns(0x1234, 0x5678, 0x9ABC)),
        greys(255, 0),
    ),
    "png 4 bits, transparent": (make_png(b"\x05\xf0", 4, 4, 0, trns(5)), greys(0, 255, 255, 0)),
    "png 2 bits, transparent": (make_png(b"\x1b", 4, 2, 0, trns(1)), greys(0, 255, 170, 255)),
    "png 1 bit, transparent": (make_png(b"\x50", 4, 1, 0, trns(0)), greys(255, 255, 255, 255)),
    "png 1 bit": (make_png(b"\x50", 4, 1, 0), greys(0, 255, 0, 255)),
    "png 8 bits, transparent": (make_png(b"\x00\x05\x07", 3, 8, 0, trns(5)), greys(0, 255, 7)),
    "png RGB, transparent": (make_png(bytes((*RED, 1, 2, 3)), 2, 8, 2, trns(1, 2, 3)), [RED, WHITE]),
    "png palette": (make_png(b"\x00\x01\x02", 3, 8, 3, PALETTE), [RED, GREEN, BLUE]),
    "png palette, one transparent": (
        make_png(b"\x1b", 4, 2, 3, PALETTE, chunk(b"tRNS", b"\xff\x00")),
        [RED, WHITE, BLUE, (0, 0, 0)],
    ),
    "png palette, half transparent": (
        make_png(b"\x00\x01\x02", 3, 8, 3, PALETTE, chunk(b"tRNS", b"\x80\x00\xff")),
        [(255, 127, 127), WHITE, BLUE],
    ),
    # TIFF: by its tags.
    "tiff 16 bits": (make_tiff(struct.pack("<3H", 255, 256, 65535), 3, 16), greys(1, 1, 255)),
    "tiff 16 bits, Motorola": (
        make_tiff(struct.pack(">3H", 255, 256, 65535), 3, 16, order=">"),
        greys(1, 1, 255),
    ),
    "tiff 16 bits, white is 0": (
        make_tiff(struct.pack("<3H", 0, 257, 65535), 3, 16, photometric=0),
        greys(255, 254, 0),
    ),
    "tiff 16 bits, compressed": (
        saved(Image.fromarray(np.array([[0, 255, 65535]], np.uint16)), "TIFF", compression="tiff_lzw"),
        greys(0, 1, 255),
    ),
    "tiff 12 bits": (make_tiff(b"\x00\x08\x00\xff\xf0", 3, 12), greys(0, 128, 255)),
    "tiff signed, named range": (
        make_tiff(struct.pack("<3h", -100, 0, 100), 3, 16, 2, more=((340, 8, -100), (341, 8, 100))),
        greys(0, 128, 255),
    ),
    "tiff 32 bits, named range": (  # Pillow takes what is above 2^31 for negative
        make_tiff(struct.pack("<3I", 0, 2**31, 2**32 - 1), 3, 32, more=((340, 4, 0), (341, 4, 2**32 - 1))),
        greys(0, 128, 255),
    ),
    # Floats from 0 to 1 were all black.
    "tiff floats": (make_tiff(struct.pack("<3f", 0, 0.5, 1), 3, 32, 3), greys(0, 128, 255)),
    "tiff floats, Motorola": (
        make_tiff(struct.pack(">3f", 0, 0.5, 1), 3, 32, 3, order=">"),
        greys(0, 128, 255),
    ),
    "tiff floats, white is 0": (
        make_tiff(struct.pack("<3f", 0, 0.25, 1), 3, 32, 3, photometric=0),
        greys(255, 191, 0),
    ),
    "tiff floats beyond": (
        make_tiff(struct.pack("<4f", -3, 7, float("nan"), float("inf")), 4, 32, 3),
        greys(0, 255, 0, 255),
    ),
    "tiff floats, named range": (
        make_tiff(struct.pack("<3f", 0, 51, 255), 3, 32, 3, more=((340, 11, 0), (341, 11, 255))),
        greys(0, 51, 255),
    ),
    "tiff 1 bit, white is 0": (make_tiff(b"\x50", 4, 1, photometric=0), greys(255, 0, 255, 0)),
    "tiff CMYK": (
        make_tiff(bytes((0, 255, 255, 0, 0, 0, 0, 255)), 2, [8] * 4, photometric=5),
        [RED, (0, 0, 0)],
    ),
    "tiff premultiplied": (  # half transparent red, and nothing
        make_tiff(bytes((128, 0, 0, 128, 0, 0, 0, 0)), 2, [8] * 4, photometric=2, more=((338, 3, 1),)),
        [(255, 127, 127), WHITE],
    ),
    # PPM: Pillow brings any largest value to 65535.
    "pgm up to 1000": (b"P5 3 1 1000\n" + struct.pack(">3H", 0, 500, 1000), greys(0, 128, 255)),
    "pgm 16 bits": (b"P5 3 1 65535\n" + struct.pack(">3H", 0, 255, 65535), greys(0, 1, 255)),
    "pgm in letters": (b"P2 2 1 300\n0 300\n", greys(0, 255)),
    "pfm": (b"Pf 3 1 -1.0\n" + struct.pack("<3f", 0, 0.5, 1), greys(0, 128, 255)),
    "jpeg 2000 16 bits": (
        saved(Image.fromarray(np.array([[0, 255, 65535]], np.uint16)), "JPEG2000"),
        greys(0, 1, 255),
    ),
    "gif, transparent": (saved(colours(0, 1, 2, mode="L"), "GIF", transparency=1), greys(0, 255, 2)),
    "webp, alpha": (saved(colours((*RED, 255), (*RED, 0), mode="RGBA"), "WEBP", lossless=True), [RED, WHITE]),
    "bmp": (saved(colours(RED, GREEN), "BMP"), [RED, GREEN]),
}


@pytest.mark.parametrize("name", EXACT)
def test_a_file_shows_what_its_mode_says(tmp_path, name):
    content, expected = EXACT[name]
    (tmp_path / "image").write_bytes(content)
    assert shown(tmp_path / "image") == expected


@pytest.mark.parametrize(
    ("mode", "form", "more"),
    [
        ("CMYK", "JPEG", {}),
        ("L", "JPEG", {}),
        ("RGB", "AVIF", {"quality": 100, "subsampling": "4:4:4"}),
        ("LAB", "TIFF", {}),
        ("YCbCr", "TIFF", {"compression": "jpeg"}),
        ("RGB", "TIFF", {"compression": "jpeg"}),
    ],
)
def test_files_of_other_colour_spaces_show_their_colours(tmp_path, mode, form, more):
    """CMYK in a JPEG is stored inverted, as Adobe does."""
    image = Image.new("RGB", (32, 16), (200, 40, 90))
    image.paste((250, 250, 250), (0, 0, 16, 16))
    if mode == "LAB":
        profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
        stored = ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    else:
        stored = image.convert(mode)
    stored.save(tmp_path / "image", form, **more)
    with Image.open(tmp_path / "image", formats=[form]) as reopened:
        assert reopened.mode == {"YCbCr": "RGB"}.get(mode, mode)
    expected = np.asarray(image if mode != "L" else image.convert("L").convert("RGB"), int)
    assert np.abs(np.asarray(open_image(tmp_path / "image"), int) - expected).max() <= 6


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(np.array([[0, 255, 65535, 99999, -5]], np.int32)), greys(0, 1, 255, 255, 0)),
        (Image.fromarray(np.array([[0, 0.5, 1, 2, -1]], np.float32)), greys(0, 128, 255, 255, 0)),
        (Image.frombytes("I;16B", (2, 1), struct.pack(">2H", 255, 65535)), greys(1, 255)),
        (Image.frombytes("I;16L", (2, 1), struct.pack("<2H", 255, 65535)), greys(1, 255)),
        (Image.frombytes("La", (2, 1), bytes((50, 100, 0, 0))), greys(205, 255)),
        (Image.frombytes("RGBa", (1, 1), bytes((128, 0, 0, 128))), [(255, 127, 127)]),
        (Image.frombytes("HSV", (1, 1), bytes((0, 255, 255))), [RED]),
        (Image.frombytes("RGBX", (1, 1), bytes((1, 2, 3, 4))), [(1, 2, 3)]),
    ],
)
def test_an_image_in_memory_shows_what_its_mode_says(image, expected):
    assert [tuple(pixel) for pixel in np.asarray(to_rgb(image))[0].tolist()] == expected


@pytest.mark.parametrize(
    ("pixels", "bits", "kind", "words"),
    [
        (struct.pack("<2i", 0, 65535), 32, 2, "signed integers of 32 bits"),
        (struct.pack("<2I", 0, 65535), 32, 1, "integers of 32 bits"),
        (struct.pack("<2h", 0, 255), 16, 2, "signed integers of 16 bits"),
    ],
)
def test_a_scale_that_nobody_names_is_not_guessed(tmp_path, pixels, bits, kind, words):
    (tmp_path / "a.tif").write_bytes(make_tiff(pixels, 2, bits, kind))
    with pytest.raises(ValueError, match=f"a.tif: .*{words}.*do not say .* white: save it with 8 or 16 bits"):
        open_image(tmp_path / "a.tif")


# ---- ordinary files stay as they were ----------------------------------------------------------------------


@pytest.mark.parametrize("strip", [image_modes.STRIP, 70])
@pytest.mark.parametrize(
    ("form", "modes"),
    [
        ("JPEG", "L RGB CMYK"),
        ("PNG", "1 L LA P RGB RGBA"),
        ("WEBP", "RGB RGBA"),
        ("GIF", "L P"),
        ("BMP", "1 L P RGB"),
        ("TIFF", "1 L LA P RGB RGBA CMYK LAB"),
        ("JPEG2000", "L RGB RGBA"),
        ("PPM", "1 L RGB"),
        ("AVIF", "RGB RGBA"),
    ],
)
def test_files_of_8_bits_give_the_bytes_that_pillow_gives(tmp_path, monkeypatch, form, modes, strip):
    """In strips too, which keep large images out of memory."""
    monkeypatch.setattr(image_modes, "STRIP", strip)
    for mode in modes.split():
        image = drawing("RGB" if mode == "LAB" else mode)
        if mode == "LAB":
            image = Image.frombytes("LAB", image.size, image.tobytes())
        image.save(tmp_path / "image", form)
        result, expected = open_image(tmp_path / "image"), plain_pillow(tmp_path / "image", form)
        assert result.size == expected.size and result.tobytes() == expected.tobytes(), mode


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("form", "mode"), [("JPEG", "RGB"), ("PNG", "LA"), ("TIFF", "RGB"), ("WEBP", "RGB")])
def test_every_orientation_is_turned_upright_once(tmp_path, form, mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    drawing(mode).save(tmp_path / "image", form, exif=exif)
    result = open_image(tmp_path / "image")
    assert result.tobytes() == plain_pillow(tmp_path / "image", form).tobytes()
    assert result.size == ((31, 23) if orientation < 5 else (23, 31))
    assert to_rgb(result) is result


def test_exif_data_that_pillow_cannot_write_again_still_turn_an_image(tmp_path, monkeypatch):
    """Maker notes of many cameras are such: the image lay on its side without a word."""
    exif = Image.Exif()
    exif[0x0112] = 6
    drawing("RGB").save(tmp_path / "a.png", exif=exif)
    expected = open_image(tmp_path / "a.png")
    monkeypatch.setattr(Image.Exif, "tobytes", lambda *_: struct.pack("B", 256))
    assert open_image(tmp_path / "a.png").tobytes() == expected.tobytes() and expected.size == (23, 31)
