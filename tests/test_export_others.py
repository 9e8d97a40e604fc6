"""What others do with an exported folder: llama.cpp, PEFT, TRL, transformers serve, wrappers of benchmarks,
older transformers. Their packages are not among the requirements; where one is missing, its test says so:

    pip install gguf xllamacpp peft trl openai 'transformers[serving]'
    MINIMIND_TRANSFORMERS4=/a/python/with/transformers-4.57 python -m pytest tests/test_export_others.py
"""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import wait_until
from test_export import (
    QUESTIONS,
    make_images,
    make_weights,
    open_llava,
    our_answers,
    our_logits,
    prepare,
    run_export,
)

from model.chat import load_chat
from model.checkpoint import config_of, load_weights, read_state_dict, save_weights
from model.decode import Decoder
from model.generate import Sampling, generate
from model.prompt import render_conversation
from model.transformer import Transformer


@pytest.fixture
def llava(tmp_path, tokenizer, tokenizer_path, clip_path) -> Path:
    weights = make_weights(tmp_path / "32_vlm_sft.pth", tokenizer, vision_dim=24)
    paths = [f"--tokenizer_path={tokenizer_path}", f"--clip_path={clip_path}"]
    return run_export(weights, "llava", tmp_path / "exported", *paths)


@pytest.mark.parametrize("more", [{}, {"qk_norm": True, "head_dim": 12}, {"tied": False}])
def test_llama_cpp_gives_our_tokens(tmp_path, tokenizer, tokenizer_path, more):
    pytest.importorskip("gguf", reason="needs pip install gguf")
    llama_cpp = pytest.importorskip("xllamacpp", reason="needs pip install xllamacpp")
    weights = make_weights(tmp_path / "32_llm.pth", tokenizer, vision_dim=0, **more)
    model = Transformer(config_of(weights, read_state_dict(weights)))
    load_weights(model, weights)
    # llama.cpp does not tell tokens that are half a character: this model never chooses one.
    halves = [token for token in range(len(tokenizer)) if "\ufffd" in tokenizer.decode([token])]
    model.output.weight.data[[*halves, tokenizer.eos_token_id]] = 0
    save_weights(model, weights)
    folder = run_export(weights, "gguf", tmp_path / "gguf", f"--tokenizer_path={tokenizer_path}")
    decoder = Decoder(model)
    params = llama_cpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(folder / "model-f32.gguf"), 256, 1
    params.cpuparams.n_threads, params.warmup, params.sampling.temp = 1, False, 0
    # By itself it attends in float16, which decides near ties.
    params.cache_type_k = params.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = llama_cpp.Server(params)
    for text in ("它是什么颜色？ It's 12.5 %.", "A  large\ncircle, is it?"):
        prompt = render_conversation([{"from": "human", "value": text}], tokenizer)
        sampling = Sampling(max_new_tokens=12)
        ours = [token for (token,) in generate(decoder, [prompt], tokenizer.eos_token_id, sampling)]
        bos, eos = tokenizer.bos_token, tokenizer.eos_token
        asked = {
            "prompt": f"{bos}user\n{text}{eos}\n{bos}assistant\n",
            "max_tokens": 12,
            "temperature": 0,
            "logprobs": 1,
        }
        answer = server.handle_completions(asked)
        said = (json.loads(answer) if isinstance(answer, str) else answer)["choices"][0]
        theirs = [token["id"] for token in said["logprobs"]["content"]]
        assert theirs == ours and len(ours) == 12


