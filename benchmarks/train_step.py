"""How fast a training step is: against what the machine could do, against transformers' LLaVA, and against
itself with each gain left out.

writes   benchmarks/results/train_step.json, and prints the tables

    python -m benchmarks.train_step               # about a quarter of an hour on two cores
    python -m benchmarks.train_step --quick       # does it run? small sizes, no meaning

Everything is made here, in the real formats and at the real geometry: 512 x 8, CLIP ViT-B/32 (random
weights), 6400 tokens, captions of 89 tokens of which 18 are targets, questions of 185, two images with 205.

needed work   matrix products of CLIP's forward pass and of the language model's forward and backward pass, at
              the rows' real lengths; the last feed-forward and the vocabulary only at the targets
share         needed work / time of the step / speed of a 2048 x 2048 matrix product of the same dtype, taken
              just before it; medians of interleaved steps, as the machine may have other work
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.machine import DTYPES, describe_machine, matmul_speed, read_speed, save_results
from benchmarks.roofline import needed_flops
from benchmarks.stage_batches import Batches, make_batches
from benchmarks.step import PARTS, Steps, sizes
from benchmarks.step_memory import peak_gb
from benchmarks.synthetic import (
    PRETRAIN_SHAPE,
    SFT_SHAPE,
    TWO_IMAGES_SHAPE,
    make_clip,
    save_clip,
    save_tokenizer,
)
from benchmarks.variants import ABLATION, LLAVA, OURS, Variant
from model.data.spec import PRETRAIN, SFT, SFT_MULTI
from model.prompt import load_tokenizer
from model.transformer import Transformer
from model.vision_utils import get_vision_model
from trainer.distributed import retain_freed_memory

STAGES = ((PRETRAIN_SHAPE, PRETRAIN), (SFT_SHAPE, SFT), (TWO_IMAGES_SHAPE, SFT_MULTI))


class Speeds:
    """How fast the machine multiplies, asked again before every step."""

    def __init__(self, size: int):
        self.size = size
        self.taken: dict[str, list[float]] = {name: [] for name in DTYPES}

    def now(self, dtype: str) -> float:
        self.taken[dtype].append(matmul_speed(DTYPES[dtype], self.size))
        return self.taken[dtype][-1]

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(speeds) for name, speeds in self.taken.items()}


def measure(
    steps: Steps, batches: Batches, variants: dict[str, Variant], repetitions: int, speeds: Speeds
) -> dict:
    """Medians over interleaved steps; the slow ones are taken every other time."""
    vision = steps.towers["float32"].config

    def flops(batch: dict, variant: Variant) -> float:
        return needed_flops(batch, steps.plain.config, vision, not variant.cached)

    taken: dict[str, list[dict]] = {name: [] for name in variants}
    for number in range(-1, repetitions):
        for name, variant in variants.items():
            if variant.is_slow and (number < 0 or number % 2 == 0):
                continue
            choice = batches[variant.bucket, variant.cached]
            batch = choice[number % len(choice)]
            peak = speeds.now(variant.dtype)
            step = steps.take(batch, variant)
            step |= {"peak": peak, "flops": flops(batch, variant)}
            step["data"] = batch["seconds"] / batch["num_rows"]
            if number >= 0:  # the first round warms up
                taken[name].append(step)
    results = {}
    for name, variant in variants.items():
        average = batches[False, variant.cached]
        per_sample = sum(flops(batch, variant) for batch in average) / sum(
            batch["num_rows"] for batch in average
        )
        results[name] = summarise(taken[name], per_sample)
    return results


def summarise(steps: list[dict], flops_per_sample: float) -> dict[str, float]:
    """Batches differ in length: speed is counted in needed work per second, and given in average samples."""

    def median(value: Callable[[dict], float]) -> float:
        return statistics.median(value(step) for step in steps)

    return {
        "samples_per_s": median(lambda step: step["flops"] / step["step"]) / flops_per_sample,
        "share": median(lambda step: step["flops"] / step["step"] / step["peak"]),
        "gflop_per_sample": flops_per_sample / 1e9,
        "steps": len(steps),
        **{f"{part}_share": median(lambda step, part=part: step[part] / step["step"]) for part in PARTS},
        "data_ms_per_sample": 1e3 * median(lambda step: step["data"]),
    }


def run(args: argparse.Namespace, folder: Path) -> dict:
    """All measurements."""
    torch.manual_seed(0)
    retain_freed_memory()
    vision, config, batch_size = sizes(args.quick)
    save_tokenizer(folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    clip_path = folder / "clip"
    save_clip(clip_path, make_clip(**vision))
    towers = {name: get_vision_model(clip_path)[0].to(dtype) for name, dtype in DTYPES.items()}
    steps = Steps(Transformer(config), towers)
    speeds = Speeds(256 if args.quick else 2048)
    results = {"batch_size": batch_size, "machine": describe_machine(), "matmul_size": speeds.size}
    for shape, spec in STAGES:
        is_first = shape is PRETRAIN_SHAPE
        rows = batch_size if is_first else max(1, batch_size // 4)
        batches = make_batches(folder / shape.name, shape, spec, config, tokenizer, rows)
        if is_first:
            steps.check(batches[False, False][0])
        variants = OURS | LLAVA | ABLATION if is_first else OURS
        results[shape.name] = measure(steps, batches, variants, args.repetitions, speeds)
    del steps, towers, batches
    names = ["bf16, cached features"] if args.quick else [*OURS, *LLAVA]
    results["peak_gb"] = {name: peak_gb(name, clip_path, args.quick) for name in names}
    results["two_images_peak_gb"] = {
        name: peak_gb(name, clip_path, args.quick, two_images=True) for name in names if name in OURS
    }
    results["matmul_gflops"] = {name: speed / 1e9 for name, speed in speeds.medians().items()}
    results["memory_gb_per_s"] = read_speed() / 1e9
    return results


# ---- tables ------------------------------------------------------------------------------------------------


def tables(results: dict) -> str:
    """Markdown."""
    speeds = ", ".join(f"{speed:.0f} GFLOP/s in {name}" for name, speed in results["matmul_gflops"].items())
    rows = results["pretrain"]
    memory = ", ".join(f"{peak:.2f} GB {name}" for name, peak in results["two_images_peak_gb"].items())
    return "\n".join(
        [
            f"{results['machine']}; matrix product of {results['matmul_size']} x {results['matmul_size']}: "
            f"{speeds}; "
            f"memory read at {results['memory_gb_per_s']:.0f} GB/s",
            *(stage_table(results, shape.name) for shape, _ in STAGES),
            ablation_table(rows),
            f"\npeak memory of a step on {results['batch_size']} rows of two images: {memory}",
            *(f"\n{line}" for line in compare_with_llava(rows)),
        ]
    )


def stage_table(results: dict, stage: str) -> str:
    rows = results[stage]
    size = results["batch_size"] if stage == "pretrain" else max(1, results["batch_size"] // 4)
    lines = [
        f"\n{stage}, batch {size}\n",
        '| step | samples/s | times "everything off" | share of the roofline | needed GFLOP per sample '
        "| CLIP / forward / backward / optimizer | loading, one core | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in filter(rows.__contains__, (*OURS, *LLAVA)):
        row = rows[name]
        parts = " / ".join(f"{100 * row[f'{part}_share']:.0f} %" for part in PARTS)
        known = name in results["peak_gb"] and stage == "pretrain"
        memory = f"{results['peak_gb'][name]:.2f} GB" if known else ""
        times = row["samples_per_s"] / rows["everything off"]["samples_per_s"]
        lines.append(
            f"| {name} | {row['samples_per_s']:.1f} | {times:.1f} | {100 * row['share']:.0f} % "
            f"| {row['gflop_per_sample']:.1f} | {parts} | {row['data_ms_per_sample']:.2f} ms per sample "
            f"| {memory} |"
        )
    return "\n".join(lines)


def ablation_table(rows: dict) -> str:
    lines = ["", "| one gain left out | samples/s | slower than with it |", "|---|---|---|"]
    for name in ABLATION:
        whole = "bf16" if name.startswith("bf16") else "bf16, cached features"
        speed = rows[name]["samples_per_s"]
        lines.append(f"| {name} | {speed:.1f} | {rows[whole]['samples_per_s'] / speed:.2f} x |")
    return "\n".join(lines)


def compare_with_llava(rows: dict) -> list[str]:
    lines = []
    for name, variant in LLAVA.items():
        dtype = "bf16" if variant.dtype == "bfloat16" else "fp32"
        ratio = rows[dtype]["samples_per_s"] / rows[name]["samples_per_s"]
        lines.append(f"{dtype} without the cache: {ratio:.1f} times {name}")
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that everything runs")
    parser.add_argument("--repetitions", type=int, default=4, help="steps of a kind (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.repetitions < 2:
        parser.error("--repetitions must be at least 2")
    if not args.quick and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        sys.exit(
            "error: this processor has no bfloat16 products, so a step would take minutes (--quick runs)"
        )
    with tempfile.TemporaryDirectory() as folder:
        results = run(args, Path(folder))
    print(tables(results))
    save_results("train_step_quick" if args.quick else "train_step", results)


if __name__ == "__main__":
    main()
