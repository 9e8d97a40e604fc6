"""Names that flags, files and loaders share: where things lie and what they are called.

Imports nothing heavy, so a wrong flag or a missing file is reported before PyTorch is loaded.
"""

import os
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from model.LMConfig import LMConfig

ROOT = Path(__file__).resolve().parent.parent  # of the repository
DEMO_DIR = Path("out/demo")  # where quickstart.sh trains
TOKENIZER_PATH = "model/minimind_tokenizer"
CLIP_PATH = "model/clip_model/clip-vit-base-patch32"
STAGES = ("llm", "vlm_pretrain", "vlm_sft", "vlm_sft_multi")
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2",
    ".j2k", ".avif", ".heic", ".heif", ".hif", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
IMAGE_MARK, VIDEO_MARK = "<image>", "<video>"  # in texts: here it stands
VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv", ".3gp",
)  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")
FEATURE_DTYPES = ("float16", "float32")
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")

TOKENIZER_CURE = (
    "MiniMind's own comes with: python -m model.download tokenizer, or name yours with --tokenizer_path"
)
CLIP_CURE = "download it with: python -m model.download clip"


def is_video_name(path: str | Path) -> bool:
    """An animated GIF is an image."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def find_recorded(path: str | Path, weights: str | Path) -> Path:
    """Where a path is that weights name, or a default: from the working directory, as when they were trained;
    else from a folder around the weights, the innermost first; else from the repository. The path itself
    where it is nowhere."""
    bases = [Path(), *Path(os.path.abspath(weights)).parents, ROOT]
    return next((base / path for base in bases if os.path.exists(base / path)), Path(path))


def weights_path(out_dir: str | Path, config: LMConfig, stage: str) -> Path:
    """Where a stage's weights lie, with v1's names: out/512_vlm_sft.pth, out/512_moe_vlm_sft.pth."""
    assert stage in STAGES, stage
    return Path(out_dir) / f"{config.dim}{'_moe' if config.use_moe else ''}_{stage}.pth"


def find_weights(
    out_dir: str | Path, stages: Sequence[str], dim: int = 0, use_moe: bool | None = None
) -> Path:
    """The weights of the first of `stages` that has any in out_dir; of several sizes, the newest file. Where
    nothing was trained in out/ itself, the demo's in out/demo/ will do.

    dim, use_moe  only weights of this width (0 = any), with or without experts (None = either)
    raises        FileNotFoundError that lists what is there instead
    """
    folder = Path(out_dir)
    folders = [folder, DEMO_DIR] if folder == DEMO_DIR.parent else [folder]
    for place, stage in product(folders, stages):
        found = [path for path in place.glob(f"*_{stage}.pth") if is_wanted(path.name, stage, dim, use_moe)]
        if found:
            return max(found, key=lambda path: path.stat().st_mtime)
    others = ", ".join(sorted(path.name for path in folder.glob("*_vlm_*.pth")))
    if others:
        wanted = " or ".join(f"{dim or '*'}{'_moe' if use_moe else ''}_{stage}.pth" for stage in stages)
        raise FileNotFoundError(
            f"{folder}/{wanted} not found, but {others}: "
            "choose by --dim, --use_moe and --stage, or name a file with --load_from"
        )
    raise FileNotFoundError(
        f"no *_vlm_*.pth in {folder}: bash quickstart.sh trains a demo; or train yours (README, 'Stages'), "
        "download v1's with python -m model.download vlm, or name a file with --load_from"
    )


def is_wanted(name: str, stage: str, dim: int, use_moe: bool | None) -> bool:
    match = re.fullmatch(rf"(\d+)(_moe)?_{stage}\.pth", name)
    return bool(match) and dim in (0, int(match[1])) and use_moe in (None, bool(match[2]))
