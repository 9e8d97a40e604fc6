"""What weights were trained with is told by content, not by size: another CLIP, another tokenizer, images
replaced under the same name, other ranks. Evaluation once fell from 1.000 to .120 without a word."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    SIZES,
    check_refused,
    make_rows,
    run_clean,
    run_inside,
    run_script,
    save_image,
    train,
    weights_of,
)
from safetensors.torch import load_file, save_file
from test_distributed import free_port
from test_resume import PowerCut, cut_after

from model.checkpoint import config_of, read_state_dict, save_weights
from model.description import read_description
from model.fingerprint import fingerprint_clip, fingerprint_tensors, fingerprint_tokenizer
from model.LMConfig import LMConfig
from model.prompt import load_tokenizer
from model.transformer import Transformer
from model.vision_utils import get_vision_model
from trainer.distributed import Run
from trainer.script import AgreedError

SCRIPT = "1-pretrain_vlm.py"


@pytest.fixture
def other_clip(clip_path, tmp_path) -> Path:
    """A CLIP of the same sizes in which one weight of one layer differs."""
    folder = shutil.copytree(clip_path, tmp_path / "other_clip")
    state = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(state) if "vision_model" in name and name.endswith("fc1.weight"))
    state[name][0, 0] += 0.5
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def other_tokenizer(tokenizer_path, tmp_path) -> Path:
    """A tokenizer of the same size in which two words have changed places."""
    folder = shutil.copytree(tokenizer_path, tmp_path / "other_tokenizer")
    text = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = text["model"]["vocab"]
    one, two = [word for word, number in sorted(vocabulary.items(), key=lambda item: item[1])][-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(text, ensure_ascii=False), encoding="utf-8")
    return folder


@pytest.mark.parametrize("which", ["clip", "tokenizer"])
def test_another_input_of_the_same_size_is_refused_wherever_weights_are_loaded(
    workplace, request, capsys, which
):
    """By the next stage, by the check, by evaluation; a flag overrules."""
    run_inside(SCRIPT, f"@{workplace}/args", "--max_steps=1")
    other = request.getfixturevalue(f"other_{which}")
    flags = [f"--{which}_path={other}", "--device=cpu"]
    asked = ["3-eval_chat.py", f"--load_from={workplace}/out/32_vlm_pretrain.pth", *flags]
    asked += [f"--image_dir={workplace}/images", "--max_new_tokens=1"]
    name, found = {
        "clip": ("CLIP", lambda path: fingerprint_clip(*get_vision_model(path))),
        "tokenizer": ("tokenizer", lambda path: fingerprint_tokenizer(load_tokenizer(path))),
    }[which]
    trained_with = read_description(workplace / "out" / "32_vlm_pretrain.pth")["inputs"][name]
    assert trained_with != found(other)
    wanted = [f"was trained with the {name} {trained_with}", found(other), f"--{which}_path", "--allow_other"]
    check_refused(run_clean(capsys, "2-sft_vlm.py", f"@{workplace}/args", "--max_steps=1", *flags), *wanted)
    check_refused(run_clean(capsys, *asked), *wanted)
    result = run_script("-m", "trainer.check", "sft", f"@{workplace}/args", *flags)
    assert result.returncode == 2 and wanted[0] in result.stderr
    result = run_clean(capsys, *asked, "--allow_other_inputs")
    assert result.returncode == 0 and result.stdout.count(".png]") == 6
    run_inside("2-sft_vlm.py", f"@{workplace}/args", "--max_steps=1", *flags, "--allow_other_inputs")


def replace_images(workplace: Path) -> None:
    for number in range(6):
        save_image(workplace / "images" / f"{number}.png", 90 + number)


def replace_rows(workplace: Path) -> None:
    """Same size, same time."""
    path = workplace / "data.json"
    times = path.stat().st_mtime_ns
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("红色", "蓝色"), encoding="utf-8")
    os.utime(path, ns=(times, times))


def replace_weights(workplace: Path) -> None:
    path = workplace / "out" / "32_llm.pth"
    model = Transformer(config_of(path, read_state_dict(path)))
    save_weights(model, path)


@pytest.mark.parametrize(
    ("change", "named"), [(replace_images, "images"), (replace_rows, "data"), (replace_weights, "weights_in")]
)
@pytest.mark.parametrize("is_large", [False, True])
def test_a_run_resumes_on_the_same_content_only(workplace, monkeypatch, capsys, change, named, is_large):
    """is_large: the data file has an index that is found by size and time."""
    if is_large:
        monkeypatch.setattr("model.data.rows.SMALL", 0)
    flags = [f"@{workplace}/args", "--max_steps=6", "--save_interval=2"]
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_after(patch, 3)
        run_inside(SCRIPT, *flags)
    assert (workplace / "out" / "32_vlm_pretrain.resume").is_file()
    change(workplace)
    result = run_clean(capsys, SCRIPT, *flags, "--resume")
    check_refused(
        result, "was made with other settings", f"{named} ", " then, ", " now", "resume_weights_only"
    )


@pytest.mark.parametrize("which", ["clip", "tokenizer"])
def test_a_run_resumes_with_the_same_clip_and_tokenizer_only(workplace, monkeypatch, request, capsys, which):
    flags = [f"@{workplace}/args", "--max_steps=6", "--save_interval=2"]
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_after(patch, 3)
        run_inside(SCRIPT, *flags)
    other = request.getfixturevalue(f"other_{which}")
    result = run_clean(capsys, SCRIPT, *flags, f"--{which}_path={other}", "--resume")
    check_refused(result, {"clip": "CLIP", "tokenizer": "tokenizer"}[which], " then, ", " now")


# ---- ranks -------------------------------------------------------------------------------------------------


class TwoRanks(Run):
    """Rank 1, as rank 0 sees it answer."""

    def share(self, value) -> list:
        return [self.first, value]


def test_ranks_that_differ_are_told_with_both_values():
    run = TwoRanks(1, 2, torch.device("cpu"))
    run.first = {"--learning_rate": 0.1, "--seed": 1, "torch": "2.13"}
    run.check_agreement(dict(run.first))
    for name, value in {"--learning_rate": 0.2, "--seed": 2, "torch": "2.14", "--dtype": "bfloat16"}.items():
        with pytest.raises(AgreedError) as error:
            run.check_agreement(run.first | {name: value})
        assert f"{name} is {run.first.get(name)} on rank 0, {value} on rank 1" in str(error.value)


@pytest.mark.parametrize("kind", ["flag", "data", "clip"])
def test_two_processes_that_were_started_differently_end_before_the_first_step(
    workplace, other_clip, kind, tmp_path
):
    """Eight of nine kinds of difference once trained something else, with status 0."""
    (tmp_path / "other.json").write_text(json.dumps(make_rows(23), ensure_ascii=False))
    differing = {
        "flag": ["--learning_rate=0.5"],
        "data": [f"--data_path={tmp_path}/other.json"],
        "clip": [f"--clip_path={other_clip}"],
    }[kind]
    named = {
        "flag": "--learning_rate is 0.001 on rank 0, 0.5 on rank 1",
        "data": "data is ",
        "clip": "CLIP is ",
    }
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, f"@{workplace}/args", "--max_steps=2", *(differing if rank else [])],
            cwd=ROOT,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert named[kind] in errors[0] and "on rank 1" in errors[0] and "Traceback" not in "".join(errors)
    assert not (workplace / "out" / "32_vlm_pretrain.pth").exists()


# ---- what shapes do not show -------------------------------------------------------------------------------


def test_the_description_travels_inside_the_weights(workplace, tmp_path):
    """Without the .json, or with "config": null in it, v1's number of heads was taken: 1.000 became .275."""
    train(workplace, "--max_steps=1")
    path = workplace / "out" / "32_vlm_pretrain.pth"
    config, plain = config_of(path, read_state_dict(path)), torch.load(path, weights_only=True)
    assert config.n_heads == SIZES["n_heads"] != LMConfig.n_heads
    for damage in ('{"config": null}', '{"config": {"n_heads": 16}}', None):
        beside = path.with_suffix(".json")
        beside.unlink() if damage is None else beside.write_text(damage)
        assert config_of(path, read_state_dict(path)) == config
        assert read_description(path)["inputs"].keys() == {"CLIP", "tokenizer", "weights_in"}
    # For everybody else the file is what torch.save makes of a state dict.
    assert plain.keys() == weights_of(workplace).keys()
    torch.save(plain, tmp_path / "bare.pth")
    with pytest.raises(ValueError, match="does not say how many heads .* put the .json .* back beside it"):
        config_of(tmp_path / "bare.pth", read_state_dict(tmp_path / "bare.pth"))
    result = run_script("3-eval_chat.py", f"--load_from={tmp_path}/bare.pth", "--device=cpu")
    check_refused(result, "bare.pth does not say how many heads")


