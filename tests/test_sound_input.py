"""Input that is sound, though unusual, is read, or refused in words that are true. Each test tells of one
that was refused in misleading words, ended a run, or went wrong without a word."""

import argparse
import base64
import contextlib
import gzip
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import unicodedata
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from conftest import (
    ROOT,
    check_refused,
    check_same,
    load_script,
    make_rows,
    run_clean,
    run_inside,
    run_script,
    save_image,
    weights_of,
)
from PIL import Image

from dataset.demo_world.build import write_recipe
from dataset.demo_world.report import read_records
from model.checkpoint import read_description, save_weights
from model.data import rows as rows_module
from model.data.batch import BadSample
from model.data.dataset import VLMDataset
from model.data.feature_store import image_keys
from model.data.rows import Rows
from model.data.sources import file_names, is_embedded
from model.data.spec import PRETRAIN, SFT_MULTI
from model.images import open_image
from model.names import find_recorded, weights_path
from model.vision_utils import ImageProcessor
from serving.page import takes_several
from trainer.distributed import Run
from trainer.inputs import read_about
from trainer.scoring import name_files
from trainer.script import place_in_run, read_recipe


def words_of(tmp_path, content: str | bytes) -> list[str]:
    recipe = tmp_path / "my.args"
    recipe.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_recipe(str(recipe))


# ---- recipes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--out_dir=out/exp#2", ["--out_dir=out/exp#2"]),  # was written into out/exp
        ("--out_dir=out/c#  # C-sharp", ["--out_dir=out/c#"]),
        ("# --out_dir=a don't", []),
        ("   # indented", []),
        ("--seed=3\t#tab", ["--seed=3"]),
        ("--data_path=D:\\data\\new\\rows.json", ["--data_path=D:\\data\\new\\rows.json"]),
        ('--image_dir "C:\\my images\\"', ["--image_dir", "C:\\my images\\"]),
        ("--prompt='# is \"what\"?' --seed 1", ['--prompt=# is "what"?', "--seed", "1"]),
        ('--prompt="O\'Brien" --about ""', ["--prompt=O'Brien", "--about", ""]),
        ("--image_dir=my' 'images", ["--image_dir=my images"]),
        ("--prompt=这是　什么\u2028？", ["--prompt=这是　什么\u2028？"]),  # spaces of other scripts are text
        ("--seed=1\r", ["--seed=1"]),
    ],
)
def test_a_line_of_a_recipe_means_what_it_says(tmp_path, line, words):
    assert words_of(tmp_path, f"{line}\n--dim=8") == [*words, "--dim=8"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_recipe_as_windows_programs_write_it(tmp_path, encoding):
    """The byte-order mark once became a part of the first flag, which then was unknown."""
    assert words_of(tmp_path, "--prompt=什么\r\n--dim=8".encode(encoding)) == ["--prompt=什么", "--dim=8"]


def test_names_in_a_recipe_need_not_be_utf_8(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9")).mkdir()
    (word,) = words_of(tmp_path, b"--image_dir=" + os.fsencode(tmp_path) + b"/caf\xe9")
    assert os.path.isdir(word.partition("=")[2])


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (b"--seed=1\n--prompt=it's", ["my.args, line 2: a quote is not closed: 's"]),
        (b"\0\1\2", ["my.args is not a recipe but a binary file"]),
        (None, ["there is no recipe", "my.args"]),
        (b"@my.args", ["my.args names itself"]),
    ],
)
def test_what_is_wrong_with_a_recipe_is_one_line(tmp_path, content, fragments):
    if content is not None:
        (tmp_path / "my.args").write_bytes(content)
    check_refused(run_script(ROOT / "1-pretrain_vlm.py", "@my.args", folder=tmp_path), *fragments)


def parse(*argv: str) -> argparse.Namespace:
    return load_script("3-eval_chat.py").parse_args([str(word) for word in argv])


