"""Answers: cached equals uncached, batched equals one by one, sampling as in transformers, text without half
characters."""

import copy
import itertools

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model.chat import Chat
from model.checkpoint import LoadReport
from model.decode import Decoder
from model.generate import Sampling, TextStreamer, TokenSampler, generate
from model.prompt import render_conversation

TEXTS = [
    "<image>\n图片里有什么？",
    "图形是什么颜色？",
    "Describe this image. <image> and <image>",
    "<image>",
]


@pytest.fixture
def prompts(tokenizer):
    return [render_conversation([{"from": "human", "value": text}], tokenizer) for text in TEXTS]


@pytest.fixture
def features() -> list[torch.Tensor]:
    """Of each prompt its images."""
    return list(torch.randn(4, 50, 24, generator=torch.Generator().manual_seed(5)).split([1, 0, 2, 1]))


@pytest.fixture
def decoder(lively):
    return Decoder(copy.deepcopy(lively))


def collect(decoder, prompts, sampling, features) -> list[list[int]]:
    steps = list(generate(decoder, prompts, 2, sampling, features))
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=30),
        Sampling(max_new_tokens=30, repetition_penalty=1.3),
        Sampling(max_new_tokens=30, temperature=0.8, top_k=40, top_p=0.9, seed=3),
    ],
    ids=["greedy", "penalty", "sampled"],
)
def test_batched_equals_one_by_one(decoder, prompts, features, sampling):
    together = collect(decoder, prompts, sampling, features)
    alone = [
        collect(
            decoder, [prompt], Sampling(**vars(sampling) | {"seed": sampling.seed + row}), [features[row]]
        )[0]
        for row, prompt in enumerate(prompts)
    ]
    assert together == alone
    assert len(set(itertools.chain(*together))) > 20  # not one token over and over


def test_cached_equals_uncached(lively, decoder, prompts, features):
    answer = collect(decoder, prompts[:1], Sampling(max_new_tokens=25), features[:1])[0]
    ids = list(prompts[0].input_ids)
    for token in answer:
        logits, _ = lively(torch.tensor([ids]), features[0])
        assert int(logits[0, -1].argmax()) == token
        ids.append(token)


def test_max_new_tokens_counts_new_tokens_and_the_context_is_the_limit(decoder, prompts, features):
    assert [len(answer) for answer in collect(decoder, prompts, Sampling(max_new_tokens=7), features)] == [
        7
    ] * 4
    lengths = [len(prompt.input_ids) for prompt in prompts]
    decoder.config.max_seq_len = max(lengths) + 3
    answers = collect(decoder, prompts, Sampling(max_new_tokens=500), features)
    assert [length + len(answer) for length, answer in zip(lengths, answers, strict=True)] == [
        max(lengths) + 3
    ] * 4
    decoder.config.max_seq_len = max(lengths)
    with pytest.raises(ValueError, match="context holds"):
        collect(decoder, prompts, Sampling(), features)


def test_an_answer_ends_at_eos_and_its_neighbours_go_on(decoder, prompts, features):
    free = collect(decoder, prompts, Sampling(max_new_tokens=20), features)
    eos = free[0][4]
    steps = list(generate(decoder, prompts, eos, Sampling(max_new_tokens=20), features))
    cut = [[token for token in row if token is not None] for row in zip(*steps, strict=True)]
    assert cut == [answer[: answer.index(eos)] if eos in answer else answer for answer in free]


def test_two_conversations_at_once_never_mix(decoder, prompts, features):
    """A cache inside the module once mixed two users."""
    a, b = (
        generate(decoder, [prompts[n]], 2, Sampling(max_new_tokens=12), features[n : n + 1]) for n in (0, 3)
    )
    interleaved = list(zip(*((x[0], y[0]) for x, y in zip(a, b, strict=True)), strict=True))
    for n, answer in zip((0, 3), interleaved, strict=True):
        assert (
            list(answer)
            == collect(decoder, [prompts[n]], Sampling(max_new_tokens=12), features[n : n + 1])[0]
        )


def test_forgotten_images_are_reported(decoder, prompts, features):
    with pytest.raises(ValueError, match="no images were given"):
        collect(decoder, prompts[:1], Sampling(), None)
    with pytest.raises(ValueError, match=r"1 image placeholder\(s\) but 2"):
        collect(decoder, prompts[:1], Sampling(), [torch.cat([features[0], features[3]])])


def test_images_are_counted_prompt_by_prompt(decoder, tokenizer, prompts, features):
    """Three placeholders and three images in all, but the first prompt lacks an image, which the second has
    too many. Compared by their totals alone, they would swap images without a word."""
    swapped, right = [features[0], features[2]], [features[2], features[0]]
    expected = r"row 1 of the batch: the prompt holds 2 image placeholder\(s\) but 1 image"
    with pytest.raises(ValueError, match=expected):
        collect(decoder, [prompts[2], prompts[0]], Sampling(), swapped)
    chat = Chat(decoder, tokenizer, vision_model=None, image_processor=None, report=LoadReport("none", 0))
    conversations = [[{"from": "human", "value": TEXTS[number]}] for number in (2, 0)]
    with pytest.raises(ValueError, match=expected):
        chat.answer_batch(conversations, swapped)
    sampling = Sampling(max_new_tokens=9)
    together = chat.answer_batch(conversations, right, sampling)
    assert together == [
        chat.answer_batch([conversation], [images], sampling)[0]
        for conversation, images in zip(conversations, right, strict=True)
    ]


def test_choosing_equals_transformers_processors():
    """Among them the penalty: dividing a negative logit would RAISE it."""
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)) * 4
    ids = torch.randint(0, 200, (3, 30), generator=torch.Generator().manual_seed(1))
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.4),
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(50),
            TopPLogitsWarper(0.8),
        ]
    )
    sampler = TokenSampler(Sampling(0.7, 50, 0.8, 1.4), ids, [30, 30, 30], 200)
    ours = sampler.filter(sampler.penalise(logits) / 0.7)
    torch.testing.assert_close(ours, processors(ids, logits.clone()))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"top_k": -1},
        {"top_p": 0},
        {"repetition_penalty": 0},
        {"max_new_tokens": 0},
        {"temperature": float("nan")},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


@pytest.mark.parametrize("text", ["图片左上角有一个大的红色圆形。", "emoji 🙂🙂 and é", "plain", "龘靐齉"])
def test_streamed_text_never_shows_half_a_character(tokenizer, text):
    """Characters outside the vocabulary are three or four byte tokens."""
    streamer = TextStreamer(tokenizer)
    pieces = [streamer.push(token) for token in tokenizer(text, add_special_tokens=False).input_ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + streamer.finish() == text
    assert len([piece for piece in pieces if piece]) > 1 or text == "plain"
