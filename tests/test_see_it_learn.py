"""--samples: the same images asked about at every save, recorded and drawn."""

import json

import pytest
import torch
from conftest import (
    PowerCut,
    check_refused,
    check_same,
    cut_after,
    make_question,
    make_rows,
    run_clean,
    run_inside,
    train,
    weights_of,
    write_questions,
)
from PIL import Image

from model.chat import load_chat
from model.generate import Sampling
from model.images import open_image
from model.prompt import normalise_turns
from trainer import drawing
from trainer.answers import GROWTH, MAX_NEW_TOKENS, SampleAnswers, in_turn

SCRIPT = "1-pretrain_vlm.py"


def lines_of(workplace) -> list[dict]:
    text = (workplace / "out" / "32_vlm_pretrain.samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_answers_are_those_of_the_saved_weights(workplace, capsys):
    """Asked again by the chat, with the images from their files: letter for letter. No bit of the run depends
    on it."""
    flags = [f"@{workplace}/args", "--val_fraction=0.5", "--save_interval=10", "--max_steps=30"]
    flags.append("--learning_rate=5e-3")
    run_inside(SCRIPT, *flags, "--samples=4")
    lines, weights = lines_of(workplace), weights_of(workplace)
    assert "answers 32_vlm_pretrain.samples.png" in capsys.readouterr().out
    assert [line["step"] for line in lines] == [step for step in (0, 10, 20, 30) for _ in range(4)]
    last = [line for line in lines if line["step"] == 30]
    assert len({line["image"][0] for line in last}) == 4 and any(line["given"] for line in last)
    chat = load_chat(workplace / "out" / "32_vlm_pretrain.pth")
    rows = json.loads((workplace / "data.json").read_text())
    for line in last:
        turns = rows[line["row"] - 1]["conversations"]
        assert line["answer"] == normalise_turns(turns)[1][1]
        asked = chat.stream(
            turns[:1], [open_image(line["image"][0])], Sampling(max_new_tokens=MAX_NEW_TOKENS)
        )
        assert line["given"] == "".join(asked).strip() and line["right"] == (line["given"] == line["answer"])
    with Image.open(workplace / "out" / "32_vlm_pretrain.samples.png") as sheet:
        assert sheet.width > 800 and sheet.height > 400
    run_inside(SCRIPT, *flags)
    check_same(weights_of(workplace), weights)
    left = {path.name for path in (workplace / "out").iterdir() if ".samples." in path.name}
    assert left == {"32_vlm_pretrain.previous.samples.jsonl", "32_vlm_pretrain.previous.samples.png"}


@pytest.mark.parametrize("flags", [[], ["--feature_cache={}/features"]])
def test_a_resumed_run_goes_on_with_its_answers_and_doubles_none(workplace, monkeypatch, flags):
    flags = [f"@{workplace}/args", *(flag.format(workplace) for flag in flags)]
    flags += ["--val_fraction=0.2", "--samples=2", "--save_interval=3", "--max_steps=10"]
    run_inside(SCRIPT, *flags)
    expected = lines_of(workplace)
    for path in (workplace / "out").glob("32_vlm_pretrain.*"):
        path.unlink()
    for steps in (4, 3):
        with monkeypatch.context() as patch, pytest.raises(PowerCut):
            cut_after(patch, steps)
            run_inside(SCRIPT, *flags, "--resume")
    run_inside(SCRIPT, *flags, "--resume")
    assert lines_of(workplace) == expected
    assert [line["step"] for line in expected] == [0, 0, 3, 3, 6, 6, 9, 9, 10, 10]


def test_two_processes_ask_what_one_does_and_only_rank_0_writes(workplace):
    flags = ["--val_fraction=0.5", "--samples=3", "--save_interval=2", "--max_steps=4"]
    train(workplace, *flags)
    one = lines_of(workplace)
    train(workplace, *flags, "--batch_size=2", processes=2)
    assert [(line["step"], line["row"]) for line in lines_of(workplace)] == [
        (line["step"], line["row"]) for line in one
    ]


def test_saves_are_asked_at_ever_more_rarely_and_the_clock_decides_nothing():
    """Of 19 epochs of 595 k rows, 353,000 steps with a save at every hundredth: some fifty times."""
    answers = SampleAnswers.__new__(SampleAnswers)
    answers.asked, answers.total_steps, answers.samples = None, 353_504, [None]
    answers.run = type("Other", (), {"is_main": False})
    asked = []
    for step in [*range(0, 353_504, 100), 353_504]:
        before = answers.asked
        answers.ask(None, step)
        asked += [step] if answers.asked != before else []
    assert asked[:5] == [0, 100, 200, 300, 400] and asked[-1] == 353_504 and 30 < len(asked) < 60
    assert all(later >= GROWTH * step for step, later in zip(asked[:-1], asked[1:-1], strict=False))


def test_images_that_were_not_shown_yet_come_first():
    shown = [["a"], ["a"], [], ["b"], ["a", "c"], ["d"]]
    order = in_turn(shown, seed=0)
    assert sorted(order) == [0, 1, 3, 4, 5]
    first = order[:3]
    assert len({name for row in first for name in shown[row]} & {"b", "d"}) == 2


def test_a_file_of_questions_takes_the_place_of_validation_rows(workplace):
    rows = [make_question(image=f"images/{n}.png", question=f"什么颜色？ {n}") for n in range(4)]
    path = write_questions(workplace / "asked.jsonl", *rows)
    flags = [f"--sample_questions={path}", "--samples=3", f"--feature_cache={workplace}/features"]
    run_inside(SCRIPT, f"@{workplace}/args", "--max_steps=2", *flags)
    lines = lines_of(workplace)
    assert [line["step"] for line in lines] == [0] * 3 + [2] * 3
    assert [line["question"] for line in lines[:3]] == ["什么颜色？ 0", "什么颜色？ 1", "什么颜色？ 2"]
    assert {line["answer"] for line in lines} == {"红"} and lines[0]["image"][0].endswith("images/0.png")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samples=2"], "give --val_fraction, --val_data_path or --sample_questions"),
        (["--sample_questions=x.jsonl"], "--sample_questions needs --samples N"),
        (["--samples=1", "--sample_questions=x.jsonl"], "--sample_questions: there is no file x.jsonl"),
        (["--samples=-1"], "--samples must be at least 0, not -1"),
    ],
)
def test_what_cannot_be_asked_is_refused(workplace, capsys, flags, message):
    result = run_clean(capsys, SCRIPT, f"@{workplace}/args", "--max_steps=1", *flags)
    check_refused(result, message)
    assert not (workplace / "out" / "32_vlm_pretrain.pth").exists()


