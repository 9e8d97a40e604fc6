"""What a run records beside its weights: the metrics, the curve, validation, wandb."""

import json
import re

import pytest
import torch
from conftest import PowerCut, cut_after, load_script, make_rows, run_inside, train, weights_of

from model.description import read_description
from trainer import validation
from trainer.distributed import Run
from trainer.logger import read_metrics
from trainer.stage import load_stage, make_plan
from trainer.validation import Validation

SCRIPT = "1-pretrain_vlm.py"


def metrics_of(workplace) -> list[dict]:
    return read_metrics(workplace / "out" / "32_vlm_pretrain.metrics.jsonl")


# ---- validation --------------------------------------------------------------------------------------------


def test_the_validation_loss_is_that_of_the_weights_on_all_rows(workplace, monkeypatch):
    """Measured again with the saved weights in one batch: a mean over tokens, not over batches."""
    (workplace / "val.json").write_text(json.dumps(make_rows(7)))
    seen = []
    original = validation.sum_by_row

    def watched(trainer, inputs):
        seen.append((trainer.model.training, torch.is_grad_enabled()))
        return original(trainer, inputs)

    monkeypatch.setattr(validation, "sum_by_row", watched)
    flags = [f"@{workplace}/args", f"--val_data_path={workplace}/val.json"]
    run_inside(SCRIPT, *flags, "--max_steps=5", "--save_interval=2")
    measured = [record for record in metrics_of(workplace) if "val_loss" in record]
    assert [record["step"] for record in measured] == [0, 2, 4, 5] and set(seen) == {(False, False)}
    description = read_description(workplace / "out" / "32_vlm_pretrain.pth")
    assert description["val_loss"] == measured[-1]["val_loss"]
    # The training loss of a step over those very rows, from those very weights, is the same number.
    run_inside(
        SCRIPT,
        f"@{workplace}/args",
        f"--data_path={workplace}/val.json",
        "--batch_size=7",
        "--max_steps=1",
        "--resume_weights_only",
    )
    assert metrics_of(workplace)[0]["loss"] == pytest.approx(measured[-1]["val_loss"], rel=1e-5)


def test_a_validation_share_has_the_same_loss_for_two_processes(workplace):
    flags = ["--val_fraction=0.25", "--save_interval=3"]
    run_inside(SCRIPT, f"@{workplace}/args", *flags, "--max_steps=6")
    one = [record["val_loss"] for record in metrics_of(workplace) if "val_loss" in record]
    output = train(workplace, *flags, "--batch_size=2", processes=2).stdout
    two = [record["val_loss"] for record in metrics_of(workplace) if "val_loss" in record]
    assert "18 samples, 4 per step" in output and "6 samples for the validation loss" in output
    assert len(one) == 3 and two == pytest.approx(one, abs=1e-4)


def test_a_validation_share_is_never_trained_on(workplace):
    script, run = load_script(SCRIPT), Run(0, 1, torch.device("cpu"))
    args = script.parse_args([f"@{workplace}/args", "--val_fraction=0.25", "--epochs=3"])
    plan = make_plan(run, args, load_stage(run, args, script.make_stage(args)))
    trained = [int(plan.train_set.indices[place]) for places in plan.batches for place in places]
    validated = plan.val_set.indices.tolist()
    assert len(validated) == 6 and sorted(trained + 3 * validated) == sorted(3 * list(range(24)))


def test_the_best_weights_are_kept_on_request(workplace, monkeypatch):
    """Also across an interruption: a later, worse loss does not replace them."""
    losses = iter([9.0, 3.0, 1.0, 2.0, 4.0])  # the first before the first step
    monkeypatch.setattr(Validation, "measure", lambda self, trainer: {"val_loss": next(losses)})
    flags = [f"@{workplace}/args", "--val_fraction=0.25", "--keep_best", "--save_interval=1", "--max_steps=4"]
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_after(patch, 3)
        run_inside(SCRIPT, *flags)
    run_inside(SCRIPT, *flags, "--resume")
    description = read_description(workplace / "out" / "32_vlm_pretrain.best.pth")
    assert (description["step"], description["val_loss"]) == (2, 1.0)
    kept = torch.load(workplace / "out" / "32_vlm_pretrain.best.pth", weights_only=True)
    assert not torch.equal(kept["norm.weight"], weights_of(workplace)["norm.weight"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--val_fraction=0.01"], "leaves nothing to validate on"),
        (["--val_fraction=0.99"], "leaves no row to train on"),
        (["--val_fraction=1.5"], "--val_fraction must be at least 0 and below 1, not 1.5"),
        (["--keep_best"], "--keep_best needs a validation loss"),
        (["--val_fraction=0.1", "--val_data_path=x.json"], "exclude each other"),
        (["--resume", "--resume_weights_only"], "give one of them"),
        (["--resume_weights_only"], "there is no earlier run to take weights from"),
    ],
)
def test_flags_that_cannot_be_meant(workplace, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        run_inside(SCRIPT, f"@{workplace}/args", "--max_steps=1", *flags)


# ---- wandb -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "key"), [("offline", None), ("online", None), ("online", "0" * 40)])
def test_wandb_records_and_never_stops_a_run(workplace, mode, key, monkeypatch):
    """Online without a key, and with a key but without a network: one line, and it goes on offline."""
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(workplace))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    result = train(workplace, "--use_wandb", "--wandb_project=tests", "--wandb_run_name=one")
    assert list((workplace / "out" / "wandb").glob("offline-run-*/run-*.wandb")), result.stderr
    assert ("recording offline" in result.stdout + result.stderr) == (mode == "online")
    assert len(metrics_of(workplace)) == 6 and "Traceback" not in result.stderr


def test_a_resumed_run_goes_on_with_its_wandb_run(workplace, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")

    flags = [f"@{workplace}/args", "--use_wandb", "--max_steps=3", "--save_interval=1"]
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_after(patch, 1)
        run_inside(SCRIPT, *flags)
    saved = torch.load(workplace / "out" / "32_vlm_pretrain.resume", weights_only=True)
    run_inside(SCRIPT, *flags, "--resume")
    names = {path.name.rsplit("-", 1)[1] for path in (workplace / "out" / "wandb").glob("offline-run-*")}
    assert names == {saved["log"]["wandb_id"]}
