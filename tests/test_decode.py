"""The decoder is the same function as the model it was made from, and as transformers' LLaVA."""

import copy

import pytest
import torch

from benchmarks.llava import to_llama, to_llava, to_llava_ids
from model import packing
from model.decode import Decoder, Norm
from model.generate import Sampling, generate
from model.packing import LAYOUTS
from model.prompt import render_conversation
from model.transformer import RMSNorm
from model.vision_utils import get_img_embedding, get_vision_model

TEXTS = ["<image>\n图片里有什么？", "它是什么颜色？", "Compare <image> with <image>, and with <image>."]


@pytest.fixture
def clip(clip_path):
    return get_vision_model(clip_path)[0]


@pytest.fixture
def prompts(tokenizer):
    return [render_conversation([{"from": "human", "value": text}], tokenizer) for text in TEXTS]


@pytest.fixture
def pixels():
    return torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(7))


def answers_of(decoder, prompts, features, num_tokens=40) -> list[list[int]]:
    steps = generate(decoder, prompts, 2, Sampling(max_new_tokens=num_tokens), features)
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (1e-4, 0), (100, 3000)])
def test_the_norm_is_the_norm(dtype, tolerance, scale, offset):
    """Written as a layer norm: neither numbers below its eps nor a mean far from 0 show that."""
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(48, 1e-5).requires_grad_(False)
    norm.weight.copy_(torch.rand(48, generator=generator))
    x = (torch.randn(2, 3, 48, generator=generator) * scale + offset).to(dtype)
    expected = norm(x.float())
    torch.testing.assert_close(Norm(norm, dtype)(x).float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_prefill_and_steps_give_the_logits_of_the_whole(lively, config, batch_size):
    ids = torch.randint(3, config.vocab_size, (3, 40), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([30, 17, 5])
    full, _ = lively(ids)
    decoder = Decoder(copy.deepcopy(lively), batch_size)
    logits, cache = decoder.prefill(ids[:, :30], lengths, 10)
    rows = [0, 1, 2]
    for step in range(10):
        torch.testing.assert_close(logits, full[rows, lengths[rows] + step - 1], rtol=1e-4, atol=1e-4)
        if step == 5:  # the row in the middle leaves
            rows = [0, 2]
            cache.select(rows)
        logits = decoder.step(ids[rows, lengths[rows] + step], cache)


@pytest.mark.parametrize("emulated", [True, False])
def test_bfloat16_stays_close(model, config, monkeypatch, emulated):
    """On processors that compute in it, and on those that only store it."""
    monkeypatch.setattr(packing, "is_emulated", lambda dtype: emulated)
    ids = torch.randint(3, config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    full, _ = model(ids)
    decoder = Decoder(copy.deepcopy(model).to(torch.bfloat16))
    logits, cache = decoder.prefill(ids[:, :30], torch.tensor([30, 30]), 10)
    for step in range(10):
        torch.testing.assert_close(logits.float(), full[:, 29 + step], rtol=0.05, atol=0.02)
        logits = decoder.step(ids[:, 30 + step], cache)


def test_no_weight_lies_in_memory_twice_and_the_emptied_model_says_so(model):
    num_parameters = model.num_parameters()
    assert Decoder(model).num_parameters == num_parameters
    with pytest.raises(TypeError):
        model(torch.ones(1, 3, dtype=torch.long))


@pytest.mark.parametrize(("batch_size", "layout"), [(8, None), *((1, layout) for layout in LAYOUTS)])
def test_the_same_tokens_as_transformers_llava(lively, clip, prompts, pixels, batch_size, layout):
    """One image, none, and three in one prompt; ours all at once, theirs one by one. However the weights are
    stored: that is decided by a machine's speed, which must not decide what it answers."""
    llava, llama = to_llava(lively, clip), to_llama(lively)
    features = get_img_embedding(pixels, clip).split([1, 0, 3])
    ours = answers_of(Decoder(copy.deepcopy(lively), batch_size, layout), prompts, features)
    images = iter(pixels.split([1, 3]))
    for prompt, answer in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt.input_ids])
        settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": 2}
        if prompt.image_slots:
            ids = to_llava_ids(ids, torch.tensor(prompt.image_slots))
            out = llava.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=next(images), **settings
            )
        else:
            out = llama.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        theirs = out[0, ids.shape[1] :].tolist()
        assert answer == [token for token in theirs if token != 2]
    assert len({token for answer in ours for token in answer}) > 20  # not one token over and over


@pytest.mark.parametrize("num_shared", [0, 1, 30, 60])
def test_rows_behind_what_they_share_are_what_they_are_alone(lively, prompts, pixels, clip, num_shared):
    """However much of them is read once."""
    ids, slots = torch.tensor([prompts[0].input_ids]), torch.tensor(prompts[0].image_slots)
    features = get_img_embedding(pixels[:1], clip)
    h = lively.embed(ids, features, slots)
    others = h + 0.1 * torch.randn(3, *h.shape[1:], generator=torch.Generator().manual_seed(1))
    rows = torch.cat([h[:, :num_shared].expand(3, -1, -1), others[:, num_shared:]], dim=1)
    expected = rows
    for layer in lively.layers:
        expected = layer(expected, lively.rope(h.shape[1], h.device))
    expected = lively.output(lively.norm(expected))[:, -4:]
    decoder = Decoder(copy.deepcopy(lively))
    _, read = decoder.read(h, 1)
    prefix = [(keys[:, :, :num_shared], values[:, :, :num_shared]) for keys, values in read]
    result, read = decoder.read(rows[:, num_shared:], 4, prefix)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    assert len(read) == len(decoder.layers) and read[0][0].shape[::2] == (3, h.shape[1])