def test_a_value_that_begins_with_an_at_sign_is_no_recipe(tmp_path):
    """--prompt "@what" once looked for a file called what."""
    (tmp_path / "my.args").write_text("--prompt @home\n--max_frames 3")
    assert parse("--prompt", "@what", "--seed=2").prompt == "@what"
    assert parse("--prompt=@what").prompt == "@what"
    assert parse(f"@{tmp_path}/my.args").prompt == "@home"
    given = parse("--multi", f"@{tmp_path}/my.args")  # what a flag can do without is not taken from it
    assert given.multi is True and given.max_frames == 3
    given = parse("--questions", "a.jsonl", f"@{tmp_path}/my.args")
    assert len(given.questions) == 1 and given.max_frames == 3


def test_a_recipe_may_name_another_and_may_be_a_pipe(tmp_path):
    """The flags are parsed twice where one decides the defaults of others; a pipe is empty by then."""
    (tmp_path / "inner.args").write_text("--dim=8 --seed=1")
    (tmp_path / "outer.args").write_text(f"@{tmp_path}/inner.args --seed=2")
    given = parse(f"@{tmp_path}/outer.args")
    assert (given.dim, given.seed) == (8, 2)
    reading, writing = os.pipe()
    os.write(writing, b"--multi --seed=7")
    os.close(writing)
    given = parse(f"@/dev/fd/{reading}")
    os.close(reading)
    assert given.seed == 7 and given.stage == "vlm_sft_multi"


def test_the_check_reads_recipes_as_the_script_does(tmp_path):
    """It knows its own flags alone, and so took the values of others for recipes."""
    flags = ["--wandb_run_name", "@night", "--dim=0", "--all_images"]
    result = run_script("-m", "trainer.check", "pretrain", *flags)
    check_refused(result, "--dim must be at least 1")


# ---- environment and numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({"WORLD_SIZE": "2"}, (0, 1, 0, 1)),  # a scheduler's; once ended in a traceback
        ({"RANK": "3"}, (0, 1, 0, 1)),  # rank 3 of one process would print and save nothing
        ({"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": "1"}, (0, 1, 0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, (3, 4, 1, 2)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0, 1)),
    ],
)
def test_only_torchrun_makes_a_process_one_of_several(monkeypatch, environment, place):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
        if name in environment:
            monkeypatch.setenv(name, environment[name])
    assert place_in_run() == place


def test_a_seed_is_one_that_generators_take():
    """Beyond 64 bits PyTorch raised an OverflowError, with a traceback, when everything was loaded."""
    assert parse(f"--seed={2**63 - 1}").seed == 2**63 - 1
    for script in ("1-pretrain_vlm.py", "2-sft_vlm.py", "3-eval_chat.py", "web_server.py"):
        with pytest.raises(ValueError, match="--seed must be at least 0 and below"):
            load_script(script).parse_args([f"--seed={2**70}"])


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
    turns = [{"from": "human", "value": "<image>" * num_marks + "什么？"}, {"from": "gpt", "value": "红。"}]
    return {"id": "7", "image": image, "conversations": turns} | more


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


# ---- question files and reports ----------------------------------------------------------------------------


def question(answer="红", **more) -> dict:
    return {"image": "images/0.png", "question": "什么颜色？", "answer": answer, "kind": "colour"} | more


