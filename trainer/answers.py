"""--samples: the same few questions asked again and again while a run trains, to see it learn.

    512_vlm_sft.samples.jsonl  every answer: step, row, images, question, right answer, the model's
    512_vlm_sft.samples.png    at the end: images down, steps across

Answers are greedy, made on rank 0 by a second view of the weights (decode.py), and draw no random number.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from model.chat import Chat
from model.data.dataset import CONTENT, VLMDataset
from model.data.video import load_images, open_images
from model.decode import Decoder
from model.device import without_memory
from model.generate import Sampling
from model.names import CLIP_PATH
from model.packing import USUAL
from model.prompt import IMAGE_MARK, find_marks, normalise_turns
from model.transformer import Transformer
from model.vision_utils import get_img_embedding, get_vision_model
from trainer.distributed import Run
from trainer.drawing import draw_answers
from trainer.logger import MetricsLog, find_records, first_line
from trainer.question_files import parse_questions
from trainer.record import Record
from trainer.stand_ins import Numbered

GROWTH = 1.25  # a save is asked at if at least so many times the steps are done than when it was asked last
MAX_NEW_TOKENS = 48  # of an answer: longer ones are cut here
SIDE, GAP = 224, 6  # pixels of an image on the sheet, and between two


@dataclass
class Sample:
    """A question, and what it shows.

    row       its number in the file, as people count
    features  (n, N, vision_dim)
    """

    row: int
    images: list
    turns: list[dict]
    question: str
    answer: str
    features: Tensor


class SampleAnswers:
    """Asks, records and draws. Whatever fails here costs the record, never the run."""

    def __init__(
        self,
        run: Run,
        args: argparse.Namespace,
        weights_out: Path,
        trainer,
        plan,
        log: MetricsLog,
        resumed: dict | None = None,
    ):
        """resumed: what state_dict() said at the save that the run resumes from"""
        self.run, self.total_steps, self.log = run, plan.batches.total_steps, log
        resumed = resumed or {"length": 0, "asked": None}
        self.record = Record(weights_out.with_suffix(".samples.jsonl"), run, resumed["length"])
        self.sheet = weights_out.with_suffix(".samples.png")
        self.asked: int | None = resumed["asked"]  # the last step at which it was asked
        self.tokenizer = plan.stage.dataset.renderer.tokenizer
        self.samples = choose_samples(args, trainer, plan) if args.samples else []  # on all ranks alike

    def ask(self, trainer, step: int) -> list[dict]:
        """The answers at a save, on rank 0: those of the first and the last, and of others as far as GROWTH
        lets them, so that they become rarer as a run goes on. Only the step decides, never the clock."""
        is_due = self.asked is None or step >= GROWTH * self.asked or step == self.total_steps
        if not self.samples or not is_due:
            return []
        self.asked = step
        if not self.run.is_main:
            return []
        try:
            answers = self.answer(trainer.model)
        except Exception as error:  # memory that is short, for one
            self.run.print(f"no answers at step {step}: {first_line(error)}")
            return []
        return [
            {
                "step": step,
                "row": sample.row,
                "image": [str(image) for image in sample.images],
                "question": sample.question,
                "answer": sample.answer,
                "given": given,
                "right": given == sample.answer,
            }
            for sample, given in zip(self.samples, answers, strict=True)
        ]

    def answer(self, model: Transformer) -> list[str]:
        with without_memory():  # the decoder arranges the weights anew; the model's own stay where they are
            copy = Transformer(model.config)
        copy.load_state_dict(model.state_dict(), assign=True)
        chat = Chat(Decoder(copy, len(self.samples), USUAL), self.tokenizer)
        turns = [sample.turns for sample in self.samples]
        features = [sample.features for sample in self.samples]
        return chat.answer_batch(turns, features, Sampling(max_new_tokens=MAX_NEW_TOKENS))

    def write(self, records: list[dict]) -> None:
        for record in records:
            self.record.write(record)
        if records and self.log.wandb:
            import wandb  # loaded already

            names = list(records[0])
            rows = [[str(value) for value in record.values()] for record in records]
            self.log.mirror(records[0]["step"], {"samples": wandb.Table(names, rows)})

    def state_dict(self) -> dict:
        return {"length": self.record.sync(), "asked": self.asked}

    def close(self) -> None:
        """Draw the sheet."""
        try:
            if self.record.close():
                records, _ = find_records(self.record.path)
                images = {sample.row: open_shown(sample.images) for sample in self.samples}
                draw_answers(
                    records, images, self.record.path.name.removesuffix(".samples.jsonl"), self.sheet
                )
                if self.log.wandb:
                    import wandb

                    self.log.mirror(self.asked, {"samples_sheet": wandb.Image(str(self.sheet))})
        except Exception as error:  # as in MetricsLog.close()
            self.run.print(f"cannot draw {self.sheet}: {first_line(error)}")


def open_shown(images: list) -> Image.Image | None:
    """A sample's image, small, or the first four of several side by side; None if they cannot be read any
    more."""
    try:
        parts = list(open_images(images[:4]))
    except CONTENT:
        return None
    if len(parts) == 1:
        return ImageOps.contain(parts[0], (SIDE, SIDE))
    sheet = Image.new("RGB", (2 * SIDE + GAP, (len(parts) + 1) // 2 * (SIDE + GAP) - GAP), "lightgrey")
    for number, part in enumerate(parts):
        tile = ImageOps.pad(part, (SIDE, SIDE), color="white")
        sheet.paste(tile, (number % 2 * (SIDE + GAP), number // 2 * (SIDE + GAP)))
    return sheet


def choose_samples(args: argparse.Namespace, trainer, plan) -> list[Sample]:
    """Those of --sample_questions in their order, or validation rows drawn from the seed, each about other
    images where there are enough. Raises ValueError if there are none."""
    dataset = plan.stage.dataset
    if args.sample_questions:
        return list(read_samples(Path(args.sample_questions), dataset, args, trainer))
    if not plan.val_set:
        raise ValueError(
            "--samples asks about rows that are never trained on: give --val_fraction, --val_data_path or "
            "--sample_questions"
        )
    rows, chosen = Numbered(plan.val_set), []
    for place in in_turn(rows.shown(), args.seed):
        if len(chosen) < args.samples and (sample := make_sample(rows, place, trainer)):
            chosen.append(sample)
    if not chosen:
        raise ValueError("--samples: no validation row shows an image in its first question")
    return chosen


def in_turn(shown: list[list[int]], seed: int) -> list[int]:
    """All rows that show something, at random, those with images that were not shown before them first."""
    order = torch.randperm(len(shown), generator=torch.Generator().manual_seed(seed)).tolist()
    seen: set[int] = set()
    first, later = [], []
    for row in filter(shown.__getitem__, order):
        (later if seen & set(shown[row]) else first).append(row)
        seen |= set(shown[row])
    return first + later


def make_sample(rows: Numbered, place: int, trainer) -> Sample | None:
    """The first question of a row; None if the row cannot be used, which is reported elsewhere, or shows its
    images later."""
    dataset, position = rows.dataset, rows.row(place)
    try:
        images, turns = dataset.expand(position)
        texts = normalise_turns(turns)
        end = [role for role, _ in texts].index("assistant")
        asked, answer = turns[:end], texts[end][1].strip()
        images = images[: find_marks(texts[:end]).count(IMAGE_MARK)]
        if not images or len(dataset.renderer.render(asked).input_ids) >= trainer.model.config.max_seq_len:
            return None
        loaded = dataset.load(images)
    except CONTENT:
        return None
    loaded = {name: tensor.to(trainer.run.device) for name, tensor in loaded.items()}
    features = trainer.image_features(loaded).float()
    return Sample(position + 1, images, asked, without_marks(texts[end - 1][1]), answer, features)


def read_samples(path: Path, dataset: VLMDataset, args: argparse.Namespace, trainer) -> Iterator[Sample]:
    """The first args.samples questions of a file as 3-eval_chat.py --questions takes them. Raises
    FileNotFoundError or ValueError, naming file and row."""
    vision_model = trainer.vision_model or get_vision_model(args.clip_path or CLIP_PATH)[0]
    vision_model.to(trainer.run.device)
    for number, entry in enumerate(islice(parse_questions(path), args.samples), 1):
        if entry.row.get("video"):
            raise ValueError(f"{entry.name}: --sample_questions asks about images, not videos")
        pixels = torch.stack(load_images(entry.files, dataset.image_processor)).to(trainer.run.device)
        features = get_img_embedding(pixels, vision_model).float()
        question, answer = without_marks(entry.row["question"]), entry.row["answer"].strip()
        yield Sample(number, entry.files, entry.turns, question, answer, features)


def without_marks(question: str) -> str:
    """What is asked, without the marks of images."""
    return question.replace(IMAGE_MARK, "").strip()
