"""What a stage starts from: its weights, tokenizer, CLIP and data, and the plan of the run.

load_stage     a stage with everything loaded
make_plan      which rows are trained on when, what memory that takes, what a resumed run must share
"""

import argparse
import contextlib
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from model.checkpoint import LoadReport, load_weights, read_state_dict
from model.data.batch import collate
from model.data.dataset import VLMDataset
from model.data.sources import Embedded, locate
from model.description import read_description
from model.device import choose_dtype
from model.fingerprint import (
    check_inputs_match,
    fingerprint_clip,
    fingerprint_files,
    fingerprint_tensors,
    fingerprint_tokenizer,
)
from model.LMConfig import LMConfig
from model.names import CLIP_PATH, weights_path
from model.prompt import Renderer, choose_placeholder, load_tokenizer, normalise_turns
from model.transformer import Transformer
from model.vision_proj import PLACEHOLDER
from model.vision_utils import ImageProcessor, check_fit, get_vision_model, num_image_tokens
from trainer.batches import GlobalBatches, automatic_share, lengths_of, split_off, spread
from trainer.distributed import Run, versions
from trainer.features import fill_feature_cache
from trainer.inputs import Stage, make_config, read_about, starting_weights, tokenizer_of, weights_cure
from trainer.loader import Loader, fitting_workers
from trainer.logger import describe_run, name_of
from trainer.memory import StepMemory, plan_memory
from trainer.optimizer import choose_trained
from trainer.saves import claim_outputs

# Flags whose value may differ from machine to machine: places, and what only the logging rank does.
LOCAL_FLAGS = (
    "out_dir",
    "llm",
    "tokenizer_path",
    "clip_path",
    "data_path",
    "val_data_path",
    "image_dir",
    "about",
    "sample_questions",
    "feature_cache",
    "num_workers",
    "device",
    "use_wandb",
    "wandb_project",
    "wandb_run_name",
)
NUM_LOOKED_AT = 1000  # rows in which the longest conversation is searched for
NUM_VOUCHED = 512  # images whose content is compared when a run is resumed, spread over the rows
COMPILED_MULTIPLE = 64  # tokens; every length is compiled by itself, so there had better be few


@dataclass
class LoadedStage:
    """What the training loop starts from.

    vision_model  None where no image is encoded while training: cached features, or text alone
    description   what the description of the weights says besides sizes and settings
    """

    model: Transformer
    vision_model: nn.Module | None
    dataset: VLMDataset
    weights_out: Path
    description: dict = field(default_factory=dict)
    val_dataset: VLMDataset | None = None


def load_stage(run: Run, args: argparse.Namespace, stage: Stage) -> LoadedStage:
    """Raises ValueError or FileNotFoundError, naming the file or flag and the cure."""
    run.check_agreement(comparable(run, args))
    weights_out = weights_path(args.out_dir, make_config(args), stage.weights_out)
    run.hold(claim_outputs(weights_out))
    return load_parts(run, args, stage, starting_weights(args, make_config(args), stage))


def load_parts(run: Run, args: argparse.Namespace, stage: Stage, source: Path) -> LoadedStage:
    """Tokenizer, CLIP, data, and the model with the weights in `source`, which are those of stage.weights_in.
    Raises as load_stage()."""
    torch.manual_seed(args.seed)
    tokenizer_path, clip_path = tokenizer_of(args), args.clip_path or CLIP_PATH
    tokenizer = load_tokenizer(tokenizer_path, None if args.llm else PLACEHOLDER)
    vision_model, image_processor = get_vision_model(clip_path)
    image_processor = replace(image_processor, jpeg_draft=args.jpeg_draft)
    num_tokens = num_image_tokens(vision_model)
    placeholder = choose_placeholder(tokenizer, num_tokens) if args.llm else PLACEHOLDER
    config = make_config(args, len(tokenizer), vision_model.config.hidden_size, num_tokens, placeholder)
    check_fit(config, tokenizer, vision_model, source, clip_path)
    inputs = compare_inputs(source, tokenizer, vision_model, image_processor, args.allow_other_inputs)
    model, report = load_model(config, source, stage.weights_in)
    run.print(str(report))

    renderer = Renderer(tokenizer, config.num_image_tokens, args.max_seq_len, config.placeholder)
    datasets = [
        VLMDataset(path, stage.spec, renderer, args.image_dir, image_processor)
        for path in (args.data_path, args.val_data_path)
        if path
    ]
    if args.feature_cache:
        store = fill_feature_cache(run, args, datasets, vision_model, image_processor)
        for dataset in datasets:
            dataset.feature_store = store
        vision_model = None  # its features are cached: free it
    return LoadedStage(
        model,
        vision_model,
        datasets[0],
        weights_path(args.out_dir, config, stage.weights_out),
        {
            "stage": stage.weights_out,
            "tokenizer_path": str(tokenizer_path),
            "clip_path": str(clip_path),
            "inputs": inputs,
            "about": {**read_about(args.about), "max_rounds": most_rounds(datasets[0])},
        },
        datasets[1] if args.val_data_path else None,
    )


