"""Image files: formats, and images too large to be read."""

import ast
import os
import struct
import subprocess
import sys
import types
import warnings
import zlib

import numpy as np
import pytest
from conftest import ROOT
from making_images import (
    BLUE,
    RED,
    chunk,
    drawing,
    greys,
    make_png,
    plain_pillow,
    shown,
    trns,
)
from PIL import AvifImagePlugin, EpsImagePlugin, Image, ImageFile

from model import image_limits, images
from model.images import FORMATS, find_images, open_image
from model.names import IMAGE_SUFFIXES
from model.vision_utils import ImageProcessor, get_img_process, load_pixels


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
def without_heif():
    """Whatever is installed: no pillow-heif yet."""
    images.heif_decoder.cache_clear()
    yield
    images.heif_decoder.cache_clear()


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1"])
def test_heic_without_its_decoder_names_the_cure(tmp_path, monkeypatch, without_heif, brand):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.heic").write_bytes(heif(brand))
    with pytest.raises(ValueError, match="a.heic: it is a HEIC image: pip install pillow-heif"):
        open_image(tmp_path / "a.heic")


def test_heic_is_read_by_pillow_heif(tmp_path, monkeypatch, without_heif):
    class Plugin(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self):
            self._size, self._mode = (2, 1), "RGB"
            self.tile = [ImageFile._Tile("raw", (0, 0, 2, 1), 64, "RGB")]

    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(HeifImageFile=Plugin))
    (tmp_path / "a.heic").write_bytes(heif(b"heic") + bytes((*RED, *BLUE)))
    assert shown(tmp_path / "a.heic") == shown(tmp_path / "a.heic") == [RED, BLUE]


@pytest.mark.parametrize("brand", ["heic", "mif1"])
def test_heic_of_the_real_pillow_heif(tmp_path, without_heif, brand):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), (200, 40, 90))).save(tmp_path / "a.heic", quality=90)
    content = (tmp_path / "a.heic").read_bytes()
    (tmp_path / "a.heic").write_bytes(content[:8] + brand.encode() + content[12:])
    image = open_image(tmp_path / "a.heic")
    assert image.size == (64, 48) and np.abs(np.asarray(image, int) - (200, 40, 90)).max() <= 6


def test_avif_without_its_decoder_names_the_cure(tmp_path, monkeypatch):
    (tmp_path / "a.avif").write_bytes(heif(b"avif"))
    monkeypatch.setattr(AvifImagePlugin, "SUPPORTED", False)
    with pytest.raises(
        ValueError, match="a.avif: it is an AVIF image, .* built without AVIF: save it as JPEG"
    ):
        open_image(tmp_path / "a.avif")


class Foreign(ImageFile.ImageFile):
    """A decoder that a library of the process adds, and that takes whatever comes."""

    format = "FOREIGN"

    def _open(self):
        self._size, self._mode, self.tile = (7, 7), "L", []


@pytest.mark.parametrize("before", ["nothing", "all of Pillow", "other plugins", "other limits", "an EPS"])
def test_what_an_image_is_does_not_depend_on_what_the_process_did_before(tmp_path, monkeypatch, before):
    """Pillow asks all decoders that were loaded until then: a file was an EPS, or none, by what was opened
    before it."""
    for name in ("OPEN", "ID", "EXTENSION"):
        monkeypatch.setattr(Image, name, getattr(Image, name).copy())
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    forms = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")
    for form in forms:
        drawing("RGB").save(tmp_path / form, form)
    if before == "all of Pillow":
        Image.init()
    elif before == "other plugins":
        for form in (*forms, "ANY"):
            Image.register_open(form, Foreign, lambda prefix: True)
    elif before == "other limits":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    elif before == "an EPS":
        Image.register_open("EPS", EpsImagePlugin.EpsImageFile, EpsImagePlugin._accept)
        Image.open(tmp_path / "a.eps")
    for form in forms:
        image = open_image(tmp_path / form)
        assert image.size == (31, 23), form
        if form != "JPEG":
            assert abs(np.asarray(image, int) - np.asarray(drawing("RGB"))).mean() < 90
    for content in (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"%PDF-1.4\n",
        b"8BPS\0\1",
        bytes(512),
    ):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(ValueError, match="in none of the formats that are read"):
            open_image(tmp_path / "a.png")


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
    monkeypatch.setattr(image_limits, "MAX_PIXELS", 1000)
    monkeypatch.setattr(image_limits, "MAX_REDUCED", 2000)
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
    images.ignore_warnings.cache_clear()
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
