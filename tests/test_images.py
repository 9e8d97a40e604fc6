"""Image files: what every mode shows, formats, images too large, folders."""

import ast
import io
import os
import struct
import subprocess
import sys
import types
import warnings
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, SIZES, check_refused, run_clean, run_script, save_image
from PIL import Image, ImageCms, ImageFile, ImageOps

from model import images
from model.checkpoint import save_weights
from model.images import FORMATS, find_images, open_image, to_rgb
from model.LMConfig import LMConfig
from model.names import IMAGE_SUFFIXES, weights_path
from model.transformer import Transformer
from model.vision_utils import ImageProcessor, get_img_process, load_pixels
from serving.page import find_examples


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


RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
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


@pytest.mark.parametrize("strip", [images.STRIP, 70])
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
    monkeypatch.setattr(images, "STRIP", strip)
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


# ---- formats -----------------------------------------------------------------------------------------------


def test_every_suffix_of_an_image_folder_is_read(tmp_path):
    """.jfif and .avif were passed over."""
    forms = Image.registered_extensions() | {".hif": "HEIF", ".heic": "HEIF", ".heif": "HEIF", ".pnm": "PPM"}
    for number, suffix in enumerate(IMAGE_SUFFIXES):
        drawing("L" if suffix in (".pgm", ".pbm") else "RGB").save(
            tmp_path / f"{number:02}{suffix.upper() if number % 2 else suffix}",
            "PNG" if forms[suffix] == "HEIF" else forms[suffix],  # which cannot be written here
        )
        assert forms[suffix] in FORMATS
    found = find_images(tmp_path)
    assert len(found) == len(IMAGE_SUFFIXES)
    assert {open_image(path).size for path in found} == {(31, 23)}


def heif(brand: bytes) -> bytes:
    return struct.pack(">I", 24) + b"ftyp" + brand + bytes(4) + b"mif1" + brand + bytes(40)


@pytest.fixture
def without_heif(monkeypatch):
    """Whatever is installed: no pillow-heif yet."""
    images.load_decoders()
    images.register_heif.cache_clear()
    monkeypatch.setattr(Image, "OPEN", {name: Image.OPEN[name] for name in Image.OPEN if name != "HEIF"})
    yield
    images.register_heif.cache_clear()


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1"])
def test_heic_without_its_decoder_names_the_cure(tmp_path, monkeypatch, without_heif, brand):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.heic").write_bytes(heif(brand))
    with pytest.raises(ValueError, match="a.heic: it is a HEIC image: pip install pillow-heif"):
        open_image(tmp_path / "a.heic")


def test_heic_is_read_by_pillow_heif_which_is_registered_once(tmp_path, monkeypatch, without_heif):
    class Plugin(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self):
            self._size, self._mode = (2, 1), "RGB"
            self.tile = [ImageFile._Tile("raw", (0, 0, 2, 1), 64, "RGB")]

    calls = []

    def register_heif_opener():
        calls.append(1)
        Image.register_open("HEIF", Plugin, lambda prefix: prefix[8:12] == b"heic")

    fake = types.SimpleNamespace(register_heif_opener=register_heif_opener)
    monkeypatch.setitem(sys.modules, "pillow_heif", fake)
    (tmp_path / "a.png").write_bytes(make_png(b"\x07", 1, 8, 0))
    (tmp_path / "a.heic").write_bytes(heif(b"heic") + bytes((*RED, *BLUE)))
    assert shown(tmp_path / "a.png") == greys(7) and not calls  # only who needs it loads it
    assert shown(tmp_path / "a.heic") == shown(tmp_path / "a.heic") == [RED, BLUE] and len(calls) == 1


@pytest.mark.parametrize("brand", ["heic", "mif1"])
def test_heic_of_the_real_pillow_heif(tmp_path, without_heif, brand):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), (200, 40, 90))).save(tmp_path / "a.heic", quality=90)
    content = (tmp_path / "a.heic").read_bytes()
    (tmp_path / "a.heic").write_bytes(content[:8] + brand.encode() + content[12:])
    image = open_image(tmp_path / "a.heic")
    assert image.size == (64, 48) and np.abs(np.asarray(image, int) - (200, 40, 90)).max() <= 6


def test_avif_without_its_decoder_names_the_cure(tmp_path, monkeypatch):
    """Pillow before 11.3 does not know it, later ones may be built without."""
    images.load_decoders()
    (tmp_path / "a.avif").write_bytes(heif(b"avif"))
    for answer in (None, "image file could not be identified because AVIF support not installed"):
        known = {name: Image.OPEN[name] for name in Image.OPEN if name != "AVIF"}
        if answer:
            known["AVIF"] = (None, lambda prefix, answer=answer: answer)
        monkeypatch.setattr(Image, "OPEN", known)
        with pytest.raises(ValueError, match=r'a.avif: it is an AVIF image: pip install "pillow>=11.3"'):
            open_image(tmp_path / "a.avif")


