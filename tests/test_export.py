"""Exported folders, opened with transformers' own classes: the same logits, the same answers; and taken back:
the same tensors."""

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SIZES, check_refused, check_same, save_clip
from PIL import Image
from safetensors.torch import load_file, save_file
from test_encoders import B16, save_siglip
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
)

from model.chat import Chat, load_chat
from model.checkpoint import config_of, read_state_dict, save_weights
from model.export.__main__ import main
from model.generate import Sampling
from model.LMConfig import LMConfig
from model.prompt import render_conversation
from model.stock_weights import half_split, interleaved
from model.transformer import Transformer
from trainer.script import clean_exit

QUESTIONS = (  # text, number of images
    ("<image>\n图片里有什么？", 1),
    ("Describe <image> this  picture.", 1),
    ("图一<image>\n图二 <image>\n说说这两张图片的不同。", 2),
    ("<image> <image>\nWhich is larger?", 2),
)


def make_weights(path: Path, tokenizer, **more) -> Path:
    """Loud random weights, with a description."""
    torch.manual_seed(3)
    model = Transformer(LMConfig(**SIZES, vocab_size=len(tokenizer), max_seq_len=256, **more))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("layers.") and parameter.ndim > 1:
                parameter.mul_(15)
            elif parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    settings = {"data": "0123456789abcdef", "batch_size": 32, "learning_rate": 0.003}
    about = {"knows": "Noise.", "max_rounds": 1, "image_dir": "/home/me"}
    save_weights(model, path, stage="vlm_sft", step=7, total_steps=7, settings=settings, about=about)
    return path


@pytest.fixture
def paths(tokenizer_path, clip_path) -> list[str]:
    return [f"--tokenizer_path={tokenizer_path}", f"--clip_path={clip_path}"]


@pytest.fixture
def weights(tmp_path, tokenizer) -> Path:
    return make_weights(tmp_path / "32_vlm_sft.pth", tokenizer, vision_dim=24)


@pytest.fixture
def llava(tmp_path, weights, paths) -> Path:
    return run_export(weights, "llava", tmp_path / "exported", *paths)


def run_export(weights: Path, kind: str, folder: Path, *flags: str) -> Path:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        main([str(weights), "--to", kind, str(folder), *flags])
    assert sorted(line.split("  ")[0] for line in said.getvalue().splitlines()) == sorted(
        str(path) for path in folder.iterdir()
    )
    return folder


