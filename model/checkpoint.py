"""Weight files: their names, atomic saving, and loading that never fails in silence.

A file is a plain state dict, as in MiniMind v1, in the zip archive that torch.save makes of it. In the same
archive lies a description (sizes, stage, what it was trained with) that PyTorch passes over; a .json beside
the file repeats it for people. A Hugging Face folder (config.json, model.safetensors or pytorch_model.bin,
tokenizer) is read like a file: its tensors and sizes, never its code. Those of transformers' own classes have
other names and another order of rotated channels (stock_weights.py).
"""

import filecmp
import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import load, load_file
from torch import Tensor, nn

from model.description import (
    DESCRIPTION,
    beside_weights,
    describe_beside,
    is_stock,
    read_description,
    read_description_inside,
)
from model.files import check_weight_file, encode_text, is_utf8, link_or_copy, read_json, write_together
from model.LMConfig import LMConfig
from model.seal import check_seal, seal_archive
from model.stock_weights import from_stock

# Copies of the frozen CLIP that other programs save with the model: CLIP is read from its own folder.
VISION_TOWERS = ("vision_encoder.", "vision_model.", "vision_tower.")
# What is not replaced by every run that comes after.
NOT_REPLACED = (".png", ".best.pth", ".best.json", ".samples.jsonl", ".samples.png")
SET = (".pth", ".json", ".metrics.jsonl", *NOT_REPLACED)  # what a run leaves
LAYER = re.compile(r"layers\.(\d{1,6})\.")
V1_SIZES = {(512, 8, 6400), (768, 16, 6400)}  # width, layers, vocabulary: known without a description


def save_weights(model: nn.Module, path: str | Path, **description) -> None:
    """Save the state dict with its config and whatever else describes it (stage, step, paths, ...), and the
    description once more beside it (.json)."""
    write_together(weight_files_of(model, path, **description))


