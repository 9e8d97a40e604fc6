"""What the images are worth: losses with a row's own images, blank ones and another row's."""

import json
from collections import Counter

import pytest
import torch
from conftest import (
    check_refused,
    check_same,
    make_rows,
    run_inside,
    run_script,
    save_image,
    train,
    weights_of,
)
from test_moe import moe_workplace  # noqa: F401

from model.data.batch import collate
from model.data.dataset import VLMDataset
from model.data.spec import DatasetSpec
from trainer import drawing, gain, necessity
from trainer.answers import SampleAnswers
from trainer.args import training_parser
from trainer.batches import LARGE, NUM_VALIDATED, automatic_share
from trainer.distributed import Run
from trainer.logger import read_metrics
from trainer.loop import Trainer
from trainer.script import clean_exit
from trainer.stand_ins import find_stand_ins, resample
from trainer.validation import Validation, describe_worth

SCRIPT = "1-pretrain_vlm.py"
FIGURES = ("val_loss", "val_loss_real", "val_loss_blank", "val_loss_another", "visual_gain")


def measured(workplace, stage="vlm_pretrain") -> list[dict]:
    records = read_metrics(workplace / "out" / f"32_{stage}.metrics.jsonl")
    return [record for record in records if "val_loss" in record]


def write_rows(path, rows: list[dict]):
    path.write_text(json.dumps(rows, ensure_ascii=False))
    return path


# ---- whose images stand in ---------------------------------------------------------------------------------


def test_every_row_is_given_another_image_than_its_own_and_every_row_stands_in_once():
    """Also where rows share files: here up to five to an image, in rows of one to three images."""
    generator = torch.Generator().manual_seed(0)
    shown = [
        [f"{int(name)}" for name in torch.randperm(40, generator=generator)[: 1 + row % 3]]
        for row in range(120)
    ]
    shown[7] = []  # a row of text
    found = find_stand_ins(shown, seed=3)
    assert sorted(found) == sorted(found.values()) == [row for row in range(120) if row != 7]
    assert not any(set(shown[row]) & set(shown[other]) for row, other in found.items())
    alike = [len(shown[row]) == len(shown[other]) for row, other in found.items()]
    assert sum(alike) >= len(alike) - 6, "rows are paired with rows of as many images, but at the borders"
    assert find_stand_ins(shown, seed=3) == found != find_stand_ins(shown, seed=4)


def test_where_there_is_no_derangement_a_row_stands_in_twice_or_none_does():
    assert find_stand_ins([["a"]], 0) == {} == find_stand_ins([["a"], ["a"], []], 0)
    found = find_stand_ins([["a"], ["a"], ["b"]], 0)
    assert found[0] == found[1] == 2 and found[2] in (0, 1)


def test_a_row_takes_as_many_images_as_it_has_places():
    images = torch.arange(3.0).view(3, 1, 1)
    assert resample(images, 5).flatten().tolist() == [0, 0, 1, 1, 2]
    assert resample(images, 2).flatten().tolist() == [0, 1]
    assert resample(images[:1], 2).flatten().tolist() == [0, 0]


# ---- the three losses --------------------------------------------------------------------------------------


@pytest.fixture
def trainer(workplace, model):
    """A trainer without CLIP; samples bring features."""
    args = training_parser("", "", "", 1e-3).parse_args(["--device=cpu", "--dtype=float32"])
    return Trainer(Run(0, 1, torch.device("cpu")), args, model, None)


class Features(VLMDataset):
    """Rows whose images have features drawn from their names, loud enough to be heard."""

    def load(self, images):
        parts = [torch.randn(50, 24, generator=torch.Generator().manual_seed(int(i.stem))) for i in images]
        return {"image_features": 20 * torch.stack(parts) if parts else torch.zeros(0, 50, 24)}


def rows_of_all_kinds() -> list[dict]:
    """One image, two, or none."""
    rows = make_rows(12)
    for row in rows[::4]:
        row["image"] += f", {(int(row['id']) + 3) % 6}.png"
        row["conversations"][0]["value"] += "<image>"
    for row in rows[1::5]:
        del row["image"]
        row["conversations"][0]["value"] = "什么？"
    return rows