def make_images(number: int) -> list[Image.Image]:
    pixels = np.random.default_rng(number).integers(0, 256, (number, 40, 48, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def open_llava(folder: Path, dtype=None):
    model, problems = LlavaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, dtype=dtype or "auto", trust_remote_code=False
    )
    assert not any(problems.values()), problems
    return model.eval(), AutoProcessor.from_pretrained(folder, backend="pil")


def prepare(processor, questions) -> dict:
    """What the classes of transformers are given for questions, padded on the left."""
    texts = [
        processor.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        for text, _ in questions
    ]
    images = [image for _, number in questions for image in make_images(number)]
    return processor(text=texts, images=images, padding=True, return_tensors="pt")


def our_logits(chat: Chat, text: str, number: int) -> torch.Tensor:
    prompt = chat.render([{"from": "human", "value": text}])
    ids, lengths = torch.tensor([prompt.input_ids]), torch.tensor([len(prompt.input_ids)])
    features = chat.encode(make_images(number))
    return chat.decoder.prefill(ids, lengths, 1, features, torch.tensor(prompt.image_slots))[0][0].clone()


def our_answers(chat: Chat, questions, length: int = 20) -> list[str]:
    turns = [[{"from": "human", "value": text}] for text, _ in questions]
    features = [chat.encode(make_images(number)) for _, number in questions]
    return chat.answer_batch(turns, features, Sampling(max_new_tokens=length))


def test_the_exported_model_is_the_same_in_transformers(llava, weights, tokenizer_path, clip_path):
    """One and two images, alone and in a batch that is padded on the left: what wrappers of benchmarks do."""
    chat = load_chat(weights, tokenizer_path, clip_path)
    model, processor = open_llava(llava)
    with torch.no_grad():
        together = model(**prepare(processor, QUESTIONS)).logits[:, -1]
        for question, beside in zip(QUESTIONS, together, strict=True):
            expected = our_logits(chat, *question)
            alone = model(**prepare(processor, [question])).logits[0, -1]
            assert expected.std() > 0.1
            for logits in (alone, beside):
                assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    inputs = prepare(processor, QUESTIONS)
    assert inputs["attention_mask"][0, 0] == 0  # padded indeed
    ids = model.generate(**inputs, max_new_tokens=20)[:, inputs["input_ids"].shape[1] :]
    answers = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    assert answers == our_answers(chat, QUESTIONS) and len(set(answers)) > 1


def test_the_folder_comes_back_equal(llava, weights, tokenizer_path, clip_path):
    """Tensors, sizes, description and CLIP; nothing else is needed to chat with it."""
    state, back = read_state_dict(weights), read_state_dict(llava)
    check_same(back, state)
    assert config_of(llava, back) == config_of(weights, state)
    here, there = load_chat(weights, tokenizer_path, clip_path), load_chat(llava)
    assert torch.equal(here.encode(make_images(2)), there.encode(make_images(2)))
    assert our_answers(there, QUESTIONS) == our_answers(here, QUESTIONS)
    assert there.max_rounds == 1 and "Noise." in str(there.report)
    assert "/home/me" not in (llava / "config.json").read_text()
    ids = [chat.render([{"from": "human", "value": "<s> <image> <unk><image>?"}]) for chat in (here, there)]
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llava", {"vision_dim": 24, "vision_proj_bias": True}),
        ("llama", {"vision_dim": 0}),
        ("llama", {"vision_dim": 24, "rope_theta": 500.0, "norm_eps": 1e-3}),
        ("qwen2_moe", {"vision_dim": 0, "use_moe": True, "n_routed_experts": 3, "multiple_of": 16}),
        ("qwen2_moe", {"vision_dim": 24, "use_moe": True, "n_shared_experts": 0, "norm_topk_prob": False}),
    ],
)
def test_every_format_comes_back_equal_also_from_transformers(tmp_path, tokenizer, paths, kind, more):
    """From the folder, and from the one that transformers writes after it has loaded ours."""
    weights = make_weights(tmp_path / "32_vlm_sft.pth", tokenizer, **more)
    folder = run_export(weights, kind, tmp_path / "exported", *paths)
    expected = read_state_dict(weights)
    if kind != "llava":
        expected = {name: tensor for name, tensor in expected.items() if "vision" not in name}
    opener = LlavaForConditionalGeneration if kind == "llava" else AutoModelForCausalLM
    model, problems = opener.from_pretrained(folder, output_loading_info=True)
    assert not any(problems.values()), problems
    model.save_pretrained(tmp_path / "again")
    for place in (folder, tmp_path / "again"):
        back = read_state_dict(place)
        check_same(back, expected)
        found, sizes = config_of(place, back), config_of(weights, read_state_dict(weights))
        if kind != "llava":
            sizes.vision_dim = 0
        assert found == sizes


