"""From an image file to CLIP features: decode, RGB, squash to 224 x 224, the frozen vision tower.

Any CLIP vision tower in the format of transformers will do, or a SigLIP one: sizes follow from its config.
The tower itself is vision_tower.py.

Letters: M images, N tokens per image (50), V CLIP width (768), S side in pixels (224), for ViT-B/32.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.checkpoint import read_tensors, weight_files
from model.device import without_memory
from model.files import check_clip_folder, read_json
from model.image_modes import to_rgb
from model.images import open_image
from model.LMConfig import str_of
from model.names import CLIP_CURE
from model.vision_config import read_vision_config
from model.vision_tower import VisionTower

# The text tower, and what makes one vector of an image or compares it with a text.
UNUSED_WEIGHTS = ("text_", "visual_projection", "logit_", "head.")
# A folder of LLaVA, as an export or transformers writes it: CLIP, and all else.
TOWER = re.compile(r"^(model\.)?vision_tower\.")
NO_TOWER = re.compile(r"^(model\.)?(language_model|multi_modal_projector)\.|^lm_head\.")
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageProcessor:
    """What CLIP was trained to see: the side of its square input and the mean and spread of each colour
    channel."""

    size: int = 224
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    jpeg_draft: bool = False  # decode large JPEGs at a half, quarter or eighth of their size: faster


def get_vision_model(path: str | Path) -> tuple[VisionTower, ImageProcessor]:
    """Load the vision tower of a folder in the format of openai/clip-vit-base-patch32, frozen, in fp32.

    The folder may hold the whole CLIP or SigLIP (its text tower is skipped) or the vision tower alone,
    as model.safetensors or pytorch_model.bin, whole or in parts.
    Raises FileNotFoundError or ValueError, naming the file and the cure.
    """
    path = Path(path)
    check_clip_folder(path)
    config = read_vision_config(path)
    with without_memory():  # it takes the file's own tensors, which are mapped, not read
        vision_model = VisionTower(config)
    wanted, state = vision_model.state_dict(), read_vision_state(path)
    missing = sorted(wanted.keys() - state.keys())
    foreign = sorted(state.keys() - wanted.keys())
    shapes = [name for name, tensor in wanted.items() if name in state and state[name].shape != tensor.shape]
    if missing or foreign or shapes:
        named = ", ".join([*missing, *shapes, *foreign][:3])
        raise ValueError(
            f"{path} does not fit its own config.json: {len(missing)} weights missing, "
            f"{len(shapes)} of other shape, {len(foreign)} unknown ({named}); {CLIP_CURE}"
        )
    vision_model.load_state_dict(state, assign=True)
    vision_model.eval().requires_grad_(False)
    return vision_model, read_image_processor(path, config.image_size)


def read_vision_state(path: Path) -> dict[str, Tensor]:
    """The tensors of the vision tower in a folder, in fp32, under the names of VisionTower. Raises
    ValueError."""
    state = {}
    try:
        for file in weight_files(path, CLIP_CURE):
            state |= read_tensors(file, CLIP_CURE)
    except ValueError as error:
        raise ValueError(f"cannot read the CLIP at {path}: {error}") from None
    state = {
        TOWER.sub("", name).removeprefix("vision_model."): tensor
        for name, tensor in state.items()
        if not NO_TOWER.match(name)
    }
    return {
        name: tensor.float()  # whatever type they were saved in
        for name, tensor in state.items()
        if not name.startswith(UNUSED_WEIGHTS) and "position_ids" not in name
    }


def read_image_processor(path: Path, size: int) -> ImageProcessor:
    """Mean and spread from preprocessor_config.json, or from processor_config.json, where newer folders keep
    them."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (path / name).is_file():
            values = read_json(path / name)
            values = values.get("image_processor", values)
            if isinstance(values, dict) and "image_mean" in values:
                mean = three_numbers(path / name, "image_mean", values, low=-10)
                return ImageProcessor(size, mean, three_numbers(path / name, "image_std", values, low=1e-3))
    raise FileNotFoundError(
        f"{path} holds no preprocessor_config.json with image_mean and image_std: {CLIP_CURE}"
    )


def three_numbers(path: Path, key: str, values: dict, low: float) -> tuple[float, float, float]:
    """One for each colour, in shares of white. Raises ValueError for what would make every pixel NaN, or the
    same."""
    found = values.get(key)
    if (
        not isinstance(found, list)
        or len(found) != 3
        or not all(type(value) in (int, float) and low <= value <= 10 for value in found)
    ):
        raise ValueError(
            f"{path}: {key} is {str_of(found)}, not a list of 3 numbers from {low:g} to 10: {CLIP_CURE}"
        )
    return tuple(found)


def num_image_tokens(vision_model: VisionTower) -> int:
    """Tokens per image: 50 for ViT-B/32."""
    return vision_model.embeddings.position_embedding.num_embeddings


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
    rounding, but faster. Raises ValueError for an image that is too large, or whose white is not known.
    """
    side = image_processor.size
    try:
        squashed = to_rgb(image).resize((side, side), Image.Resampling.BICUBIC)
    except MemoryError:
        raise ValueError(
            f"{image.width} x {image.height} pixels need too much memory: scale it down"
        ) from None
    pixels = np.array(squashed)  # (S, S, 3) uint8
    # Turned while they are bytes, a quarter of the traffic.
    pixels = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float()
    mean, std = (
        255 * torch.tensor(values).view(3, 1, 1) for values in (image_processor.mean, image_processor.std)
    )
    return pixels.sub_(mean).div_(std)


def load_pixels(path: str | Path, image_processor: ImageProcessor) -> Tensor:
    """An image file to CLIP's input, (3, S, S). Raises FileNotFoundError or ValueError, naming the file."""
    image = open_image(path, image_processor.size if image_processor.jpeg_draft else 0)
    try:
        return get_img_process(image, image_processor)
    except ValueError as error:
        raise ValueError(f"cannot read image {path}: {error}") from None


@torch.no_grad()
def get_img_embedding(pixel_values: Tensor, vision_model: VisionTower) -> Tensor:
    """Encode images with the frozen vision tower, all in one call, in the tower's own dtype.

    pixel_values  (M, 3, S, S) float32, from get_img_process; M may be 0
    returns       (M, N, V): of CLIP the class token and the patch tokens, before its final layer norm,
                  because v1 took them there; of SigLIP the patch tokens
    """
    if not len(pixel_values):
        shape = (0, num_image_tokens(vision_model), vision_model.config.hidden_size)
        return pixel_values.new_zeros(shape, dtype=vision_model.dtype)
    return vision_model(pixel_values.to(vision_model.dtype))