def test_the_losses_are_those_of_each_row_alone(workplace, trainer, renderer):
    """Batched = one by one, with zeros and the stand-in's features put in by hand; rows of text alone count
    in the loss and not in the gain."""
    spec = DatasetSpec(min_images=0, max_images=2)
    path = write_rows(workplace / "mixed.json", rows_of_all_kinds())
    data = Features(path, spec, renderer, workplace / "images")
    validation = Validation(trainer.run, data, batch_size=5, seed=1)
    losses = {row.place: row for row in validation.row_losses(trainer)}
    assert sorted(losses) == list(range(12)) and {1, 6, 11} == {p for p in losses if losses[p].blank is None}
    totals = Counter()
    for place, row in losses.items():
        sample, n = data[place], row.num_targets

        def alone(features, sample=sample, n=n) -> float:
            with torch.no_grad():
                return n * trainer.loss(collate([sample | {"image_features": features}])).item()

        own = sample["image_features"]
        assert row.real == pytest.approx(alone(own), rel=1e-4)
        totals.update(all=row.real, targets=n)
        if len(own):
            other = resample(data[validation.stand_ins[place]]["image_features"], len(own))
            assert row.blank == pytest.approx(alone(torch.zeros_like(own)), rel=1e-4)
            assert row.another == pytest.approx(alone(other), rel=1e-4)
            assert abs(row.another - row.real) > 1e-3, "the images must matter, or this shows nothing"
            totals.update(real=row.real, blank=row.blank, another=row.another, seen=n)
    figures = validation.measure(trainer)
    expected = [totals["all"] / totals["targets"]]
    expected += [totals[name] / totals["seen"] for name in ("real", "blank", "another")]
    assert list(figures.values()) == pytest.approx([*expected, expected[2] - expected[1]], rel=1e-6)


def test_one_row_alone_has_no_other_and_the_words_say_so(workplace, trainer, renderer):
    path = write_rows(workplace / "one.json", make_rows(1))
    data = Features(path, DatasetSpec(), renderer, workplace / "images")
    figures = Validation(trainer.run, data, batch_size=4).measure(trainer)
    assert set(figures) == set(FIGURES) - {"val_loss_another"}
    assert describe_worth(figures).endswith("no other row to compare with")
    losses = {"val_loss_real": 0.63, "val_loss_blank": 1.32, "val_loss_another": 1.41, "visual_gain": 0.69}
    expected = "the image is worth 0.69 nats per token: real 0.63, blank 1.32, another's 1.41"
    assert describe_worth(losses) == expected


@pytest.mark.parametrize("flags", [["--num_workers=1"], ["--feature_cache={}/features"]])
def test_two_processes_measure_what_one_does(workplace, flags):
    """Rows share images here (six for all), and the first measurement is before the first step."""
    flags = [flag.format(workplace) for flag in flags]
    flags += ["--val_fraction=0.4", "--save_interval=2", "--max_steps=3"]
    run_inside(SCRIPT, f"@{workplace}/args", *flags)
    one = measured(workplace)
    train(workplace, *flags, "--batch_size=2", processes=2)
    two = measured(workplace)
    assert [record["step"] for record in one] == [record["step"] for record in two] == [0, 2, 3]
    for mine, theirs in zip(one, two, strict=True):
        assert set(mine) == {"step", *FIGURES}
        assert [theirs[name] for name in FIGURES] == pytest.approx([mine[name] for name in FIGURES], abs=1e-4)


@pytest.mark.parametrize("place", ["workplace", "moe_workplace"])
def test_the_runs_bits_are_the_same_whether_it_is_measured_or_not(place, request, monkeypatch):
    """Weights and record, with experts their load and balance too: two runs of the same rows, of which one
    neither validates nor asks."""
    workplace, stage = request.getfixturevalue(place), "vlm_pretrain"
    stage = "moe_vlm_pretrain" if place == "moe_workplace" else stage
    flags = [f"@{workplace}/args", "--val_fraction=0.3", "--save_interval=1", "--max_steps=4"]

    def record() -> list[dict]:
        lines = read_metrics(workplace / "out" / f"32_{stage}.metrics.jsonl")
        clock = ("seconds", "tokens_per_s")
        lines = [line for line in lines if "loss" in line]
        return [{name: value for name, value in line.items() if name not in clock} for line in lines]

    run_inside(SCRIPT, *flags, "--samples=2")
    expected, lines = weights_of(workplace, stage), record()
    with monkeypatch.context() as patch:
        patch.setattr(Validation, "measure", lambda *_: {})
        patch.setattr(SampleAnswers, "ask", lambda *_: [])
        run_inside(SCRIPT, *flags)
    check_same(weights_of(workplace, stage), expected)
    assert record() == lines and len(lines) == 4


def test_a_long_run_keeps_a_few_rows_for_validation_and_others_none():
    assert automatic_share(LARGE, max_steps=0) == NUM_VALIDATED / LARGE
    assert round(automatic_share(595_375, max_steps=0) * 595_375) == NUM_VALIDATED
    assert automatic_share(LARGE - 1, max_steps=0) == automatic_share(595_375, max_steps=8) == 0


