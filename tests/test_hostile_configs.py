"""Numbers that make no sense or would fill the memory, and code that a folder names."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import (
    check_refused,
    run_clean,
    save_clip,
    v1_state_dict,
)

import model.tokenizer
from model.checkpoint import check_state_dict, read_state_dict, sizes_of
from model.LMConfig import LMConfig
from model.prompt import load_tokenizer
from model.vision_utils import get_vision_model
from trainer.inputs import read_about
from trainer.script import clean_exit


@pytest.fixture
def folder(tmp_path, tokenizer_path) -> Path:
    return shutil.copytree(tokenizer_path, tmp_path / "folder")


# ---- numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"norm_eps": math.nan}, "norm_eps must be a finite number, not nan"),
        ({"norm_eps": 0}, "norm_eps must lie between 0 and 1, not 0"),
        ({"norm_eps": -1e-5}, "norm_eps must lie between 0 and 1"),
        ({"norm_eps": math.inf}, "norm_eps must be a finite number"),
        ({"rope_theta": 0}, "rope_theta must be at least 1, not 0"),
        ({"rope_theta": 10**400}, "rope_theta must be a finite number, not 1000"),
        ({"aux_loss_alpha": math.inf}, "aux_loss_alpha must be a finite number"),
        ({"dim": 512.5}, "dim must be a whole number, not 512.5"),
        ({"dim": "512"}, "dim must be a whole number, not '512'"),
        ({"n_layers": True}, "n_layers must be a whole number, not True"),
        ({"use_moe": "false"}, "use_moe must be true or false, not 'false'"),
        ({"n_layers": 10**8}, "n_layers must be at most 1,000, not 100000000"),
        ({"dim": 10**8}, "dim must be at most 65,536"),
        ({"vocab_size": 10**9}, "vocab_size must be at most 1,000,000"),
        ({"max_seq_len": 10**8}, "max_seq_len must be at most 1,048,576"),
        ({"hidden_dim": 10**400}, "hidden_dim must be at most 1,000,000"),
        ({"use_moe": True, "n_routed_experts": 10**8}, "n_routed_experts must be at most 1,024"),
        ({"dim": 65536, "n_layers": 1000, "n_heads": 512}, "makes .* parameters, at most 20,000,000,000"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ValueError, match=f"model sizes do not fit: .*{message}"):
        LMConfig.from_dict(values)


def test_sizes_as_v1_and_others_write_them_are_read():
    config = LMConfig.from_dict({"rope_theta": 1000000, "n_shared_experts": True, "hidden_dim": None})
    assert config.n_shared_experts == 1 and config.rope_theta == 1e6


@pytest.mark.parametrize("flag", ["--dim=100000000", "--n_layers=100000000", "--max_seq_len=999999999"])
def test_absurd_flags_are_refused_before_anything_is_made(workplace, capsys, flag):
    name = flag[2:].partition("=")[0]
    check_refused(
        run_clean(capsys, "1-pretrain_vlm.py", f"@{workplace}/args", flag), f"{name} must be at most"
    )


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        (
            "config.json",
            "image_size",
            100_000_000,
            "image_size is 100000000, not a whole .* to 4,096",
        ),
        ("config.json", "num_hidden_layers", 10**8, "num_hidden_layers is 100000000, not a whole number"),
        ("config.json", "patch_size", 300, "patch_size 300 is larger than image_size 224"),
        ("config.json", "patch_size", 1, "an image would have 50,177 tokens, at most 16,384"),
        ("config.json", "layer_norm_eps", math.nan, "layer_norm_eps is nan, not a number between 0 and 1"),
        (
            "preprocessor_config.json",
            "image_std",
            [0, 0.2, 0.2],
            "image_std is .*, not a list of 3",
        ),
        (
            "preprocessor_config.json",
            "image_std",
            [0.2, math.nan, 0.2],
            "image_std is .*nan.*, not a list",
        ),
        ("preprocessor_config.json", "image_mean", [0.5, 0.5], "image_mean is .0.5, 0.5., not a list of 3"),
        ("preprocessor_config.json", "image_mean", "0.5", "image_mean is '0.5', not a list of 3"),
    ],
)
def test_settings_of_clip_that_make_no_sense_are_refused(clip_path, tmp_path, file, key, value, message):
    """image_std 0 made every pixel infinite."""
    clip = shutil.copytree(clip_path, tmp_path / "clip")
    values = json.loads((clip / file).read_text())
    (values["vision_config"] if file == "config.json" else values)[key] = value
    (clip / file).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        get_vision_model(clip)


def test_a_clip_of_many_layers_costs_nothing_before_it_is_refused(tmp_path):
    """Each would be an object, though it held no numbers."""
    clip = save_clip(tmp_path / "clip")
    values = json.loads((clip / "config.json").read_text())
    values["vision_config"]["num_hidden_layers"] = 10**8
    (clip / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="clip .config.json: num_hidden_layers is 100000000"):
        get_vision_model(clip)


def test_names_and_shapes_in_a_weight_file_cannot_mislead(tmp_path, config, model):
    state = v1_state_dict(config)
    torch.save(
        state | {"layers.99999999.x": torch.zeros(1), "layers.x.y": torch.zeros(1)}, tmp_path / "a.pth"
    )
    state = read_state_dict(tmp_path / "a.pth")
    assert sizes_of(state)["n_layers"] == 2
    with pytest.raises(ValueError, match="a.pth does not fit the model: 2 unknown"):
        check_state_dict(model, tmp_path / "a.pth", state)
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight", "vision_proj.weight"):
        for shape in ((), (3,), (2, 2, 2)):
            assert sizes_of(state | {name: torch.zeros(shape)})["n_layers"] == 2
    for strange in ({1: torch.zeros(1)}, {"x": torch.eye(2).to_sparse()}, {"x": torch.eye(2, device="meta")}):
        torch.save(state | strange, tmp_path / "b.pth")
        with pytest.raises(ValueError, match="b.pth holds no plain state dict"):
            read_state_dict(tmp_path / "b.pth")


def test_a_long_or_deep_file_of_settings_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "about.json"
    path.write_text('{"knows": ' + "[" * 101 + "]" * 101 + "}")
    with pytest.raises(ValueError, match="about.json is nested more than 100 levels deep"):
        read_about(path)
    with open(path, "wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(ValueError, match="about.json has 67,108,865 bytes, at most 67,108,864 are read"):
        read_about(path)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("Allocator: can't allocate memory")])
def test_memory_that_does_not_suffice_is_one_line(capsys, error):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        clean_exit(main)
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "error: the memory does not suffice: choose a smaller --batch_size, or a smaller model\n"
    )


# ---- code that a folder names ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("described", "settings"),
    [
        (
            {"tokenizer_class": "LlamaTokenizerFast"},
            {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}},
        ),
        ({"tokenizer_class": "LlamaTokenizer", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}, {}),
        ({"tokenizer_class": "GPT2Tokenizer", "_attn_implementation_internal": "evil/kernels"}, {}),
        (
            {"tokenizer_class": "LlamaTokenizerFast"},
            {
                "model_type": "lightglue",
                "trust_remote_code": True,
                "use_kernels": True,
                "attn_implementation": "evil/kernels",
                "_attn_implementation_internal": "evil/kernels",
                "quantization_config": {"quant_method": "evil"},
            },
        ),
        ({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}, {}),
        ({"tokenizer_class": ["LlamaTokenizer"]}, {}),
        ({"tokenizer_class": None, "auto_map": ["evil.Evil", "evil.Evil"]}, {}),
        (
            {
                "tokenizer_class": "LlamaTokenizer",
                "vocab_file": "/etc/hostname",
                "tokenizer_file": "/etc/hostname",
            },
            {},
        ),
    ],
)
def test_a_folder_does_not_choose_what_code_reads_it(folder, monkeypatch, described, settings):
    """transformers is shown a copy in which no code, kernels or other files are named."""
    (folder / "evil.py").write_text(f"open({str(folder / 'it_ran')!r}, 'w')\nclass Evil: pass\n")
    words = json.loads((folder / "tokenizer_config.json").read_text()) | described
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    (folder / "config.json").write_text(json.dumps(settings))
    seen = []

    def look(copy: str):
        seen.extend(path.name for path in Path(copy).iterdir())
        for path in Path(copy).glob("*config.json"):
            assert not any(word in path.read_text() for word in ("evil", "auto_map", "/etc", "trust"))
        return original(copy)

    original = model.tokenizer.load_copy
    monkeypatch.setattr(model.tokenizer, "load_copy", look)
    known = described["tokenizer_class"] in ("LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer")
    try:
        load_tokenizer(folder)
    except ValueError as error:
        assert known or "tokenizer_class is" in str(error)
    assert bool(seen) == known and "evil.py" not in seen and not (folder / "it_ran").exists()


def test_a_tokenizer_of_absurd_size_is_refused(folder, monkeypatch):
    with open(folder / "vocab.json", "wb") as file:
        file.truncate((256 << 20) + 1)
    with pytest.raises(ValueError, match="vocab.json has 268,435,457 bytes: at most 268,435,456 are read"):
        load_tokenizer(folder)
    (folder / "vocab.json").unlink()
    words = json.loads((folder / "tokenizer.json").read_text())
    words["model"]["vocab"]["far"] = 4_000_000_000
    (folder / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ValueError, match="one of number 4,000,000,000: numbers must have no gaps"):
        load_tokenizer(folder)


def test_an_absurd_learning_rate_is_told(workplace, capsys):
    flags = ("--max_steps=1", "--learning_rate=12")
    result = run_clean(capsys, "1-pretrain_vlm.py", f"@{workplace}/args", *flags)
    assert "--learning_rate 12 destroys what weights know" in result.stdout, result.stderr
