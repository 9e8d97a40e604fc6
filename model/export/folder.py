"""A folder that others open: weights, sizes, tokenizer, template and card, in the formats of transformers.

load_source    what is exported, loaded and compared with what it was trained with
export         llava, llama, qwen2_moe or gguf, into an empty folder
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import save
from torch import Tensor

from model.checkpoint import check_state_dict, config_of, read_state_dict
from model.description import PLACES, input_paths, read_description
from model.device import without_memory
from model.export.card import write_card
from model.export.gguf_file import find_writer, gguf_name, name_splitter, write_gguf
from model.export.text import (
    chat_template,
    choose_image_token,
    compare_ids,
    image_processor_config,
    processor_config,
    tokenizer_config,
    tokenizer_json,
)
from model.files import encode_text, write_together
from model.fingerprint import check_inputs, fingerprint_clip, fingerprint_tokenizer
from model.LMConfig import LMConfig
from model.prompt import load_tokenizer
from model.stock_config import DESCRIBED, llava_config, text_config, text_type
from model.stock_weights import projector, to_stock
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from model.vision_tower import VisionTower
from model.vision_utils import ImageProcessor, check_fit, get_vision_model

Files = dict[str, bytes | Callable[[IO[bytes]], object]]  # by name


@dataclass
class Source:
    """A model as it is exported.

    state         under our names, in the dtype of the export
    vision_model  None where the language model goes alone
    """

    weights: Path
    config: LMConfig
    state: dict[str, Tensor]
    description: dict
    tokenizer: Tokenizer
    vision_model: VisionTower | None = None
    image_processor: ImageProcessor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.state["norm.weight"].dtype

    @property
    def ids(self) -> tuple[int, int]:
        return self.tokenizer.bos_token_id, self.tokenizer.eos_token_id


def load_source(
    weights: Path,
    kind: str,
    dtype: torch.dtype = torch.float32,
    tokenizer_path: str | Path | None = None,
    clip_path: str | Path | None = None,
    allow_other_inputs: bool = False,
) -> Source:
    """Raises FileNotFoundError or ValueError, naming the file and the cure; also for a model that the format
    `kind` has no place for."""
    state, description = read_state_dict(weights), read_description(weights)
    config = config_of(weights, state)
    check_kind(kind, config, weights)
    tokenizer_path, clip_path = input_paths(weights, description, tokenizer_path, clip_path)
    tokenizer = load_tokenizer(tokenizer_path, config.placeholder if kind == "llava" else None)
    eyes = ()
    if kind == "llava":
        eyes = get_vision_model(clip_path)
        check_clip(eyes[0], clip_path)
        check_fit(config, tokenizer, eyes[0], weights, clip_path)
    else:
        config = replace(config, vision_dim=0, vision_proj_bias=False)
    if not allow_other_inputs:
        places = {"CLIP": clip_path, "tokenizer": tokenizer_path}
        found = {"tokenizer": fingerprint_tokenizer(tokenizer)} | (
            {"CLIP": fingerprint_clip(*eyes)} if eyes else {}
        )
        check_inputs(weights, description, places, found)
    with without_memory():
        model = Transformer(config)
    check_state_dict(model, weights, state, may_ignore="vision_proj.")
    state = {name: state[name].to(dtype) for name in model.state_dict()}
    for module in eyes[:1]:
        module.to(dtype)
    return Source(weights, config, state, description, tokenizer, *eyes)


def check_kind(kind: str, config: LMConfig, weights: Path) -> None:
    """Raise ValueError unless the format has a place for all that the model has."""
    if kind == "llava" and not config.vision_dim:
        raise ValueError(
            f"{weights} is a language model without a vision projection, so it is no LLaVA: "
            f"export it with --to {text_type(config)}, or train it with 1-pretrain_vlm.py first"
        )
    if config.use_moe and kind != "qwen2_moe":
        raise ValueError(
            f"{weights} has experts, for which {kind} has no place: --to qwen2_moe exports its language model"
        )
    if kind == "qwen2_moe" and not config.use_moe:
        raise ValueError(
            f"{weights} has no experts: --to llama exports its language model, --to llava the whole"
        )


def check_clip(vision_model: VisionTower, clip_path: Path) -> None:
    if not vision_model.config.is_clip:
        raise ValueError(
            f"the encoder at {clip_path} is a SigLIP: LLaVA takes its features before its last norm, this "
            "model after it, so no LLaVA is equal to it; --to llama exports the language model"
        )


def export(source: Source, kind: str, folder: Path, report: dict | None = None) -> list[Path]:
    """Write the folder, which must be empty or not there; all of it or nothing. Raises OSError or ValueError.

    report   what 3-eval_chat.py --report wrote, for the card
    returns  the files
    """
    check_empty(folder)
    files = {"llava": llava_files, "gguf": gguf_files}.get(kind, text_files)(source)
    files["README.md"] = encode_text(write_card(source, kind, folder, report))
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        write_together({folder / name: writer(content) for name, content in files.items()})
    except BaseException:
        if is_new:
            folder.rmdir()
        raise
    return [folder / name for name in files]


def check_empty(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: name a new folder, or empty it")


def writer(content: bytes | Callable) -> Callable[[IO[bytes]], object]:
    return content if callable(content) else lambda file: file.write(content)


def as_json(values: dict) -> bytes:
    return encode_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def llava_files(source: Source) -> Files:
    """The whole model, as LlavaForConditionalGeneration."""
    config, tower = source.config, source.vision_model
    image_id = choose_image_token(source.tokenizer)
    tensors = {f"language_model.{name}": tensor for name, tensor in to_stock(source.state, config).items()}
    tensors |= projector(source.state)
    tensors |= {f"vision_tower.vision_model.{name}": tensor for name, tensor in tower.state_dict().items()}
    sizes = llava_config(config, tower.config.values, *source.ids, image_id)
    return {
        **model_files(source, sizes, tensors, image_id),
        "preprocessor_config.json": as_json(image_processor_config(source.image_processor)),
        "processor_config.json": as_json(processor_config(tower.config.patch_size)),
    }


def text_files(source: Source) -> Files:
    """The language model alone."""
    sizes = text_config(source.config, *source.ids)
    return model_files(source, sizes, to_stock(source.state, source.config))


def model_files(
    source: Source, sizes: dict, tensors: dict[str, Tensor], image_id: int | None = None
) -> Files:
    """What every folder of transformers holds."""
    tokenizer, words = source.tokenizer, tokenizer_json(source.tokenizer, image_id)
    compare_ids(tokenizer, words, source.config, image_id)
    bos_id, eos_id = source.ids
    generation = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": eos_id}
    dtype = str(source.dtype).removeprefix("torch.")
    config = sizes | {"torch_dtype": dtype, DESCRIBED: describe(source)}
    return {
        "config.json": as_json(config),
        "generation_config.json": as_json(generation | {"do_sample": False, "max_new_tokens": 256}),
        "model.safetensors": save(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"}
        ),
        "tokenizer.json": as_json(words),
        "tokenizer_config.json": as_json(
            tokenizer_config(tokenizer, source.config.max_seq_len, image_id is not None)
        ),
        "chat_template.jinja": encode_text(chat_template(tokenizer.bos_token, tokenizer.eos_token)),
    }


def describe(source: Source) -> dict:
    """The description of the weights, for whoever takes the folder back, without places of this machine."""
    about = source.description.get("about", {})
    kept = {name: value for name, value in source.description.items() if name not in PLACES}
    return kept | {
        "config": source.config.to_dict(),
        "about": {name: value for name, value in about.items() if name != "image_dir"},
    }


def gguf_files(source: Source) -> Files:
    """The language model alone, in one file."""
    find_writer()
    name_splitter(tokenizer_json(source.tokenizer))  # may refuse it
    compare_ids(source.tokenizer, tokenizer_json(source.tokenizer), source.config, None)
    return {gguf_name(source.dtype): lambda file: write_gguf(source, Path(file.name))}