def write_questions(path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def seeing(workplace, config, model) -> list[str]:
    """Flags of an evaluation with a model that sees and knows nothing."""
    save_weights(model, weights_path(workplace / "out", config, "vlm_sft"))
    keep = ("--tokenizer_path", "--clip_path", "--out_dir", "--device")
    flags = [flag for flag in (workplace / "args").read_text().splitlines() if flag.startswith(keep)]
    return [*flags, "--max_new_tokens=4"]


@pytest.mark.parametrize(
    ("bad", "fragments"),
    [
        (question(["红", "红色"]), ['its "answer" must be a text or a number, not ["']),
        (question(True), ['its "answer" must be a text or a number, not true']),
        (question(kind=["colour"]), ['its "kind" must be a text']),
        (question(swapped_answer={}), ['its "swapped_answer" must be a text']),
        (question(" "), ["it has no answer"]),
        (question(image="images/gone.png"), ["image not found: ", "gone.png"]),
        (question(image="https://example.org/a.png"), ['its "image" is an address: download it']),
        (question(question="<image><image>？"), ["the question marks 2 image(s) but 1 were given"]),
        ([1], ["it has no image, question, answer, kind"]),
    ],
)
def test_a_question_that_cannot_be_scored_is_named_before_a_model_is_loaded(
    workplace, capsys, bad, fragments
):
    """An answer that was a list ended the evaluation when all questions of all files had been answered."""
    first = write_questions(workplace / "first.jsonl", question())
    last = write_questions(workplace / "last.jsonl", question(), bad)
    flags = ["--questions", first, last, "--load_from=README.md", "--device=cpu"]
    check_refused(run_clean(capsys, "3-eval_chat.py", *flags), f"{last}, row 2: ", *fragments)


@pytest.mark.parametrize(
    ("report", "fragments"),
    [
        ("file/r.json", ["file is no folder"]),
        ("images", ["it is a folder"]),
        ("r" * 250, ["File name too long"]),
    ],
)
def test_a_report_that_cannot_be_written_is_named_before_a_model_is_loaded(
    workplace, capsys, report, fragments
):
    """It was tried when an hour had gone into the answers."""
    (workplace / "file").write_text("")
    questions = write_questions(workplace / "q.jsonl", question())
    flags = ["--questions", questions, f"--report={workplace / report}", "--load_from=README.md"]
    check_refused(run_clean(capsys, "3-eval_chat.py", *flags), "--report: cannot write ", report, *fragments)
    check_refused(run_clean(capsys, "3-eval_chat.py", *flags[2:]), "--report keeps the scores of --questions")


def test_numbers_are_answers_and_kinds(workplace, seeing):
    path = write_questions(workplace / "q.jsonl", question(3), question(0.5), question(0, kind=2))
    run_inside("3-eval_chat.py", *seeing, "--questions", path, f"--report={workplace}/r.json")
    records = [json.loads(line) for line in (workplace / "r.answers.jsonl").read_text().splitlines()]
    assert [record["answer"] for record in records] == ["3", "0.5", "0"]
    assert json.loads((workplace / "r.json").read_text()) == {
        "q": {"colour": {"real": 0.0}, "2": {"real": 0.0}}
    }


def test_a_question_too_long_is_named_before_the_first_is_answered(workplace, seeing, capsys):
    path = write_questions(workplace / "q.jsonl", question(), question(question="什么" * 300))
    result = run_clean(capsys, "3-eval_chat.py", *seeing, "--questions", path)
    check_refused(result, "q.jsonl, row 2: the question has ", "context holds 256 with the answer")


def test_files_of_one_name_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def names(*paths: str) -> list[str]:
        return list(name_files(map(Path, paths)))

    assert names("questions_x.jsonl", "b/questions_y.json", "c/z.v2.jsonl.gz") == ["x", "y", "z.v2"]
    assert names("a/questions_x.jsonl", "b/questions_x.jsonl", "b/questions_y.jsonl") == ["a/x", "b/x", "y"]
    assert names("a/q/x.json", "b/q/x.json", "c/x.json") == ["a/q/x", "b/q/x", "c/x"]
    assert names("x.json", "a/x.json") == [f"{tmp_path.name}/x", "a/x"]
    assert names("a/x.json", "a/x.jsonl", "y.json") == [f"{tmp_path}/a/x.json", f"{tmp_path}/a/x.jsonl", "y"]
    assert names("x.json", "./x.json", f"{tmp_path}/x.json") == ["x"]


def test_scores_and_answers_do_not_mix(workplace, seeing):
    """Two files of one name were averaged, and the answers of one report overwrote those of another whose
    name began alike."""
    first = write_questions(workplace / "a" / "questions_x.jsonl", question(image="../images/0.png"))
    second = write_questions(workplace / "b" / "questions_x.jsonl", *2 * [question(image="../images/1.png")])
    for report, paths in (("r-1.0", [first, second]), ("r-1.5", [first]), ("r.json", [second])):
        flags = ["--control", "real", "real", f"--report={workplace / report}"]
        run_inside("3-eval_chat.py", *seeing, "--questions", *paths, *flags)
    assert set(json.loads((workplace / "r-1.0").read_text())) == {"a/x", "b/x"}
    assert set(json.loads((workplace / "r-1.5").read_text())) == {"x"}
    found = {path.name: len(path.read_text().splitlines()) for path in workplace.glob("*.answers.jsonl")}
    assert found == {"r-1.0.answers.jsonl": 3, "r-1.5.answers.jsonl": 1, "r.answers.jsonl": 2}


# ---- places, terminals and names of files ------------------------------------------------------------------


@pytest.fixture
def recorded(workplace, config, model, monkeypatch) -> Path:
    """Weights that were trained in a folder, and name what they were trained with from there."""
    for name, place in (("tokenizer_path", "tok"), ("clip_path", "clip")):
        flags = (workplace / "args").read_text().splitlines()
        given = next(flag.partition("=")[2] for flag in flags if flag.startswith(f"--{name}="))
        shutil.copytree(given, workplace / place)
    places = {"tokenizer_path": "tok", "clip_path": "clip", "about": {"image_dir": "images"}}
    save_weights(model, weights_path(workplace / "out", config, "vlm_sft"), **places)
    (workplace / "elsewhere" / "out").mkdir(parents=True)
    monkeypatch.chdir(workplace / "elsewhere")
    return workplace / "out" / "32_vlm_sft.pth"


def test_weights_find_what_they_were_trained_with_from_any_folder(recorded, capsys):
    """They name it as it was named in training; from elsewhere there was no tokenizer."""
    flags = [f"--load_from={os.path.relpath(recorded)}", "--device=cpu", "--max_new_tokens=1"]
    result = run_clean(capsys, "3-eval_chat.py", *flags)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"[{recorded.parent.parent}/images/") == 6