def test_a_step_of_lora_comes_back(llava, tmp_path):
    """PEFT trains the exported model; merged and saved, it is a model of ours again."""
    peft = pytest.importorskip("peft", reason="needs pip install peft")
    model, processor = open_llava(llava)
    inputs = prepare(processor, QUESTIONS[:2])
    before = our_logits(load_chat(llava), *QUESTIONS[0])
    lora = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "linear_1"]))
    optimizer = torch.optim.SGD((p for p in lora.parameters() if p.requires_grad), lr=1.0)
    losses = []
    for _ in range(3):
        loss = lora(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    merged = lora.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    processor.save_pretrained(tmp_path / "merged")
    after = our_logits(load_chat(tmp_path / "merged"), *QUESTIONS[0])
    with torch.no_grad():
        theirs = merged(**prepare(processor, QUESTIONS[:1])).logits[0, -1]
    assert (after - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert (after - before).abs().max() > 1e-3 * before.abs().max()


def test_trl_collates_and_trains_it(llava, tmp_path):
    trl = pytest.importorskip("trl", reason="needs pip install trl datasets")
    datasets = pytest.importorskip("datasets", reason="needs pip install datasets")
    model, processor = open_llava(llava)
    rows = [
        {
            "images": make_images(1),
            "prompt": [{"role": "user", "content": f"What is this? {number}"}],
            "completion": [{"role": "assistant", "content": "它是蓝色。"}],
        }
        for number in range(4)
    ]
    config = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"),
        max_length=None,
        max_steps=2,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = trl.SFTTrainer(
        model=model, args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=processor
    )
    batch = trainer.data_collator([rows[0]])
    targets = batch["labels"][0][batch["labels"][0] != -100].tolist()
    assert (batch["input_ids"] == 0).sum() == 50 and "它是蓝色" in processor.decode(targets)
    assert len(targets) < 20  # the answer alone, not the image and not the question
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(loss > 0 for loss in losses)


def test_wrappers_of_benchmarks_call_it_so(llava):
    """As lmms-eval's llava_hf: marks in front of a question that is one string, padded on the left, 8 at a
    time."""
    model, processor = open_llava(llava)
    processor.tokenizer.padding_side = "left"
    questions = [(f"{' '.join(['<image>'] * (1 + n % 2))}\nQuestion {'x' * n}?", 1 + n % 2) for n in range(8)]
    texts, images = [], []
    for text, number in questions:
        chat = [{"role": "user", "content": text}]
        texts.append(
            processor.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        )
        images += make_images(number)
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True).to("cpu", model.dtype)
    eos = processor.tokenizer.eos_token_id
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=12, pad_token_id=eos, eos_token_id=eos)
    answers = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [answer.strip() for answer in answers] == our_answers(load_chat(llava), questions, 12)


def test_transformers_serve_answers_as_our_chat(llava):
    """Through the client of OpenAI, with one and two images and with none."""
    openai = pytest.importorskip("openai", reason="needs pip install openai")
    pytest.importorskip("accelerate", reason="needs pip install 'transformers[serving]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(llava)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: server.poll() is not None or answers_at(port), pause=0.5)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        for text, number in ((f"问题{n}？", n) for n in range(3)):
            parts = [
                {"type": "image_url", "image_url": {"url": address(image)}} for image in make_images(number)
            ]
            chat = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
            answer = client.chat.completions.create(
                model=str(llava), messages=chat, max_tokens=12, temperature=0
            )
            found = answer.choices[0].message.content.strip()
            assert [found] == our_answers(load_chat(llava), [("<image>\n" * number + text, number)], 12)
    finally:
        server.kill()
        server.wait()


def answers_at(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError:
        return False


def address(image) -> str:
    file = io.BytesIO()
    image.save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


OLDER = """
import json, sys, torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
folder, questions, images = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]
model, problems = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
assert not any(problems.values()), problems
processor = AutoProcessor.from_pretrained(folder, use_fast=False)
chats = [[{"role": "user", "content": text}] for text in questions]
texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
images = [Image.open(path) for path in images]
inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits[:, -1].tolist()
ids = model.generate(**inputs, max_new_tokens=20)[:, inputs["input_ids"].shape[1] :]
print(json.dumps({"logits": logits, "answers": processor.batch_decode(ids, skip_special_tokens=True)}))
"""


def test_older_transformers_open_it(llava, tmp_path):
    python = os.environ.get("MINIMIND_TRANSFORMERS4")
    if not python:
        pytest.skip("needs MINIMIND_TRANSFORMERS4=, a python with transformers 4.57")
    files = []
    for image in (image for _, number in QUESTIONS for image in make_images(number)):
        files.append(str(tmp_path / f"{len(files)}.png"))
        image.save(files[-1])
    words = [python, "-c", OLDER, str(llava), json.dumps([text for text, _ in QUESTIONS]), *files]
    result = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found, chat = json.loads(result.stdout.splitlines()[-1]), load_chat(llava)
    assert [answer.strip() for answer in found["answers"]] == our_answers(chat, QUESTIONS)
    for question, logits in zip(QUESTIONS, found["logits"], strict=True):
        expected = our_logits(chat, *question)
        assert (torch.tensor(logits) - expected).abs().max() < 1e-4 * expected.abs().max()
