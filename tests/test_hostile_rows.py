"""Rows whose content costs memory or time, or makes a decoder raise whatever it likes: bad samples, no
more."""

import base64
import json
import struct
import zlib

import pytest
from conftest import make_row, train
from making_images import chunk, drawing, saved

from model import prompt
from model.data import dataset as dataset_module
from model.data import sources
from model.data.batch import BadSample
from model.data.dataset import VLMDataset
from model.data.sources import is_embedded
from model.data.spec import SFT
from model.vision_utils import ImageProcessor


def make_dataset(folder, renderer, *rows: dict) -> VLMDataset:
    (folder / "data.json").write_text(json.dumps(rows))
    (folder / "0.png").write_bytes(saved(drawing("RGB"), "PNG"))
    return VLMDataset(folder / "data.json", SFT, renderer, folder, ImageProcessor())


def test_a_line_of_70_million_pixels_is_left_out_of_a_run(workplace):
    """68 kB ended training, even with --on_bad_sample skip."""
    rows = [make_row(image=f"{number % 6}.png", answer=f"答案 {number}") for number in range(120)]
    header = struct.pack(">IIBBBBB", 70_000_000, 1, 1, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(9_000_000)))
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels
    (workplace / "images" / "bad.png").write_bytes(content)
    rows[3]["image"] = "bad.png"
    (workplace / "data.json").write_text(json.dumps(rows))
    result = train(workplace, "--epochs=1", "--max_steps=0", "--batch_size=32", "--on_bad_sample=skip")
    assert "row 4: cannot read image" in result.stdout + result.stderr
    assert "at most 1,000,000 are read in a row or column" in result.stdout + result.stderr


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OverflowError("int too large to convert"),
        ZeroDivisionError("division by zero"),
        RecursionError("maximum recursion depth exceeded"),
        struct.error("unpack requires a buffer of 4 bytes"),
        EOFError("no more"),
        OSError(5, "Input/output error"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    ],
)
@pytest.mark.parametrize("place", ["load_images", "tokenize", "locate", "normalise_turns", "check_row"])
def test_whatever_the_content_of_a_row_raises_is_a_bad_sample(tmp_path, renderer, monkeypatch, place, error):
    """The guard stood around two kinds of errors; a resize that ran out of memory was a third."""
    dataset = make_dataset(tmp_path, renderer, make_row(id="seven"))

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(dataset_module, place, fail)
    sample = dataset[0]
    assert isinstance(sample, BadSample) and not sample.ends_run
    assert "data.json, row 1 (id seven): " in sample.reason and "\n" not in sample.reason
    if place in ("normalise_turns", "check_row"):
        assert dataset.problem_of(dataset.rows[0]) and dataset.rough_length(dataset.rows[0]) == 0


@pytest.mark.parametrize("error", [TypeError("a mistake"), AttributeError("another"), AssertionError()])
def test_a_mistake_in_the_program_ends_the_run(tmp_path, renderer, monkeypatch, error):
    dataset = make_dataset(tmp_path, renderer, make_row())

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(dataset_module, "load_images", fail)
    with pytest.raises(type(error)):
        dataset[0]


def test_a_text_that_no_context_holds_is_not_tokenized(tmp_path, renderer, monkeypatch):
    """An answer of 200 MB took minutes and all memory. One just below the limit gives the ids that it did."""
    monkeypatch.setattr(prompt, "MAX_TEXT", 5000)
    long = make_row(answer="蓝" * 4900)
    dataset = make_dataset(tmp_path, renderer, make_row(answer="蓝" * 5000), long)
    with monkeypatch.context() as patch:
        patch.setattr(type(renderer), "encode", lambda *_: pytest.fail("it is tokenized"))
        assert "row 1: its 2 turns have 5,011 characters: at most 5,000 are read" in dataset[0].reason
    with pytest.raises(ValueError, match="row 1: its 2 turns have"):
        dataset.check_rows()
    ids = renderer.render(long["conversations"]).input_ids
    assert dataset[1]["input_ids"].tolist() == ids[: renderer.max_seq_len - 1]
    assert dataset[1]["full_length"] > 4900
    with pytest.raises(ValueError, match="its 600 turns have 0 characters"):
        prompt.normalise_turns([{"from": "gpt", "value": ""}] * 600)


def test_images_in_a_row_are_bounded_too(tmp_path, renderer, monkeypatch):
    monkeypatch.setattr(sources, "MAX_EMBEDDED", 100)
    content = base64.b64encode(saved(drawing("RGB"), "PNG")).decode()
    sample = make_dataset(tmp_path, renderer, make_row(image=content))[0]
    assert f"it has {len(content):,} letters of base64: at most 100 are read" in sample.reason


def test_a_name_that_looks_like_base64_costs_no_time():
    """Spaces behind it were tried in every way of sharing them out between two patterns: 100,000 of them took
    minutes."""
    assert is_embedded("/9j/" + "A" * 50 + " " * 200_000 + "==")
    assert not is_embedded("/9j/" + "A" * 50 + " " * 200_000 + "!")
