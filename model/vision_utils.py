"""From a picture file to CLIP features: decode, RGB, squash to 224 x 224, the frozen vision tower.

Letters: M images, N tokens per image (50), V CLIP width (768), S side in pixels (224).
"""
import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import CLIPVisionModel
from transformers.utils import logging as transformers_logging

from model.checkpoint import check_weight_file, find_substitute

CLIP_CURE = ("download it with: hf download openai/clip-vit-base-patch32 config.json "
             "preprocessor_config.json pytorch_model.bin --local-dir model/clip_model/clip-vit-base-patch32")
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageProcessor:
    """What CLIP was trained to see: the side of its square input and the mean and spread of each colour
    channel."""

    size: int = 224
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    jpeg_draft: bool = False        # decode large JPEGs at a half, quarter or eighth of their size: faster


def get_vision_model(path: str | Path) -> tuple[CLIPVisionModel, ImageProcessor]:
    """Load the vision tower of a CLIP folder in the format of openai/clip-vit-base-patch32, frozen, in fp32.

    The folder may hold the whole CLIP (its text tower is skipped) or the vision tower alone,
    as pytorch_model.bin or model.safetensors.
    Raises FileNotFoundError or ValueError, naming the file and the cure.
    """
    path = Path(path)
    check_clip_folder(path)
    with quiet_transformers():
        # The stock class under its own name: a subclass would match no key and keep random weights.
        # dtype: otherwise the checkpoint's own type decides. local_files_only: never wait for a network.
        try:
            vision_model, report = CLIPVisionModel.from_pretrained(
                path, dtype=torch.float32, local_files_only=True, output_loading_info=True)
        except Exception as error:      # half a dozen types, all meaning the same to the user
            raise ValueError(f"cannot read the CLIP at {path} ({type(error).__name__}: {error}); "
                             f"{CLIP_CURE}") from None
    missing = [name for name in report["missing_keys"] if not name.endswith("position_ids")]
    foreign = [name for name in report["unexpected_keys"]
               if not name.startswith(("text_", "visual_projection", "logit_scale"))
               and "position_ids" not in name]
    if missing or foreign:
        raise ValueError(f"{path} does not fit its own config.json: {len(missing)} weights missing "
                         f"({', '.join(sorted(missing)[:3])}), {len(foreign)} unknown; {CLIP_CURE}")
    vision_model.eval().requires_grad_(False)       # after loading: a freeze in __init__ is lost
    return vision_model, read_image_processor(path, vision_model.config.image_size)


def check_clip_folder(path: Path) -> None:
    if not path.is_dir():
        raise FileNotFoundError(f"no CLIP folder at {path}: {CLIP_CURE}, or name yours with --clip_path")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} holds no config.json: {CLIP_CURE}")
    check_weight_file(path / "config.json", CLIP_CURE)
    weights = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
    if not weights:
        raise FileNotFoundError(f"{path} holds neither model.safetensors nor pytorch_model.bin: {CLIP_CURE}")
    check_weight_file(weights[0], CLIP_CURE)        # transformers prefers safetensors too


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide transformers' table of skipped text-tower weights: they are expected, and what matters is checked
    here."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()


def read_image_processor(path: Path, size: int) -> ImageProcessor:
    """Mean and spread from preprocessor_config.json, or from processor_config.json, where newer folders keep
    them."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (path / name).is_file():
            values = json.loads((path / name).read_text())
            values = values.get("image_processor", values)
            if "image_mean" in values:
                return ImageProcessor(size, tuple(values["image_mean"]), tuple(values["image_std"]))
    raise FileNotFoundError(f"{path} holds no preprocessor_config.json with image_mean and image_std: "
                            f"{CLIP_CURE}")


def num_image_tokens(vision_model: CLIPVisionModel) -> int:
    """Tokens per image: one per patch and the class token; 7 * 7 + 1 = 50 for ViT-B/32."""
    return (vision_model.config.image_size // vision_model.config.patch_size) ** 2 + 1


def turn_upright(image: Image.Image) -> Image.Image:
    """As its EXIF data says; where they are damaged, the picture is shown as it lies."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:       # Pillow raises SyntaxError, struct.error and others; the pixels are whole
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture mode to RGB as a person would see it: upright, transparency on white paper, 16 bits scaled
    to 8."""
    image = turn_upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode.startswith("I") and values.max(initial=0) > 255 else 255.0
        image = Image.fromarray((values.clip(0, top) * (255.0 / top)).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")


def check_is_file(path: str | Path, what: str = "picture") -> None:
    if not os.path.isfile(path):        # a pipe would be waited for, a name with NUL or too long is refused
        if os.path.exists(path):
            raise ValueError(f"cannot read {what} {path}: not a file")
        raise FileNotFoundError(f"{what} not found: {path}")


def open_image(path: str | Path, draft_side: int = 0) -> Image.Image:
    """Read and fully decode a picture file, in RGB. Raises FileNotFoundError or ValueError, naming the file,
    whatever is wrong with it.

    draft_side  if not 0: a JPEG may come smaller, but not below this side
    """
    check_is_file(path)
    try:
        with Image.open(path) as image:
            if draft_side:
                image.draft("RGB", (draft_side, draft_side))
            image.load()
            image = turn_upright(image)
    except Exception as error:      # on damaged files Pillow, which alone works here, raises any type
        raise ValueError(f"cannot read picture {path}: {explain_damage(path, error)}") from None
    try:
        return to_rgb(image)
    except (ValueError, MemoryError) as error:      # a mode without a conversion; a picture beyond the memory
        raise ValueError(f"cannot read picture {path}: {explain_damage(path, error)}") from None


def explain_damage(path: str | Path, error: Exception | str) -> str:
    with contextlib.suppress(OSError):
        if substitute := find_substitute(path):
            return f"it {substitute}"
    return str(error).replace(f" {os.fspath(path)!r}", "") or type(error).__name__


def get_img_process(image: Image.Image, image_processor: ImageProcessor) -> Tensor:
    """A picture to CLIP's input, (3, S, S) float32.

    Squashed to a square instead of cropped, as v1 does, so nothing at the edges is lost. Equal to
    transformers' CLIPImageProcessor(size={"height": S, "width": S}, do_center_crop=False) within float
    rounding, but faster.
    """
    side = image_processor.size
    pixels = np.array(to_rgb(image).resize((side, side), Image.Resampling.BICUBIC))         # (S, S, 3) uint8
    # Turned while they are bytes, a quarter of the traffic.
    pixels = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float()
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (image_processor.mean,
                                                                         image_processor.std))
    return pixels.sub_(mean).div_(std)


def load_pixels(path: str | Path, image_processor: ImageProcessor) -> Tensor:
    """A picture file to CLIP's input, (3, S, S). Raises FileNotFoundError or ValueError, naming the file."""
    image = open_image(path, image_processor.size if image_processor.jpeg_draft else 0)
    return get_img_process(image, image_processor)


@torch.no_grad()
def get_img_embedding(pixel_values: Tensor, vision_model: CLIPVisionModel) -> Tensor:
    """Encode images with the frozen CLIP tower, all in one call, in the tower's own dtype.

    pixel_values  (M, 3, S, S) float32, from get_img_process; M may be 0
    returns       (M, N, V): the class token and the patch tokens, before CLIP's final layer norm, because v1
                  took them there
    """
    if not len(pixel_values):
        config = vision_model.config
        return pixel_values.new_zeros(0, num_image_tokens(vision_model), config.hidden_size,
                                      dtype=vision_model.dtype)
    return vision_model(pixel_values=pixel_values.to(vision_model.dtype)).last_hidden_state
