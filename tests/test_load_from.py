"""Weights that others made, from the file to the logits: v1's own .pth files and Hugging Face folders,
against a forward pass written out here in numpy, in float64, from v1's key names."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_script, save_image, v1_state_dict
from PIL import Image
from safetensors.torch import save_file

from model.chat import load_chat
from model.LMConfig import LMConfig

# As the config.json of the published folders: null where v1 computes, code to be fetched, MoE fields unused.
V1_CONFIG = {
    "architectures": ["MiniMindVLM"],
    "model_type": "minimind-v",
    "torch_dtype": "float32",
    "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    "hidden_dim": None,
    "multiple_of": 64,
    "dropout": 0.0,
    "flash_attn": True,
    "use_moe": False,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": True,
    "scoring_func": "softmax",
    "aux_loss_alpha": 0.01,
    "seq_aux": True,
    "norm_topk_prob": True,
}
EVIL = "import pathlib\npathlib.Path(__file__).with_name('it_ran').touch()\n"


def reference_logits(
    state: dict, config: LMConfig, ids: list[int], features: np.ndarray, slots: list[list[int]]
) -> np.ndarray:
    """v1's forward for one row, position by position and head by head: (T, V).

    state     under v1's names
    features  (M, N, vision_dim), written over the positions `slots` (M, N)
    """
    weights = {name: tensor.double().numpy() for name, tensor in state.items() if not tensor.is_complex()}
    E, T, share = config.dim // config.n_heads, len(ids), config.n_heads // config.n_kv_heads

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * weights[f"{name}.weight"]

    def times(x, name):
        return x @ weights[f"{name}.weight"].T

    def rotated(x, position):  # (E,): neighbouring pairs are complex numbers
        turns = position * config.rope_theta ** (-np.arange(0, E, 2) / E)
        return ((x[0::2] + 1j * x[1::2]) * np.exp(1j * turns)).view(float)

    def swiglu(x, name):
        gate = times(x, f"{name}w1")
        return times(gate / (1 + np.exp(-gate)) * times(x, f"{name}w3"), f"{name}w2")

    def feed_forward(x, name):
        if f"{name}gate.weight" not in weights:
            return swiglu(x, name)
        scores = np.exp(times(x, f"{name}gate"))
        chosen = np.argsort(scores)[-2:]
        routed = sum(scores[expert] * swiglu(x, f"{name}experts.{expert}.") for expert in chosen)
        return routed / scores[chosen].sum() + swiglu(x, f"{name}shared_experts.")

    h = weights["tok_embeddings.weight"][ids]
    for image, places in zip(features, slots, strict=True):
        for feature, place in zip(image, places, strict=True):
            h[place] = times(feature, "vision_proj.vision_proj.0") + weights.get(
                "vision_proj.vision_proj.0.bias", 0
            )
    for layer in [f"layers.{number}." for number in range(config.n_layers)]:
        x = norm(h, f"{layer}attention_norm")
        q, k, v = (times(x, f"{layer}attention.{name}").reshape(T, -1, E) for name in ("wq", "wk", "wv"))
        attended = np.zeros((T, config.n_heads, E))
        for head in range(config.n_heads):
            turned = [rotated(k[t, head // share], t) for t in range(T)]
            for t in range(T):
                scores = np.exp(np.array(turned[: t + 1]) @ rotated(q[t, head], t) / np.sqrt(E))
                attended[t, head] = scores @ v[: t + 1, head // share] / scores.sum()
        h = h + times(attended.reshape(T, -1), f"{layer}attention.wo")
        x = norm(h, f"{layer}ffn_norm")
        h = h + np.array([feed_forward(x[t], f"{layer}feed_forward.") for t in range(T)])
    return times(norm(h, "norm"), "output")


def check_logits(path: Path, state: dict, config: LMConfig, **paths) -> str:
    """Load, show two images, and compare the logits of a prompt and of one more token with the reference;
    returns the report of the loading."""
    chat = load_chat(path, **paths)
    found = {name: getattr(chat.decoder.config, name) for name in config.to_dict()}
    assert found == config.to_dict()
    prompt = chat.render([{"from": "human", "value": "<image>什么？ <image>"}])
    images = np.random.default_rng(0).integers(0, 256, (2, 9, 9, 3), dtype=np.uint8)
    features = chat.encode([Image.fromarray(image) for image in images])
    ids, following = prompt.input_ids, 77
    first, cache = chat.decoder.prefill(
        torch.tensor([ids]), torch.tensor([len(ids)]), 1, features, torch.tensor(prompt.image_slots)
    )
    logits = torch.cat([first, chat.decoder.step(torch.tensor([following]), cache)]).numpy()
    expected = reference_logits(
        state, config, [*ids, following], features.double().numpy(), prompt.image_slots
    )[-2:]
    assert expected.std() > 0.1
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
    return str(chat.report)


@pytest.fixture
def sizes(tokenizer) -> LMConfig:
    """v1's heads, otherwise small."""
    torch.manual_seed(4)
    return LMConfig(dim=64, n_layers=2, vocab_size=len(tokenizer), vision_dim=24)


