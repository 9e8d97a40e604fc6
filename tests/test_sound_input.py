"""Input that is sound, though unusual, is read, or refused in words that are true. Each test tells of one
that was refused in misleading words, ended a run, or went wrong without a word. That of rows stands in
test_sound_rows.py."""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    check_refused,
    load_script,
    make_question,
    run_clean,
    run_script,
    write_questions,
)

from dataset.demo_world.build import write_recipe
from dataset.demo_world.report import read_records
from model.checkpoint import save_weights
from model.description import read_description
from model.names import find_recorded, weights_path
from serving.page import takes_several
from trainer.distributed import Run
from trainer.inputs import read_about
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
    questions = write_questions(place / "q.jsonl", make_question(), make_question(image=["images/1.png"]))
    command = [
        sys.executable,
        "3-eval_chat.py",
        f"--load_from={weights}",
        "--device=cpu",
        "--max_new_tokens=2",
    ]
    more = ["--control=real", f"--questions={questions}", f"--report={place}/r.json"]
    for flags in (more, [f"--image_dir={place}/images", "--prompt=什么？"]):
        result = subprocess.run([*command, *flags], cwd=ROOT, env=environment, capture_output=True)
        assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (place / "r.answers.jsonl").read_text().splitlines()]
    assert [Path(record["image"][0]).is_file() for record in records] == [True, True]


def test_a_log_on_a_full_disk_costs_the_log(monkeypatch):
    run = Run(0, 1, torch.device("cpu"))
    with open("/dev/full", "w", buffering=1) as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        with pytest.raises(OSError, match="No space"):
            print("lost")
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
