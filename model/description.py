"""What a weight file says of itself: sizes, stage, step, what it was trained with.

The description lies inside the weights, in the archive that torch.save makes. The .json beside them repeats
it for people, who may change PLACES there, and nothing else; what is changed is used, and reported.
"""

import json
import zipfile
import zlib
from pathlib import Path

from model.files import MAX_JSON, read_json
from model.names import CLIP_PATH, TOKENIZER_PATH, find_recorded
from model.stock_config import DESCRIBED, STOCK_TYPES, read_stock_config

DESCRIPTION = "minimind_description.json"  # in the archive
SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")  # of weight files
PLACES = ("tokenizer_path", "clip_path")
KINDS = {
    "config": dict,
    "inputs": dict,
    "about": dict,
    "settings": dict,
    "step": int,
    "total_steps": int,
    "stage": str,
    "tokenizer_path": str,
    "clip_path": str,
}


def read_description(path: str | Path) -> dict:
    """What save_weights wrote into the weights, with the PLACES that the .json beside them names; of weights
    that hold no description the whole .json, or nothing (v1's own files). Of a Hugging Face folder: the sizes
    in its config.json, what an export wrote there, and itself as tokenizer_path if it holds a tokenizer, as
    clip_path if it holds CLIP."""
    path = Path(path)
    if not path.is_dir():
        inside, beside = read_description_inside(path), read_beside(path)
        words = {name: beside[name] for name in PLACES if name in beside} if inside else beside
        return inside | check_kinds(words, beside_weights(path))
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    description = describe_stock(config, path) if is_stock(config) else {"config": config} if config else {}
    if (path / "tokenizer_config.json").is_file():
        description["tokenizer_path"] = str(path)
    return description


def is_stock(config: dict) -> bool:
    """Is this the config.json of a class of transformers' own that can be read here?"""
    return config.get("model_type") in STOCK_TYPES


def describe_stock(config: dict, path: Path) -> dict:
    """Of a folder in the format of transformers' own classes. Sizes are those that config.json says in their
    words; what they have no word for (and stage, step, inputs, ...) is in what the export wrote beside."""
    described = config.get(DESCRIBED)
    described = check_kinds(dict(described) if isinstance(described, dict) else {}, path / "config.json")
    places = {"clip_path": str(path)} if config["model_type"] == "llava" else {}
    sizes = described.get("config", {}) | read_stock_config(config, path)
    return (
        {name: value for name, value in described.items() if name not in PLACES} | places | {"config": sizes}
    )


def input_paths(
    weights: str | Path, description: dict, tokenizer_path: str | Path | None, clip_path: str | Path | None
) -> tuple[Path, Path]:
    """Where the tokenizer and the CLIP of weights lie: where they are given, else what the description names,
    else v1's places."""
    return (
        Path(tokenizer_path or find_recorded(description.get("tokenizer_path", TOKENIZER_PATH), weights)),
        Path(clip_path or find_recorded(description.get("clip_path", CLIP_PATH), weights)),
    )


def describe_beside(path: Path) -> str:
    """In words, what the .json beside weights says otherwise than they do; "" if nothing."""
    inside, beside = read_description_inside(path), read_beside(path)
    if not inside or not beside:
        return ""
    other = sorted(name for name in inside | beside if inside.get(name) != beside.get(name))
    places = [f"{name} {beside[name]}" for name in PLACES if name in other and name in beside]
    notes = [f"taken from {beside_weights(path).name}: {', '.join(places)}"] if places else []
    if rest := [name for name in other if name not in PLACES]:
        notes.append(
            f"{beside_weights(path).name} is not of these weights, or was changed: "
            f"what it says about {', '.join(rest)} is passed over"
        )
    return "; ".join(notes)


def read_beside(path: Path) -> dict:
    beside = beside_weights(path)
    return read_json(beside, "mend it, or remove it") if beside.is_file() else {}


def check_kinds(words: dict, path: Path) -> dict:
    """Raise ValueError for what cannot be meant."""
    for name, kind in KINDS.items():
        if name in words and (not isinstance(words[name], kind) or words[name] is True):
            raise ValueError(f"{path}: its {name} is {str(words[name])[:80]!r}: mend it, or remove it")
    check_about(words.get("about", {}), path)
    return words


def check_about(about: dict, path: str | Path) -> None:
    """Raise ValueError unless all that is known of the data is of the kind that chat and page take it for."""
    for name, value in about.items():
        is_list = name == "questions"
        if is_list and not (isinstance(value, list) and all(isinstance(text, str) for text in value)):
            raise ValueError(f"{path}: {name} must be a list of texts, not {str(value)[:80]!r}: mend it")
        if name in ("knows", "image_dir") and not isinstance(value, str):
            raise ValueError(f"{path}: {name} must be a text, not {str(value)[:80]!r}: mend it")


def beside_weights(path: Path) -> Path:
    """Where the .json of a weight file is: of ckpt.pth ckpt.json, but of ckpt-1.5 not ckpt-1.json."""
    return path.with_suffix(".json") if path.suffix in SUFFIXES else path.with_name(f"{path.name}.json")


def read_description_inside(path: Path) -> dict:
    """The description in a weight file; empty where it holds none, or cannot be read at all, which is
    reported when it is loaded. Raises ValueError for one that no program of ours wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(f"/{DESCRIPTION}")]
            if names and archive.getinfo(names[0]).file_size > MAX_JSON:
                return {}
            description = json.loads(archive.read(names[0])) if names else {}
    except (OSError, ValueError, RecursionError, zipfile.BadZipFile, zlib.error, EOFError):
        return {}
    return check_kinds(description, path) if isinstance(description, dict) else {}
