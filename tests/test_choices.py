"""Answers that somebody else wrote: how likely they are, and choices in order of that."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.llava import to_llava, to_llava_ids
from model.decode import Decoder
from model.likelihood import log_probabilities
from model.prompt import render_conversation
from model.transformer import Transformer
from model.vision_utils import get_img_embedding, get_vision_model

TEXTS = ["<image>\n图片里有什么？", "它是什么颜色？", "Compare <image> with <image>."]
ANSWERS = [
    ["它是蓝色。", "红", "图片里有一个红色圆形。"],
    ["A large green star at the top left."],
    ["yes", "no"],
]


@pytest.fixture
def clip(clip_path):
    return get_vision_model(clip_path)[0]


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def asked(tokenizer, clip, pixels):
    """Prompts, the ids of their answers, and the features of their images."""
    prompts = [render_conversation([{"from": "human", "value": text}], tokenizer) for text in TEXTS]
    answers = [
        [[*tokenizer(text, add_special_tokens=False).input_ids, 2] for text in texts] for texts in ANSWERS
    ]
    return prompts, answers, list(get_img_embedding(pixels, clip).split([1, 0, 2]))


def test_the_log_probabilities_are_those_of_transformers_llava(lively, clip, pixels, asked):
    """Of the choices as LLaVA's own loss sees them: each with its prompt, as one row of labels."""
    prompts, answers, features = asked
    found = log_probabilities(Decoder(copy.deepcopy(lively)), prompts, answers, features)
    llava = to_llava(lively, clip)
    for prompt, given, shown, ours in zip(prompts, answers, pixels.split([1, 0, 2]), found, strict=True):
        assert len(given) == len(ours)
        for ids, values in zip(given, ours, strict=True):
            row = torch.tensor([prompt.input_ids + ids])
            row = to_llava_ids(row, torch.tensor(prompt.image_slots, dtype=torch.long))
            logits = llava(input_ids=row, pixel_values=shown if len(shown) else None).logits[0]
            logits = logits[len(prompt.input_ids) - 1 : -1]
            expected = -F.cross_entropy(logits, torch.tensor(ids), reduction="none")
            torch.testing.assert_close(values, expected, rtol=0, atol=1e-4)


def test_choices_of_a_batch_are_as_likely_as_alone(lively, asked):
    """Whatever else is in the batch: prompts and answers of other lengths, other numbers of answers."""
    prompts, answers, features = asked
    together = log_probabilities(Decoder(copy.deepcopy(lively), 3), prompts, answers, features)
    decoder = Decoder(copy.deepcopy(lively), 1)
    for number in range(3):
        for place, ids in enumerate(answers[number]):
            ((alone,),) = log_probabilities(decoder, [prompts[number]], [[ids]], [features[number]])
            torch.testing.assert_close(alone, together[number][place], rtol=0, atol=1e-4)
            assert len(alone) == len(ids) and alone.max() < 0


@pytest.mark.parametrize("use_moe", [False, True])
def test_the_log_probabilities_are_those_of_the_model_as_defined(config, asked, use_moe):
    """With experts too, of which the tokens of an answer choose their own."""
    torch.manual_seed(3)
    model = Transformer(replace(config, use_moe=use_moe)).eval().requires_grad_(False)
    prompts, answers, features = asked
    found = log_probabilities(Decoder(copy.deepcopy(model)), prompts, answers, features)
    for prompt, given, shown, ours in zip(prompts, answers, features, found, strict=True):
        for ids, values in zip(given, ours, strict=True):
            row = torch.tensor([prompt.input_ids + ids])
            logits = model(row, shown if len(shown) else None)[0][0, len(prompt.input_ids) - 1 : -1]
            expected = -F.cross_entropy(logits, torch.tensor(ids), reduction="none")
            torch.testing.assert_close(values, expected, rtol=0, atol=1e-4)


def test_an_answer_that_does_not_fit_the_context_is_refused(lively, asked):
    prompts, answers, features = asked
    answers[1][0] = [5] * 250
    with pytest.raises(ValueError, match="have 2.. tokens, but the model's context holds 256"):
        log_probabilities(Decoder(copy.deepcopy(lively)), prompts, answers, features)
