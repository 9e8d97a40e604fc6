"""Rows as people have them: whatever the columns, the files and the place of the images, a run is the one on
the same rows as JSON and image files, bit for bit."""

import base64
import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import check_refused, check_same, make_row, run_clean, run_inside, weights_of

from model.data import rows as rows_module
from model.data.batch import BadSample
from model.data.dataset import VLMDataset
from model.data.feature_store import image_keys
from model.data.spec import PRETRAIN, SFT_MULTI
from model.vision_utils import ImageProcessor
from trainer.stage import fingerprint_images

MIXED = replace(PRETRAIN, min_images=0)
PAIR = {"user": "?", "assistant": "!"}


def make_documented() -> list[dict]:
    """Rows of one and of two rounds, and of text alone; an image stands before the first question."""
    rows = []
    for number in range(12):
        turns = [
            {"from": "human", "value": f"<image>\n图片{number}里有什么？"},
            {"from": "gpt", "value": "一个红色圆形。" * (1 + number % 3)},
            {"from": "human", "value": "它在哪里？"},
            {"from": "gpt", "value": f"在左上角 {number}"},
        ]
        turns = turns[: 2 + number % 2 * 2]
        rows.append({"id": str(number), "image": f"{number % 6}.png", "conversations": turns})
    turns = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello."}]
    return rows + [{"id": f"text {number}", "image": None, "conversations": turns} for number in range(3)]


# ---- the documented rows as others write them --------------------------------------------------------------


class Others:
    """The same rows, column by column."""

    def __init__(self, folder: Path):
        self.rows = make_documented()
        self.bytes = [(folder / row["image"]).read_bytes() if row["image"] else None for row in self.rows]
        self.base64 = [inside and base64.b64encode(inside).decode() for inside in self.bytes]
        self.addresses = [inside and f"data:image/png;base64,{inside}" for inside in self.base64]
        self.names = [row["image"] for row in self.rows]
        self.turns = [row["conversations"] for row in self.rows]
        roles = {"human": "user", "gpt": "assistant"}
        self.messages = [
            [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
            for turns in self.turns
        ]
        self.texts = list(map(json.dumps, self.messages))

    def structs(self, contents: list) -> list:
        return [inside and {"bytes": inside, "path": "/home/somebody/0.png"} for inside in contents]

    def unmarked(self) -> list[list[dict]]:
        return json.loads(json.dumps(self.messages).replace(r"<image>\n", ""))

    def parts(self, images: list | None = None) -> list[list[dict]]:
        """Messages of parts; images: what those of the images bring with them"""
        found = []
        for number, (marked, turns) in enumerate(zip(self.messages, self.unmarked(), strict=True)):
            turns = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
            if "<image>" in marked[0]["content"]:
                url = {"image_url": {"url": images[number]}} if images else {}
                turns[0]["content"].insert(0, {"type": "image_url" if images else "image"} | url)
            found.append(turns)
        return found

    def pairs(self) -> list[list[dict]]:
        return [
            [
                {"user": asked["content"], "assistant": told["content"], "source": "x"}
                for asked, told in zip(turns[::2], turns[1::2], strict=True)
            ]
            for turns in self.unmarked()
        ]


def write_parquet(path: Path, columns: dict[str, list], **more) -> Path:
    """In row groups of three, as large files have them of thousands."""
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path, **({"row_group_size": 3} | more))
    return path


def write_lines(path: Path, columns: dict[str, list]) -> Path:
    path.parent.mkdir(exist_ok=True)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def listed(values: list) -> list:
    return [[] if value is None else [value] for value in values]


def in_two(write, folder: Path, ending: str, columns: dict[str, list]) -> Path:
    """A folder of two files, whose names say their order."""
    for number, part in enumerate((slice(0, 7), slice(7, None))):
        write(folder / f"train-{number}{ending}", {key: values[part] for key, values in columns.items()})
    return folder


