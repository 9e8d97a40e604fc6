"""How fast a training step is: against what the machine could do, against transformers' LLaVA, and against
itself with each gain switched off.

writes   benchmarks/results/train_step.json, and prints the tables

    python benchmarks/train_step.py               # about a quarter of an hour on two cores
    python benchmarks/train_step.py --quick       # does it run? small sizes, no meaning

Everything is made here, in the real formats and at the real geometry: 512 x 8, CLIP ViT-B/32 (random
weights), 6400 tokens, captions of 89 tokens of which 18 are learnt, questions of 185, two images with 205.

needed work   matrix products of CLIP's forward pass and of the language model's forward and backward pass, at
              the rows' real lengths; the last feed-forward and the vocabulary only where something is learnt
share         needed work / time of the step / speed of a 2048 x 2048 matrix product of the same dtype, taken
              just before it; medians of interleaved steps, as the machine may have other work
"""

import argparse
import contextlib
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from transformers import CLIPVisionConfig, CLIPVisionModel  # noqa: E402

import model.transformer as network  # noqa: E402
from benchmarks.llava import to_llava, to_llava_ids  # noqa: E402
from benchmarks.roofline import matmul_speed, needed_flops, read_speed, row_lengths  # noqa: E402
from benchmarks.synthetic import (  # noqa: E402
    PRETRAIN_SHAPE,
    SFT_SHAPE,
    TWO_IMAGES_SHAPE,
    Shape,
    save_data,
    save_tokenizer,
)
from model.data.batch import (
    IGNORE_INDEX,  # noqa: E402
    collate,  # noqa: E402
)
from model.data.dataset import VLMDataset  # noqa: E402
from model.data.feature_store import FeatureStore, image_key  # noqa: E402
from model.data.spec import PRETRAIN, SFT, SFT_MULTI, DatasetSpec  # noqa: E402
from model.LMConfig import LMConfig  # noqa: E402
from model.prompt import load_tokenizer  # noqa: E402
from model.transformer import Transformer  # noqa: E402
from model.vision_utils import ImageProcessor, get_img_embedding  # noqa: E402
from trainer.batches import GlobalBatches  # noqa: E402
from trainer.distributed import Run, retain_freed_memory  # noqa: E402
from trainer.optimizer import trained_parameters  # noqa: E402

RUN = Run(0, 1, torch.device("cpu"))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PARTS = ("clip", "forward", "backward", "optimizer")


@dataclass(frozen=True)
class Variant:
    """A way to take the step; the defaults are the scripts' own."""

    dtype: str = "float32"
    cached: bool = False
    bucket: bool = True
    pad_to: int = 0  # 0 = to the longest row
    clip_one_by_one: bool = False
    logits_everywhere: bool = False
    sdpa: bool = False  # in bf16 too
    fused: bool = True
    lean: bool = True  # norms and SwiGLU with a backward pass of their own
    llava: bool = False


FP32, BF16, CACHED = Variant(), Variant("bfloat16"), Variant("bfloat16", cached=True)
OFF = Variant(bucket=False, pad_to=512, clip_one_by_one=True, logits_everywhere=True, fused=False, lean=False)
OURS = {"fp32": FP32, "bf16": BF16, "bf16, cached features": CACHED, "everything off": OFF}
LLAVA = {
    "transformers' LLaVA, fp32": Variant(bucket=False, llava=True),
    "transformers' LLaVA, bf16": Variant("bfloat16", bucket=False, llava=True),
    "LLaVA padded to 512, fp32": Variant(bucket=False, pad_to=512, llava=True),
    "LLaVA padded to 512, bf16": Variant("bfloat16", bucket=False, pad_to=512, llava=True),
}
ABLATION = {  # one gain at a time switched off again
    "bf16, CLIP image by image": replace(BF16, clip_one_by_one=True),
    "cached, padded to 512": replace(CACHED, bucket=False, pad_to=512),
    "cached, no buckets": replace(CACHED, bucket=False),
    "cached, logits everywhere": replace(CACHED, logits_everywhere=True),
    "cached, SDPA in bf16": replace(CACHED, sdpa=True),
    "cached, optimizer not fused": replace(CACHED, fused=False),
    "cached, norms and SwiGLU left to autograd": replace(CACHED, lean=False),
    "cached, fp32": replace(CACHED, dtype="float32"),
}


