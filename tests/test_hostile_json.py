"""JSON files and recipes with whatever may stand in them: one line that names the file, no traceback."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import (
    make_question,
    save_image,
    write_questions,
)
from safetensors.torch import save_file

from model.chat import load_chat
from model.checkpoint import config_of, read_state_dict, save_weights
from model.prompt import load_tokenizer
from model.vision_utils import get_vision_model
from trainer.inputs import read_about
from trainer.question_files import open_question_files
from trainer.script import read_recipe

MARK = "here"
VALUES = [
    "null", "true", "0", "-1", "0.5", "100000000", "NaN", "-Infinity", "1e999", "1" + "0" * 400, '""',
    '"x\\u001b[2J"',
    '"\\ud800"', "[]", "{}", "[null]", '{"a": null}', "[" * 90 + "]" * 90, "[" * 100_000 + "]" * 100_000,
]  # fmt: skip


def spoil(text: str, values: list[str]) -> Iterator[str]:
    """A JSON text with each of its values, and all of it, replaced by each of others, or cut off."""

    def places(value, path: tuple) -> Iterator[tuple]:
        yield path
        is_nested = isinstance(value, dict | list)
        keys = list(value if isinstance(value, dict) else range(len(value)))[:30] if is_nested else []
        for key in keys:
            yield from places(value[key], (*path, key))

    for path in places(json.loads(text), ()):
        spoilt = {"": copy.deepcopy(json.loads(text))}
        inside = spoilt
        for key in ("", *path)[:-1]:
            inside = inside[key]
        inside[("", *path)[-1]] = MARK
        for value in values:
            yield json.dumps(spoilt[""]).replace(f'"{MARK}"', value)
    yield from (text[:end] for end in (0, 1, len(text) // 2, len(text) - 1))


def check_spoilt(file: Path, load: Callable[[], object], values: list[str] = VALUES) -> None:
    """Nothing but a ValueError or FileNotFoundError of one line comes out, and it names the file or its
    folder."""
    original, num_refused = file.read_text(), 0
    load()
    for text in spoil(original, values):
        file.write_bytes(text.encode(errors="surrogatepass"))
        try:
            load()
        except (ValueError, FileNotFoundError) as error:
            num_refused += 1
            assert "\n" not in str(error)
            assert file.name in str(error) or file.parent.name in str(error), (str(error), text[:200])
    file.write_text(original)
    assert num_refused > 10


@pytest.fixture
def folder(tmp_path, config, model, tokenizer_path) -> Path:
    """A Hugging Face folder, its weights in parts."""
    folder = shutil.copytree(tokenizer_path, tmp_path / "folder")
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"model_type": "minimind-v"}))
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "output.weight"}
    save_file(state, folder / "part.safetensors")
    places = {"weight_map": dict.fromkeys(list(state)[:3], "part.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(places))
    return folder


def test_spoilt_settings_of_clip(clip_path, tmp_path):
    clip = shutil.copytree(clip_path, tmp_path / "clip")
    values = json.loads((clip / "config.json").read_text())
    kept = ("hidden_size", "image_size", "patch_size", "layer_norm_eps", "hidden_act", "num_hidden_layers")
    kept += ("num_attention_heads", "intermediate_size", "model_type", "attention_dropout")
    vision = {name: value for name, value in values["vision_config"].items() if name in kept}
    vision["id2label"] = {"0": "LABEL_0"}
    (clip / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
    check_spoilt(clip / "config.json", lambda: get_vision_model(clip)[0].config.to_dict())
    check_spoilt(clip / "preprocessor_config.json", lambda: get_vision_model(clip))


def test_spoilt_settings_of_a_model(folder):
    check_spoilt(folder / "config.json", lambda: config_of(folder, read_state_dict(folder)))
    check_spoilt(folder / "model.safetensors.index.json", lambda: read_state_dict(folder))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"])
def test_spoilt_settings_of_a_tokenizer(folder, name, monkeypatch):
    if name == "tokenizer.json":  # thousands of tokens are as good as a few
        words = json.loads((folder / name).read_text())
        words["model"] |= {"merges": words["model"]["merges"][:2]}
        (folder / name).write_text(json.dumps(words))
    values = VALUES if name != "tokenizer_config.json" else VALUES[::3] + VALUES[-1:]
    check_spoilt(folder / name, lambda: load_tokenizer(folder), values)


def test_spoilt_words_beside_weights(tmp_path, config, model, tokenizer_path, clip_path):
    """v1's weights, which hold no description of their own."""
    about = {"knows": "colours", "questions": ["什么颜色？"], "image_dir": "images", "max_rounds": 1}
    save_weights(model, tmp_path / "w.pth", stage="vlm_sft", step=5, total_steps=5, about=about)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    values = ["null", "NaN", "1e999", '"x"', "[[1]]", VALUES[-1]]
    load = lambda: str(load_chat(tmp_path / "w.pth", tokenizer_path, clip_path).report)  # noqa: E731
    check_spoilt(tmp_path / "w.json", load, values)


def test_spoilt_words_about_the_data_and_questions(tmp_path):
    about = {"knows": "colours", "questions": ["什么颜色？"], "image_dir": "images"}
    (tmp_path / "about.json").write_text(json.dumps(about))
    check_spoilt(tmp_path / "about.json", lambda: read_about(tmp_path / "about.json"))
    (tmp_path / "images").mkdir()
    save_image(tmp_path / "images" / "0.png", 0)
    path = write_questions(tmp_path / "q.jsonl", make_question())
    check_spoilt(path, lambda: open_question_files([path]))


def test_spoilt_recipes(tmp_path):
    content = b"--data_path a.json # here\n--name \"of 'two' words\"\n"
    for number in range(len(content)):
        for byte in b"\0\"'#\n@\xff\xfe":
            (tmp_path / "a.args").write_bytes(content[:number] + bytes([byte]) + content[number + 1 :])
            try:
                assert all(isinstance(word, str) for word in read_recipe(str(tmp_path / "a.args")))
            except ValueError as error:
                assert "a.args" in str(error)