def test_only_places_are_read_from_the_json_beside_the_weights(workplace):
    train(workplace, "--max_steps=1")
    path = workplace / "out" / "32_vlm_pretrain.pth"
    words = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(words | {"clip_path": "elsewhere", "stage": "llm"}))
    assert read_description(path)["clip_path"] == "elsewhere"
    assert read_description(path)["stage"] == "vlm_pretrain"


def test_weights_of_v1_are_known_by_their_sizes(tmp_path):
    with torch.device("meta"):
        model = Transformer(LMConfig())
    state = {name: torch.zeros(1).expand(tensor.shape) for name, tensor in model.state_dict().items()}
    path = tmp_path / "512_vlm_sft.pth"
    torch.save({name: tensor for name, tensor in state.items() if "wq" not in name}, path)
    assert config_of(path, state) == LMConfig()


def test_a_fingerprint_sees_every_value_and_no_order():
    state = {"a": torch.arange(4.0), "b": torch.zeros(2, 2)}
    same = fingerprint_tensors(dict(reversed(state.items())))
    assert fingerprint_tensors(state) == same
    changes = [{"a": torch.tensor([0.0, 1, 2, 4])}, {"a": torch.arange(4).int()}, {"b": torch.zeros(4)}]
    others = {fingerprint_tensors(state | change) for change in changes}
    assert len(others | {same}) == 4


def test_a_saved_file_stays_readable_for_torch_and_zip_alike(workplace):
    path = workplace / "out" / "32_llm.pth"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    mapped = torch.load(path, weights_only=True, mmap=True)
    read = torch.load(path, weights_only=True)
    assert all(torch.equal(mapped[name], read[name]) for name in read)
