"""Short names for contents: two CLIPs, tokenizers or data files of one size are told apart by these.

Weights carry the fingerprints of what they were trained with; whoever loads them compares.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from model.data.sources import Embedded

HEAD = 1 << 20  # bytes of a file that are read for its fingerprint; beyond them, its size must do


def fingerprint(*parts: bytes | str) -> str:
    """16 hex digits of the parts, in their order."""
    digest = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def fingerprint_tensors(state: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and every value; 0.1 s per 100 MB."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def fingerprint_clip(vision_model: torch.nn.Module, image_processor) -> str:
    """Of a vision tower's weights, its settings, and the size and colours that it expects."""
    config = {
        name: value
        for name, value in vision_model.config.to_dict().items()
        if name != "transformers_version" and not name.startswith("_")  # "_name_or_path" is a place
    }
    expects = (image_processor.size, image_processor.mean, image_processor.std)
    return fingerprint(
        repr((sorted(config.items()), expects)), fingerprint_tensors(vision_model.state_dict())
    )


def fingerprint_tokenizer(tokenizer) -> str:
    """Of all that turns text into ids: vocabulary, merges, normalizer, pre-tokenizer and special tokens."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    decisive = {name: parts.get(name) for name in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    specials = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return fingerprint(json.dumps([decisive, specials], sort_keys=True))


def fingerprint_files(files: Iterable[Path | Embedded]) -> str:
    """Of the first HEAD bytes of each file and its size; a file that is missing counts as such. An image that
    stands in a row counts as the file that it was, and the same content twice counts once."""
    contents = {}
    for file in files:
        try:
            contents[head_and_size(file)] = None
        except (OSError, ValueError):
            contents[b"missing", "-1"] = None
    return fingerprint(*chain.from_iterable(contents))


def head_and_size(file: Path | Embedded) -> tuple[bytes, str]:
    if isinstance(file, Embedded):
        content = file.read()
        return content[:HEAD], str(len(content))
    if not os.path.isfile(file):  # a pipe would be waited for; no file has a name with NUL
        raise FileNotFoundError
    with open(file, "rb") as opened:
        return opened.read(HEAD), str(file.stat().st_size)


def check_inputs(
    weights: str | Path, description: dict, places: Mapping[str, Path], found: Mapping[str, str]
) -> None:
    """check_inputs_match() but for what lies in the folder of the weights themselves: that belongs to them
    (an exported one may have been trained on by others).

    places  "CLIP" and "tokenizer" -> where they lie
    """
    elsewhere = {name: value for name, value in found.items() if places[name] != Path(weights)}
    check_inputs_match(weights, description.get("inputs", {}), elsewhere)


def check_inputs_match(
    weights: str | Path, trained_with: Mapping[str, str], found: Mapping[str, str]
) -> None:
    """Raise ValueError unless what is at hand is what the weights were trained with.

    trained_with  name ("CLIP", "tokenizer") -> fingerprint, from the description of the weights; empty for
                  weights that carry none (v1's)
    found         the same of what is at hand; a name that only one side knows is not compared
    """
    differences = [
        f"{name} {trained_with[name]}, but the {name} named now is {found[name]}"
        for name in found
        if name in trained_with and trained_with[name] != found[name]
    ]
    if differences:
        flags = " or ".join(f"--{name.lower()}_path" for name in found if name in trained_with)
        raise ValueError(
            f"{weights} was trained with the {'; with the '.join(differences)}: name the right one with "
            f"{flags}, or use it anyway with --allow_other_inputs"
        )
