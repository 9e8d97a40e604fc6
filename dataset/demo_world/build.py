"""The parts of a demo world, and the order in which they are made; __main__.py lists what they come to."""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from dataset.demo_world import scenes, sentences, tokenizer, videos
from dataset.demo_world.eye import CLIP_FILES, SHIPPED
from dataset.demo_world.recipe import PRESETS, Stage
from dataset.demo_world.wording import SINGLE_KINDS
from model.data.dataset import VLMDataset
from model.data.spec import TEXT
from model.files import atomic_write, write_text
from model.locks import claimed
from model.names import weights_path
from model.prompt import Renderer
from model.transformer import Transformer
from trainer.args import training_parser
from trainer.distributed import start_run
from trainer.inputs import make_config
from trainer.logger import progress_bar
from trainer.loop import train
from trainer.script import quote_word
from trainer.stage import LoadedStage

WORLD_VERSION = 7  # raised when a change of the recipe makes existing worlds outdated
NUM_EVAL_IMAGES = 8
NUM_VALIDATED, NUM_SAVES = 64, 4  # rows whose loss is measured at every save of a stage, about so many times
# Rows of one length ask one kind of question here: in a few hundred steps each had better hold all kinds.
# (The last stage does without, see write_recipes.)
MIXED_STEPS = "--bucket=False"
MAX_SEQ_LEN = 256
# An expert learns from the tokens that choose it. Measured on the tiny world, two seeds: at equal steps a
# mixture is up to 17 points less accurate than a dense model is; with half as many more, at most 2 points.
MOE_STEPS = 1.5


