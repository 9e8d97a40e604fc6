"""Rendering: the placeholder in every context, which tokens are targets, and text that looks like markup."""

import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from model.prompt import Renderer, check_tokenizer, load_tokenizer, put_marks
from model.vision_proj import find_image_slots, placeholder_ids

MINIMIND_TOKENIZER = Path(os.environ.get("MINIMIND_TOKENIZER", "model/minimind_tokenizer"))


@pytest.fixture(scope="module")
def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Like MiniMind's own: nothing keeps "<" apart, so " <" and "<<<<" are tokens, and pasted placeholders
    are lost."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([" < <<<<<<<< >>>>>>>>", "a <b> user assistant"] * 50, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(params=["demo", "merging", "minimind"])
def any_tokenizer(request):
    if request.param == "minimind":
        if not (MINIMIND_TOKENIZER / "tokenizer_config.json").is_file():
            pytest.skip(f"no tokenizer at {MINIMIND_TOKENIZER}: python -m model.download tokenizer")
        return load_tokenizer(MINIMIND_TOKENIZER)
    return request.getfixturevalue("tokenizer" if request.param == "demo" else "merging_tokenizer")


def human(text: str) -> list[dict]:
    return [{"from": "human", "value": text}]


@pytest.mark.parametrize(
    "text",
    [
        "<image>",
        "see <image>",
        "x\n<image>\ny",
        "看<image>图",
        "<image><image>",
        "<image> <image>",
        "context: Source Image: <image> Target Image: <image> Instruction: what?",
    ],
)
def test_the_placeholder_is_found_in_every_context(any_tokenizer, text):
    prompt = Renderer(any_tokenizer).render(human(text))
    assert len(prompt.image_slots) == text.count("<image>")
    for slots in prompt.image_slots:
        assert [prompt.input_ids[slot] for slot in slots] == placeholder_ids() == [30] * 25 + [32] * 25
    found = find_image_slots(torch.tensor([prompt.input_ids]))
    assert found.tolist() == prompt.image_slots


@pytest.mark.parametrize(
    "text", ["<s>user\nhi</s>", "a </s> b", "<<<<" + "<" * 25 + ">" * 25, "<unk>", "<b>html</b>"]
)
def test_text_that_looks_like_markup_stays_text(any_tokenizer, text):
    prompt = Renderer(any_tokenizer).render(human(text))
    assert prompt.image_slots == []
    # Our own turns, nothing of the user's.
    assert prompt.input_ids.count(1) == 2 and prompt.input_ids.count(2) == 1
    start, end = prompt.input_ids.index(1) + 1, prompt.input_ids.index(2)
    assert any_tokenizer.decode(prompt.input_ids[start:end]) == f"user\n{text}"


def test_template_and_answer_mask(any_tokenizer):
    turns = [
        {"from": "system", "value": "hi "},
        *human("<image>\nA?"),
        {"from": "gpt", "value": "B <image>"},
        *human("C?"),
        {"from": "gpt", "value": "D"},
    ]
    prompt = Renderer(any_tokenizer).render(turns)
    text = "".join(
        "#" if position in prompt.image_slots[0] else any_tokenizer.decode([token])
        for position, token in enumerate(prompt.input_ids)
    )
    assert text.replace("#" * 50, "#") == (
        "hi <s>user\n#\nA?</s>\n<s>assistant\nB <image></s>\n<s>user\nC?</s>\n<s>assistant\nD</s>\n"
    )
    targets = [prompt.input_ids[position] for position in prompt.target_positions()]
    assert any_tokenizer.decode(targets) == "B <image></s>D</s>"


def test_a_question_ends_where_its_answer_begins(any_tokenizer):
    """What generation continues from is, token for token, what training saw in front of the answer."""
    question = Renderer(any_tokenizer).render(human("<image>\nA?"))
    trained = Renderer(any_tokenizer).render([*human("<image>\nA?"), {"from": "gpt", "value": "B"}])
    assert trained.input_ids[: len(question.input_ids)] == question.input_ids
    assert trained.answer_mask.index(True) == len(question.input_ids)


def test_minimind_ids_of_the_answer_header():
    if not (MINIMIND_TOKENIZER / "tokenizer_config.json").is_file():
        pytest.skip(f"no tokenizer at {MINIMIND_TOKENIZER}: python -m model.download tokenizer")
    prompt = Renderer(load_tokenizer(MINIMIND_TOKENIZER)).render(human("hi"))
    assert prompt.input_ids[-5:] == [1, 1078, 538, 501, 201]


def test_a_sample_is_cut_after_a_target_never_through_an_image(tokenizer):
    turns = [*human("<image>\n描述这张图片。"), {"from": "gpt", "value": "图片里有什么？" * 9}]
    prompt = Renderer(tokenizer).render(turns)

    def end_of(max_seq_len: int) -> int:
        return Renderer(tokenizer, max_seq_len=max_seq_len).end_of(prompt)

    first = prompt.answer_mask.index(True)
    assert end_of(999) == len(prompt.input_ids) - 1  # the newline after </s> is no target
    assert end_of(first + 3) == first + 3
    with pytest.raises(ValueError, match="answer begins at token"):
        end_of(first)
    with pytest.raises(ValueError, match="image 1 would be cut at max_seq_len 40"):
        end_of(40)


def test_marks_are_put_where_a_person_leaves_them_out():
    assert put_marks("what?", 1) == "<image>\nwhat?"
    assert put_marks("see <image>!", 1) == "see <image>!"
    assert put_marks("<image> or", 2) == "<image>\n<image> or"
    with pytest.raises(ValueError, match=r"marks 2 image\(s\) but 1"):
        put_marks("<image><image>", 1)


def test_another_tokenizer_is_refused(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<": 1, ">": 2}, unk_token="<unk>"))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    with pytest.raises(ValueError, match="exactly 50 placeholder ids"):
        check_tokenizer(fast, "somewhere")
    with pytest.raises(FileNotFoundError, match="--tokenizer_path"):
        load_tokenizer(tmp_path / "nothing")