def save_file_of_v1(path: Path, state: dict, sizes: LMConfig) -> Path:
    """A .pth file; small ones with a description, for only v1's own sizes are known without."""
    torch.save(state, path)
    path.with_suffix(".json").write_text(json.dumps({"config": sizes.to_dict()}))
    return path


@pytest.mark.parametrize(
    ("name", "wrapper", "bias", "dtype"),
    [
        ("64_vlm_sft.pth", "", True, torch.float16),
        ("64_llm.pth", "_orig_mod.", False, torch.float32),
        ("64_vlm_sft_multi.pth", "module._orig_mod.module.", True, torch.bfloat16),
    ],
)
def test_files_of_v1(tmp_path, sizes, tokenizer_path, clip_path, name, wrapper, bias, dtype):
    """A projection with a bias, an *_llm.pth that already contains one, wrappers, half precision, buffers."""
    sizes.vision_proj_bias = bias
    state = {
        key: tensor if tensor.is_complex() else tensor.to(dtype)
        for key, tensor in v1_state_dict(sizes, bias).items()
    }
    path = save_file_of_v1(tmp_path / name, {wrapper + key: tensor for key, tensor in state.items()}, sizes)
    said = check_logits(path, state, sizes, tokenizer_path=tokenizer_path, clip_path=clip_path)
    assert f"{name}: {22 + bias} tensors loaded\n64 wide, 2 layers, 16 heads (8 key/value)" in said
    assert ("with a bias" in said) == bias and "not used" not in said


def test_a_file_of_v1_without_a_description(tmp_path, tokenizer_path, clip_path):
    """Its sizes tell what its tensors do not: heads, context, rotations."""
    torch.manual_seed(4)
    config = LMConfig(dim=512, n_layers=8, vocab_size=6400, vision_dim=24)
    state = {
        name: tensor if tensor.ndim < 2 else tensor / 3 for name, tensor in v1_state_dict(config).items()
    }
    torch.save(state, tmp_path / "512_vlm_sft.pth")
    said = check_logits(
        tmp_path / "512_vlm_sft.pth", state, config, tokenizer_path=tokenizer_path, clip_path=clip_path
    )
    assert "76 tensors loaded\n512 wide, 8 layers, 16 heads (8 key/value), 6400 tokens, context 512" in said


def test_a_file_of_v1_with_experts(tmp_path, sizes, tokenizer_path, clip_path):
    config = LMConfig.from_dict(sizes.to_dict() | {"use_moe": True, "n_routed_experts": 3})
    state = v1_state_dict(config, experts=3)
    path = save_file_of_v1(tmp_path / "64_moe_vlm_sft.pth", state, config)
    check_logits(path, state, config, tokenizer_path=tokenizer_path, clip_path=clip_path)


def test_a_wrapper_around_every_layer(tmp_path, sizes, tokenizer_path, clip_path):
    """torch.compile of each block puts its name in the middle."""
    state = v1_state_dict(sizes)
    wrapped = {re.sub(r"^(layers\.\d\.)", r"\1_orig_mod.", key): tensor for key, tensor in state.items()}
    path = save_file_of_v1(tmp_path / "64_vlm_sft.pth", wrapped, sizes)
    check_logits(path, state, sizes, tokenizer_path=tokenizer_path, clip_path=clip_path)