class Bench:
    """Model, data and batches of one stage, and the step of any variant on them."""

    def __init__(
        self,
        folder: Path,
        shape: Shape,
        spec: DatasetSpec,
        config: LMConfig,
        clip: CLIPVisionModel,
        batch_size: int,
        num_batches: int = 4,
    ):
        self.config, self.vision, self.batch_size, self.num_batches = (
            config,
            clip.config,
            batch_size,
            num_batches,
        )
        half = CLIPVisionModel(clip.config).eval().requires_grad_(False).to(torch.bfloat16)
        half.load_state_dict(clip.state_dict())
        self.towers = {"float32": clip, "bfloat16": half}
        tokenizer = load_tokenizer(folder / "tokenizer")
        place = folder / shape.name
        rows = save_data(place, shape, 50 * batch_size, 4 * batch_size, tokenizer)
        self.dataset = VLMDataset(
            rows,
            spec,
            tokenizer,
            place,
            ImageProcessor(clip.config.image_size),
            config.num_image_tokens,
            config.max_seq_len,
        )
        self.batches = {(bucket, False): self.make_batches(bucket) for bucket in (True, False)}
        self.dataset.feature_store = self.fill_store(place / "features", sorted(place.glob("*.jpg")))
        self.batches |= {(bucket, True): self.make_batches(bucket) for bucket in (True, False)}
        self.model = Transformer(config).train()
        self.llava = to_llava(self.model, clip).train()
        self.llava.model.language_model.requires_grad_(True)
        self.llava.model.multi_modal_projector.linear_1.requires_grad_(True)
        self.optimizers = {}

    def make_batches(self, bucket: bool) -> list[dict]:
        """The first batches of an epoch as the loader makes them, with the seconds that each took."""
        args = argparse.Namespace(
            batch_size=self.batch_size, accumulation_steps=1, seed=0, max_steps=0, epochs=1
        )
        order = GlobalBatches(len(self.dataset), args, RUN, self.dataset.lengths() if bucket else None)
        batches = []
        for samples in list(order)[: self.num_batches]:
            start = time.perf_counter()
            batch = collate([self.dataset[sample] for sample in samples])
            batches.append(batch | {"seconds": time.perf_counter() - start})
            assert not batch["bad_samples"], batch["bad_samples"][0]
        return batches

    def fill_store(self, folder: Path, images: list[Path]) -> FeatureStore:
        """Made-up features: reading them takes as long as reading true ones."""
        store = FeatureStore(folder)
        features = torch.randn(len(images), self.config.num_image_tokens, self.config.vision_dim)
        store.add(
            torch.stack([torch.from_numpy(image_key(path).copy()) for path in images]).numpy(),
            features.numpy(),
        )
        store.reload()
        return store

    def optimizer(self, variant: Variant) -> torch.optim.Optimizer:
        key = variant.llava, variant.fused
        if key not in self.optimizers:
            model = self.llava if variant.llava else self.model
            self.optimizers[key] = torch.optim.AdamW(
                trained_parameters(model), lr=1e-5, weight_decay=0.0, fused=variant.fused, foreach=False
            )
        return self.optimizers[key]

    def flops_per_sample(self, variant: Variant) -> float:
        """Needed work of an average row."""
        batches = self.batches[False, variant.cached]
        return sum(
            needed_flops(batch, self.config, self.vision, not variant.cached) for batch in batches
        ) / sum(len(batch["input_ids"]) for batch in batches)

    def step(self, variant: Variant, number: int) -> dict[str, float]:
        """One optimizer step on one batch: seconds, in all and by part."""
        batches = self.batches[variant.bucket, variant.cached]
        batch = batches[number % len(batches)]
        padded = pad_batch(batch, variant.pad_to) if variant.pad_to else batch
        optimizer, times = self.optimizer(variant), [time.perf_counter()]
        with switched_off(variant):
            features = self.image_features(batch, variant)
            times.append(time.perf_counter())
            with torch.autocast("cpu", DTYPES[variant.dtype], enabled=variant.dtype != "float32"):
                loss = self.loss(padded, features, variant)
            times.append(time.perf_counter())
            loss.backward()
            times.append(time.perf_counter())
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0, foreach=variant.fused)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            times.append(time.perf_counter())
        parts = {part: after - before for part, (before, after) in zip(PARTS, pairwise(times), strict=True)}
        return parts | {
            "step": times[-1] - times[0],
            "data": batch["seconds"],
            "loss": loss.item(),
            "samples": len(batch["input_ids"]),
            "flops": needed_flops(batch, self.config, self.vision, not variant.cached),
        }

    def image_features(self, batch: dict, variant: Variant) -> Tensor | None:
        if variant.llava:
            return None  # it calls CLIP itself
        if variant.cached:
            return batch["image_features"].to(DTYPES[variant.dtype])
        tower, pixels = self.towers[variant.dtype], batch["pixel_values"]
        if variant.clip_one_by_one:
            return torch.cat([get_img_embedding(pixels[n : n + 1], tower) for n in range(len(pixels))])
        return get_img_embedding(pixels, tower)

    def loss(self, batch: dict, features: Tensor | None, variant: Variant) -> Tensor:
        if variant.llava:
            ids, mask, labels = to_llava_batch(batch)
            return self.llava(
                input_ids=ids, attention_mask=mask, labels=labels, pixel_values=batch["pixel_values"]
            ).loss
        if variant.logits_everywhere:
            logits, _ = self.model(batch["input_ids"], features, batch["image_slots"])
            return F.cross_entropy(
                logits.float().flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE_INDEX
            )
        return self.model(
            batch["input_ids"],
            features,
            batch["image_slots"],
            batch["labels"],
            target_positions=batch["target_positions"],
        )[1]

    def check(self) -> None:
        """All ways of taking the step compute one loss: else the comparison would mean nothing."""
        batch = self.batches[False, False][0]
        with torch.no_grad():
            features = get_img_embedding(batch["pixel_values"], self.towers["float32"])
            losses = [
                self.loss(padded, features, variant).item()
                for padded, variant in (
                    (batch, FP32),
                    (pad_batch(batch, self.config.max_seq_len), OFF),
                    (batch, LLAVA["transformers' LLaVA, fp32"]),
                )
            ]
        assert max(losses) - min(losses) < 1e-3, losses


