"""Input that is sound, though unusual, is read, or refused in words that are true. Each test tells of one
that was refused in misleading words, ended a run, or went wrong without a word."""

import argparse
import os

import pytest
from conftest import ROOT, check_refused, load_script, run_script

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