def save_folder(folder: Path, state: dict, config: LMConfig, tokenizer_path: Path, form: str) -> Path:
    """A Hugging Face folder as v1's: sizes, tensors, tokenizer, and code that must never run."""
    shutil.copytree(tokenizer_path, folder)
    kept = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "rope_theta", "max_seq_len")
    sizes = {name: value for name, value in config.to_dict().items() if name in kept}
    (folder / "config.json").write_text(json.dumps(V1_CONFIG | sizes))
    (folder / "evil.py").write_text(EVIL)
    if form == "bin":
        torch.save({f"model.{name}": tensor for name, tensor in state.items()}, folder / "pytorch_model.bin")
        return folder
    # safetensors takes no tied tensors; CLIP's own were saved with the model by some.
    state = {name: tensor.contiguous() for name, tensor in state.items() if not tensor.is_complex()}
    del state["tok_embeddings.weight"]
    state |= {f"vision_encoder.layers.{number}.weight": torch.zeros(3) for number in range(7)}
    if form == "safetensors":
        save_file(state, folder / "model.safetensors")
        return folder
    names = sorted(state)
    parts = {name: f"model-{1 + number % 2:05}-of-00002.safetensors" for number, name in enumerate(names)}
    for part in set(parts.values()):
        save_file({name: state[name] for name in names if parts[name] == part}, folder / part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    return folder


@pytest.mark.parametrize("form", ["bin", "safetensors", "parts"])
def test_folders_of_hugging_face(tmp_path, tokenizer, tokenizer_path, clip_path, form):
    """Sizes come from config.json, for the heads cannot be read off the tensors; the tokenizer lies there."""
    torch.manual_seed(5)
    config = LMConfig(
        dim=64,
        n_layers=2,
        n_heads=8,
        n_kv_heads=2,
        vocab_size=len(tokenizer),
        vision_dim=24,
        norm_eps=1e-3,
        rope_theta=500.0,
        max_seq_len=200,
        vision_proj_bias=True,
    )
    state = v1_state_dict(config, bias=True)
    folder = save_folder(tmp_path / "minimind-v-v1", state, config, tokenizer_path, form)
    said = check_logits(folder, state, config, clip_path=clip_path)
    assert "8 heads (2 key/value), 581 tokens, context 200" in said and f"tokenizer {folder}" in said
    assert ("not used: vision_encoder.* (7 tensors, a copy of CLIP)" in said) == (form != "bin")
    assert not (folder / "it_ran").exists()


def test_the_program_takes_a_folder_and_runs_no_code_of_it(tmp_path, sizes, tokenizer_path, clip_path):
    """Neither what config.json names nor what the tokenizer's config names."""
    folder = save_folder(tmp_path / "v1", v1_state_dict(sizes), sizes, tokenizer_path, "bin")
    (tmp_path / "images").mkdir()
    save_image(tmp_path / "images" / "a.png", 0)
    result = run_script(
        "3-eval_chat.py",
        "--load_from",
        folder,
        f"--clip_path={clip_path}",
        "--device=cpu",
        f"--image_dir={tmp_path}/images",
        "--max_new_tokens=3",
    )
    assert result.returncode == 0, result.stderr
    assert f"{folder}: 22 tensors loaded" in result.stdout and "a.png]" in result.stdout
    described = json.loads((folder / "tokenizer_config.json").read_text())
    described |= {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}}
    described.pop("tokenizer_class", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="cannot read the tokenizer at .*v1"):
        load_chat(folder, clip_path=clip_path)
    assert not (folder / "it_ran").exists()


def test_a_language_model_cannot_see(tmp_path, sizes):
    state = {name: tensor for name, tensor in v1_state_dict(sizes).items() if "vision" not in name}
    sizes.vision_dim = 0
    path = save_file_of_v1(tmp_path / "64_llm.pth", state, sizes)
    with pytest.raises(ValueError, match=r"64_llm.pth is a language model .* cannot see: train it with"):
        load_chat(path)


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "pytorch_model.bin").unlink(), "v1 holds neither model.safetensors nor"),
        (
            lambda folder: (folder / "pytorch_model.bin").write_text(
                "version https://git-lfs.github.com/spec/v1"
            ),
            "pytorch_model.bin is a git-lfs pointer",
        ),
        (
            lambda folder: torch.save({"x": Evil(folder / "it_ran")}, folder / "pytorch_model.bin"),
            "pytorch_model.bin is not a readable weight file",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"no tensors at all"),
            "model.safetensors is not a readable weight file",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda folder: (folder / "config.json").write_text('{"dim": "wide"}'), "v1: .* dim must be a whole"),
        (
            lambda folder: (folder / "config.json").write_text('{"dim": 96}'),
            r"of other shape .*would fit --dim 64 --n_layers 2",
        ),
        (
            lambda folder: torch.save({"embed_tokens.weight": torch.zeros(2)}, folder / "pytorch_model.bin"),
            "v1 is not a MiniMind model: its first tensors are embed_tokens.weight",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot read the tokenizer at .*v1"),
    ],
)
def test_a_folder_that_cannot_be_used_says_why(tmp_path, sizes, tokenizer_path, clip_path, damage, message):
    folder = save_folder(tmp_path / "v1", v1_state_dict(sizes), sizes, tokenizer_path, "bin")
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_chat(folder, clip_path=clip_path)
    assert not (folder / "it_ran").exists()


def test_an_index_reaches_no_file_outside_its_folder(tmp_path, sizes, tokenizer_path, clip_path):
    folder = save_folder(tmp_path / "v1", v1_state_dict(sizes), sizes, tokenizer_path, "bin")
    (folder / "pytorch_model.bin").rename(tmp_path / "outside.bin")
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"x": "../outside.bin"}}')
    with pytest.raises(FileNotFoundError, match="v1/outside.bin not found"):
        load_chat(folder, clip_path=clip_path)
