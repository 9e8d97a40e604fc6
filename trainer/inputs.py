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
    check_tokenizer_folder,
    check_weight_file,
    check_writable,
    read_json,
)
from model.LMConfig import EXPERT_FIELDS, LMConfig
from model.locks import claimed
from model.names import CLIP_PATH, TOKENIZER_PATH, weights_path

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
) -> LMConfig:
    """The sizes that the flags, the tokenizer and CLIP give together."""
    return LMConfig(
        dim=args.dim,
        n_layers=args.n_layers,
        n_heads=args.n_heads,
        n_kv_heads=args.n_kv_heads,
        vocab_size=args.vocab_size or num_tokens,
        max_seq_len=args.max_seq_len,
        vision_dim=vision_dim,
        num_image_tokens=num_image_tokens,
        **{name: getattr(args, name) for name in EXPERT_FIELDS},
    )


def check_inputs(args: argparse.Namespace, stage: Stage) -> None:
    """Raise FileNotFoundError or ValueError for the first thing that the stage would miss."""
    config = make_config(args)
    check_weight_file(
        weights_path(args.out_dir, config, stage.weights_in), weights_cure(stage.weights_in, config)
    )
    check_sources(args)


def check_sources(args: argparse.Namespace) -> None:
    """The same of all but the weights."""
    check_tokenizer_folder(Path(args.tokenizer_path or TOKENIZER_PATH))
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