def test_wandb_has_the_answers_and_the_sheet(workplace, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_inside(
        SCRIPT, f"@{workplace}/args", "--val_fraction=0.5", "--samples=2", "--max_steps=2", "--use_wandb"
    )
    media = next((workplace / "out" / "wandb").glob("offline-run-*")) / "files" / "media"
    assert len(list(media.glob("table/samples_*.json"))) == 2 and list(
        media.glob("images/samples_sheet_*.png")
    )
    assert "records no more" not in capsys.readouterr().out


def test_answers_that_fail_cost_one_line_and_not_the_run(workplace, monkeypatch, capsys):
    monkeypatch.setattr(SampleAnswers, "answer", lambda *_: 1 / 0)
    run_inside(SCRIPT, f"@{workplace}/args", "--val_fraction=0.5", "--samples=2", "--max_steps=2")
    output = capsys.readouterr().out
    assert output.count("no answers at step") == 2 and "saved " in output


def test_a_sheet_of_long_answers_and_lost_images_is_drawn(tmp_path):
    """As real captions are; formulas and line ends stay text, and steps that have no room are left out."""
    records = [
        {
            "step": step,
            "row": row,
            "question": "What is $x^2$ here?\nSay it " * 9,
            "answer": "一只猫坐在窗台上" * 20,
            "given": "" if step == 0 else "It costs $5 and $6, " * step,
            "right": step == 3,
        }
        for step in range(30)
        for row in (4, 9)
    ]
    drawing.draw_answers(records, {4: Image.new("RGB", (30, 200)), 9: None}, "a_run", tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width < 2500
    assert drawing.break_text("ab " * 40, 10, 2).count("\n") == 1


def test_a_broken_row_is_passed_over(workplace):
    rows = make_rows(8)
    (workplace / "val.json").write_text(json.dumps(rows))
    (workplace / "images" / "1.png").write_bytes(b"no image")
    flags = [f"--val_data_path={workplace}/val.json", "--samples=8", "--max_steps=1"]
    good = [row for row in rows if row["image"] != "1.png"]
    (workplace / "data.json").write_text(json.dumps(good))
    run_inside(SCRIPT, f"@{workplace}/args", *flags, "--on_bad_sample=skip")
    assert {line["row"] for line in lines_of(workplace)} == {1, 3, 4, 5, 6, 7}
    assert torch.isfinite(weights_of(workplace)["norm.weight"]).all()