SCHEMAS = {
    "parquet, image as a struct": lambda there, folder: write_parquet(
        folder / "a.parquet", {"image": there.structs(there.bytes), "conversations": there.turns}
    ),
    "parquet, raw bytes, messages": lambda there, folder: write_parquet(
        folder / "a.parquet", {"image": there.bytes, "messages": there.messages}, compression="zstd"
    ),
    "MiniMind-V's later releases": lambda there, folder: write_parquet(
        folder / "a.parquet",
        {"image_names": there.names, "image_bytes": there.bytes, "conversations": there.texts},
    ),
    "the same, images in a list": lambda there, folder: write_parquet(
        folder / "a.parquet", {"image_bytes": listed(there.bytes), "conversations": there.texts}
    ),
    "FineVision, The Cauldron": lambda there, folder: write_parquet(
        folder / "a.parquet", {"images": listed(there.structs(there.bytes)), "texts": there.pairs()}
    ),
    "messages of parts": lambda there, folder: write_parquet(
        folder / "a.parquet", {"images": listed(there.structs(there.bytes)), "messages": there.parts()}
    ),
    "messages without marks": lambda there, folder: write_lines(
        folder / "a.jsonl", {"images": listed(there.names), "messages": there.unmarked()}
    ),
    "paths alone in a struct": lambda there, folder: write_parquet(
        folder / "a.parquet",
        {"image": [{"bytes": None, "path": name} for name in there.names], "conversations": there.turns},
    ),
    "jsonl, base64": lambda there, folder: write_lines(
        folder / "a.jsonl", {"image_bytes": there.base64, "conversations": there.turns}
    ),
    "jsonl.gz, struct of base64, pairs": lambda there, folder: write_lines(
        folder / "a.jsonl.gz", {"image": there.structs(there.base64), "texts": there.pairs()}
    ),
    "OpenAI's parts": lambda there, folder: write_lines(
        folder / "a.jsonl", {"messages": there.parts(there.addresses)}
    ),
    "a folder of parquet files": lambda there, folder: in_two(
        write_parquet, folder / "data", ".parquet", {"image": there.bytes, "conversations": there.turns}
    ),
    "a pattern of jsonl.gz files": lambda there, folder: (
        in_two(write_lines, folder / "data", ".jsonl.gz", {"images": there.base64, "texts": there.pairs()})
        / "*.gz"
    ),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> tuple[Path, dict]:
    """The feature cache of all runs, and the weights of the run on the documented rows."""
    return tmp_path_factory.mktemp("cache"), {}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_schema_is_the_documented_row(workplace, renderer, shared, monkeypatch, schema):
    """The same samples and keys, and the same weights after a run from the same feature cache, where nothing
    is encoded again."""
    cache, weights = shared
    monkeypatch.setattr(rows_module, "SMALL", 0)
    path = workplace / "data.json"
    path.write_text(json.dumps(make_documented()))
    other = SCHEMAS[schema](Others(workplace / "images"), workplace)
    documented, found = (
        VLMDataset(data, MIXED, renderer, workplace / "images", ImageProcessor()) for data in (path, other)
    )
    found.check_rows()
    assert len(found) == len(documented) == 15 and (found.lengths() == documented.lengths()).all()
    for position in range(15):
        sample, expected = found[position], documented[position]
        assert not isinstance(sample, BadSample), sample
        assert sample.pop("full_length") == expected.pop("full_length")
        check_same(sample, expected)
        assert np.array_equal(*(image_keys(data.expand(position)[0]) for data in (found, documented)))
    assert fingerprint_images(found) == fingerprint_images(documented)

    def run(data: Path) -> dict[str, torch.Tensor]:
        flags = ["--min_images=0", "--epochs=1", f"--feature_cache={cache}", f"--data_path={data}"]
        run_inside("1-pretrain_vlm.py", f"@{workplace}/args", *flags)
        return weights_of(workplace)

    if not weights:
        weights |= run(path)
    before = sorted(cache.rglob("*.npy"))
    check_same(run(other), weights)
    assert sorted(cache.rglob("*.npy")) == before and len(before) == 2


# ---- what is not read --------------------------------------------------------------------------------------


def dataset_of(folder: Path, renderer, *rows, spec=MIXED) -> VLMDataset:
    (folder / "rows.json").write_text(json.dumps(rows))
    return VLMDataset(folder / "rows.json", spec, renderer, folder / "images", ImageProcessor())


@pytest.mark.parametrize(
    ("row", "fragments"),
    [
        (
            {"picture": "0.png", "question": "?", "answer": "!"},
            ["its columns are picture, question, answer;", "read from conversations, messages, texts"],
        ),
        ({"image": "0.png", "texts": "oops"}, ['it has no "texts": the text there is not JSON']),
        ({"image": "0.png", "texts": "7"}, ['it has no "texts": a list of turns should stand there']),
        ({"image": "0.png", "texts": [{"q": 1, "a": 2}]}, ["a turn must look like", "its keys are q, a"]),
        ({"image": "0.png", "texts": [{"user": "?", "assistant": None}]}, ["a turn must look like"]),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            ["a part of a turn must look like", "audio"],
        ),
        ({"images": [{"bytes": [1, 2]}], "texts": [PAIR]}, ['its "bytes" must be']),
        ({"images": ["0.png", None], "texts": [PAIR]}, ['its "images" must be']),
        ({"images": ["0.png"] * 2, "texts": [PAIR]}, ["it has 2 images"]),
        (make_row("什么？"), ["it has 0 <image> mark(s) for 1 image(s)"]),  # this schema has marks
        (make_row(image={"$stored": [0, 9, "0" * 32]}), ["image 1 in", "its bytes are not in this file"]),
        (make_row(image={"$stored": [-1, 9, "00"]}), ['its "image" must be']),
    ],
)
def test_what_no_schema_knows_is_named(workplace, renderer, row, fragments):
    sample = dataset_of(workplace, renderer, row)[0]
    assert isinstance(sample, BadSample) and not sample.ends_run and "rows.json, row 1: " in sample.reason
    assert all(fragment in sample.reason for fragment in fragments), sample.reason