def test_no_file_reaches_another_decoder(tmp_path):
    """An EPS called kitten.png started Ghostscript: 69 bytes of endless PostScript hung page and training."""
    (tmp_path / "kitten.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n"
    )
    for name in ("gs", "gswin64c", "ffmpeg"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    for code, started in (
        ("from model.images import open_image; open_image(sys.argv[1])", False),
        ("from PIL import Image; Image.open(sys.argv[1]).load()", True),  # the trap works
    ):
        result = subprocess.run(
            [sys.executable, "-c", f"import sys; {code}", tmp_path / "kitten.png"],
            env=os.environ | {"PATH": path},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert (tmp_path / "started").exists() == started, result.stderr
        assert result.returncode
        if not started:
            assert "ValueError: cannot read image" in result.stderr and "none of the formats" in result.stderr


def test_an_image_is_opened_with_the_list_of_formats_everywhere():
    """Also by whoever adds a place that opens one."""
    files = [
        path
        for pattern in ("*.py", "model/**/*.py", "trainer/**/*.py", "serving/**/*.py", "dataset/**/*.py")
        for path in ROOT.glob(pattern)
    ]
    assert len(files) > 40
    for path in files:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("Image.open", "PIL.Image.open"):
                assert any(ast.unparse(word) == "formats=FORMATS" for word in call.keywords), path
    assert not {"EPS", "PDF", "WMF", "MPEG", "GRIB", "BUFR", "HDF5"} & set(FORMATS)


# ---- large images ------------------------------------------------------------------------------------------


def test_a_photograph_of_200_megapixels_is_read_at_half_its_size(tmp_path):
    """Pillow refused it as a decompression bomb. Decoded in full it would take 0.8 GB."""
    Image.new("L", (16320, 12240), 90).save(tmp_path / "a.jpg")
    image = open_image(tmp_path / "a.jpg")
    assert image.size == (8160, 6120) and image.getpixel((4000, 3000)) == (90, 90, 90)
    assert open_image(tmp_path / "a.jpg", 224).size == (2040, 1530)
    assert load_pixels(tmp_path / "a.jpg", ImageProcessor()).shape == (3, 224, 224)


def test_what_is_too_large_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    monkeypatch.setattr(images, "MAX_REDUCED", 2000)
    for form in ("PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM"):
        Image.new("RGB", (40, 25)).save(tmp_path / "fits", form)
        assert open_image(tmp_path / "fits").size == (40, 25)
        Image.new("RGB", (40, 26)).save(tmp_path / "large", form)
        with pytest.raises(ValueError, match="large: 40 x 26 = 1,040 pixels: at most 1,000 are read; scale"):
            open_image(tmp_path / "large")
    for form in ("JPEG", "JPEG2000"):
        Image.new("RGB", (40, 50)).save(tmp_path / "fits", form)
        assert open_image(tmp_path / "fits").size == (20, 25)
        Image.new("RGB", (40, 51)).save(tmp_path / "large", form)
        for draft_side in (0, 5):
            with pytest.raises(ValueError, match="large: 40 x 51 = 2,040 pixels: at most 2,000 are read"):
                open_image(tmp_path / "large", draft_side)
    with pytest.raises(ValueError, match="^40 x 26 = 1,040 pixels: at most 1,000 are read"):
        get_img_process(Image.new("RGB", (40, 26)), ImageProcessor())


def test_pillow_has_no_word_about_bombs(tmp_path):
    """Neither its warning, from 89 million pixels on, nor its error."""
    images.load_decoders.cache_clear()
    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 0, 0, 0, 0)
    (tmp_path / "half.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"x"))
    screen = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0)
    for name, side in (("a.gif", 10_000), ("b.gif", 60_000)):  # a frame larger than the screen
        (tmp_path / name).write_bytes(screen + b"," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x08\0;")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("half.png", "a.gif", "b.gif"):
            with pytest.raises(ValueError, match=name) as error:
                open_image(tmp_path / name)
            assert "bomb" not in str(error.value)


@pytest.mark.parametrize("size", [(70_000_000, 1), (1, 70_000_000)])
def test_a_line_of_70_million_pixels_is_refused(tmp_path, size):
    """68 kB: the resize ran out of memory outside of every guard, and training ended, even with
    --on_bad_sample skip."""
    header = struct.pack(">IIBBBBB", *size, 1, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(9_000_000)))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels)
    with pytest.raises(ValueError, match=f"a.png: {size[0]} x {size[1]} pixels: at most 1,000,000 .* column"):
        load_pixels(tmp_path / "a.png", ImageProcessor())
    with pytest.raises(ValueError, match="pixels: at most 1,000,000"):
        get_img_process(Image.new("1", size), ImageProcessor())


@pytest.mark.parametrize("step", ["load", "transpose", "convert", "getexif", "resize"])
def test_memory_that_does_not_suffice_is_a_bad_image(tmp_path, monkeypatch, step):
    exif = Image.Exif()
    exif[0x0112] = 6
    drawing("LA").save(tmp_path / "a.png", exif=exif)

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile if step == "load" else Image.Image, step, fail)
    with pytest.raises(ValueError, match="a.png: .*pixels need too much memory: scale it down"):
        load_pixels(tmp_path / "a.png", ImageProcessor())


