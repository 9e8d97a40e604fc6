"""What trainer.check looks at: tokenizer, CLIP, weights and data, and then what the run would be."""

import argparse
import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from model.checkpoint import is_finished, read_state_dict, sizes_of
from model.data.batch import collate
from model.data.dataset import VLMDataset, tokenize
from model.data.formats import data_files
from model.device import choose_device, choose_dtype
from model.files import check_image_dir
from model.LMConfig import LMConfig
from model.names import CLIP_PATH, weights_path
from model.printable import format_bytes, one_line, printable
from model.prompt import MARK, Renderer, choose_placeholder, load_tokenizer, normalise_turns
from model.transformer import Transformer
from model.vision_proj import PLACEHOLDER
from model.vision_utils import ImageProcessor, check_fit, get_vision_model, num_image_tokens
from trainer.args import AUTO
from trainer.batches import split_off, spread
from trainer.distributed import Run, start_run
from trainer.inputs import Stage, make_config, starting_weights, tokenizer_of, weights_cure
from trainer.interrupt import ignore_interrupts
from trainer.loader import fitting_workers
from trainer.logger import describe_run, progress_bar
from trainer.loop import Trainer
from trainer.memory import (
    available_memory,
    estimate_loading,
    estimate_step,
    held_memory,
    plan_memory,
    size_in_memory,
)
from trainer.meter import ENOUGH, MAX_BAD_SHARE, describe_cut
from trainer.optimizer import choose_trained
from trainer.samples import Measured, bad_rows, decode_sample, measure, well_formed
from trainer.saves import RunFiles
from trainer.script import MOST_SHOWN
from trainer.stage import (
    LoadedStage,
    compare_inputs,
    load_model,
    make_batches,
    settings_of,
    settle_val_fraction,
)

NUM_ANSWERS = 8  # rows whose answers the language model is measured on
NUM_SHOWN = 3  # samples decoded; bad rows named one by one
GUESSING = 0.9  # a model with a loss above this share of ln(vocabulary) has learned next to nothing
ORDINARY = [
    ("今天天气怎么样？", "今天天气很好，阳光明媚，适合出去散步。"),
    ("苹果是什么颜色的？", "苹果通常是红色或绿色的。"),
    ("你能帮我做什么？", "我可以回答你的问题，也可以帮助你写文章。"),
    ("What do people eat for breakfast?", "Many people eat bread, eggs and fruit for breakfast."),
    ("Where do fish live?", "Fish live in the water, in rivers, lakes and the sea."),
    ("Tell me something about the sun.", "The sun is a star. It gives us light and heat."),
]


def inspect(args: argparse.Namespace, stage: Stage, script: str, num_loaded: int | None) -> list[str]:
    """Report on a stage part by part, and at the end each problem, on rank 0; returns the problems."""
    problems: list[str] = []
    try:
        choose_device(args.device)
    except ValueError as error:
        problems.append(str(error))
        args.device = "cpu"  # carry on, so that every problem is reported
    with start_run(args.device, args.timeout) as run:
        if run.is_main:
            report("check", f"is everything in place for {script}?")
            Check(run, args, stage, problems, num_loaded).everything()
            report("check", f"{len(problems)} problem(s)" if problems else "everything is in place")
            for problem in problems:
                print(f"error: {one_line(problem, MOST_SHOWN)}", file=sys.stderr, flush=True)
    return problems