class World:
    """A demo world being made in `work`, for its later life in `folder`."""

    def __init__(
        self, folder: Path, preset_name: str, seed: int, use_moe: bool = False, clip: Path = SHIPPED
    ):
        self.folder, self.work = folder, folder.with_name(folder.name + ".building")
        self.preset, self.seed = PRESETS[preset_name], seed
        self.use_moe, self.clip = use_moe, clip
        self.identity = {
            "version": WORLD_VERSION,
            "preset": preset_name,
            "seed": seed,
            "clip": hash_file(clip / "model.safetensors"),
            **({"use_moe": True} if use_moe else {}),
        }

    @cached_property
    def splits(self) -> dict[str, list[scenes.Scene]]:
        return scenes.make_splits(self.preset, self.seed)

    @cached_property
    def video_splits(self) -> dict[str, list[videos.Video]]:
        return videos.make_videos(self.preset, self.seed)

    def images(self, split: str) -> dict[str, scenes.Scene]:
        """File name -> scene."""
        return {
            f"{split}_{number:04d}.{scene.suffix}": scene for number, scene in enumerate(self.splits[split])
        }

    def videos_of(self, split: str) -> dict[str, videos.Video]:
        """File name -> video."""
        return {f"videos/{split}_{n:04d}.mp4": video for n, video in enumerate(self.video_splits[split])}

    def rng(self, part: str) -> np.random.Generator:
        """A stream of its own for every part, so that a part made in a second call comes out the same."""
        return np.random.default_rng([self.seed, *part.encode()])

    def build(self) -> None:
        """Make what is missing. Raises ValueError if another world lies in the folder, or another process is
        at work there."""
        if not self.folder.exists():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with claimed(self.folder, "wait until it is made, or choose another --out"):
                if not self.folder.exists():
                    self.make_parts()
        self.check_identity()

    def make_parts(self) -> None:
        state = read_json(self.work / "world.json")
        if state.get("identity") != self.identity or not isinstance(state.get("seconds"), dict):
            shutil.rmtree(self.work, ignore_errors=True)
            state = {"identity": self.identity, "seconds": {}}
        self.work.mkdir(parents=True, exist_ok=True)
        for name, part in self.parts().items():
            if name not in state["seconds"]:
                started = time.perf_counter()
                part()
                sync()
                state["seconds"][name] = round(time.perf_counter() - started, 1)
                write_json(self.work / "world.json", state)
        os.rename(self.work, self.folder)

    def parts(self) -> dict[str, Callable[[], None]]:
        return {
            "images": self.draw_images,
            "videos": self.draw_videos,
            "sentences": self.write_rows,
            "tokenizer": self.make_tokenizer,
            "clip": self.copy_clip,
            "llm": self.make_llm,
        }

    def check_identity(self) -> None:
        found = read_json(self.folder / "world.json").get("identity")
        if found != self.identity:
            raise ValueError(
                f"{self.folder} holds "
                f"{'another demo world: ' + str(found) if found else 'something else'}; "
                "choose another --out, or remove that folder"
            )

    def draw_images(self) -> None:
        images, shown = self.work / "images", self.work / "eval_images"
        images.mkdir(exist_ok=True)
        shown.mkdir(exist_ok=True)
        everything = {name: scene for split in scenes.SPLITS for name, scene in self.images(split).items()}
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # PIL and NumPy let other threads run
            done = pool.map(lambda name: scenes.save(everything[name], images / name), everything)
            for _ in progress_bar(done, total=len(everything), desc="images", unit=""):
                pass
        half = NUM_EVAL_IMAGES // 2
        for name in [*list(self.images("unseen"))[:half], *list(self.images("several_unseen"))[:half]]:
            shutil.copyfile(images / name, shown / name)

    def draw_videos(self) -> None:
        (self.work / "videos").mkdir(exist_ok=True)
        everything = self.videos_of("train") | self.videos_of("unseen")
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # x264 lets other threads run
            done = pool.map(lambda name: videos.save_video(everything[name], self.work / name), everything)
            for _ in progress_bar(done, total=len(everything), desc="videos", unit=""):
                pass

    def write_rows(self) -> None:
        train, preset = self.images("train"), self.preset
        rows = {
            "pretrain": sentences.pretrain_rows(train, preset, self.rng("pretrain")),
            "sft": sentences.sft_rows(train, preset, self.rng("sft")),
            "sft_multi": sentences.multi_rows(
                in_folder(train), self.videos_of("train"), preset, self.rng("multi")
            ),
            "text": sentences.text_rows(train, self.videos_of("train"), preset, self.rng("text")),
        }
        for name, made in rows.items():
            write_json(self.work / f"{name}.json", made)
        for split in scenes.SINGLE_SPLITS:
            images, rng = in_folder(self.images(split)), self.rng(f"questions {split}")
            questions = sentences.questions(images, SINGLE_KINDS, preset, rng)
            write_lines(self.work / f"questions_{split}.jsonl", questions)
        for split in scenes.SEVERAL_SPLITS:
            images, rng = in_folder(self.images(split)), self.rng(f"questions {split}")
            singles = in_folder(self.images(split.removeprefix("several_")))
            questions = sentences.several_questions(images, singles, preset, rng)
            write_lines(self.work / f"questions_{split}.jsonl", questions)
        for split in scenes.SINGLE_SPLITS:
            images, rng = in_folder(self.images(split)), self.rng(f"questions multi {split}")
            write_lines(
                self.work / f"questions_multi_{split}.jsonl",
                sentences.two_image_questions(images, preset.test_images, rng),
            )
        write_lines(
            self.work / "questions_videos_unseen.jsonl",
            sentences.video_questions(self.videos_of("unseen"), self.rng("questions films")),
        )

    def make_tokenizer(self) -> None:
        tokenizer.train_tokenizer(self.work / "tokenizer")

    def copy_clip(self) -> None:
        (self.work / "clip").mkdir(exist_ok=True)
        for name in CLIP_FILES:
            shutil.copyfile(self.clip / name, self.work / "clip" / name)

    def make_llm(self) -> None:
        """The language model: MiniMind in small, trained on text alone with the loop of the later stages."""
        preset = self.preset
        parser = training_parser(
            "", data_path=str(self.work / "text.json"), image_dir="", learning_rate=preset.llm.lr
        )
        args = parser.parse_args(
            self.sizes()
            + [
                f"--max_steps={preset.llm.steps}",
                f"--batch_size={preset.llm.batch_size}",
                f"--seed={self.seed}",
                "--num_workers=0",
                "--dtype=float32",
                "--device=cpu",
                MIXED_STEPS,
                "--resume",
            ]
        )
        words = PreTrainedTokenizerFast.from_pretrained(self.work / "tokenizer")
        config = make_config(args, len(words), vision_dim=0)
        with start_run(args.device) as run:
            torch.manual_seed(args.seed)
            dataset = VLMDataset(args.data_path, TEXT, Renderer(words, max_seq_len=args.max_seq_len))
            train(
                run,
                args,
                LoadedStage(
                    Transformer(config),
                    None,
                    dataset,
                    weights_path(self.work, config, "llm"),
                    {"stage": "llm", "tokenizer_path": str(self.folder / "tokenizer")},
                ),
            )

    def sizes(self) -> list[str]:
        preset = self.preset
        return [
            f"--dim={preset.dim}",
            f"--n_layers={preset.n_layers}",
            f"--n_heads={preset.n_heads}",
            f"--n_kv_heads={preset.n_kv_heads}",
            f"--max_seq_len={MAX_SEQ_LEN}",
            *self.kind(),
        ]

    def num_steps(self, stage: Stage) -> int:
        return round(stage.steps * MOE_STEPS) if self.use_moe else stage.steps

    def kind(self) -> list[str]:
        return ["--use_moe=True"] * self.use_moe

    def write_recipes(self, weights_dir: Path) -> None:
        """One @file per script, so that the numbered scripts run the demo without another flag."""
        if weights_dir != self.folder:
            weights_dir.mkdir(parents=True, exist_ok=True)
            for source in self.folder.glob("*_llm.*"):
                atomic_write(
                    weights_dir / source.name, lambda file, source=source: file.write(source.read_bytes())
                )
        write_json(
            self.folder / "about.json",
            {**sentences.about(), "image_dir": f"{self.folder}/eval_images"},
        )
        model = [
            f"--tokenizer_path={self.folder}/tokenizer",
            f"--clip_path={self.folder}/clip",
            f"--out_dir={weights_dir}",
            f"--seed={self.seed}",
            "--device=cpu",
            "--dtype=float32",
        ]
        for name in ("pretrain", "sft", "sft_multi"):
            stage = {
                "pretrain": self.preset.pretrain,
                "sft": self.preset.sft,
                "sft_multi": self.preset.multi,
            }[name]
            # The rows of the last stage say which folder: images/ or videos/.
            image_dir = self.folder if name == "sft_multi" else self.folder / "images"
            flags = [
                *model,
                *self.sizes(),
                f"--data_path={self.folder}/{name}.json",
                f"--image_dir={image_dir}",
                f"--max_steps={self.num_steps(stage)}",
                f"--batch_size={stage.batch_size}",
                f"--learning_rate={stage.lr}",
                f"--warmup_steps={stage.warmup}",
                "--num_workers=0",
                f"--feature_cache={self.folder}/features",
                f"--about={self.folder}/about.json",
                f"--val_data_path={self.folder}/validation_{name}.json",
                f"--save_interval={max(50, -(-self.num_steps(stage) // NUM_SAVES))}",
                "--samples=8",
            ]
            write_json(self.folder / f"validation_{name}.json", self.validation_rows(name))
            if name == "sft":
                flags.append("--max_rounds=0")  # every round of a dialogue is learnt
            # A video is twice as long as two images: side by side, half of a step would be padding.
            flags.append("--multi=True" if name == "sft_multi" else MIXED_STEPS)
            write_recipe(self.folder / f"{name}.args", flags)
        write_recipe(
            self.folder / "eval.args",
            [*model, f"--dim={self.preset.dim}", *self.kind(), f"--image_dir={self.folder}/eval_images"],
        )

    def validation_rows(self, name: str) -> list[dict]:
        """Rows like those of a stage, about images of combinations that no stage ever sees."""
        rng, half = self.rng(f"validation {name}"), NUM_VALIDATED // 2
        images = {
            image: scene
            for split in ("unseen", "several_unseen")
            for image, scene in islice(self.images(split).items(), half)
        }
        if name == "pretrain":
            return sentences.pretrain_rows(images, self.preset, rng)
        if name == "sft":
            return sentences.sft_rows(images, self.preset, rng)[:NUM_VALIDATED]
        third = NUM_VALIDATED // 3
        preset = replace(self.preset, two_image_rows=third, one_image_rows=third)
        videos_shown = dict(islice(self.videos_of("unseen").items(), third // sentences.ASKED_PER_VIDEO))
        return sentences.multi_rows(in_folder(images), videos_shown, preset, rng)


def in_folder(images: dict[str, scenes.Scene]) -> dict[str, scenes.Scene]:
    return {f"images/{name}": scene for name, scene in images.items()}


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, its first 16 digits. Raises FileNotFoundError, naming the cure."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} not found: restore it, or make it with python -m dataset.demo_world.eye "
            f"--out {path.parent}"
        )
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def read_json(path: Path) -> dict:
    """The object in a file; {} where there is none, or no whole one."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        values = json.loads(path.read_bytes())
        return values if isinstance(values, dict) else {}
    return {}


def sync() -> None:
    """Have the system write out what it still holds: a part counts as made once it outlives a power cut."""
    if hasattr(os, "sync"):  # Windows has none
        os.sync()


def write_json(path: Path, values: dict | list) -> None:
    text = json.dumps(values, ensure_ascii=False, indent=1)
    write_text(path, text)


def write_lines(path: Path, rows: list[dict]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(path, text)


def write_recipe(path: Path, flags: list[str]) -> None:
    text = (
        "# made by python -m dataset.demo_world; a flag given after @this_file wins\n"
        + "\n".join(quote_word(flag) for flag in flags)
        + "\n"
    )
    # Not write_text(): the bytes of a name that are not UTF-8 stay what they are.
    atomic_write(path, lambda file: file.write(text.encode(errors="surrogateescape")))
