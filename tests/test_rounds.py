"""Conversations of several rounds: learned answer by answer, and remembered by a chat as far as they fit."""

import json
import os
import random
import re
import subprocess
import sys

import pytest
import torch
from conftest import LONG, ROOT, load_script, make_rows, run_inside

from model.chat import Round, load_chat, recent_turns
from model.checkpoint import save_weights
from model.data.dataset import VLMDataset
from model.generate import Sampling
from model.images import open_image
from model.printable import printable
from model.vision_utils import ImageProcessor


def human(text: str) -> dict:
    return {"from": "human", "value": text}


def random_chat(seed: int) -> list[Round]:
    """Rounds with 0 to 2 images, named by numbers; some without an answer, some with marks typed in."""
    dice, number, rounds = random.Random(seed), 0, []
    for position in range(dice.randint(1, 9)):
        images = [f"{number + more}.png" for more in range(dice.choice([0, 0, 1, 2]))]
        number += len(images)
        text = f"question {position} " + dice.choice(["", "word " * dice.randint(1, 30), "a <image> b"])
        rounds.append(Round(text, images, dice.choice(["", "yes", "well " * dice.randint(1, 30)])))
    rounds[-1].answer = ""
    return rounds


@pytest.mark.parametrize("seed", range(60))
def test_the_newest_rounds_that_fit_with_every_image_they_speak_of(renderer, seed):
    rounds, limit = random_chat(seed), random.Random(-seed).randint(60, 500)

    def length(turns) -> int:
        return len(renderer.render(turns).input_ids)

    turns, images = recent_turns(rounds, lambda turns: length(turns) <= limit)
    asked = [int(re.search(r"question (\d+)", turn["value"]).group(1)) for turn in turns[::2]]
    # The newest rounds that have an answer, and the question; whole and in order.
    answered = [n for n, one in enumerate(rounds) if one.answer or n == len(rounds) - 1]
    assert asked == answered[-len(asked) :]
    assert [turn["value"] for turn in turns[1::2]] == [rounds[n].answer for n in asked[:-1]]
    # Within the limit, and one more would not be.
    everything, _ = recent_turns(rounds, lambda turns: True)
    assert len(everything) == 2 * len(answered) - 1
    if len(asked) > 1:
        assert length(turns) <= limit
    if len(asked) < len(answered):
        longer, _ = recent_turns(rounds, lambda turns: True, max_rounds=len(asked) + 1)
        assert len(longer) == len(turns) + 2 and length(longer) > limit
    # An image for every mark, none twice; each question stands behind the images shown last before it.
    assert len(renderer.render(turns).image_slots) == len(images) == len(set(images))
    marks = 0
    for question, n in zip(turns[::2], asked, strict=True):
        marks += question["value"].count("<image>")
        shown = next((one.images for one in reversed(rounds[: n + 1]) if one.images), [])
        assert images[max(0, marks - len(shown)) : marks] == shown


def test_the_marks_of_images_move_when_their_round_goes():
    rounds = [
        Round("what?", ["a"], "a cat"),
        Round("colour?", [], "black"),
        Round("and <image> this?", ["b"]),
    ]
    whole = [
        human("<image>\nwhat?"),
        {"from": "gpt", "value": "a cat"},
        human("colour?"),
        {"from": "gpt", "value": "black"},
        human("and <image> this?"),
    ]
    assert recent_turns(rounds, lambda turns: True) == (whole, ["a", "b"])
    assert recent_turns(rounds, lambda turns: len(turns) < 5) == (
        [human("<image>\ncolour?"), *whole[3:]],
        ["a", "b"],
    )
    assert recent_turns(rounds, lambda turns: False) == (whole[4:], ["b"])


@pytest.fixture
def speaker(workplace, lively, tokenizer_path, clip_path):
    """A weight file that speaks at length."""
    path = workplace / "out" / "32_vlm_sft.pth"
    save_weights(lively, path, tokenizer_path=str(tokenizer_path), clip_path=str(clip_path))
    return path


def test_the_terminal_chat_remembers(workplace, speaker):
    questions = ["什么颜色？", "and the shape?", "where?"]
    result = subprocess.run(
        [
            sys.executable,
            "3-eval_chat.py",
            f"--load_from={speaker}",
            "--max_new_tokens=9",
            f"--chat={workplace}/images/0.png",
            "--device=cpu",
        ],
        cwd=ROOT,
        timeout=LONG,
        input="\n".join([*questions, ""]),
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    chat, turns, expected = load_chat(speaker), [], []
    for question in questions:
        turns.append(human(question if turns else f"<image>\n{question}"))
        answer = chat.stream(turns, [open_image(workplace / "images" / "0.png")], Sampling(max_new_tokens=9))
        expected.append("".join(answer))
        turns.append({"from": "gpt", "value": expected[-1]})
    assert result.stdout == "".join(f"{printable(answer)}\n" for answer in expected)  # and nothing else


def test_a_chat_leaves_room_for_the_answer_and_refuses_a_question_too_long(workplace, speaker):
    chat = load_chat(speaker)  # its context holds 256 tokens
    rounds = [Round(f"question {n}?", ["0.png"] if n == 0 else [], "an answer") for n in range(40)]
    for room, limit in ((20, 236), (200, 128)):  # no more than half of it
        turns, images = chat.recall(rounds, room)
        assert limit - 30 < len(chat.render(turns).input_ids) <= limit and images == ["0.png"]
    assert chat.recall(rounds, 20, max_rounds=1) == ([human("<image>\nquestion 39?")], ["0.png"])
    turns, _ = chat.recall([*rounds, Round("long " * 300)], 20)
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens, but the model's context holds 256"):
        next(chat.stream(turns, [open_image(workplace / "images" / "0.png")]))


@pytest.mark.parametrize(
    ("flags", "num_rounds"),
    [
        ([], 1),
        (["--max_rounds=2"], 2),
        (["--max_rounds=0"], 3),
        (["--multi"], 3),
        (["--multi", "--max_rounds=1"], 1),
    ],
)
def test_stage_two_learns_as_many_rounds_as_the_flags_say(workplace, renderer, flags, num_rounds):
    rows = make_rows(4)
    for row in rows:
        row["conversations"] += [human("And now?"), {"from": "gpt", "value": "Now it is late."}] * 2
    (workplace / "data.json").write_text(json.dumps(rows))
    script = load_script("2-sft_vlm.py")
    stage = script.make_stage(script.parse_args([f"@{workplace}/args", *flags]))
    images = workplace / "images"
    sample = VLMDataset(workplace / "data.json", stage.spec, renderer, images, ImageProcessor())[0]
    assert (sample["labels"] == renderer.tokenizer.eos_token_id).sum() == num_rounds


def test_the_number_of_rounds_is_a_setting_of_the_run(workplace, lively):
    torch.manual_seed(0)
    save_weights(lively, workplace / "out" / "32_vlm_pretrain.pth")
    flags = [f"@{workplace}/args", "--max_steps=1", "--resume"]
    run_inside("2-sft_vlm.py", *flags)
    with pytest.raises(ValueError, match=r"other settings \(rows.max_rounds 1 then, 2 now\)"):
        run_inside("2-sft_vlm.py", *flags, "--max_rounds=2")
