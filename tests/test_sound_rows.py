"""Rows as people have them: data files in any form, names as other systems spell them, images that stand in
the rows. Each test tells of what was refused in misleading words, or read wrongly."""

import base64
import gzip
import io
import json
import os
import pickle
import textwrap
import unicodedata
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from conftest import (
    check_same,
    make_question,
    make_row,
    make_rows,
    run_inside,
    save_image,
    weights_of,
    write_questions,
)
from PIL import Image

from model.data import rows as rows_module
from model.data.batch import BadSample
from model.data.dataset import VLMDataset
from model.data.feature_store import image_keys
from model.data.rows import Rows
from model.data.sources import file_names, is_embedded
from model.data.spec import PRETRAIN, SFT_MULTI
from model.images import open_image
from model.vision_utils import ImageProcessor

# ---- data files --------------------------------------------------------------------------------------------


def text_of(rows: list, name: str) -> str:
    kept = [json.dumps(row, ensure_ascii=False) for row in rows]
    return "\n".join(kept) if "jsonl" in name.lower() or "ndjson" in name else f"[{','.join(kept)}]"


@pytest.fixture(params=["small", "large"])
def size(request, monkeypatch, tmp_path) -> str:
    """A large file is indexed, a small one read at every start."""
    monkeypatch.setattr(rows_module, "SMALL", 0 if request.param == "large" else 1 << 30)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return request.param


@pytest.mark.parametrize(
    ("name", "encoding"),
    [
        ("a.JSON", "utf-8"),
        ("a.JsonL", "utf-8"),
        ("a.ndjson", "utf-8"),
        ("a.v2.jsonl.gz", "utf-8"),
        ("a.JSON.GZ", "utf-8-sig"),
        ("a.json", "utf-16"),
        ("a.jsonl", "utf-16-le"),
        ("a.json", "utf-32"),
        ("a.jsonl.gz", "utf-16"),
        ("unpacked.jsonl.gz", "utf-8"),  # many a program unpacks what it downloads and keeps the name
        ("a.PARQUET", None),
        ("named.json", None),
    ],
)
def test_a_data_file_is_read_in_whatever_form_it_comes(tmp_path, monkeypatch, size, name, encoding):
    rows, path = make_rows(40), tmp_path / name
    if encoding is None:
        pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
        os.replace(tmp_path / "a.parquet", path)
    else:
        content = text_of(rows, name).encode(encoding)
        packed = name.lower().endswith(".gz") and "unpacked" not in name
        path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    read = Rows(path)
    assert list(read) == rows
    assert list(pickle.loads(pickle.dumps(read))) == rows  # as a spawned loader worker gets it
    if size == "large":
        monkeypatch.setattr(Rows, "build", lambda *_: 1 / 0)
        assert list(Rows(path)) == rows and Rows(path).folder == read.folder


def test_a_compressed_file_counts_as_large_for_what_is_in_it(tmp_path, monkeypatch):
    """A small file is held in memory; one that is compressed may hold a thousand times its size."""
    monkeypatch.setattr(rows_module, "SMALL", 20_000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"text": "x" * 5_000_000}).encode(), mtime=0))
    assert path.stat().st_size < 20_000 and Rows(path).folder is not None


