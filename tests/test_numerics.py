"""Arithmetic that cannot spoil a run: steps that are not finite are skipped, and freezing freezes."""

import re

import pytest
import torch
from conftest import load_script, run_inside, weights_of

from model.data.batch import collate
from model.description import read_description
from trainer.distributed import Run
from trainer.logger import read_metrics
from trainer.loop import Trainer
from trainer.meter import StepSize

SCRIPT = "1-pretrain_vlm.py"


def spoil(monkeypatch, steps: set[int], value: float, at: str = "loss") -> None:
    """Let the loss, or only the gradient, of some steps (counted from 1) not be finite."""
    original, taken = Trainer.loss, []

    def spoilt(self, *arguments):
        taken.append(1)
        loss = original(self, *arguments)
        if len(taken) in steps:
            if at == "loss":
                return loss * value
            loss.register_hook(lambda gradient: gradient * value)
        return loss

    monkeypatch.setattr(Trainer, "loss", spoilt)


@pytest.mark.parametrize(
    ("dtype", "value", "at"),
    [
        ("float32", float("nan"), "loss"),
        ("bfloat16", float("inf"), "loss"),
        ("float32", float("nan"), "gradient"),
        ("float16", float("inf"), "gradient"),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(workplace, monkeypatch, dtype, value, at):
    """The weights after a spoilt second step are those after the first, and so is Adam's state."""
    states = []
    original = Trainer.step

    def step(self, *arguments):
        result = original(self, *arguments)
        tensors = [
            *self.model.state_dict().values(),
            *(value for state in self.optimizer.state.values() for value in state.values()),
        ]
        states.append([tensor.clone() for tensor in tensors])
        return result

    monkeypatch.setattr(Trainer, "step", step)
    spoil(monkeypatch, {2}, value, at)
    run_inside(SCRIPT, f"@{workplace}/args", "--max_steps=4", f"--dtype={dtype}")
    assert all(torch.equal(one, two) for one, two in zip(states[0], states[1], strict=True))
    assert not torch.equal(states[1][1], states[2][1])
    records = read_metrics(workplace / "out" / "32_vlm_pretrain.metrics.jsonl")
    assert [record.get("bad_steps", 0) for record in records] == [0, 1, 1, 1]
    assert [record["loss"] is None for record in records] == [False, True, False, False]
    assert records[1]["grad_norm"] is None and records[2]["grad_norm"] > 0


def test_too_many_bad_steps_in_a_row_end_the_run_with_good_weights(workplace, monkeypatch):
    spoil(monkeypatch, {4, 5, 6}, float("nan"))
    with pytest.raises(ValueError, match="the last 3 steps was not finite.*--learning_rate.*--dtype"):
        run_inside(SCRIPT, f"@{workplace}/args", "--max_steps=20", "--max_bad_steps=3")
    assert all(tensor.isfinite().all() for tensor in weights_of(workplace).values())
    assert read_description(workplace / "out" / "32_vlm_pretrain.pth")["step"] == 6


@pytest.mark.parametrize(("dtype", "scaled"), [("float32", False), ("bfloat16", False), ("float16", True)])
def test_only_float16_has_a_scaler(model, dtype, scaled):
    """It once was float16 whatever --dtype said, and bfloat16 had a scaler."""
    args = load_script(SCRIPT).parse_args(["--device=cpu", f"--dtype={dtype}"])
    trainer = Trainer(Run(0, 1, torch.device("cpu")), args, model, vision_model=None)
    products = []
    model.output.register_forward_hook(lambda module, inputs, logits: products.append(logits.dtype))
    ids = torch.arange(3, 20)
    sample = {
        "input_ids": ids,
        "labels": ids.clone(),
        "image_slots": torch.zeros(0, 50, dtype=torch.long),
        "image_features": torch.zeros(0, 50, 24),
    }
    loss, _, skipped = trainer.step([collate([sample])], StepSize(num_targets=17, num_rows=1), 1e-3)
    assert loss.isfinite() and not skipped
    assert products == [getattr(torch, dtype)] and trainer.scaler.is_enabled() == scaled
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize(
    ("choice", "trained", "line"),
    [
        (
            "all",
            ".*",
            r"trained \(all\): 0.05 M parameters, 0.00 M of them the projection; frozen: 0.08 M \(CLIP\)\n",
        ),
        ("projection", r"vision_proj\.weight", r"trained \(projection\): .* and 0.05 M \(language model\)"),
        (
            "projection+last",
            r"vision_proj\.weight|layers\.1\..*|norm\.weight",
            r"trained \(projection\+last\): ",
        ),
    ],
)
def test_what_is_frozen_stays_as_it_was(workplace, capsys, choice, trained, line):
    before = torch.load(workplace / "out" / "32_llm.pth", weights_only=True)
    run_inside(SCRIPT, f"@{workplace}/args", "--max_steps=2", f"--train={choice}")
    assert re.search(line, capsys.readouterr().out)
    for name, tensor in weights_of(workplace).items():
        if name in before:
            assert torch.equal(tensor, before[name]) != bool(re.fullmatch(trained, name)), name