LONG = 1_500_000  # bytes


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"tEXt", b"Comment\0" + b"a" * LONG),
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * LONG)),
        chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(b"a" * LONG)),
        chunk(b"iTXt", b"Comment\0\0\0\0\0" + b"a" * LONG),
        chunk(b"iCCP", b"icc\0\0" + zlib.compress(os.urandom(LONG))),
        chunk(b"tEXt", b"Comment\0" + b"a" * LONG) * 50,
    ],
    ids=["tEXt", "zTXt", "iTXt compressed", "iTXt", "iCCP", "75 MB"],
)
@pytest.mark.parametrize("at_the_end", [False, True])
def test_long_texts_and_colour_profiles_do_not_spoil_a_png(tmp_path, extra, at_the_end):
    """Pillow refuses one of more than 1 MB, although neither shows."""
    more = (b"", extra) if at_the_end else (extra, b"")
    pixels = struct.pack(">3H", 256, 257, 65535)
    (tmp_path / "a.png").write_bytes(make_png(pixels, 3, 16, 0, more[0], trns(257), after=more[1]))
    assert shown(tmp_path / "a.png") == greys(1, 255, 255)


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "TIFF", "AVIF"])
def test_a_long_colour_profile_does_not_spoil_another_format(tmp_path, form):
    drawing("RGB").save(tmp_path / "image", form, icc_profile=os.urandom(LONG))
    assert open_image(tmp_path / "image").tobytes() == plain_pillow(tmp_path / "image", form).tobytes()


# ---- folders -----------------------------------------------------------------------------------------------


@pytest.fixture
def place(workplace, tokenizer, tokenizer_path, clip_path) -> list[str]:
    """Flags for weights that describe something, and a folder with sound, broken and hidden images."""
    torch.manual_seed(2)
    config = LMConfig(**SIZES, vocab_size=len(tokenizer), vision_dim=24, max_seq_len=256)
    save_weights(Transformer(config), weights_path(workplace / "out", config, "vlm_sft"))
    folder = workplace / "images"
    (folder / "._0.png").write_bytes(b"\0\5\x16\7")
    (folder / ".hidden.png").write_bytes(b"no image")
    (folder / "2.png").write_bytes(b"no image")
    (folder / "3.png").write_bytes((folder / "4.png").read_bytes()[:999])
    (folder / "folder.png").mkdir()
    return [
        f"--out_dir={workplace}/out",
        f"--tokenizer_path={tokenizer_path}",
        f"--clip_path={clip_path}",
        f"--image_dir={folder}",
        "--device=cpu",
        "--max_new_tokens=4",
    ]


def test_broken_and_hidden_files_do_not_end_the_description_of_a_folder(place, workplace, capsys):
    """The first of them did, and the images after it were never described."""
    result = run_clean(capsys, "3-eval_chat.py", *place)
    check_refused(result, "2 of 6 could not be described", "above")
    described = result.stdout[result.stdout.index("\n[") :]
    names = [line.partition("]")[0].rpartition("/")[2] for line in described.splitlines() if line[:1] == "["]
    assert names == [f"{number}.png" for number in range(6)]
    passed_over = [line for line in described.splitlines() if "passed over: cannot read image" in line]
    assert len(passed_over) == 2 and "2.png" in passed_over[0] and "3.png" in passed_over[1]
    together = run_script("3-eval_chat.py", *place, processes=2)
    assert together.returncode and together.stderr.count("error: 2 of 6 could not be described") == 1
    assert together.stdout[together.stdout.index("\n[") :] == described


def test_a_set_with_a_broken_image_is_passed_over(place, workplace, capsys):
    for name in ("a", "b", "c", "empty", ".hidden"):
        (workplace / "sets" / name).mkdir(parents=True)
    for name in ("a", "b", "c"):
        save_image(workplace / "sets" / name / "0.png", 0)
        (workplace / "sets" / name / "._0.png").write_bytes(b"\0\5\x16\7")
    (workplace / "sets" / "b" / "1.png").write_bytes(b"no image")
    flags = [*place, "--multi", "--stage=vlm_sft", f"--image_dir={workplace}/sets"]
    result = run_clean(capsys, "3-eval_chat.py", *flags)
    check_refused(result, "2 of 4 could not be described")
    lines = [line for line in result.stdout.splitlines() if line.startswith("[")]
    assert ["passed over" in line for line in lines] == [False, True, False, True]
    assert "1.png" in lines[1] and "it holds no images" in lines[3]


def test_the_page_shows_no_hidden_file_as_an_example(tmp_path):
    for name in ("a.png", "._a.png", ".b.jpg"):
        (tmp_path / name).write_bytes(b"")
    assert [example["files"] for example in find_examples(tmp_path, several=False)] == [
        [str(tmp_path / "a.png")]
    ]
