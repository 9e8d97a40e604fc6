"""Every command of the README and of the scripts' docstrings that needs no network is RUN, on small files in
the places where the real ones would lie. Once they were only parsed, and two of them could not have run."""

import base64
import importlib
import io
import json
import os
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_rows, run_inside, run_script, save_clip, save_image, save_video
from test_llm_base import save_base
from test_load_from import save_folder
from test_structure import SCRIPTS, documented_commands

from benchmarks.drawn import make_family
from dataset.demo_world import recipe
from dataset.demo_world.__main__ import main as make_demo_world
from model.checkpoint import save_weights
from model.download_table import COMMAND, TABLE, command_line, describe_size, markdown_lines, read_table
from model.export.__main__ import main as export
from model.LMConfig import LMConfig
from model.names import CLIP_PATH, TOKENIZER_PATH, weights_path
from model.prompt import load_tokenizer
from model.transformer import Transformer

# What keeps a command short; a flag that the command gives itself stays.
SMALL = {"--n_layers": "2", "--max_steps": "1", "--batch_size": "2", "--num_workers": "0", "--device": "cpu"}
FEW = recipe.Stage(steps=2, batch_size=4, lr=1e-3)
COMMANDS = list(dict.fromkeys(command for _, command in documented_commands()))


def save_rows(folder: Path, name: str, rows: list[dict]) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(
        "\n".join(json.dumps(row) for row in rows) if name.endswith("l") else json.dumps(rows)
    )


def fill_with_data(place: Path) -> None:
    """The data sets, under the names that the README gives them."""
    for folder in (
        "pretrain_images",
        "sft_images",
        "sft_multi_images",
        "eval_images",
        "eval_multi_images/set",
    ):
        (place / "dataset" / folder).mkdir(parents=True)
        for number in range(2 if "eval" in folder else 6):
            save_image(place / "dataset" / folder / f"{number}.png", number)
    for folder in ("my_images", "my_data/images"):
        shutil.copytree(place / "dataset/pretrain_images", place / folder)
    shutil.copy(place / "my_images/0.png", place / "my_image.jpg")
    shutil.copy(place / "my_images/0.png", place / "my_images/cat.jpg")
    shutil.copy(place / "my_images/0.png", place / "a.jpg")
    for name in ("my_video.mp4", "b.mp4"):
        save_video(place / name, [20, 120, 220])
    save_rows(place, "dataset/LLaVA-Pretrain/chat-translated.json", make_rows(100))
    save_rows(place, "dataset/LLaVA-Instruct/llava_instruct_230k.json", make_rows(12))
    save_rows(place, "my_data/captions.jsonl", make_rows(12))
    save_rows(place, "my_data/questions.json", make_rows(12))
    two = [
        {"from": "human", "value": "<image>\n<image>\nName all the differences between these two birds."},
        {"from": "gpt", "value": "animal1 is brown while animal2 is white"},
    ]
    rows = [{"id": "0", "image": f"{number}.png, 1.png", "conversations": two} for number in range(6)]
    save_rows(place, "dataset/sft_multi_images/output.json", rows)
    asked = [{"image": f"my_images/{n}.png", "question": "?", "answer": "!", "kind": "any"} for n in range(3)]
    save_rows(place, "my_questions.jsonl", asked)
    fill_with_benchmarks(place)