def test_a_recorded_place_is_looked_for_from_the_inside_to_the_outside(recorded):
    home, here = recorded.parent.parent, Path.cwd()
    assert find_recorded("tok", recorded) == home / "tok"
    (here / "tok").mkdir()
    assert find_recorded("tok", recorded) == Path("tok")
    (home / "out" / "clip").mkdir()
    assert find_recorded("clip", recorded) == home / "out" / "clip"
    assert find_recorded("trainer/loop.py", recorded) == ROOT / "trainer" / "loop.py"
    assert find_recorded("nowhere", recorded) == Path("nowhere")
    assert find_recorded(home / "gone", recorded) == home / "gone"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", rb"\u4e2d \udce9"), ("utf-8", b"\xe4\xb8\xad \\udce9"), ("gbk", b"\xd6\xd0 \\udce9")],
)
def test_what_a_terminal_cannot_show_is_escaped(encoding, shown):
    code = (
        "import sys; from trainer.script import clean_exit, print_and_exit;"
        "clean_exit(lambda: (print('\\u4e2d \\udce9'), print_and_exit('\\u4e2d \\udce9')))"
    )
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True)
    assert result.stdout.rstrip() == shown and result.stderr.rstrip() == b"error: " + shown


def test_what_cannot_be_printed_ends_no_run(workplace):
    """A name that is not UTF-8, or a log that is not, once ended training at its first line or its last."""
    place = workplace.parent / os.fsdecode(b"caf\xe9 \xe4\xb8\xad")
    workplace.rename(place)
    recipe = "".join(f'"{line}"\n' for line in (place / "args").read_text().splitlines())
    recipe = os.fsencode(recipe.replace(str(workplace), str(place)))
    (place / "args").write_bytes(recipe)
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "1-pretrain_vlm.py", f"@{place}/args", "--max_steps=2", "--feature_cache"]
    result = subprocess.run([*command, f"{place}/cache"], cwd=ROOT, env=environment, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert rb"caf\udce9 \u4e2d" in result.stdout and b"saved " in result.stdout
    assert b"32_vlm_pretrain: 100%" in result.stderr
    weights = place / "out" / "32_vlm_pretrain.pth"
    for path in (weights, weights.with_suffix(".json")):
        assert path.is_file() and read_description(weights)["stage"] == "vlm_pretrain"
    questions = write_questions(place / "q.jsonl", question(), question(image=["images/1.png"]))
    command = [
        sys.executable,
        "3-eval_chat.py",
        f"--load_from={weights}",
        "--device=cpu",
        "--max_new_tokens=2",
    ]
    more = [f"--questions={questions}", f"--report={place}/r.json"]
    for flags in (more, [f"--image_dir={place}/images", "--prompt=什么？"]):
        result = subprocess.run([*command, *flags], cwd=ROOT, env=environment, capture_output=True)
        assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (place / "r.answers.jsonl").read_text().splitlines()]
    assert [Path(record["image"][0]).is_file() for record in records] == [True, True]


