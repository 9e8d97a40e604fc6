"""Weight files: names, atomic saves, strict loading that explains, v1's own format."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SIZES, v1_state_dict

from model.checkpoint import config_of, load_weights, read_state_dict, save_weights
from model.description import read_description
from model.files import atomic_write
from model.LMConfig import LMConfig
from model.names import weights_path
from model.transformer import Transformer


def perturbed(model: Transformer) -> Transformer:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("bias", [False, True])
def test_v1_files_load_without_a_missing_or_unexpected_key(tmp_path, wrapper, bias):
    config = LMConfig(dim=64, n_layers=2, vision_proj_bias=bias)
    state = v1_state_dict(config, bias)
    torch.save({wrapper + name: tensor for name, tensor in state.items()}, tmp_path / "64_vlm_sft.pth")
    model = Transformer(config)
    report = load_weights(model, tmp_path / "64_vlm_sft.pth")
    assert report.missing == report.ignored == []
    assert torch.equal(model.vision_proj.weight, state["vision_proj.vision_proj.0.weight"])
    assert torch.equal(model.layers[1].feed_forward.w2.weight, state["layers.1.feed_forward.w2.weight"])
    assert model.output.weight is model.tok_embeddings.weight
    if bias:
        assert torch.equal(model.vision_proj.bias, state["vision_proj.vision_proj.0.bias"])


def test_the_config_of_v1s_own_files_is_read_off_their_tensors(tmp_path):
    """Heads, context and rotations cannot be; 512 x 8 layers and 768 x 16 are known by their sizes, other
    sizes need a description."""
    config = LMConfig(dim=512, n_layers=8, vision_proj_bias=True)
    torch.save(v1_state_dict(config, bias=True), tmp_path / "a.pth")
    assert config_of(tmp_path / "a.pth", read_state_dict(tmp_path / "a.pth")) == config
    state = v1_state_dict(LMConfig(dim=64, n_layers=8))
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(ValueError, match="b.pth does not say how many heads it has"):
        config_of(tmp_path / "b.pth", state)


def test_perturb_save_load_round_trip(tmp_path, model, config):
    path = weights_path(tmp_path, config, "vlm_sft")
    assert path.name == "32_vlm_sft.pth"
    save_weights(perturbed(model), path, stage="vlm_sft", step=7)
    assert (
        read_description(path)["step"] == 7 and LMConfig.from_dict(read_description(path)["config"]) == config
    )
    other = Transformer(config)
    assert load_weights(other, path).num_loaded == len(other.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    assert path.stat().st_size < 1.1 * 4 * model.num_parameters() + 20_000  # the tied matrix is stored once


def test_only_what_is_named_may_differ(tmp_path, config, model):
    llm = Transformer(LMConfig.from_dict(config.to_dict() | {"vision_dim": 0}))
    save_weights(llm, tmp_path / "llm.pth")
    with pytest.raises(ValueError, match=r"1 missing \(vision_proj.weight\)"):
        load_weights(model, tmp_path / "llm.pth")
    report = load_weights(model, tmp_path / "llm.pth", may_miss="vision_proj.")
    assert report.missing == ["vision_proj.weight"] and "new, not in the file: vision_proj.weight" in str(
        report
    )
    save_weights(model, tmp_path / "vlm.pth")
    with pytest.raises(ValueError, match=r"1 unknown \(vision_proj.weight\)"):
        load_weights(llm, tmp_path / "vlm.pth")


def test_weights_of_another_size_name_the_flags_that_fit(tmp_path, config):
    big = Transformer(LMConfig.from_dict(config.to_dict() | {"dim": 64, "n_layers": 3, "hidden_dim": 0}))
    save_weights(big, tmp_path / "big.pth")
    with pytest.raises(
        ValueError,
        match=r"of other shape \(tok_embeddings.weight \(\d+, 64\) in the file.*"
        r"--dim 64 --n_layers 3",
    ):
        load_weights(Transformer(config), tmp_path / "big.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not found: cure me"),
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git-lfs pointer"),
        (b"<!DOCTYPE html>\n<html>", "web page"),
        (b"neither zip nor pickle", "not a readable weight file"),
    ],
)
def test_what_people_have_instead_of_weights(tmp_path, content, message):
    if content is not None:
        (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_state_dict(tmp_path / "w.pth", "cure me")


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/minimind_v_was_here",)


def test_no_code_of_a_file_is_run(tmp_path):
    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="not a readable weight file"):
        read_state_dict(tmp_path / "evil.pth")
    assert not os.path.exists("/tmp/minimind_v_was_here")


def test_broken_numbers_are_reported(tmp_path, model, config):
    model.norm.weight.data[3] = float("nan")
    save_weights(model, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match="not finite, first in norm.weight"):
        load_weights(Transformer(config), tmp_path / "nan.pth")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        atomic_write(tmp_path / "a", fail)
    assert (tmp_path / "a").read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_a_kill_during_a_save_leaves_a_readable_file(tmp_path):
    """Kill a process that saves without pause; whatever file lies there must load."""
    code = (
        f"import torch\nfrom model.LMConfig import LMConfig\nfrom model.transformer import Transformer\n"
        f"from model.checkpoint import save_weights\nmodel = Transformer(LMConfig(**{SIZES}))\n"
        f"while True:\n    save_weights(model, '{tmp_path}/w.pth')\n    print('saved', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    load_weights(Transformer(LMConfig(**SIZES)), tmp_path / "w.pth")
