"""What is written for GPUs, as far as a CPU can run it: copies ahead, compiled blocks, a batch that fits."""

import contextlib
from dataclasses import replace

import pytest
import torch
from conftest import run_inside, weights_of
from torch import nn

from model.data.batch import collate
from model.data.dataset import VLMDataset
from model.data.spec import DatasetSpec
from model.fast import use_fast_kernels
from model.prompt import Renderer
from model.vision_utils import get_img_embedding, get_vision_model
from trainer import memory
from trainer.args import AUTO
from trainer.loader import prefetch
from trainer.memory import LARGEST_BATCH, SHARE, StepMemory

CPU = torch.device("cpu")


class FakeStream:
    """Takes down in which order copies are begun and waited for."""

    def __init__(self, *_):
        self.said = []

    def record_event(self) -> str:
        self.said.append("copied")
        return "event"

    def wait_event(self, event: str) -> None:
        self.said.append(event)


def test_the_next_batch_is_copied_before_this_one_is_used(monkeypatch):
    copying, computing = FakeStream(), FakeStream()
    computing.said = copying.said
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: copying)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: computing)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: stream.said.append("kept"))
    monkeypatch.setattr("trainer.loader.to_device", lambda batch, device: batch)
    batches = [{"input_ids": torch.full((1,), number), "num_tokens": number} for number in range(3)]
    seen = []
    for batch in prefetch(batches, torch.device("cuda")):
        seen.append(batch["num_tokens"])
        copying.said.append(f"used {batch['num_tokens']}")
    assert seen == [0, 1, 2]
    arrived = ["event", "kept"]
    assert copying.said == [
        "copied",
        "copied",
        *arrived,
        "used 0",
        "copied",
        *arrived,
        "used 1",
        *arrived,
        "used 2",
    ]


def test_on_a_cpu_batches_pass_as_they_are():
    batches = [{"input_ids": torch.ones(2, 3), "num_tokens": 6}]
    assert [batch["input_ids"] is batches[0]["input_ids"] for batch in prefetch(batches, CPU)] == [True]
    assert list(prefetch([], CPU)) == []


@pytest.fixture
def batches(workplace, tokenizer, clip_path) -> list[dict]:
    """Two batches of rows padded to a multiple of 64, of different numbers of targets, and the same rows
    without that padding."""
    vision_model, processor = get_vision_model(clip_path)
    renderer = Renderer(tokenizer, num_image_tokens=50, max_seq_len=256)
    dataset = VLMDataset(workplace / "data.json", DatasetSpec(), renderer, workplace / "images", processor)
    rows = [[dataset[place] for place in places] for places in ((0, 1, 2, 3), (4, 5, 6, 7))]
    made = [collate(part, multiple=64) for part in rows] + [collate(part) for part in rows]
    for batch in made:
        batch["features"] = get_img_embedding(batch["pixel_values"], vision_model)
    return made


def loss_and_gradients(model: nn.Module, batch: dict) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss = model(
        batch["input_ids"],
        batch["features"],
        batch["image_slots"],
        batch["labels"],
        target_positions=batch["target_positions"],
    )[1]
    loss.backward()
    return [loss.detach()] + [parameter.grad.clone() for parameter in model.parameters()]


def test_rows_padded_to_a_multiple_have_the_same_loss_and_gradients(model, batches):
    assert all(batch["input_ids"].shape[1] % 64 == 0 for batch in batches[:2])
    for padded, plain in zip(batches[:2], batches[2:], strict=True):
        assert padded["input_ids"].shape[1] > plain["input_ids"].shape[1]
        for one, two in zip(loss_and_gradients(model, padded), loss_and_gradients(model, plain), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.fixture
def without_a_compiler(monkeypatch):
    """Blocks are traced whole, no graph break is allowed, and differentiated by PyTorch; what is left out is
    their C++, because not every machine has a compiler."""
    compiled = nn.Module.compile
    monkeypatch.setattr(
        nn.Module,
        "compile",
        lambda module, dynamic: compiled(module, backend="aot_eager", fullgraph=True, dynamic=dynamic),
    )
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def test_compiled_blocks_compute_the_same(model, batches, without_a_compiler):
    expected = [loss_and_gradients(model, batch) for batch in batches[:2]]
    names = list(model.state_dict())
    use_fast_kernels(model, CPU, torch.float32, compiled=True)
    for batch, values in zip(batches[:2], expected, strict=True):
        for one, two in zip(loss_and_gradients(model, batch), values, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == names
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # it was the compiler's work


def test_a_compiled_run_learns_as_the_plain_one_does(workplace, without_a_compiler):
    weights = []
    for flags in ([], ["--compile"]):
        run_inside("1-pretrain_vlm.py", f"@{workplace}/args", "--max_steps=3", *flags)
        weights.append(weights_of(workplace))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-5)


def test_the_largest_batch_is_a_power_of_two_that_fits():
    for gigabytes in (1, 3, 10, 10_000):
        plan = StepMemory(fixed=10**9, per_sample=10**7, available=gigabytes * 10**9)
        largest = plan.largest_batch()
        assert largest in (0, *(2**power for power in range(9)))
        assert not largest or plan.needed(largest) <= SHARE * plan.available
        assert largest == LARGEST_BATCH or plan.needed(max(1, 2 * largest)) > SHARE * plan.available
    assert StepMemory(1, 1, None).largest_batch() is None


def test_batch_size_auto_takes_it_and_the_start_says_so(workplace, monkeypatch, capsys):
    """Ten times the memory is there that one row takes beyond what any batch does."""
    original = memory.plan_step

    def plan_step(*arguments):
        plan = original(*arguments)
        return replace(plan, available=int((plan.fixed + 10 * plan.per_sample) / SHARE))

    monkeypatch.setattr(memory, "plan_step", plan_step)
    run_inside("1-pretrain_vlm.py", f"@{workplace}/args", "--max_steps=1", f"--batch_size={AUTO}")
    printed = capsys.readouterr().out
    assert "8 per step (1 process(es) x batch 8" in printed
    assert "memory of a step: about" in printed and "the largest batch that fits: 8" in printed


def test_a_row_that_does_not_fit_is_reported(workplace, monkeypatch):
    monkeypatch.setattr(memory, "plan_step", lambda *_: StepMemory(10**9, 10**9, 10**9))
    with pytest.raises(ValueError, match="not even one row fits: a step of it needs about 2 GB of 1 GB"):
        run_inside("1-pretrain_vlm.py", f"@{workplace}/args", "--max_steps=1", "--batch_size=auto")


@pytest.mark.parametrize("size", ["0", "-1", "many"])
def test_a_batch_size_that_is_none_is_refused(workplace, size, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_inside("1-pretrain_vlm.py", f"@{workplace}/args", f"--batch_size={size}")
    assert f"must be at least 1, or auto, not {size}" in capsys.readouterr().err


def test_experts_are_not_compiled(workplace):
    with pytest.raises(ValueError, match="--compile does not go with --use_moe"):
        run_inside("1-pretrain_vlm.py", f"@{workplace}/args", "--compile", "--use_moe")
