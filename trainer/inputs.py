"""What can be said of a stage before PyTorch is loaded: what it reads and writes, and whether it is there."""

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from model.data.formats import data_files
from model.data.spec import DatasetSpec
from model.description import check_about
from model.download_table import COMMAND, find_download
from model.files import (
    check_clip_folder,
    check_image_dir,
    check_model_folder,
    check_tokenizer_folder,
    check_weight_file,
    check_writable,
    read_json,
)
from model.LMConfig import EXPERT_FIELDS, LMConfig
from model.locks import claimed
from model.names import CLIP_PATH, TOKENIZER_PATH, weights_path
from model.stock_config import read_stock_config

ABOUT = ("knows", "questions", "image_dir")  # what --about may say of the data
TRAINED_BY = {
    "vlm_pretrain": "1-pretrain_vlm.py",
    "vlm_sft": "2-sft_vlm.py",
    "vlm_sft_multi": "2-sft_vlm.py --multi",
}


@dataclass(frozen=True)
class Stage:
    """How one stage differs from another; weights_in and weights_out are names of names.STAGES."""

    spec: DatasetSpec
    weights_in: str
    weights_out: str


def make_config(
    args: argparse.Namespace,
    num_tokens: int = LMConfig.vocab_size,
    vision_dim: int = LMConfig.vision_dim,
    num_image_tokens: int = LMConfig.num_image_tokens,
    placeholder: tuple[int, int] = (LMConfig.open_id, LMConfig.close_id),
) -> LMConfig:
    """The sizes that the flags, --llm, the tokenizer and CLIP give together."""
    sizes = {
        "dim": args.dim,
        "n_layers": args.n_layers,
        "n_heads": args.n_heads,
        "n_kv_heads": args.n_kv_heads,
        "vocab_size": args.vocab_size or num_tokens,
        "max_seq_len": args.max_seq_len,
        "vision_dim": vision_dim,
        "num_image_tokens": num_image_tokens,
        "open_id": placeholder[0],
        "close_id": placeholder[1],
        **{name: getattr(args, name) for name in EXPERT_FIELDS},
    }
    return LMConfig(**(sizes | (read_llm(args) if args.llm else {})))


def read_llm(args: argparse.Namespace) -> dict:
    """The sizes of the language model that --llm names, as fields of LMConfig. Raises FileNotFoundError or
    ValueError, also where a flag asks for another size."""
    folder = Path(args.llm)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"--llm: {folder} holds no config.json: name a folder of Hugging Face")
    values = read_json(folder / "config.json")
    if values.get("model_type") not in ("llama", "qwen3"):
        raise ValueError(
            f"--llm: {folder} holds a model of type {str(values.get('model_type'))[:40]}: "
            "a language model of type llama or qwen3 can be the base"
        )
    sizes = read_stock_config(values, folder)
    LMConfig.from_dict(sizes)  # raises ValueError for what is no number
    if args.max_seq_len > (longest := sizes.pop("max_seq_len")):
        raise ValueError(f"--max_seq_len {args.max_seq_len} is more than {folder} was made for: {longest}")
    for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "use_moe"):
        asked, usual = getattr(args, name), 0 if name == "vocab_size" else getattr(LMConfig, name)
        if asked not in (usual, sizes.get(name, False)):
            raise ValueError(
                f"--{name} {asked} is not what --llm {folder} has ({sizes.get(name)}): leave it out"
            )
    return sizes


def starting_weights(args: argparse.Namespace, config: LMConfig, stage: Stage) -> Path:
    """What the stage begins from: weights of the stage before, or the folder that --llm names."""
    if args.llm and stage.weights_in == "llm":
        return Path(args.llm)
    return weights_path(args.out_dir, config, stage.weights_in)


def tokenizer_of(args: argparse.Namespace) -> Path:
    return Path(args.tokenizer_path or args.llm or TOKENIZER_PATH)


def check_inputs(args: argparse.Namespace, stage: Stage) -> None:
    """Raise FileNotFoundError or ValueError for the first thing that the stage would miss."""
    config = make_config(args)
    source = starting_weights(args, config, stage)
    if source.is_dir():
        check_model_folder(source, "download it again, or name another with --llm")
    else:
        check_weight_file(source, weights_cure(stage.weights_in, config))
    check_sources(args)


def check_sources(args: argparse.Namespace) -> None:
    """The same of all but the weights."""
    check_tokenizer_folder(tokenizer_of(args))
    check_clip_folder(Path(args.clip_path or CLIP_PATH))
    for path in filter(None, (args.data_path, args.val_data_path)):
        data_files(path)
    if args.sample_questions and not Path(args.sample_questions).is_file():
        raise FileNotFoundError(f"--sample_questions: there is no file {args.sample_questions}")
    check_image_dir(Path(args.image_dir))
    read_about(args.about)


def read_about(path: str | None) -> dict:
    """What --about says of the data, {} without it. Raises FileNotFoundError or ValueError."""
    if not path:
        return {}
    if not Path(path).is_file():
        raise FileNotFoundError(f"--about: there is no file {path}")
    about = read_json(Path(path), "mend it")
    if unknown := [name for name in about if name not in ABOUT]:
        raise ValueError(f"{path}: {unknown[0]} is not among what --about may say: {', '.join(ABOUT)}")
    check_about(about, path)
    return about


def answers_path(report: Path) -> Path:
    """Where every answer lies beside a --report: r.answers.jsonl beside r.json, r-1.5.answers.jsonl beside
    r-1.5."""
    return report.with_name(f"{report.name.removesuffix('.json')}.answers.jsonl")


def table_path(report: Path) -> Path:
    """Where the scores lie with their intervals: r.scores.csv beside r.json."""
    return report.with_name(f"{report.name.removesuffix('.json')}.scores.csv")


def check_report(*paths: Path) -> None:
    """Raise OSError, now and not in an hour, for files of a --report that could not be written."""
    for path in paths:
        try:
            check_writable(path)
        except OSError as error:
            raise OSError(f"--report: {error}") from None


@contextlib.contextmanager
def claim_report(report: Path | None, is_main: bool) -> Iterator[None]:
    """Keep other evaluations from a --report while this one works on it. Raises ValueError, naming the
    process that has it."""
    with contextlib.ExitStack() as stack:
        if report and is_main:
            report.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(claimed(report, "wait for its end, or give another --report"))
        yield


def weights_cure(weights_in: str, config: LMConfig) -> str:
    """What to do where the weights of a stage are missing or wrong."""
    cure, experts = "make a demo world with python -m dataset.demo_world", ""
    if config.use_moe:
        experts = " --use_moe"
        cure += f" --out dataset/demo_moe{experts}"
    if weights_in != "llm":
        cure = f"run {TRAINED_BY[weights_in]}{experts} first"
    command = find_download(weights_path("out", config, weights_in))
    if not command and not config.use_moe:
        command = f"{COMMAND} --list"
    download = f"download v1's with {command}, " if command else ""
    return f"{cure}, {download}or name the folder where it lies with --out_dir"