def weight_files_of(
    model: nn.Module, path: str | Path, **description
) -> dict[Path, Callable[[IO[bytes]], object]]:
    """The files of save_weights(), for write_together()."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    copies: dict[int, Tensor] = {}  # the tied embedding and output weight are written once
    state = {
        name: copies.setdefault(tensor.data_ptr(), tensor.detach().cpu())
        for name, tensor in model.state_dict().items()
    }
    description = {"config": model.config.to_dict(), "is_sealed": True, **description}
    text = encode_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n")

    def write(file: IO[bytes]) -> None:
        torch.save(state, file)
        seal_archive(file, {DESCRIPTION: text})

    return {path: write, beside_weights(path): lambda file: file.write(text)}


def set_aside(path: str | Path) -> Path | None:
    """Keep what another run finished (or somebody downloaded): its weights, description, record and curve,
    also those of its best step. Weights and description stay in their place besides, until a save replaces
    them, and the record until another begins.

    returns  where they lie now: 512_vlm_sft.previous.pth; None if there were none, none that were finished,
             or if they lie there already, since a run that began after them ended before its first save
    """
    path = Path(path)
    kept = path.with_name(f"{path.stem}.previous.pth")
    if not is_finished(path):
        return None
    is_kept = kept.is_file() and filecmp.cmp(path, kept, False)
    for ending in () if is_kept else reversed(SET):  # the weights last: once they are there, all else is
        source, target = path.with_name(path.stem + ending), kept.with_name(f"{path.stem}.previous{ending}")
        if source.is_file():
            link_or_copy(source, target)
        else:
            target.unlink(missing_ok=True)
    for ending in NOT_REPLACED:  # else they would stand beside weights of another run
        path.with_name(path.stem + ending).unlink(missing_ok=True)
    return None if is_kept else kept


def is_finished(path: str | Path) -> bool:
    """Are these the weights of a whole run? Those without a description (v1's own) are taken for such.
    Raises ValueError for a damaged file."""
    path = Path(path)
    if not path.is_file():
        return False
    check_seal(path, "remove it")
    description = read_description_inside(path)
    return description.get("step", 0) >= description.get("total_steps", 0)


def read_state_dict(path: str | Path, cure: str = "download it again") -> dict[str, Tensor]:
    """Tensors of a .pth file or a Hugging Face folder under today's names. Runs no code from there. Raises
    FileNotFoundError or ValueError."""
    state = {}
    for file in weight_files(Path(path), cure):
        state |= read_tensors(file, cure)
    return rename_v1(rename_stock(state, Path(path)))


def rename_stock(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of a folder of transformers' own classes to ours; others as they are. Raises ValueError."""
    if not (path.is_dir() and (path / "config.json").is_file() and is_stock(read_json(path / "config.json"))):
        return state
    try:
        return from_stock(state, LMConfig.from_dict(read_description(path)["config"]))
    except (ValueError, RuntimeError) as error:  # of torch: a tensor of a shape that has no heads
        raise ValueError(f"{path}: {error}") from None


def weight_files(path: Path, cure: str) -> list[Path]:
    """The files that hold the tensors: `path` itself, or those of a folder, where they may be in parts."""
    if not path.is_dir():
        return [path]
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return [path / name]
        if (index := path / f"{name}.index.json").is_file():
            places = read_json(index).get("weight_map")
            if not isinstance(places, dict) or not places:
                raise ValueError(f"{index} names no files in a weight_map: {cure}")
            # Path.name: an index must not reach outside its folder.
            return [path / part for part in sorted({Path(str(place)).name for place in places.values()})]
    raise FileNotFoundError(f"{path} holds neither model.safetensors nor pytorch_model.bin: {cure}")


def read_tensors(path: Path, cure: str) -> dict[str, Tensor]:
    """One file, under its own names."""
    check_weight_file(path, cure)
    if not check_seal(path, cure) and read_description_inside(path).get("is_sealed"):
        raise ValueError(f"{path} is damaged (its end is not what was written): {cure}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path) if is_utf8(path) else load(path.read_bytes())
        # Mapped, not read: tensors that are only looked at, or converted one by one, take no memory.
        state = (
            torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            if is_utf8(path)
            else torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
        )
    except Exception as error:  # torch raises a dozen different types here, all meaning the same to the user
        raise ValueError(f"{path} is not a readable weight file ({type(error).__name__}): {cure}") from None
    if not isinstance(state, dict) or not all(map(is_plain, state.keys(), state.values())):
        raise ValueError(f"{path} holds no plain state dict of tensors: {cure}")
    return state


def is_plain(name: object, value: object) -> bool:
    """Is this a named tensor with numbers of its own? Others (sparse, quantised, without memory) would break
    whatever computes with them."""
    if not isinstance(name, str) or not isinstance(value, Tensor):
        return False
    return value.layout == torch.strided and not value.is_quantized and value.device.type == "cpu"


def rename_v1(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """v1's names to ours: wrappers off (also "model.", which transformers puts in front), its nested
    projection flattened, its buffers (rebuilt here) dropped."""
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"(?<![^.])(_orig_mod|module|model)\.", "", name).replace(
            "vision_proj.vision_proj.0.", "vision_proj."
        )
        if name != "pos_cis" and not name.endswith(".mask"):
            renamed[name] = tensor
    tied = ("tok_embeddings.weight", "output.weight")
    for name, other in (tied, tied[::-1]):  # some formats store the shared matrix once, under either name
        if other in renamed:
            renamed.setdefault(name, renamed[other])
    return renamed


def sizes_of(state: dict[str, Tensor]) -> dict[str, int]:
    """The sizes that a state dict's names and shapes reveal; the number of heads is not among them, nor how
    many experts a token chooses."""
    sizes = {"n_layers": 1 + max((int(match[1]) for match in map(LAYER.match, state) if match), default=-1)}
    matrices = {name for name, tensor in state.items() if tensor.ndim == 2}
    if "tok_embeddings.weight" in matrices:
        sizes["vocab_size"], sizes["dim"] = state["tok_embeddings.weight"].shape
    feed_forward = "layers.0.feed_forward."
    num_experts = sum(
        bool(re.fullmatch(rf"{re.escape(feed_forward)}experts\.\d+\.w1\.weight", name)) for name in state
    )
    if num_experts:
        sizes |= {
            "use_moe": True,
            "n_routed_experts": num_experts,
            "n_shared_experts": int(f"{feed_forward}shared_experts.w1.weight" in state),
        }
        feed_forward += "experts.0."
    if f"{feed_forward}w1.weight" in matrices:
        sizes["hidden_dim"] = state[f"{feed_forward}w1.weight"].shape[0]
    if "vision_proj.weight" in matrices:
        sizes["vision_dim"] = state["vision_proj.weight"].shape[1]
    return sizes


def config_of(path: str | Path, state: dict[str, Tensor]) -> LMConfig:
    """The config of a weight file or folder: from its description, else from its shapes and v1's number
    of heads, if its sizes are v1's. What no description says about the projection, the tensors show.

    Raises ValueError for weights of other sizes without a description: shapes do not show the number of
    heads, the length of the context, nor the angles of the rotations.
    """
    sizes = sizes_of(state)
    if "dim" not in sizes or not sizes["n_layers"]:
        raise ValueError(
            f"{path} is not a MiniMind model: its first tensors are {', '.join(list(state)[:3])}"
        )
    described = read_description(path).get("config")
    if not described and (sizes["dim"], sizes["n_layers"], sizes["vocab_size"]) not in V1_SIZES:
        raise ValueError(
            f"{path} does not say how many heads it has nor how long its context is, and its sizes are not "
            "those of MiniMind v1: put the .json that was saved with it back beside it"
        )
    eyes = {"vision_dim": sizes.get("vision_dim", 0), "vision_proj_bias": "vision_proj.bias" in state}
    try:
        return LMConfig.from_dict(eyes | (described or sizes))
    except ValueError as error:
        raise ValueError(f"the config of {path}: {error}") from None
    except TypeError:  # a word where a number should be
        raise ValueError(f"the sizes in the config of {path} are no numbers: download it again") from None


@dataclass
class LoadReport:
    """How a file and a model matched."""

    path: str
    num_loaded: int
    missing: list[str] = field(default_factory=list)  # kept their initial values, as allowed by may_miss
    ignored: list[str] = field(default_factory=list)  # in the file, without a place in the model
    details: list[str] = field(default_factory=list)  # more lines, about what else was loaded

    def __str__(self) -> str:
        text = f"{self.path}: {self.num_loaded} tensors loaded"
        if self.missing:
            text += f"; new, not in the file: {', '.join(self.missing)}"
        if self.ignored:
            text += f"; in the file, not used: {', '.join(summarise(self.ignored))}"
        described = read_description(self.path)
        if described.get("step", 0) < described.get("total_steps", 0):
            text += f"; of an unfinished run (step {described['step']} of {described['total_steps']})"
        if beside := describe_beside(Path(self.path)):
            text += f"; {beside}"
        return "\n".join([text, *self.details])


def summarise(names: list[str]) -> list[str]:
    """Names of tensors, those of a whole tower as one."""
    towers = Counter(name.split(".")[0] for name in names if name.startswith(VISION_TOWERS))
    return [
        *(name for name in names if not name.startswith(VISION_TOWERS)),
        *(f"{tower}.* ({count} tensors, a copy of CLIP)" for tower, count in towers.items()),
    ]


def load_weights(
    model: nn.Module,
    path: str | Path,
    may_miss: str | tuple[str, ...] = (),
    may_ignore: str | tuple[str, ...] = (),
    cure: str = "download it again",
) -> LoadReport:
    """Copy a weight file into a model, strictly; a model on the meta device, which has no memory to copy to,
    takes the file's tensors themselves.

    may_miss    prefixes of parameters that may be absent from the file ("vision_proj." when a language model
                gains eyes)
    may_ignore  prefixes of tensors in the file that the model need not have, besides VISION_TOWERS
    raises      FileNotFoundError, or ValueError with the first differences and the sizes that would fit
    """
    state, wanted = read_state_dict(path, cure), model.state_dict()
    missing, surplus = check_state_dict(model, path, state, may_miss, may_ignore)
    if all(tensor.is_meta for tensor in wanted.values()):
        model.load_state_dict({name: state[name] for name in wanted}, assign=True)
        if model.config.tied:
            model.output.weight = model.tok_embeddings.weight  # one again
    else:
        with torch.no_grad():
            for name, tensor in wanted.items():
                if name in state:
                    tensor.copy_(state[name])
    return LoadReport(str(path), len(wanted) - len(missing), missing, surplus)


def check_state_dict(
    model: nn.Module,
    path: str | Path,
    state: dict[str, Tensor],
    may_miss: str | tuple[str, ...] = (),
    may_ignore: str | tuple[str, ...] = (),
) -> tuple[list[str], list[str]]:
    """The names that `state` lacks and those it has too many, as far as they may differ; else ValueError, as
    for load_weights()."""
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in state]
    surplus = [name for name in state if name not in wanted]
    shapes = [
        f"{name} {tuple(state[name].shape)} in the file, {tuple(tensor.shape)} in the model"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    bad_missing = [
        name
        for name in missing
        if not name.startswith(tuple([may_miss] if isinstance(may_miss, str) else may_miss))
    ]
    may_ignore = VISION_TOWERS + tuple([may_ignore] if isinstance(may_ignore, str) else may_ignore)
    bad_surplus = [name for name in surplus if not name.startswith(may_ignore)]
    if bad_missing or bad_surplus or shapes:
        raise ValueError(explain_mismatch(path, state, model, bad_missing, bad_surplus, shapes))
    bad = [name for name in wanted if name in state and not torch.isfinite(state[name]).all()]
    if bad:
        raise ValueError(
            f"{path} holds values that are not finite, first in {bad[0]}: "
            "the run that saved it had broken down"
        )
    return missing, surplus


def explain_mismatch(path, state, model, missing: list[str], surplus: list[str], shapes: list[str]) -> str:
    """One line: what differs first, and which flags would fit the file."""
    parts = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("of other shape", shapes), ("missing", missing), ("unknown", surplus))
        if names
    ]
    sizes = {"use_moe": False, **sizes_of(state)}
    fitting = " ".join(
        f"--{name} {sizes[name]}"
        for name in ("dim", "n_layers", "vocab_size", "use_moe", "n_routed_experts", "n_shared_experts")
        if sizes["n_layers"] and sizes.get(name, getattr(model.config, name)) != getattr(model.config, name)
    )
    cure = f"; the file would fit {fitting}" if fitting else ""
    return f"{path} does not fit the model: {'; '.join(parts)}{cure}"