def test_the_rule_is_at_work_and_can_be_turned_off(workplace, monkeypatch, capsys):
    monkeypatch.setattr("trainer.batches.LARGE", 24)
    monkeypatch.setattr("trainer.batches.NUM_VALIDATED", 4)
    run_inside(SCRIPT, f"@{workplace}/args", "--epochs=1")
    output = capsys.readouterr().out
    assert "4 of 24 rows are kept out of training" in output and "20 samples, 4 per step" in output
    assert len(measured(workplace)) == 2
    run_inside(SCRIPT, f"@{workplace}/args", "--epochs=1", "--val_fraction=0")
    assert "24 samples, 4 per step" in capsys.readouterr().out and not measured(workplace)


def test_the_curve_names_the_step_from_which_the_model_sees():
    def record(step: int, another: float) -> dict:
        return {"step": step, "val_loss_real": 1.0, "val_loss_another": another}

    blind = [record(0, 1.2), record(5, 1.01)]  # what was at step 0 went away again
    assert drawing.first_seeing(blind) is None
    assert drawing.first_seeing([*blind, {"step": 7, "loss": 1}, record(10, 1.06), record(15, 1.5)]) == 10


# ---- python -m trainer.gain --------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_row_by_row_the_mean_is_the_runs_own_figure(workplace, processes):
    (workplace / "val.json").write_text(json.dumps(make_rows(11)))
    train(workplace, f"--val_data_path={workplace}/val.json", "--max_steps=3")
    expected, out = measured(workplace)[-1], workplace / "gain.jsonl"
    flags = [f"--data_path={workplace}/val.json", f"--out={out}", "--batch_size=3"]
    result = run_script("-m", "trainer.gain", "pretrain", f"@{workplace}/args", *flags, processes=processes)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(row["row"] for row in rows) == list(range(1, 12))
    assert [row["gain"] for row in rows] == sorted(row["gain"] for row in rows)
    total = sum(row["num_targets"] for row in rows)
    for name, figure in (("real", "val_loss"), ("blank", "val_loss_blank"), ("another", "val_loss_another")):
        mean = sum(row[name] * row["num_targets"] for row in rows) / total
        assert mean == pytest.approx(expected[figure], abs=1e-4)
    mean = sum(row["gain"] * row["num_targets"] for row in rows) / total
    assert mean == pytest.approx(expected["visual_gain"], abs=1e-4)
    assert result.stdout.count(describe_worth(expected)) == 1, result.stdout


def run_gain(capsys, *flags):
    status = 0
    try:
        clean_exit(lambda: gain.main([str(flag) for flag in flags]))
    except SystemExit as end:
        status = end.code
    output = capsys.readouterr()
    return status, output.out, output.err


def test_the_rows_that_a_run_validates_on_can_be_looked_at_alone(workplace, capsys):
    flags = [f"@{workplace}/args", "--val_fraction=0.3"]
    run_inside(SCRIPT, *flags, "--max_steps=2")
    status, output, _ = run_gain(capsys, "pretrain", *flags, "--validation")
    assert status == 0 and describe_worth(measured(workplace)[-1]) in output
    assert "7 rows with images" in output and "does without it" in output
    status, _, error = run_gain(capsys, "pretrain", flags[0], "--validation")
    assert status == 2 and "validates on no rows" in error


def test_what_the_losses_say_of_a_row():
    assert necessity.verdict_of(0.5, 1.0, 1.2) == necessity.verdict_of(0.5, 1.0, None) == necessity.NEEDS
    assert necessity.verdict_of(0.5, 0.52, 0.51) == necessity.verdict_of(0.5, 0.5, 2.0) == necessity.WITHOUT
    assert necessity.verdict_of(1.0, 0.9, 1.5) == necessity.verdict_of(1.0, 1.5, 0.9) == necessity.BETTER


def test_bad_input_is_one_line(workplace, capsys):
    result = run_script("-m", "trainer.gain", "pretrain", f"@{workplace}/args")
    check_refused(
        result, "32_vlm_pretrain.pth not found: train it first, or name another file with --weights"
    )
    run_inside(SCRIPT, f"@{workplace}/args", "--max_steps=1")
    save_image(workplace / "images" / "0.png", 1)
    (workplace / "images" / "0.png").write_bytes(b"no image")
    for flags, words in (
        (["nostage"], "no stage nostage"),
        (["pretrain", "--wieghts=x"], "unknown flag --wieghts=x"),
        (["pretrain", f"@{workplace}/args", f"--weights={workplace}/out/32_llm.pth"], "vision_proj"),
        (["pretrain", f"@{workplace}/args", f"--out={workplace}"], "it is a folder"),
        (["pretrain", f"@{workplace}/args"], "0.png"),
    ):
        capsys.readouterr()
        status, _, error = run_gain(capsys, *flags)
        assert status == 2 and words in error and error.count("error: ") == 1, error
    status, output, error = run_gain(capsys, "pretrain", f"@{workplace}/args", "--on_bad_sample=skip")
    assert status == 0 and "20 rows with images" in output, error
