"""From an image file to CLIP features: decode, RGB, squash to 224 x 224, the frozen vision tower.

Any CLIP vision tower in the format of transformers will do, or a SigLIP one: sizes follow from its config.

Letters: M images, N tokens per image (50), V CLIP width (768), S side in pixels (224), for ViT-B/32.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionModel, SiglipVisionModel
from transformers.utils import logging as transformers_logging

from model.files import check_clip_folder, read_json
from model.images import open_image, to_rgb
from model.names import CLIP_CURE

# model_type in config.json -> the class that reads it, and what of its config is set: SigLIP's pooling head,
# which makes one vector of an image, is not used here.
ENCODERS = {"clip": (CLIPVisionModel, {}), "siglip": (SiglipVisionModel, {"vision_use_head": False})}
UNUSED_WEIGHTS = ("text_", "visual_projection", "logit_", "head.", "vision_model.head.")
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageProcessor:
    """What CLIP was trained to see: the side of its square input and the mean and spread of each colour
    channel."""

    size: int = 224
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    jpeg_draft: bool = False  # decode large JPEGs at a half, quarter or eighth of their size: faster


def get_vision_model(path: str | Path) -> tuple[CLIPVisionModel | SiglipVisionModel, ImageProcessor]:
    """Load the vision tower of a folder in the format of openai/clip-vit-base-patch32, frozen, in fp32.

    The folder may hold the whole CLIP or SigLIP (its text tower is skipped) or the vision tower alone,
    as pytorch_model.bin or model.safetensors.
    Raises FileNotFoundError or ValueError, naming the file and the cure.
    """
    path = Path(path)
    check_clip_folder(path)
    kind = str(read_json(path / "config.json").get("model_type", "clip"))
    if kind.removesuffix("_vision_model") not in ENCODERS:
        raise ValueError(
            f"{path} holds a model of type {kind}, but images are encoded by "
            f"{' or '.join(ENCODERS)}: {CLIP_CURE}, or name yours with --clip_path"
        )
    encoder, settings = ENCODERS[kind.removesuffix("_vision_model")]
    with quiet_transformers():
        # The stock class under its own name: a subclass would match no key and keep random weights.
        # dtype: otherwise the checkpoint's own type decides. local_files_only: never wait for a network.
        try:
            vision_model, report = encoder.from_pretrained(
                path, dtype=torch.float32, local_files_only=True, output_loading_info=True, **settings
            )
        except Exception as error:  # half a dozen types, all meaning the same to the user
            raise ValueError(
                f"cannot read the CLIP at {path} ({type(error).__name__}: {error}); {CLIP_CURE}"
            ) from None
    missing = [name for name in report["missing_keys"] if not name.endswith("position_ids")]
    foreign = [
        name
        for name in report["unexpected_keys"]
        if not name.startswith(UNUSED_WEIGHTS) and "position_ids" not in name
    ]
    if missing or foreign:
        raise ValueError(
            f"{path} does not fit its own config.json: {len(missing)} weights missing "
            f"({', '.join(sorted(missing)[:3])}), {len(foreign)} unknown; {CLIP_CURE}"
        )
    vision_model.eval().requires_grad_(False)  # after loading: a freeze in __init__ is lost
    return vision_model, read_image_processor(path, vision_model.config.image_size)


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
    raise FileNotFoundError(
        f"{path} holds no preprocessor_config.json with image_mean and image_std: {CLIP_CURE}"
    )


def num_image_tokens(vision_model: CLIPVisionModel | SiglipVisionModel) -> int:
    """Tokens per image: one per patch, and CLIP's class token, which SigLIP lacks; 7 * 7 + 1 = 50 for
    ViT-B/32."""
    config = vision_model.config
    return (config.image_size // config.patch_size) ** 2 + isinstance(vision_model, CLIPVisionModel)


def check_fit(config, tokenizer, vision_model, weights: str | Path, clip_path: str | Path) -> None:
    """Raise ValueError unless the language model, the tokenizer and CLIP have the same sizes."""
    width, tokens = vision_model.config.hidden_size, num_image_tokens(vision_model)
    if (width, tokens) != (config.vision_dim, config.num_image_tokens):
        raise ValueError(
            f"{weights} was made for image features of {config.num_image_tokens} x "
            f"{config.vision_dim}, but the CLIP at {clip_path} gives {tokens} x {width}: "
            "name the right one with --clip_path"
        )
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens but {weights} knows "
            f"{config.vocab_size}: name the right one with --tokenizer_path"
        )


def get_img_process(image: Image.Image, image_processor: ImageProcessor) -> Tensor:
    """An image to CLIP's input, (3, S, S) float32.

    Squashed to a square instead of cropped, as v1 does, so nothing at the edges is lost. Equal to
    transformers' CLIPImageProcessor(size={"height": S, "width": S}, do_center_crop=False) within float
    rounding, but faster.
    """
    side = image_processor.size
    pixels = np.array(to_rgb(image).resize((side, side), Image.Resampling.BICUBIC))  # (S, S, 3) uint8
    # Turned while they are bytes, a quarter of the traffic.
    pixels = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float()
    mean, std = (
        255 * torch.tensor(values).view(3, 1, 1) for values in (image_processor.mean, image_processor.std)
    )
    return pixels.sub_(mean).div_(std)


def load_pixels(path: str | Path, image_processor: ImageProcessor) -> Tensor:
    """An image file to CLIP's input, (3, S, S). Raises FileNotFoundError or ValueError, naming the file."""
    image = open_image(path, image_processor.size if image_processor.jpeg_draft else 0)
    return get_img_process(image, image_processor)


@torch.no_grad()
def get_img_embedding(pixel_values: Tensor, vision_model: CLIPVisionModel | SiglipVisionModel) -> Tensor:
    """Encode images with the frozen vision tower, all in one call, in the tower's own dtype.

    pixel_values  (M, 3, S, S) float32, from get_img_process; M may be 0
    returns       (M, N, V): of CLIP the class token and the patch tokens, before its final layer norm,
                  because v1 took them there; of SigLIP the patch tokens
    """
    if not len(pixel_values):
        config = vision_model.config
        return pixel_values.new_zeros(
            0, num_image_tokens(vision_model), config.hidden_size, dtype=vision_model.dtype
        )
    return vision_model(pixel_values=pixel_values.to(vision_model.dtype)).last_hidden_state