@contextlib.contextmanager
def switched_off(variant: Variant) -> Iterator[None]:
    """The network without the gains that the variant does without."""
    with contextlib.ExitStack() as stack:
        if variant.sdpa:
            stack.enter_context(mock.patch.object(network, "causal_attention", plain_attention))
        if not variant.lean:
            stack.enter_context(mock.patch.object(network.RMSNorm, "forward", plain_norm))
            stack.enter_context(mock.patch.object(network.FeedForward, "forward", plain_feed_forward))
        yield


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA in bf16 too."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def plain_norm(norm: network.RMSNorm, x: Tensor) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight


def plain_feed_forward(layer: network.FeedForward, x: Tensor) -> Tensor:
    return layer.w2(F.silu(layer.w1(x)) * layer.w3(x))


def pad_batch(batch: dict, T: int) -> dict:
    """The batch padded to T tokens instead of its longest row."""
    old = batch["input_ids"].shape[1]
    return batch | {
        "input_ids": F.pad(batch["input_ids"], (0, T - old)),
        "labels": F.pad(batch["labels"], (0, T - old), value=IGNORE_INDEX),
        "image_slots": batch["image_slots"] % old + batch["image_slots"] // old * T,
    }


def to_llava_batch(batch: dict) -> tuple[Tensor, Tensor, Tensor]:
    """ids, attention mask and labels (B, T + 1) of LLaVA, which shifts the labels itself and wants the last
    token too."""
    lengths = row_lengths(batch).unsqueeze(1)
    ids = F.pad(to_llava_ids(batch["input_ids"], batch["image_slots"]), (0, 1))
    ids.scatter_(1, lengths, batch["labels"].gather(1, lengths - 1))
    mask = torch.arange(ids.shape[1]) <= lengths
    return ids.where(mask, 2), mask.long(), F.pad(batch["labels"], (1, 0), value=IGNORE_INDEX)