class Check:
    """Looks at one stage part by part; each part keeps what it loaded for the next, None where it failed."""

    def __init__(
        self,
        run: Run,
        args: argparse.Namespace,
        stage: Stage,
        problems: list[str],
        num_loaded: int | None = None,
    ):
        """num_loaded: rows that are loaded with their images, spread over the file; None: all"""
        self.run, self.args, self.stage = run, args, stage
        self.problems, self.num_loaded = problems, num_loaded
        self.alone = replace(run, world_size=1)  # the other processes of the run do not answer here
        self.model: Transformer | None = None
        self.inputs: dict | None = None
        self.placeholder = PLACEHOLDER  # the ids that an image's is made of
        self.good: dict[int, Measured] = {}  # of some rows, what measure() says

    def everything(self) -> None:
        torch.manual_seed(self.args.seed)
        self.check_tokenizer()
        self.check_clip()
        is_loaded = self.check_weights()
        has_images = self.check_images()
        self.dataset = self.check_rows("data", self.args.data_path)
        self.val_dataset = self.args.val_data_path and self.check_rows("validation", self.args.val_data_path)
        if has_images and self.tokenizer:
            for name, dataset in (("validation", self.val_dataset), ("data", self.dataset)):
                self.good = self.load_rows(name, dataset) if dataset else {}
        if self.model:
            self.check_run()
        if is_loaded and self.tokenizer:
            self.attempt(self.check_losses)
        if self.model and self.good:
            self.check_memory()
        for position in list(self.good)[:NUM_SHOWN]:
            text = self.attempt(decode_sample, self.dataset[position], self.tokenizer, self.placeholder)
            report(f"row {position + 1}", text or "")

    def attempt(self, make: Callable, *arguments):
        """What make(*arguments) returns; where it raises what a user can cure, None and one problem more."""
        try:
            return make(*arguments)
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            self.problem(str(error))
            return None

    def problem(self, text: str) -> None:
        text = " ".join(text.split())
        if text not in self.problems:
            self.problems.append(text)

    # ---- what the run starts from --------------------------------------------------------------------------

    def check_tokenizer(self) -> None:
        path = tokenizer_of(self.args)
        self.tokenizer = self.attempt(load_tokenizer, path, None if self.args.llm else PLACEHOLDER)
        if self.tokenizer:
            ids = {
                token: self.tokenizer.convert_tokens_to_ids(token)
                for token in (self.tokenizer.bos_token, self.tokenizer.eos_token, "<", ">")
            }
            report(
                "tokenizer",
                f"{path}, {size_of(path)}: {len(self.tokenizer)} tokens, "
                f"{', '.join(f'{token} is {number}' for token, number in ids.items())}",
            )

    def check_clip(self) -> None:
        self.clip_path = self.args.clip_path or CLIP_PATH
        self.vision_model, self.image_processor = self.attempt(get_vision_model, self.clip_path) or (
            None,
            ImageProcessor(),
        )
        if self.vision_model:
            report(
                "CLIP",
                f"{self.clip_path}, {size_of(self.clip_path)}: "
                f"{num_image_tokens(self.vision_model)} x {self.vision_model.config.hidden_size} "
                "features per image",
            )

    def check_weights(self) -> bool:
        """Make the model that the flags describe; is it loaded? Sizes that a missing tokenizer or CLIP would
        give are taken from the weights."""
        config = self.attempt(make_config, self.args)
        if not config:
            return False
        source = starting_weights(self.args, config, self.stage)
        state = self.attempt(read_state_dict, source, weights_cure(self.stage.weights_in, config))
        sizes = config.to_dict() | sizes_of(state or {})
        num_tokens = num_image_tokens(self.vision_model) if self.vision_model else sizes["num_image_tokens"]
        if self.args.llm and self.tokenizer:
            chosen = self.attempt(choose_placeholder, self.tokenizer, num_tokens)
            self.placeholder = chosen or PLACEHOLDER
        config = make_config(
            self.args,
            len(self.tokenizer) if self.tokenizer else sizes["vocab_size"],
            self.vision_model.config.hidden_size if self.vision_model else sizes["vision_dim"],
            num_tokens,
            self.placeholder,
        )
        if self.tokenizer and self.vision_model:
            self.attempt(check_fit, config, self.tokenizer, self.vision_model, source, self.clip_path)
            self.inputs = state and self.attempt(
                compare_inputs,
                source,
                self.tokenizer,
                self.vision_model,
                self.image_processor,
                self.args.allow_other_inputs,
            )
        loaded = state and self.attempt(load_model, config, source, self.stage.weights_in)
        self.model = loaded[0] if loaded else Transformer(config)
        if loaded:
            report("weights", f"{loaded[1]}; {size_of(source)}")
        return bool(loaded)

    # ---- what it learns from -------------------------------------------------------------------------------

    def check_images(self) -> bool:
        folder = Path(self.args.image_dir)
        self.attempt(check_image_dir, folder)
        if has_images := folder.is_dir():
            report("images", f"{folder}: {sum(1 for _ in os.scandir(folder))} files")
        return has_images

    def check_rows(self, name: str, path: str) -> VLMDataset | None:
        """A data file, with a look at each of its rows."""
        folder = self.args.image_dir if Path(self.args.image_dir).is_dir() else "."  # already reported
        num_tokens = self.model.config.num_image_tokens if self.model else LMConfig.num_image_tokens
        renderer = Renderer(self.tokenizer, num_tokens, self.args.max_seq_len, self.placeholder)
        dataset = self.attempt(VLMDataset, path, self.stage.spec, renderer, folder, self.image_processor)
        if dataset:
            sizes = [file.stat().st_size for file in data_files(path)]
            many = f" in {len(sizes)} files" if len(sizes) > 1 else ""
            report(name, f"{path}, {format_bytes(sum(sizes))}: {len(dataset)} rows{many}")
            self.report_bad(name, [dataset[position].reason for position in bad_rows(dataset)], len(dataset))
        return dataset

    def load_rows(self, name: str, dataset: VLMDataset) -> dict[int, Measured]:
        """Load rows with their images, as training will; what measure() says of the good ones, by
        position."""
        number = min(self.num_loaded or len(dataset), len(dataset))
        positions = spread(len(dataset), number)
        loader = DataLoader(
            Subset(dataset, positions),
            batch_size=20,
            num_workers=self.args.num_workers,
            collate_fn=measure,
            worker_init_fn=ignore_interrupts,
        )
        bar = progress_bar(loader, desc=name, disable=self.num_loaded is not None)
        found = dict(zip(positions, (facts for batch in bar for facts in batch), strict=True))
        good = {position: facts for position, facts in found.items() if not isinstance(facts, str)}
        longest = max((sample.num_tokens for sample in good.values()), default=0)
        report(name, f"{len(good)} of {number} rows loaded with their images, at most {longest} tokens long")
        lengths = sorted(sample.full_length for sample in good.values())
        num_cut = sum(length > self.args.max_seq_len for length in lengths)
        if num_cut:
            enough = lengths[math.ceil(ENOUGH * len(lengths)) - 1]
            report(name, describe_cut(num_cut, len(lengths), self.args.max_seq_len, enough))
        self.report_bad(name, [facts for facts in found.values() if isinstance(facts, str)], number)
        return good

    def report_bad(self, name: str, reasons: list[str], number: int) -> None:
        """Name the first bad rows of `number`; with --on_bad_sample skip a few are no problem."""
        skip = self.args.on_bad_sample == "skip"
        if skip and reasons:
            report(name, f"leaves out {len(reasons)} of {number} rows, first: {reasons[0]}")
        if not reasons or (skip and len(reasons) <= MAX_BAD_SHARE * number):
            return
        for reason in reasons[:NUM_SHOWN]:
            self.problem(reason if skip else f"{reason} (--on_bad_sample skip would leave it out)")
        if len(reasons) > NUM_SHOWN or skip:
            cure = "fix them" if len(reasons) < number else "are --data_path and --image_dir the right ones?"
            self.problem(f"{len(reasons)} of {number} rows looked at ({name}) cannot be used: {cure}")

    # ---- what it will do -----------------------------------------------------------------------------------

    def check_run(self) -> None:
        """The plan, in the run's own words, and what becomes of the files in --out_dir."""
        args, model = self.args, self.model
        choose_trained(model, args.train)
        if note := settle_val_fraction(args, len(self.dataset or ())):
            report("data", note)
        sets = self.dataset and self.attempt(
            split_off, self.dataset, self.val_dataset, args.val_fraction, args.seed
        )
        if sets and args.batch_size == AUTO:
            plan_memory(self.run, args, model, self.vision_model, sets[0])
        batches = sets and make_batches(self.run, args, sets[0])
        if batches and self.vision_model:
            dtype = choose_dtype(args.dtype, self.run.device)
            report("run", describe_run(self.run, args, model, self.vision_model, *sets, batches, dtype))
        path = weights_path(args.out_dir, model.config, self.stage.weights_out)
        settings = {}
        if batches:
            stage = LoadedStage(model, self.vision_model, self.dataset, path, {"inputs": self.inputs})
            settings = settings_of(self.run, args, stage, batches)
        files = RunFiles(self.alone, args, path, settings, {})
        if path.parent.is_dir():
            report(
                "disk",
                f"{path.parent}: the saves need {format_bytes(files.room_needed(model))}, "
                f"{format_bytes(shutil.disk_usage(path.parent).free)} free",
            )
            self.attempt(files.check_room, model)
        if batches and (fate := self.attempt(foresee, files, model, batches.total_steps)):
            report("writes", f"{path}: {fate}")

    # ---- what it knows already -----------------------------------------------------------------------------

    @torch.no_grad()
    def check_losses(self) -> None:
        """Does the model know its language? Random weights lose ln(vocabulary) per token or more.

        Measured on answers, without images: ordinary ones, and those of the data, because a model may know
        one sort alone (the demo's knows nothing but its world). The better loss counts.
        """
        trainer = Trainer(self.alone, self.args, self.model, self.vision_model)
        conversations = {
            "ordinary answers": [
                [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
                for question, answer in ORDINARY
            ],
            "the data's answers": well_formed(self.dataset, NUM_ANSWERS) if self.dataset else [],
        }
        losses = {
            name: answer_loss(trainer, self.tokenizer, turns)
            for name, turns in conversations.items()
            if turns
        }
        chance = math.log(self.model.config.vocab_size)
        text = (
            f"loss {', '.join(f'{loss:.2f} on {name}' for name, loss in losses.items())}; "
            f"guessing has ln({self.model.config.vocab_size}) = {chance:.2f}"
        )
        report("language", text)
        # Later stages' weights come from a run, and their data may be of a kind that they are yet to learn.
        if self.stage.weights_in == "llm" and not min(losses.values()) < GUESSING * chance:
            self.problem(
                f"the weights of stage {self.stage.weights_in} look random: {text}; "
                f"{weights_cure(self.stage.weights_in, self.model.config)}, or name the tokenizer they "
                "were trained with (--tokenizer_path)"
            )
        if self.vision_model and self.good:
            samples = [self.dataset[row] for row in list(self.good)[:NUM_SHOWN]]
            loss = trainer.loss(collate(samples)).item()
            report("sight", f"loss {loss:.2f} on the answers of {len(samples)} rows with their images")
            if not math.isfinite(loss):
                self.problem(f"the loss with images is {loss}: compute in --dtype float32 or bfloat16")

    def check_memory(self) -> None:
        """Compare what a step will take, its rows as long as the longest, with what is available. After
        check_losses(): until they are used, weights that were read from a file are not yet in memory."""
        args, device, cpu = self.args, self.run.device, torch.device("cpu")
        num_tokens, num_targets, num_bytes, _ = np.array(list(self.good.values())).T
        step = estimate_step(
            self.model,
            device,
            args.batch_size * int(num_tokens.max()),
            round(args.batch_size * num_targets.mean()),
        )
        needs = {
            cpu: {
                "held now": held_memory(),
                "loading": estimate_loading(args.num_workers, args.batch_size * int(num_bytes.max())),
            }
        }
        if note := fitting_workers(args.num_workers, args.batch_size * int(num_bytes.max()))[1]:
            report("loading", note)
        if device != cpu:
            needs[device] = {"weights": size_in_memory(self.model), "CLIP": size_in_memory(self.vision_model)}
        needs[device] |= step
        for place, parts in needs.items():
            processes = self.run.local_world_size if place == cpu else 1
            needed, available = processes * sum(parts.values()), available_memory(place)
            known = "" if available is None else f" of {format_bytes(available)}"
            report(
                "memory",
                f"{place}: about {format_bytes(needed)}{known} for {args.batch_size} x "
                f"{num_tokens.max()} tokens"
                f"{f' in each of {processes} processes' if processes > 1 else ''}\n"
                f"({', '.join(f'{name} {format_bytes(size)}' for name, size in parts.items())})",
            )
            if available is not None and needed > available:
                self.problem(
                    f"a step needs about {format_bytes(needed)} of memory on {place}, but "
                    f"{format_bytes(available)} is available: halve --batch_size and double "
                    "--accumulation_steps, or lower --num_workers"
                )


def report(name: str, text: str) -> None:
    for number, line in enumerate(printable(text).split("\n")):
        print(f"{'' if number else name:<12}{line}", flush=True)


def size_of(path: str | Path) -> str:
    """Of a file, or of all files in a folder."""
    path = Path(path)
    return format_bytes(sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir())))