def test_a_log_on_a_full_disk_costs_the_log(monkeypatch):
    run = Run(0, 1, torch.device("cpu"))
    with open("/dev/full", "w", buffering=1) as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        run.print("lost")
        with contextlib.suppress(OSError):
            full.close()


def test_the_json_of_other_weights_is_not_taken_for_ones_own(tmp_path, model):
    """Of ckpt-1.5 the end was cut off as if it were .pth, and ckpt-1.json read."""
    for name, step in (("ckpt-1.pth", 1), ("ckpt-1.5", 5), ("a.b.best.pth", 7)):
        save_weights(model, tmp_path / name, step=step, clip_path=name)
    for name, step in (("ckpt-1.pth", 1), ("ckpt-1.5", 5), ("a.b.best.pth", 7)):
        found = read_description(tmp_path / name)
        assert (found["step"], found["clip_path"]) == (step, name)


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
    files = [question(image=f"images/{n}.png") for n in range(3)]
    text = [question(image=base64_of(workplace / "images" / f"{n}.png", "bare")) for n in range(3)]
    for name, asked in (("files", files), ("text", text)):
        path = write_questions(workplace / f"{name}.jsonl", *asked)
        run_inside("3-eval_chat.py", *seeing, "--questions", path, f"--report={workplace}/{name}.json")
    given = [
        [json.loads(line)["given"] for line in (workplace / f"{name}.answers.jsonl").read_text().splitlines()]
        for name in ("files", "text")
    ]
    assert given[0] == given[1] and len(given[0]) == 3


# ---- what programs of this repository write for each other -------------------------------------------------


@pytest.mark.parametrize(
    "word",
    [
        "--out_dir=out/exp#2",
        "#2",
        "",
        "--image_dir=C:\\my images\\",
        '--prompt=O\'Brien said "#1"',
        "--prompt='",
        '"',
        "--clip_path=" + os.fsdecode(b"caf\xe9 \xb0"),
        "--prompt=这是　什么？",
    ],
)
def test_a_recipe_that_is_written_says_what_was_meant(tmp_path, word):
    """The recipes of a demo world in a folder with a space in its name were cut there."""
    write_recipe(tmp_path / "a.args", [word, "--dim=8"])
    assert read_recipe(str(tmp_path / "a.args")) == [word, "--dim=8"]


def test_json_as_windows_programs_write_it(tmp_path):
    """A byte-order mark in a file for --about was called invalid JSON: download it again."""
    about = {"knows": "鸟"}
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "about.json").write_text(json.dumps(about, ensure_ascii=False), encoding=encoding)
        assert read_about(str(tmp_path / "about.json")) == about
    for text in ("[" * 5000, "{oops", "[]"):
        (tmp_path / "about.json").write_text(text)
        with pytest.raises(ValueError, match="about.json .*: mend it"):
            read_about(str(tmp_path / "about.json"))


def test_an_answer_with_a_line_separator_is_one_line(tmp_path):
    """str.splitlines() cuts at U+2028 and at U+0085 too, which JSON does not escape."""
    record = {"split": "unseen", "given": "一\u2028二\x85三"}
    (tmp_path / "scores.answers.jsonl").write_text(2 * (json.dumps(record, ensure_ascii=False) + "\n"))
    assert read_records(tmp_path) == [record, record]


def test_the_page_takes_several_images_whatever_the_weights_are_called(tmp_path, model):
    """It went by the end of the name, which that of the best weights does not share."""
    for name, stage, several in (
        ("512_vlm_sft_multi.best.pth", "vlm_sft_multi", True),
        ("mine.pth", "vlm_sft_multi", True),
        ("512_vlm_sft.pth", "vlm_sft", False),
    ):
        save_weights(model, tmp_path / name, stage=stage)
        assert takes_several(tmp_path / name) == several
    assert takes_several(Path("512_vlm_sft_multi.pth"))  # without a description, the name must do