def compare_inputs(
    source: Path, tokenizer, vision_model, image_processor: ImageProcessor, allow_others: bool
) -> dict[str, str]:
    """The fingerprints of CLIP, tokenizer and starting weights. Raises ValueError for another CLIP or
    tokenizer than the weights were trained with."""
    inputs = {
        "CLIP": fingerprint_clip(vision_model, image_processor),
        "tokenizer": fingerprint_tokenizer(tokenizer),
    }
    if not allow_others:
        check_inputs_match(source, read_description(source).get("inputs", {}), inputs)
    return inputs | {"weights_in": fingerprint_tensors(read_state_dict(source))}


def most_rounds(dataset: VLMDataset) -> int:
    """The longest conversation, in answers, that the model learns from, among NUM_LOOKED_AT rows. A model of
    single rounds cannot answer the second question of a chat."""
    most = 1
    for position in spread(len(dataset), NUM_LOOKED_AT):
        with contextlib.suppress(ValueError):  # a bad row is reported elsewhere
            _, turns = dataset.check(dataset.rows[position])
            most = max(most, sum(role == "assistant" for role, _ in normalise_turns(turns)))
    return most


def comparable(run: Run, args: argparse.Namespace) -> dict:
    """What all processes of a run must have in common: all flags but those that name a place or a part
    of one machine, and the versions of what computes. Contents are compared later, see settings_of()."""
    flags = {name: value for name, value in vars(args).items() if name not in LOCAL_FLAGS}
    optional = {f"--{name} given": bool(getattr(args, name)) for name in ("feature_cache", "val_data_path")}
    return {
        **{f"--{name}": value for name, value in flags.items()},
        **optional,
        "device": run.device.type,
        **versions(),
    }


def load_model(config: LMConfig, source: Path, weights_in: str) -> tuple[Transformer, LoadReport]:
    """A model with the weights of an earlier stage. Raises FileNotFoundError or ValueError with the cure."""
    cure = weights_cure(weights_in, config)
    from_llm = weights_in == "llm"  # it has no projection yet; the published one may, and keeps it
    config.vision_proj_bias = not from_llm and "vision_proj.bias" in read_state_dict(source, cure)
    model = Transformer(config)
    return model, load_weights(
        model,
        source,
        may_miss="vision_proj." if from_llm else (),
        may_ignore="vision_proj.bias" if from_llm else (),
        cure=cure,
    )


@dataclass
class Plan:
    """A run as it will go.

    memory    what a step takes
    settings  what decides the bits of the run: one that is resumed must have the same
    """

    run: Run
    args: argparse.Namespace
    stage: LoadedStage
    train_set: Dataset
    val_set: Dataset | None
    batches: GlobalBatches
    memory: StepMemory
    settings: dict

    @property
    def loader(self) -> Loader:
        return Loader(
            self.train_set,
            self.batches,
            self.args.num_workers,
            pin_memory=self.run.device.type == "cuda",
            make_batch=partial(collate, multiple=COMPILED_MULTIPLE) if self.args.compile else collate,
        )

    def describe(self, dtype: torch.dtype) -> str:
        stage = self.stage
        return (
            describe_run(
                self.run,
                self.args,
                stage.model,
                stage.vision_model,
                self.train_set,
                self.val_set,
                self.batches,
                dtype,
            )
            + "\n"
            + self.memory.describe(self.args.batch_size, self.run.device)
        )


