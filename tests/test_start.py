"""What is imported on the way, by the names of modules: --help, a wrong flag and a missing file wait for no
PyTorch, the first step and the first answer for nothing that they do not use."""

import re
import subprocess

import pytest
from conftest import check_refused, run_script
from test_structure import SCRIPTS, load_script

from dataset.demo_world import __main__ as demo_world
from dataset.demo_world import recipe
from model.checkpoint import save_weights
from trainer import check, gain
from trainer.script import Parser

COMMANDS = (*SCRIPTS, "trainer.check", "trainer.gain", "dataset.demo_world")
# What takes a tenth of a second or more to import.
HEAVY = {
    "torch",
    "transformers",
    "tokenizers",
    "gradio",
    "numpy",
    "PIL",
    "pandas",
    "matplotlib",
    "av",
    "wandb",
}
# Not needed for a step or an answer; sympy comes with PyTorch's compiler, which takes as long as PyTorch.
LATER = {"transformers", "pandas", "matplotlib", "av", "wandb", "gradio", "pyarrow", "sympy", "torch._dynamo"}

BEGIN = "import runpy, sys; sys.argv = sys.argv[1:]\n"
RUN = """
name = sys.argv[0]
if name.endswith(".py"):
    runpy.run_path(name, run_name="__main__")
else:
    runpy.run_module(name, run_name="__main__", alter_sys=True)
"""
AT_THE_END = "import atexit; atexit.register(lambda: print('LOADED', *sys.modules, flush=True))\n"
AT_THE_FIRST_STEP = """
from trainer.loop import Trainer
step = Trainer.step
def first_step(*arguments):
    step(*arguments)
    print("LOADED", *sys.modules, flush=True)
    sys.exit()
Trainer.step = first_step
"""
AT_THE_FIRST_ANSWER = """
from model.chat import Chat
stream = Chat.stream
def first_answer(*arguments):
    list(stream(*arguments))
    print("LOADED", *sys.modules, flush=True)
    sys.exit()
Chat.stream = first_answer
"""


def run_watched(when: str, *command: str) -> tuple[subprocess.CompletedProcess, set[str]]:
    """A command of ours as a process, and the modules that were loaded when it came so far."""
    result = run_script("-c", BEGIN + when + RUN, *command)
    loaded = re.search(r"^LOADED (.*)$", result.stdout, re.MULTILINE)
    assert loaded, result.stderr
    return result, set(loaded[1].split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_waits_for_no_heavy_import(command):
    result, loaded = run_watched(AT_THE_END, command, "--help")
    assert result.returncode == 0 and "usage: " in result.stdout
    assert not loaded & HEAVY


@pytest.mark.parametrize(
    ("command", "wrong", "meant"),
    [
        ("1-pretrain_vlm.py", "--batch_sise=3", "--batch_size"),
        ("2-sft_vlm.py", "--max_round=2", "--max_rounds"),
        ("3-eval_chat.py", "--max_new_token", "--max_new_tokens"),
        ("web_server.py", "--prot=8080", "--port"),
        ("trainer.check", "--learning-rate=1", "--learning_rate"),
        ("trainer.gain", "--learning-rate=1", "--learning_rate"),
        ("dataset.demo_world", "--sed=1", "--seed"),
    ],
)
def test_a_wrong_flag_names_the_nearest_before_any_heavy_import(command, wrong, meant):
    result, loaded = run_watched(AT_THE_END, command, wrong)
    check_refused(result, f"unknown flag {wrong}", f"did you mean {meant}?")
    assert not loaded & HEAVY


@pytest.mark.parametrize("command", SCRIPTS)
def test_missing_weights_are_reported_before_any_heavy_import(command, tmp_path):
    result, loaded = run_watched(AT_THE_END, command, f"--out_dir={tmp_path}")
    check_refused(result, str(tmp_path), "python -m model.download ")
    assert not loaded & HEAVY


@pytest.mark.parametrize(
    "flags", [["--dtype=float32"], ["--dtype=bfloat16", "--num_workers=1"], ["--train=projection"]]
)
def test_the_first_step_waits_for_nothing_that_it_does_not_use(workplace, flags):
    result, loaded = run_watched(AT_THE_FIRST_STEP, "1-pretrain_vlm.py", f"@{workplace}/args", *flags)
    assert result.returncode == 0 and "torch" in loaded, result.stderr
    assert not loaded & LATER


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_answer_waits_for_nothing_that_it_does_not_use(
    workplace, lively, tokenizer_path, clip_path, dtype
):
    places = {"tokenizer_path": str(tokenizer_path), "clip_path": str(clip_path)}
    save_weights(lively, workplace / "out" / "32_vlm_pretrain.pth", **places)
    result, loaded = run_watched(
        AT_THE_FIRST_ANSWER,
        "3-eval_chat.py",
        f"--out_dir={workplace}/out",
        "--dim=32",
        "--stage=vlm_pretrain",
        "--device=cpu",
        f"--dtype={dtype}",
        f"--image_dir={workplace}/images",
        "--max_new_tokens=3",
    )
    assert result.returncode == 0 and "torch" in loaded, result.stderr
    assert not loaded & LATER


# ---- what --help says --------------------------------------------------------------------------------------


class Caught(Exception):
    pass


def parser_of(command: str, monkeypatch) -> Parser:
    """The parser of a command, caught when it is used."""

    def catch(parser, *_):
        raise Caught(parser)

    monkeypatch.setattr(Parser, "parse_known_args", catch)
    with pytest.raises(Caught) as caught:
        if command == "trainer.check":
            check.main([])
        elif command == "trainer.gain":
            gain.main([])
        elif command == "dataset.demo_world":
            demo_world.parse_args([])
        else:
            load_script(command).parse_args([])
    return caught.value.args[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_says_what_it_does_and_its_default(command, monkeypatch):
    parser = parser_of(command, monkeypatch)
    formatter = parser._get_formatter()
    for action in parser._actions:
        text = formatter._expand_help(action)
        assert len(text) > 10, action.option_strings
        if action.default not in (None, "==SUPPRESS==") and action.default is not False:
            assert re.search(r"default: [^'\[]", text), f"{action.option_strings}: {text}"


def test_the_presets_of_the_demo_world_are_listed_without_loading_them():
    assert set(demo_world.PRESETS) == set(recipe.PRESETS)