@pytest.mark.parametrize("more", [{}, {"use_moe": True}, {"use_moe": True, "n_shared_experts": 0}])
def test_the_language_model_alone_is_the_same_in_transformers(tmp_path, tokenizer, paths, more):
    weights = make_weights(tmp_path / "32_llm.pth", tokenizer, vision_dim=0, **more)
    folder = run_export(weights, "qwen2_moe" if more else "llama", tmp_path / "exported", *paths)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    state = read_state_dict(weights)
    ours = Transformer(config_of(weights, state)).eval()
    ours.load_state_dict(state)
    words = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "system", "content": "你好。"}, {"role": "user", "content": "What <s> colour?"}]
    ids = words.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected, logits = ours(ids)[0], theirs(ids).logits
    assert expected.std() > 0.1 and (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_template_makes_the_ids_of_our_renderer(llava, tokenizer):
    """Strings with marks of their own, and parts, of which unmarked images go in front; what TRL is told to
    train on is what we train on."""
    words = AutoTokenizer.from_pretrained(llava)
    image, text = {"type": "image"}, {"type": "text", "text": "有什么？ "}
    marked = {"type": "text", "text": "A <image> and <image>."}
    conversations = [
        ([{"role": "user", "content": " What is  this?"}], " What is  this?"),
        ([{"role": "user", "content": "图一<image>\n图二<image>"}], "图一<image>\n图二<image>"),
        ([{"role": "user", "content": [text, image]}], "<image>\n有什么？ "),
        ([{"role": "user", "content": [image, image, text]}], "<image>\n<image>\n有什么？ "),
        ([{"role": "user", "content": [image, image, marked]}], "A <image> and <image>."),
        ([{"role": "user", "content": [image, marked]}], "<image>\nA  and ."),
    ]
    rounds = [("gpt", "It is red.\n"), ("human", "Sure?"), ("gpt", "是的。")]
    for chat, first in conversations:
        chat = [{"role": "system", "content": "S."}, *chat]
        turns = [{"from": "system", "value": "S."}, {"from": "human", "value": first}]
        for role, text in rounds:
            check_template(words, tokenizer, chat, turns, asks=role == "gpt")
            chat.append({"role": {"gpt": "assistant", "human": "user"}[role], "content": text})
            turns.append({"from": role, "value": text})
        check_template(words, tokenizer, chat, turns, asks=False)


def check_template(words, tokenizer, chat: list[dict], turns: list[dict], asks: bool) -> None:
    prompt = render_conversation(turns, tokenizer)
    found = words.apply_chat_template(
        chat, add_generation_prompt=asks, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = [], []
    for number, is_answer in zip(found["input_ids"], found["assistant_masks"], strict=True):
        ids += [0] * 50 if number == 0 else [number]
        mask += [bool(is_answer)] * (50 if number == 0 else 1)
    expected = [
        0 if number in sum(prompt.image_slots, []) else id for number, id in enumerate(prompt.input_ids)
    ]
    assert ids == expected and mask == prompt.answer_mask


def test_a_projection_that_was_trained_on_in_transformers_comes_back(llava, weights, tmp_path):
    """LLaVA's second layer is the identity only until somebody trains it."""
    state = load_file(llava / "model.safetensors")
    torch.manual_seed(5)
    second = "multi_modal_projector.linear_2.weight"
    state[second] = state[second] + 0.1 * torch.randn_like(state[second])
    save_file(state, llava / "model.safetensors", metadata={"format": "pt"})
    chat, (model, processor) = load_chat(llava), open_llava(llava)
    with torch.no_grad():
        logits = model(**prepare(processor, QUESTIONS[:1])).logits[0, -1]
    expected = our_logits(chat, *QUESTIONS[0])
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    assert not torch.equal(
        read_state_dict(llava)["vision_proj.weight"], read_state_dict(weights)["vision_proj.weight"]
    )


def test_half_precision(tmp_path, weights, paths):
    """Half the size; what comes back is the rounded model, its CLIP too, and the folder belongs to itself."""
    folder = run_export(weights, "llava", tmp_path / "half", "--dtype=bfloat16", *paths)
    back = read_state_dict(folder)
    check_same(back, {name: tensor.bfloat16() for name, tensor in read_state_dict(weights).items()})
    model, _ = open_llava(folder)
    assert model.dtype == torch.bfloat16
    model, processor = open_llava(folder, torch.float32)
    with torch.no_grad():
        logits = model(**prepare(processor, QUESTIONS[:1])).logits[0, -1]
    expected = our_logits(load_chat(folder), *QUESTIONS[0])
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_rows_of_queries_and_keys_go_there_and_back():
    """Channel pairs (0,1), (2,3) of each head become (0,2), (1,3)."""
    rows = torch.arange(8.0).unsqueeze(1)
    assert half_split(rows, 4).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    rows = torch.randn(48, 5)
    assert torch.equal(interleaved(half_split(rows, 12), 12), rows)


def test_the_card_says_what_it_is_and_its_lines_run(tmp_path, weights, paths, monkeypatch, capsys):
    report = {"unseen": {"colour": {"real": 0.98, "blank": 0.14, "shuffled": 0.12}, "free": {"real": 0.5}}}
    (tmp_path / "scores.json").write_text(json.dumps(report))
    folder = run_export(weights, "llava", tmp_path / "mine", f"--report={tmp_path}/scores.json", *paths)
    card = (folder / "README.md").read_text()
    for line in (
        "| unseen | colour | 0.98 | 0.14 | 0.12 | 0.84 |",
        "| unseen | free | 0.50 |  |  |  |",
        "| stage | vlm_sft |",
        "| fingerprint of the data | 0123456789abcdef |",
        "batch_size 32, learning_rate 0.003",
        "CC BY-NC 4.0",
        f"hf upload YOUR_NAME/mine {folder} .",
    ):
        assert line in card, line
    make_images(1)[0].save(tmp_path / "a.jpg")
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {})
    assert capsys.readouterr().out.strip()


# ---- what is refused ---------------------------------------------------------------------------------------


def refuse(capsys, *words: object) -> subprocess.CompletedProcess:
    status = 0
    try:
        clean_exit(lambda: main([str(word) for word in words]))
    except SystemExit as end:
        status = end.code
    return subprocess.CompletedProcess(words, status, *capsys.readouterr())


def test_what_has_no_place_in_a_format_is_refused(tmp_path, tokenizer, weights, paths, capsys):
    out = tmp_path / "new"
    experts = make_weights(tmp_path / "32_moe_vlm_sft.pth", tokenizer, vision_dim=24, use_moe=True)
    blind = make_weights(tmp_path / "32_llm.pth", tokenizer, vision_dim=0)
    cases = [
        ((tmp_path / "no.pth", "--to", "llava"), "there is no file or folder"),
        ((experts, "--to", "llava"), "has experts, for which llava has no place: --to qwen2_moe"),
        ((experts, "--to", "gguf"), "has experts, for which gguf has no place"),
        ((weights, "--to", "qwen2_moe"), "has no experts: --to llama exports"),
        ((blind, "--to", "llava"), "is a language model without a vision projection"),
        ((weights, "--to", "llava", "--report=no.json"), "--report: there is no file no.json"),
        (
            (weights, "--to", "llava", f"--report={weights.with_suffix('.json')}"),
            "is not a report of questions",
        ),
        ((weights, "--to", "onnx"), "invalid choice: 'onnx'"),
    ]
    for words, message in cases:
        check_refused(refuse(capsys, words[0], out, *words[1:], *paths), message)
        assert not out.exists()


def test_a_folder_that_is_not_empty_stays_as_it_is(tmp_path, weights, paths, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    check_refused(refuse(capsys, weights, tmp_path / "mine", "--to", "llava", *paths), "mine is not empty")
    check_refused(
        refuse(capsys, weights, tmp_path / "mine/notes.txt", "--to", "llava", *paths), "notes.txt is a file"
    )
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_the_wrong_clip_is_refused(tmp_path, tokenizer_path, weights, clip_path, capsys):
    other = save_clip(tmp_path / "other", hidden_size=32)
    words = (weights, tmp_path / "new", "--to", "llava", f"--tokenizer_path={tokenizer_path}")
    check_refused(refuse(capsys, *words, f"--clip_path={other}"), "name the right one with --clip_path")


def test_a_siglip_is_refused(tmp_path, tokenizer, tokenizer_path, capsys):
    """LLaVA would take its features before the last norm."""
    siglip = save_siglip(tmp_path / "siglip", **B16)
    weights = make_weights(tmp_path / "a.pth", tokenizer, vision_dim=768, num_image_tokens=196)
    words = (weights, tmp_path / "new", "--to", "llava", f"--tokenizer_path={tokenizer_path}")
    check_refused(refuse(capsys, *words, f"--clip_path={siglip}"), "is a SigLIP", "--to llama exports")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_layer": -2}, "vision_feature_layer -2, not -1"),
        ({"projector_hidden_act": "gelu"}, "projector_hidden_act 'gelu', not linear"),
        ({"text_config": {"model_type": ["llama"]}}, "of type ['llama']: llama, qwen3, qwen2_moe are read"),
        ({"text_config": {"model_type": "mistral"}}, "of type 'mistral': llama, qwen3, qwen2_moe are read"),
        ({"vision_config": None}, "its vision_config has no image_size"),
    ],
)
def test_other_models_of_llava_are_not_taken_for_ours(llava, change, message):
    """Their tensors would load, and compute something else."""
    config = json.loads((llava / "config.json").read_text())
    (llava / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=re.escape(message)):
        load_chat(llava)


def test_the_command_runs_as_a_process(tmp_path, weights, paths):
    words = [sys.executable, "-m", "model.export", weights, "--to", "llava", tmp_path / "x", *paths]
    result = subprocess.run([*map(str, words)], capture_output=True, text=True)
    assert result.returncode == 0 and "model.safetensors" in result.stdout, result.stderr