def measure(
    bench: Bench, variants: dict[str, Variant], repetitions: int, peaks: dict[str, list[float]]
) -> dict:
    """Medians over interleaved steps; the slow ones are taken every other time.

    Batches differ in length, so speed is counted in needed work per second, and told in average samples.
    """
    taken: dict[str, list[dict]] = {name: [] for name in variants}
    for number in range(-1, repetitions):
        for name, variant in variants.items():
            slow = bool(variant.pad_to) or variant.llava
            if slow and (number < 0 or number % 2 == 0):
                continue
            peaks[variant.dtype].append(matmul_speed(DTYPES[variant.dtype]))
            step = bench.step(variant, number) | {"peak": peaks[variant.dtype][-1]}
            if number >= 0:  # the first round warms up
                taken[name].append(step)

    def middle(steps: list[dict], value) -> float:
        return statistics.median(value(step) for step in steps)

    results = {}
    for name, steps in taken.items():
        per_sample = bench.flops_per_sample(variants[name])
        results[name] = {
            "samples_per_s": middle(steps, lambda step: step["flops"] / step["step"]) / per_sample,
            "share": middle(steps, lambda step: step["flops"] / step["step"] / step["peak"]),
            "gflop_per_sample": per_sample / 1e9,
            "steps": len(steps),
            **{
                f"{part}_share": middle(steps, lambda step, part=part: step[part] / step["step"])
                for part in PARTS
            },
            "data_ms_per_sample": 1e3 * middle(steps, lambda step: step["data"] / step["samples"]),
        }
    return results


def peak_memory(name: str, quick: bool, two_images: bool = False) -> float:
    """GB that a process needs which does nothing but two steps of a variant."""
    command = [sys.executable, __file__, "--memory_of", name] + ["--quick"] * quick
    command += ["--two_images"] * two_images
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def use_memory(
    variant: Variant, config: LMConfig, vision: CLIPVisionConfig, batch_size: int, shape: Shape
) -> float:
    """Two steps on rows of one length, as trainer.loop takes them (or LLaVA would); the peak in GB."""
    retain_freed_memory()
    T, N = (variant.pad_to or shape.tokens), config.num_image_tokens
    ids, labels = torch.full((batch_size, T), 99), torch.full((batch_size, T), IGNORE_INDEX)
    labels[:, shape.tokens - shape.targets : shape.tokens] = 99
    starts = 5 + N * torch.arange(shape.images) + T * torch.arange(batch_size).unsqueeze(1)  # (B, images)
    slots = starts.flatten().unsqueeze(1) + torch.arange(N)  # (M, N)
    batch = {
        "input_ids": ids,
        "labels": labels,
        "image_slots": slots,
        "num_targets": shape.targets * batch_size,
        "target_positions": (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1),
        "seconds": 0.0,
    }
    bench = Bench.__new__(Bench)
    bench.config, bench.vision, bench.optimizers = config, vision, {}
    bench.model = Transformer(config).train()
    if variant.cached:
        batch["image_features"] = torch.zeros(len(slots), N, config.vision_dim).half()
    else:
        batch["pixel_values"] = torch.zeros(len(slots), 3, vision.image_size, vision.image_size)
        tower = CLIPVisionModel(vision).eval().requires_grad_(False).to(DTYPES[variant.dtype])
        bench.towers = {variant.dtype: tower}
    if variant.llava:
        bench.llava = to_llava(bench.model, tower.float()).train()
        bench.llava.model.language_model.requires_grad_(True)
        bench.model, bench.towers = None, {}
    bench.batches = {(variant.bucket, variant.cached): [batch]}
    for number in range(2):
        bench.step(variant, number)
    # Not ru_maxrss, which a process inherits from the one that started it.
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9