def fill_with_benchmarks(place: Path) -> None:
    """In their formats, a few rows each."""
    shutil.copytree(place / "my_images", place / "val2014")
    for name in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": n, "image": f"{n}.png", "text": "Is there a cat in the image?", "label": label}
            for n, label in enumerate(("yes", "no"))
        ]
        (place / f"coco_pope_{name}.json").write_text("\n".join(map(json.dumps, rows)))
    image = base64.b64encode((place / "my_images/0.png").read_bytes()).decode()
    header = "index\tquestion\tA\tB\tanswer\tcategory\timage\n"
    rows = [f"{n}\tWhat?\tred\tblue\t{'AB'[n]}\tcolour\t{image if n == 0 else 0}\n" for n in range(2)]
    (place / "MMStar.tsv").write_text(header + "".join(rows))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tokenizer_path) -> Path:
    """A working folder as it is after everything was downloaded, and the demo trained."""
    place = tmp_path_factory.mktemp("readme")
    fill_with_data(place)
    shutil.copytree(tokenizer_path, place / TOKENIZER_PATH)
    save_clip(place / CLIP_PATH)
    save_clip(place / "model/clip_model/clip-vit-large-patch14", patch_size=14)
    tokenizer = load_tokenizer(tokenizer_path)
    torch.manual_seed(0)
    sizes = {"n_layers": 2, "vocab_size": len(tokenizer)}
    for more in ({"dim": 512}, {"dim": 768}, {"dim": 512, "use_moe": True}):
        for stage in ("llm", "vlm_pretrain", "vlm_sft", "vlm_sft_multi"):
            config = LMConfig(**sizes, **more, vision_dim=0 if stage == "llm" else 24)
            save_weights(Transformer(config), weights_path(place / "out", config, stage))
    v1 = LMConfig(**sizes, dim=512, vision_dim=24)
    save_folder(place / "model/minimind-v-v1", Transformer(v1).state_dict(), v1, tokenizer_path, "bin")
    save_base(place / "model/SmolLM2-135M", "tinyllama")
    (place / "out/report.json").write_text('{"unseen": {"colour": {"real": 0.5, "blank": 0.1}}}')
    before = os.getcwd()
    os.chdir(place)
    try:
        run_inside("1-pretrain_vlm.py", *small(["--llm", "model/SmolLM2-135M"]))
        export(["out/512_vlm_sft.pth", "--to", "llava", "exported/minimind-v"])
        with pytest.MonkeyPatch.context() as patch:
            shrink_the_world(patch)
            make_demo_world(["--weights_dir=out/demo"])
        for family in ("plain", "outlined"):  # as python -m benchmarks.drawn does
            make_family(family, Path("out/drawn"), 2, seed=0)
        run_inside("1-pretrain_vlm.py", "@dataset/demo/pretrain.args")
        run_inside("2-sft_vlm.py", "@dataset/demo/sft.args")
        run_inside("2-sft_vlm.py", "@dataset/demo/sft_multi.args")
    finally:
        os.chdir(before)
    return place


def shrink_the_world(patch: pytest.MonkeyPatch) -> None:
    """The full preset with a few images and steps: it learns nothing."""
    few = replace(
        recipe.PRESETS["tiny"], train_images=60, text_rows=40, two_image_rows=20, train_videos=6,
        one_image_rows=10, test_images=24, test_videos=4, llm=FEW, pretrain=FEW, sft=FEW, multi=FEW,
    )  # fmt: skip
    patch.setitem(recipe.PRESETS, "full", few)


@pytest.fixture
def place(finished, tmp_path, monkeypatch) -> Path:
    """A copy of its own: files are links, and every program replaces files instead of changing them."""
    copy = shutil.copytree(finished, tmp_path / "place", copy_function=os.link)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("WANDB_MODE", "offline")
    shrink_the_world(monkeypatch)
    return copy


def small(words: list[str]) -> list[str]:
    """The flags of a training command, with those that keep it short; recipes bring their own."""
    given = {word.partition("=")[0] for word in words}
    if any(word.startswith("@") for word in words):
        return words
    more = [f"{name}={value}" for name, value in SMALL.items() if name not in given or name == "--n_layers"]
    return [*words, *more]


def run(command: str, monkeypatch) -> None:
    """Run a documented command in this process, where nothing has to be imported anew."""
    words = shlex.split(command)
    if words[1] == "-m":
        module, flags = words[2], words[3:]
        flags = small(flags) if module in ("trainer.check", "trainer.gain") else flags
        if module == "model.export":
            shutil.rmtree("exported")  # what it writes must not be there
        packages = ("dataset.demo_world", "model.export")
        importlib.import_module(f"{module}.__main__" if module in packages else module).main(flags)
        return
    position = next(number for number, word in enumerate(words) if word in SCRIPTS)
    script, flags = words[position], words[position + 1 :]
    if script == "web_server.py":
        pages = []
        monkeypatch.setattr("serving.server.serve", lambda *given: pages.append(given))
        run_inside(script, *flags)
        assert "127.0.0.1" in pages[0] and pages[0][0].blocks
    elif script == "3-eval_chat.py":
        monkeypatch.setattr("sys.stdin", io.StringIO("图片里有什么？\n"))
        run_inside(script, *flags, "--max_new_tokens=2", "--device=cpu")
    else:
        run_inside(script, *small(flags))