@pytest.mark.parametrize(
    ("name", "content", "fragments"),
    [
        (
            "a.json.gz",
            gzip.compress(b"[1]" * 99, mtime=0)[:-9],
            ["cannot unpack", "was it copied as a whole?"],
        ),
        ("a.json.gz", gzip.compress(b"[1, oops]", mtime=0), ["a.json.gz is not valid JSON: line 1 column 5"]),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), ["a parquet file is compressed inside", "gunzip"]),
        ("a.json", "[1]".encode("utf-16")[:-1], ["is not UTF-16", "truncated data"]),
        ("a.zip", b"PK\x03\x04rest", ["a.zip is a zip archive: unpack it"]),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfdrest", ["is compressed by zstd: unpack it"]),
        ("a.csv", b"image,question\n", ["line 1 column 1", "rows are read from .json, .jsonl and .parquet"]),
        ("a.json", b"version https://git-lfs.github.com/spec/v1\n", ["a.json is a git-lfs pointer"]),
        ("a.json", b"<!doctype html>", ["a.json is a web page"]),
    ],
)
def test_a_data_file_that_is_not_read_is_named_for_what_it_is(tmp_path, size, name, content, fragments):
    """All were called invalid JSON, or text that is not UTF-8."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as found:
        Rows(tmp_path / name)
    for fragment in (name, *fragments):
        assert fragment in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_deep_rows_are_refused_before_training_and_not_in_it(tmp_path, name):
    """json.loads() gives up where the stack ends: rows of 975 levels passed the check, and died in training,
    which calls it from further inside."""

    def nested(depth: int) -> list:
        row: list = []
        for _ in range(depth - 1):
            row = [row]
        return row

    wide = [{"a": [[[]] * 300]}]
    (tmp_path / name).write_text(text_of([nested(200), wide], name))
    rows = Rows(tmp_path / name)
    assert rows[0] == nested(200) and rows[1] == wide
    for depth in (201, 975, 5000):
        text = "[" * depth + "]" * depth
        (tmp_path / name).write_text(f"1\n{text}" if name == "a.jsonl" else f"[1,\n{text}, 2]")
        with pytest.raises(ValueError, match="line 2 column 1: nested too deeply, more than 200 levels"):
            Rows(tmp_path / name)


# ---- what rows name ----------------------------------------------------------------------------------------


def row(image, num_marks: int = 1, **more) -> dict:
    return make_row("<image>" * num_marks + "什么？", image=image, id="7", **more)


@pytest.fixture
def make(tmp_path, renderer):
    """Rows to a dataset, in a folder `images` with six images."""
    (tmp_path / "images").mkdir()
    for number in range(6):
        save_image(tmp_path / "images" / f"{number}.png", number)

    def build(*rows, spec=PRETRAIN) -> VLMDataset:
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        return VLMDataset(tmp_path / "rows.json", spec, renderer, tmp_path / "images", ImageProcessor())

    return build


def shown(dataset: VLMDataset, position: int = 0) -> list[str]:
    """The names of the files that a row shows; they are read."""
    sample = dataset[position]
    assert not isinstance(sample, BadSample), sample
    return [str(path.relative_to(dataset.image_dir)) for path in dataset.expand(position)[0]]


@pytest.mark.parametrize("name", ["Smith, John.png", "1,024.png", "0.png,1.png", "a,,b.png"])
def test_a_comma_may_belong_to_a_name(make, tmp_path, name):
    """A string was always cut at its commas: `1,024.png` was said to be two images."""
    save_image(tmp_path / "images" / name, 7)
    dataset = make(row(name), row([name]), row(f"3.png, {name}"), row(f"file://{name}"))
    for position in (0, 1, 3):
        assert shown(dataset, position) == [name]
    assert isinstance(dataset[2], BadSample)  # which comma is which, nobody can say
    assert shown(make(row(["3.png", name], num_marks=2), spec=SFT_MULTI)) == ["3.png", name]


def test_as_many_marks_as_parts_make_them_several_names(make, tmp_path):
    save_image(tmp_path / "images" / "0.png,1.png", 7)
    assert shown(make(row("0.png,1.png", num_marks=2), spec=SFT_MULTI)) == ["0.png", "1.png"]
    assert shown(make(row("0.png, 1.png, ", num_marks=2), spec=SFT_MULTI)) == ["0.png", "1.png"]
    reason = make(row("0.png, 2.png"), spec=SFT_MULTI)[0].reason
    assert "1 <image> mark(s) for 2 image(s)" in reason and 'no file called "0.png, 2.png"' in reason


def test_a_file_that_is_put_there_later_ends_what_was_said_of_its_row(make, tmp_path, monkeypatch):
    """The verdict on a large file is kept with its index."""
    monkeypatch.setattr(rows_module, "SMALL", 0)
    dataset = make(row("late, a.png"), row("0.png"))
    for _ in range(2):
        with pytest.raises(ValueError, match="row 1 .id 7.: it has 2 images"):
            dataset.check_rows()
    save_image(tmp_path / "images" / "late, a.png", 7)
    dataset.check_rows()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("sub\\a.png", "sub/a.png"),
        ("sub\\deep\\b.png", "sub/deep/b.png"),
        ("back\\slash.png", "back\\slash.png"),  # a letter like others, where a file is called so
        (unicodedata.normalize("NFD", "café ü.png"), unicodedata.normalize("NFC", "café ü.png")),
        (unicodedata.normalize("NFC", "한국.png"), unicodedata.normalize("NFD", "한국.png")),
        (unicodedata.normalize("NFD", "sub\\é.png"), unicodedata.normalize("NFC", "sub/é.png")),
        ("file:sub/a.png", "sub/a.png"),
        ("file://sub/a%20b%2Cc.png", "sub/a b,c.png"),
    ],
)
def test_names_as_other_systems_spell_them_are_found(make, tmp_path, name, found):
    path = tmp_path / "images" / found
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(path, 7)
    dataset = make(row(name), row([name]))
    dataset.check_rows()
    assert shown(dataset) == shown(dataset, 1) == [found]


def test_addresses_of_files_are_paths(make, tmp_path):
    save_image(tmp_path / "away 1.png", 7)
    address = (tmp_path / "away 1.png").as_uri()
    assert "%20" in address
    for name in (
        address,
        address.replace("file://", "file://localhost"),
        address.replace("file://", "FILE:"),
    ):
        assert make(row(name)).expand(0)[0] == [tmp_path / "away 1.png"]
    assert file_names({"image": "file:///C:/my%20images/a.png"}, "image") == ["C:/my images/a.png"]


def test_other_addresses_are_named_for_what_they_are(make):
    """Were cut at their commas, and then not found as files of --image_dir."""
    dataset = make(row("0.png"), row("https://example.org/a.jpg?size=1,2"), row(["s3://bucket/a.jpg"]))
    for position, address in ((1, "https://"), (2, "s3://")):
        assert 'its "image" is an address: download it' in dataset[position].reason
        assert address in dataset[position].reason
    with pytest.raises(ValueError, match="row 2 .*is an address: download it"):
        dataset.check_rows()


def test_conversations_as_json_text(make):
    """As tables keep them, parquet above all."""
    whole = row("0.png")
    text = row("0.png", conversations=json.dumps(whole["conversations"]))
    deep = row("0.png", conversations="[" * 5000 + "]" * 5000)
    dataset = make(whole, text, row("0.png", conversations="[oops"), deep)
    assert torch.equal(dataset[0]["input_ids"], dataset[1]["input_ids"])
    assert torch.equal(dataset[0]["labels"], dataset[1]["labels"])
    for position in (2, 3):
        assert 'it has no "conversations": the text there is not JSON' in dataset[position].reason


# ---- images that stand in the rows -------------------------------------------------------------------------


def base64_of(path: Path, form: str) -> str:
    text = base64.b64encode(path.read_bytes()).decode()
    return {
        "bare": text,
        "without padding": text.rstrip("="),
        "in lines": "\n".join(textwrap.wrap(text, 76)) + "\n",
        "address": f"data:image/png;base64,{text}",
        "capitals": f"DATA:image/png;charset=utf-8;BASE64,{text}",
    }[form]


@pytest.mark.parametrize("form", ["bare", "without padding", "in lines", "address", "capitals"])
def test_images_may_stand_in_the_row(make, tmp_path, form):
    """They were looked for as files; one in an address of data: was cut at its comma first."""
    first, second = (base64_of(tmp_path / "images" / f"{n}.png", form) for n in (1, 2))
    dataset = make(
        row("1.png"),
        row(first),
        row(["2.png", "1.png"], num_marks=2),
        row([second, "1.png"], num_marks=2),
        row(f"{second}, {first}", num_marks=2),
        spec=SFT_MULTI,
    )
    dataset.check_rows()
    pixels = [dataset[position]["pixel_values"] for position in range(5)]
    assert torch.equal(pixels[0], pixels[1])
    assert torch.equal(pixels[2], pixels[3]) and torch.equal(pixels[2], pixels[4])
    keys = [image_keys(dataset.expand(position)[0]) for position in range(5)]
    for one, other in ((0, 1), (2, 3), (2, 4)):  # features are shared with the same image as a file
        assert np.array_equal(keys[one], keys[other])
    (image,) = pickle.loads(pickle.dumps(dataset.expand(1)[0]))
    assert open_image(image).size == (48, 40)


@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_base64_is_known_by_how_images_begin(suffix):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, suffix)
    assert is_embedded(base64.b64encode(buffer.getvalue()).decode())
    for name in ("Qk" + "a" * 30, "Qk.bmp", "a" * 90, "/9j/" + "a" * 70 + ".jpg", "iVBORw0KGgo"):
        assert not is_embedded(name)


def test_an_image_in_a_row_that_is_none_is_named_by_its_row(make, tmp_path):
    whole = base64_of(tmp_path / "images" / "0.png", "bare")
    dataset = make(
        row("data:image/png;base64,oops!"),
        row(f"data:image/png;base64,{whole[:400]}"),
        row("data:image/svg+xml,<svg/>"),
        {**row(None), "video": f"data:video/mp4;base64,{whole}"},
    )
    for position, fragments in enumerate(
        (
            ["row 1 (id 7): cannot read image 1 in ", "rows.json, row 1: "],
            ["cannot read image 1 in ", "row 2: "],
            ['its "image" is a data: address without base64'],
            ['its "video" stands in the row: only images are read from there'],
        )
    ):
        reason = dataset[position].reason
        assert all(fragment in reason for fragment in fragments) and len(reason) < 400, reason


def test_images_in_the_rows_are_trained_on_and_scored_as_those_in_files(workplace, seeing):
    """To the same bits, by two loader workers and from the feature cache."""
    rows = make_rows(24)
    inside = [one | {"image": base64_of(workplace / "images" / one["image"], "address")} for one in rows]
    (workplace / "inside.json").write_text(json.dumps(inside))
    runs = []
    for data, cache in (("data", "a"), ("inside", "a"), ("inside", "b"), ("inside", "")):
        flags = [f"--data_path={workplace}/{data}.json", "--max_steps=2", "--num_workers=2"]
        flags += [f"--feature_cache={workplace}/{cache}"] * bool(cache)
        run_inside("1-pretrain_vlm.py", f"@{workplace}/args", *flags)
        runs.append(weights_of(workplace))
        if not cache:
            run_inside("1-pretrain_vlm.py", f"@{workplace}/args", "--max_steps=2")
    check_same(runs[1], runs[0])
    check_same(runs[2], runs[0])
    check_same(runs[3], weights_of(workplace))
    files = [make_question(image=f"images/{n}.png") for n in range(3)]
    text = [make_question(image=base64_of(workplace / "images" / f"{n}.png", "bare")) for n in range(3)]
    for name, asked in (("files", files), ("text", text)):
        path = write_questions(workplace / f"{name}.jsonl", *asked)
        flags = ["--control=real", f"--questions={path}", f"--report={workplace}/{name}.json"]
        run_inside("3-eval_chat.py", *seeing, *flags)
    given = [
        [json.loads(line)["given"] for line in (workplace / f"{name}.answers.jsonl").read_text().splitlines()]
        for name in ("files", "text")
    ]
    assert given[0] == given[1] and len(given[0]) == 3