def test_a_row_without_an_image_says_where_images_are_looked_for(workplace, renderer, capsys):
    row = make_row("什么？", image=None, photo="0.png")
    reason = dataset_of(workplace, renderer, row, spec=PRETRAIN)[0].reason
    assert 'it has no "image": its columns are image, conversations, photo' in reason
    assert "--min_images 0" in reason
    flags = [f"@{workplace}/args", f"--data_path={workplace}/rows.json"]
    check_refused(run_clean(capsys, "1-pretrain_vlm.py", *flags), "rows.json, row 1", "its columns are")


def test_a_video_mark_is_a_word_where_a_stage_takes_no_videos(workplace, renderer):
    pair = {"user": "What is <video>?", "assistant": "A word."}
    documented = make_row("<image>\nWhat is <video>?", "A word.")
    dataset = dataset_of(workplace, renderer, {"image": "0.png", "texts": [pair]}, documented)
    assert torch.equal(dataset[0]["input_ids"], dataset[1]["input_ids"])


def test_a_digest_that_a_row_claims_is_no_key(workplace, renderer):
    """It would be shown another image's features, though it brings none."""
    dataset = dataset_of(workplace, renderer, make_row(image={"$stored": [0, 9, "0" * 32]}))
    with pytest.raises(ValueError, match="rows.json, row 1: its bytes are not in this file"):
        image_keys(dataset.expand(0)[0])


def test_several_images_stand_before_the_first_question_where_no_marks_are(workplace, renderer):
    def shows_two(**columns) -> dict:
        return {"images": ["1.png", "2.png"], **columns}

    pairs = [{"system": "Look.", "user": "Compare.", "assistant": "Same."}, PAIR]
    turns = [("system", "Look."), ("user", "<image>\n<image>\nCompare."), ("assistant", "Same.")]
    turns += [("user", "?"), ("assistant", "!")]
    answer = {"role": "assistant", "content": "C"}
    image, words = {"type": "image"}, [{"type": "text", "text": text} for text in "AB"]
    between = {"role": "user", "content": [words[0], image, words[1], image]}
    dataset = dataset_of(
        workplace,
        renderer,
        shows_two(texts=pairs),
        shows_two(messages=[{"role": role, "content": text} for role, text in turns]),
        shows_two(messages=[between, answer]),
        shows_two(messages=[{"role": "user", "content": "A\n<image>\nB\n<image>"}, answer]),
        spec=SFT_MULTI,
    )
    for one, other in ((0, 1), (2, 3)):
        for name in ("input_ids", "labels", "image_slots", "pixel_values"):
            assert torch.equal(dataset[one][name], dataset[other][name])
    slots = [dataset[position]["image_slots"] for position in (0, 2)]
    gaps = [int(two[1, 0] - two[0, -1]) for two in slots]
    assert gaps[0] < gaps[1]  # between the images of the second stands a text