def run(args: argparse.Namespace, folder: Path) -> dict:
    """All measurements."""
    torch.manual_seed(0)
    retain_freed_memory()
    vision, config, batch_size = sizes(args.quick)
    save_tokenizer(folder / "tokenizer")
    clip = CLIPVisionModel(vision).eval().requires_grad_(False)
    peaks = {name: [matmul_speed(dtype) for _ in range(3)] for name, dtype in DTYPES.items()}
    results = {
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    bench = Bench(folder, PRETRAIN_SHAPE, PRETRAIN, config, clip, batch_size)
    bench.check()
    results["pretrain"] = measure(bench, OURS | LLAVA | ABLATION, args.repetitions, peaks)
    for shape, spec in ((SFT_SHAPE, SFT), (TWO_IMAGES_SHAPE, SFT_MULTI)):
        bench = Bench(folder, shape, spec, config, clip, max(1, batch_size // 4))
        results[shape.name] = measure(bench, OURS, args.repetitions, peaks)
    del bench
    names = ["bf16, cached features"] if args.quick else [*OURS, *LLAVA]
    results["peak_gb"] = {name: peak_memory(name, args.quick) for name in names}
    results["two_images_peak_gb"] = {
        name: peak_memory(name, args.quick, two_images=True) for name in names if name in OURS
    }
    results["matmul_gflops"] = {name: statistics.median(speeds) / 1e9 for name, speeds in peaks.items()}
    results["memory_gb_per_s"] = statistics.median(read_speed() for _ in range(5)) / 1e9
    return results


def sizes(quick: bool) -> tuple[CLIPVisionConfig, LMConfig, int]:
    if quick:
        return (
            CLIPVisionConfig(
                hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
            ),
            LMConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vision_dim=32),
            4,
        )
    return CLIPVisionConfig(), LMConfig(), 32


def tables(results: dict) -> str:
    """Markdown."""
    speeds = ", ".join(f"{speed:.0f} GFLOP/s in {name}" for name, speed in results["matmul_gflops"].items())
    lines = [
        f"{results['threads']} threads, torch {results['torch']}; matrix product of 2048 x 2048: "
        f"{speeds}; memory read at {results['memory_gb_per_s']:.0f} GB/s"
    ]
    off = "everything off"
    for stage in ("pretrain", "SFT", "two images"):
        rows = results[stage]
        size = results["batch_size"] if stage == "pretrain" else max(1, results["batch_size"] // 4)
        lines += [
            "",
            f"{stage}, batch {size}",
            "",
            '| step | samples/s | times "everything off" | share of the roofline '
            "| needed GFLOP per sample | CLIP / forward / backward / optimizer "
            "| loading, one core | peak memory |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name in filter(rows.__contains__, (*OURS, *LLAVA)):
            row = rows[name]
            parts = " / ".join(f"{100 * row[f'{part}_share']:.0f} %" for part in PARTS)
            known = name in results["peak_gb"] and stage == "pretrain"
            memory = f"{results['peak_gb'][name]:.2f} GB" if known else ""
            speed = row["samples_per_s"]
            lines.append(
                f"| {name} | {speed:.1f} | {speed / rows[off]['samples_per_s']:.1f} "
                f"| {100 * row['share']:.0f} % | {row['gflop_per_sample']:.1f} | {parts} "
                f"| {row['data_ms_per_sample']:.2f} ms per sample | {memory} |"
            )
    rows = results["pretrain"]
    lines += ["", "| one gain switched off | samples/s | slower than with it |", "|---|---|---|"]
    for name in ABLATION:
        base = rows["bf16" if name.startswith("bf16") else "bf16, cached features"]["samples_per_s"]
        speed = rows[name]["samples_per_s"]
        lines.append(f"| {name} | {speed:.1f} | {base / speed:.2f} x |")
    memory = ", ".join(f"{peak:.2f} GB {name}" for name, peak in results["two_images_peak_gb"].items())
    lines.append(f"\npeak memory of a step on {results['batch_size']} rows of two images: {memory}")
    for name, variant in LLAVA.items():
        dtype = "bf16" if variant.dtype == "bfloat16" else "fp32"
        ratio = rows[dtype]["samples_per_s"] / rows[name]["samples_per_s"]
        lines.append(f"\n{dtype} without the cache: {ratio:.1f} times {name}")
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that everything runs")
    parser.add_argument("--repetitions", type=int, default=4, help="steps of a kind (default: %(default)s)")
    parser.add_argument("--memory_of", choices=[*OURS, *LLAVA], help=argparse.SUPPRESS)
    parser.add_argument("--two_images", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.repetitions < 2:
        parser.error("--repetitions must be at least 2")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.memory_of:
        vision, config, batch_size = sizes(args.quick)
        print(
            use_memory(
                (OURS | LLAVA)[args.memory_of],
                config,
                vision,
                batch_size,
                TWO_IMAGES_SHAPE if args.two_images else PRETRAIN_SHAPE,
            )
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        results = run(args, Path(folder))
    print(tables(results))
    path = ROOT / "benchmarks" / "results" / ("train_step_quick.json" if args.quick else "train_step.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