def make_plan(run: Run, args: argparse.Namespace, stage: LoadedStage) -> Plan:
    """Raises ValueError for a malformed row, or where the flags leave nothing to train on."""
    for data in filter(None, (stage.dataset, stage.val_dataset)):
        if data.rows.index_seconds:
            run.print(f"indexed {data.rows.path}: {len(data)} rows in {data.rows.index_seconds:.1f} s (once)")
        if args.on_bad_sample == "stop":
            data.check_rows()
    if note := settle_val_fraction(args, len(stage.dataset)):
        run.print(note)
    train_set, val_set = split_off(stage.dataset, stage.val_dataset, args.val_fraction, args.seed)
    choose_trained(stage.model, args.train)
    memory = plan_memory(run, args, stage.model, stage.vision_model, train_set)
    args.num_workers, note = fitting_workers(args.num_workers, args.batch_size * memory.loaded)
    if note:
        run.print(note)
    batches = make_batches(run, args, train_set)
    settings = settings_of(run, args, stage, batches)
    run.check_agreement(settings)
    return Plan(run, args, stage, train_set, val_set, batches, memory, settings)


def settle_val_fraction(args: argparse.Namespace, num_rows: int) -> str:
    """Put the share of the rows that is kept for validation in the place of a flag that was not given.
    Returns what a person should know of it."""
    if args.val_fraction is not None:
        return ""
    args.val_fraction = 0.0 if args.val_data_path else automatic_share(num_rows, args.max_steps)
    if not args.val_fraction:
        return ""
    return (
        f"{round(args.val_fraction * num_rows)} of {num_rows} rows are kept out of training for the "
        "validation loss: --val_fraction 0 trains on them, too"
    )


def make_batches(run: Run, args: argparse.Namespace, train_set: Dataset) -> GlobalBatches:
    return GlobalBatches(
        len(train_set),
        args.batch_size,
        run,
        accumulation_steps=args.accumulation_steps,
        epochs=args.epochs,
        max_steps=args.max_steps,
        seed=args.seed,
        lengths=lengths_of(train_set) if args.bucket else None,
    )


def settings_of(run: Run, args: argparse.Namespace, stage: LoadedStage, batches: GlobalBatches) -> dict:
    """What decides the bits of a run, flags and contents: one that is resumed must have the same."""
    named = (
        "batch_size",
        "accumulation_steps",
        "seed",
        "learning_rate",
        "warmup_steps",
        "weight_decay",
        "grad_clip",
        "train",
        "max_seq_len",
        "val_fraction",
        "jpeg_draft",
        "bucket",
        "compile",
        "tf32",
    )
    dataset, model = stage.dataset, stage.model
    return {
        "processes": run.world_size,
        "total_steps": batches.total_steps,
        "rows": len(dataset),
        "features": args.feature_dtype if args.feature_cache else None,
        "dtype": name_of(choose_dtype(args.dtype, run.device)),
        **{name: getattr(args, name) for name in named},
        "data": dataset.rows.fingerprint,
        "images": fingerprint_images(dataset),
        **(stage.description.get("inputs") or {}),
        **{f"rows.{name}": value for name, value in asdict(dataset.spec).items()},
        **{f"model.{name}": value for name, value in model.config.to_dict().items()},
    }


def fingerprint_images(dataset: VLMDataset) -> str | None:
    """Of NUM_VOUCHED images spread over the rows, or of all where there are fewer: reading every image of
    600 k rows would take as long as a part of the training."""
    if not dataset.spec.max_images:
        return None
    images: list[Path | Embedded] = []
    for position in spread(len(dataset), NUM_VOUCHED):
        with contextlib.suppress(ValueError):  # a bad row is reported elsewhere
            names, _ = dataset.check(dataset.rows[position])
            images += locate(names, dataset.rows, position, dataset.find_image)
    return fingerprint_files(dict.fromkeys(images))
