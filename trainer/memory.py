"""How much memory a run will take, from its sizes alone, and how much is there."""

import argparse
import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from model.data.batch import collate
from model.printable import format_bytes
from model.transformer import Transformer
from trainer.args import AUTO
from trainer.batches import lengths_of, spread
from trainer.distributed import Run

FLOAT = 4  # bytes; weights, gradients and moments are float32 whatever --dtype computes in
WORKER = 100 << 20  # what a loader worker's copy of this process comes to hold for itself
SHARE = 0.8  # of what is available; the rest covers what the estimate misses
NUM_SEARCHED = 20  # rows in which an image is searched for, where the longest row has none
SHOWN = ("image_slots", "pixel_values", "image_features")  # of a batch: what its images are
LARGEST_BATCH = 256  # that --batch_size auto takes, whatever the memory


def estimate_step(
    model: Transformer, device: torch.device, num_tokens: int, num_targets: int
) -> dict[str, int]:
    """Bytes that training takes beyond the weights and CLIP: what for, and how much.

    gradients    one number per trained parameter
    moments      two numbers per trained parameter, Adam's
    activations  what the blocks keep for the backward pass, 8 dim + 2 hidden_dim numbers per token and block
                 as counted in float32 (half precision keeps less, and copies of the weights), plus
                 20 % for temporaries; of experts the feed-forward width of each that a
                 token uses (on a GPU, which groups them, half as much again of those it has chosen), and
                 its copies of the token
    logits       three numbers per target token and vocabulary entry: logits, probabilities, gradients

    num_tokens, num_targets  tokens of one forward pass, padding included, and those of them that are learnt
    """
    config = model.config
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    chosen, shared = (config.num_experts_per_tok, config.n_shared_experts) if config.use_moe else (0, 1)
    per_chosen = 2 if device.type == "cpu" else 3
    kept = (
        num_tokens
        * config.n_layers
        * ((8 + 2 * chosen) * config.dim + (per_chosen * chosen + 2 * shared) * config.hidden_dim)
    )
    return {
        "gradients": FLOAT * trained,
        "moments": 2 * FLOAT * trained,
        "activations": FLOAT * kept * 6 // 5,
        "logits": 3 * FLOAT * num_targets * config.vocab_size,
    }


@dataclass(frozen=True)
class StepMemory:
    """What a step takes, by batch size, and what is available; bytes, None where the system does not say."""

    fixed: int
    per_sample: int
    available: int | None
    loaded: int = 0  # of one sample as a loader worker hands it over

    def needed(self, batch_size: int) -> int:
        return self.fixed + batch_size * self.per_sample

    def largest_batch(self) -> int | None:
        """The largest power of two that fits with something to spare; 0 if none does."""
        if self.available is None:
            return None
        sizes = [2**power for power in range(LARGEST_BATCH.bit_length())]
        return max((size for size in sizes if self.needed(size) <= SHARE * self.available), default=0)

    def describe(self, batch_size: int, device: torch.device) -> str:
        largest, available = self.largest_batch(), ""
        if largest is not None:
            available = (
                f" of {format_bytes(self.available)}; the largest batch that fits: {largest or 'none'}"
            )
        return f"memory of a step: about {format_bytes(self.needed(batch_size))} on {device}{available}"


def plan_memory(
    run: Run, args: argparse.Namespace, model: Transformer, vision_model: nn.Module | None, train_set: Dataset
) -> StepMemory:
    """What a step takes if its rows are as long as the longest; decides what --batch_size auto is."""
    local = run.local_world_size if run.device.type == "cpu" else 1
    memory = plan_step(run.device, model, vision_model, longest_sample(train_set), args.num_workers, local)
    if args.batch_size == AUTO:
        sizes = run.share(memory.largest_batch())  # the ranks must agree
        if None in sizes:
            raise ValueError("this system does not say how much memory there is: give --batch_size a number")
        if not min(sizes):
            raise ValueError(
                f"not even one row fits: a step of it needs about {format_bytes(memory.needed(1))} "
                f"of {format_bytes(memory.available)}: lower --max_seq_len, or take a smaller model"
            )
        args.batch_size = min(sizes)
    return memory


def longest_sample(train_set: Dataset) -> dict:
    """A batch of the longest row; of text alone, it gets the images of another row."""
    longest = collate([train_set[int(lengths_of(train_set).argmax())]])
    for position in spread(len(train_set), NUM_SEARCHED):
        if len(longest["image_slots"]):
            break
        longest |= {name: values for name, values in collate([train_set[position]]).items() if name in SHOWN}
    return longest


def plan_step(
    device: torch.device,
    model: Transformer,
    vision_model: nn.Module | None,
    sample: dict,
    num_workers: int,
    num_sharing: int = 1,
) -> StepMemory:
    """The memory of steps whose rows are as long as `sample`, which is a batch of one row.

    num_sharing  processes that share the device
    """
    one, none = (
        sum(
            estimate_step(
                model, device, size * sample["input_ids"].shape[1], size * sample["num_targets"]
            ).values()
        )
        for size in (1, 0)
    )
    num_bytes = sum(value.nbytes for value in sample.values() if isinstance(value, torch.Tensor))
    clip = len(sample["image_slots"]) * clip_work(vision_model)
    available = available_memory(device)
    if device.type == "cpu":
        fixed = held_memory() + estimate_loading(num_workers, 0)
        per_sample = estimate_loading(num_workers, num_bytes) - estimate_loading(num_workers, 0)
    else:  # where two batches lie at a time
        fixed, per_sample = size_in_memory(model) + size_in_memory(vision_model), 2 * num_bytes
    return StepMemory(
        fixed + none,
        per_sample + one - none + clip,
        None if available is None else available // num_sharing,
        num_bytes,
    )


def clip_work(vision_model: nn.Module | None) -> int:
    """Temporary bytes per image while CLIP encodes it; nothing is kept."""
    if vision_model is None:
        return 0
    config = vision_model.config
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    return FLOAT * tokens * (6 * config.hidden_size + 2 * config.intermediate_size)


def estimate_loading(num_workers: int, batch_bytes: int) -> int:
    """Bytes for the batches in work and, by each worker, two in advance."""
    return batch_bytes * (2 * num_workers + 1) + num_workers * WORKER


def available_memory(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that this process holds on the device or can still have; None where the system does not say.

    root  where Linux's own files lie
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    found = []
    with contextlib.suppress(OSError):
        facts = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
        found.append(1024 * int(facts["MemAvailable"].split()[0]))
    # A container's own limit; version 2 and version 1 of Linux's control groups.
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            group = root / "sys/fs/cgroup"
            found.append(
                int((group / limit).read_text())
                - int((group / usage).read_text())
                + reclaimable((group / limit).with_name("memory.stat"))
            )
    return min(found) + held_memory() if found else None


def reclaimable(statistics: Path) -> int:
    """Bytes of files that the system keeps in memory as long as nobody needs it."""
    facts = dict(line.split() for line in statistics.read_text().splitlines())
    return int(facts.get("total_inactive_file", facts.get("inactive_file", 0)))


def held_memory() -> int:
    """Bytes that this process holds now; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        return os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[1])
    return 0


def size_in_memory(module: nn.Module | None) -> int:
    return sum(parameter.nbytes for parameter in module.parameters()) if module else 0
