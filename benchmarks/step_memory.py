"""Peak memory of a process that does nothing but two training steps of one kind, in GB.

python -m benchmarks.step_memory "bf16, cached features"
python -m benchmarks.step_memory fp32 --two_images
"""

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.machine import DTYPES, peak_memory, run_module
from benchmarks.step import Steps, sizes
from benchmarks.synthetic import PRETRAIN_SHAPE, TWO_IMAGES_SHAPE, Shape, make_clip, save_clip
from benchmarks.variants import LLAVA, OURS, Variant
from model.data.batch import IGNORE_INDEX
from model.LMConfig import LMConfig
from model.transformer import Transformer
from model.vision_utils import get_vision_model
from trainer.distributed import retain_freed_memory

IMAGE_SIDE = 224


def peak_gb(name: str, clip_path: Path, quick: bool = False, two_images: bool = False) -> float:
    """Of a variant by its name, in a fresh process that reads CLIP from a folder, as training does."""
    flags = [f"--clip_path={clip_path}", *["--quick"] * quick, *["--two_images"] * two_images]
    return float(run_module("step_memory", name, *flags).split()[-1])


def make_batch(shape: Shape, size: int, config: LMConfig, variant: Variant) -> dict:
    """Rows of one length, with as much in them as the shape says."""
    T, N = shape.tokens, config.num_image_tokens
    ids, labels = torch.full((size, T), 99), torch.full((size, T), IGNORE_INDEX)
    labels[:, T - shape.targets :] = 99
    starts = 5 + N * torch.arange(shape.images) + T * torch.arange(size).unsqueeze(1)  # (B, images)
    slots = starts.view(-1, 1) + torch.arange(N)  # (M, N)
    batch = {
        "input_ids": ids,
        "labels": labels,
        "image_slots": slots,
        "target_positions": (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1),
    }
    if variant.cached:
        return batch | {"image_features": torch.zeros(len(slots), N, config.vision_dim).half()}
    return batch | {"pixel_values": torch.zeros(len(slots), 3, IMAGE_SIDE, IMAGE_SIDE)}


def take_two_steps(variant: Variant, shape: Shape, clip_path: Path, quick: bool) -> None:
    retain_freed_memory()
    _, config, batch_size = sizes(quick)
    towers = {}
    if not variant.cached:
        dtype = "float32" if variant.llava else variant.dtype
        towers[dtype] = get_vision_model(clip_path)[0].to(DTYPES[dtype])
    steps = Steps(Transformer(config), towers)
    steps.model(variant)
    if variant.llava:  # it has copies of both
        steps.plain = None
        towers.clear()
    batch = make_batch(shape, batch_size, config, variant)
    for _ in range(2):
        steps.take(batch, variant)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=[*OURS, *LLAVA])
    parser.add_argument("--two_images", action="store_true", help="rows of two images, not of one")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs")
    parser.add_argument("--clip_path", type=Path, help=argparse.SUPPRESS)  # in the process that is measured
    args = parser.parse_args(argv)
    if args.clip_path:
        shape = TWO_IMAGES_SHAPE if args.two_images else PRETRAIN_SHAPE
        take_two_steps((OURS | LLAVA)[args.name], shape, args.clip_path, args.quick)
        print(peak_memory() / 1e9)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_clip(Path(folder), make_clip(**sizes(args.quick)[0]))
        print(f"{peak_gb(args.name, Path(folder), args.quick, args.two_images):.2f} GB")


if __name__ == "__main__":
    main()