def foresee(files: RunFiles, model: Transformer, total_steps: int) -> str:
    """What the run will do about the files of an earlier one. Raises what it would raise."""
    if files.finished_before():
        return "finished; there is nothing to do"
    kept = ""
    if is_finished(files.path):
        previous = files.path.with_suffix(".previous.pth")
        lost = ", whose place it takes" if previous.is_file() else ""
        kept = f"; the present file is kept as {previous.name}{lost}"
    state = files.read_start(model)
    if not state:
        return f"starts from step 0{kept}"
    if files.args.resume_weights_only:
        return f"a new schedule from the weights of the earlier run{kept}"
    return f"resumes from step {state['step']} of {total_steps}"


@torch.no_grad()
def answer_loss(trainer: Trainer, tokenizer, conversations: list[list[dict]]) -> float:
    """The loss per token of the answers when no image is shown: what the language model knows by itself."""
    renderer = Renderer(tokenizer, trainer.model.config.num_image_tokens, max_seq_len=sys.maxsize)
    samples = []
    for turns in conversations:
        blind = [{"from": role, "value": MARK.sub("", text)} for role, text in normalise_turns(turns)]
        samples.append(tokenize(blind, renderer) | {"pixel_values": torch.zeros(0, 3, 1, 1)})
    return trainer.loss(collate(samples)).item()