def is_ours(command: str) -> bool:
    """Is it run here? The suite, quickstart.sh, the downloads and the benchmarks have tests of their own;
    compiling takes minutes (tests/test_gpu_paths.py compiles a small model)."""
    words = shlex.split(command)
    elsewhere = ("ruff", "benchmarks", "--compile", "model.download")
    return words[0] != "bash" and not any(part in word for part in elsewhere for word in words)


@pytest.mark.parametrize("command", [command for command in COMMANDS if is_ours(command)])
def test_documented_commands_run(command, place, monkeypatch, capsys):
    try:
        run(command, monkeypatch)
    except SystemExit as end:  # the check says at the end whether there are problems; random weights are one
        output = capsys.readouterr()
        assert "trainer.check" in command and end.code == 2, output.err
        problems = [line for line in output.err.splitlines() if line.startswith("error: ")]
        assert all("look random" in line for line in problems), problems
    written = {
        "1-pretrain": "out/*_vlm_pretrain.metrics.jsonl",
        "2-sft": "out/*_vlm_sft*.metrics.jsonl",
        "demo_world": "dataset/demo*/world.json",
        "--report": "out/report.*",
    }
    for part, pattern in written.items():
        if part in command and "trainer.check" not in command and "@" not in command:
            assert list(place.glob(pattern)), f"{command} wrote nothing"


def test_under_torchrun_too(place):
    """As written, in two processes, in the folder where the files lie."""
    command = next(command for command in COMMANDS if command.startswith("torchrun --standalone"))
    words = shlex.split(command)
    position = next(number for number, word in enumerate(words) if word in SCRIPTS)
    flags = [word for word in words[position + 1 :] if word != "--use_wandb"]
    result = run_script(ROOT / words[position], *small(flags), processes=2, folder=place)
    assert result.returncode == 0, result.stderr
    assert "(2 process(es) x batch 2" in result.stdout


def test_every_other_documented_command_names_a_file_or_module_of_ours():
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] == "bash":
            assert (ROOT / words[1]).is_file(), command
        elif words[1] == "-m":
            assert words[2] in ("pip", "venv") or importlib.util.find_spec(words[2]), command
    assert len(COMMANDS) > 40


# ---- downloads ---------------------------------------------------------------------------------------------


def test_the_downloads_are_those_of_the_table():
    """Two of them once named no revision of a repository whose main branch had been rewritten."""
    table, text = read_table(), (ROOT / "README.md").read_text()
    assert "\n".join(markdown_lines(table)) in text, "\n".join(markdown_lines(table))
    lines = [line for line in text.splitlines() if line.startswith(COMMAND)]
    assert len(lines) >= 4
    for line in lines:
        names = line.removeprefix(COMMAND).partition("#")[0].split()
        assert line == command_line(table, names)
    real = describe_size(download for name in ("clip", "tokenizer", "vlm") for download in table[name])
    assert f"{real} to download" in text


def test_no_other_file_says_how_to_download():
    """One table: every command that is named anywhere is one of its names, and nothing goes around it."""
    files = [*ROOT.glob("*.py"), ROOT / "README.md", ROOT / "quickstart.sh"]
    for folder in ("model", "trainer", "serving", "dataset", "out"):
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md")]
    table, found = read_table(), set()
    others = r"hf download|huggingface-cli|wget |curl (?!http://127)|git lfs clone"
    for path in files:
        text = path.read_text()
        assert not re.search(others, text), path
        found |= {name for name in re.findall(rf"{COMMAND} (\w+)", text) if name != "NAME"}
    assert found <= table.keys() and len(found) >= 7


def test_v1s_data_and_weights_are_pinned():
    pinned = "dbe331826f7dd6bf9e66d33cb7f4b15fbcb88afe"
    downloads = [download for downloads in read_table().values() for download in downloads]
    data = [one for one in downloads if one.repository.id == "jingyaogong/minimind-v_dataset"]
    assert len(data) > 8 and all(one.repository.revision == pinned for one in data)
    assert all(one.repository.revision == "main" or len(one.repository.revision) == 40 for one in downloads)
    assert TABLE.read_text().count(pinned) == 1
