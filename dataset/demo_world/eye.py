"""Train the demo's CLIP, as it lies in dataset/demo_world/clip:

    python -m dataset.demo_world.eye --out my_clip

The real CLIP arrives trained, and so does the demo's: this takes longer than all stages of the quickstart
together. It never sees a combination that any demo world, of whatever seed, keeps for its test.

FOLDER/                  what the folder of openai/clip-vit-base-patch32 holds
FOLDER/eye.json          recipe, seed and fingerprint of the recipe, scores, versions, seconds
FOLDER/training.jsonl    losses and scores on the way
FOLDER/training.png      the same as curves

A second call goes on where the first was stopped, in FOLDER.building.
"""

import argparse
import ast
import hashlib
import inspect
import json
import os
import platform
import time
from dataclasses import asdict
from pathlib import Path

from trainer.script import Parser, at_least, clean_exit

SHIPPED = Path(__file__).parent / "clip"
SCORE_EVERY = 500
LOG_EVERY = 50
CLIP_FILES = (
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.prog = "python -m dataset.demo_world.eye"
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--steps", type=at_least(1), help="other than the recipe's, to try something")
    return parser.parse_args(argv)


def fingerprint(recipe) -> str:
    """Of all that decides what the encoder becomes: the recipe's numbers, and the code that draws scenes,
    writes captions and learns; not of its comments and docstrings."""
    from dataset.demo_world import colours, cosines, encoder, paint, patches, things, tokenizer, wording

    digest = hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode())
    for part in (colours, cosines, encoder, paint, patches, things, tokenizer, wording.fill):
        digest.update(code_of(inspect.getsource(part)).encode())
    rules = {
        "held out": [patches.SPLIT_TABLE.tolist(), patches.TOGETHER_TABLE.tolist()],
        "words": [wording.CHINESE.words, wording.CHINESE.thing, wording.CHINESE.list],
        "joints": [wording.CHINESE.begin, wording.CHINESE.joint],
    }
    digest.update(json.dumps(rules, sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()


def code_of(source: str) -> str:
    """A module's code without comments and docstrings, however it is laid out."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            del node.body[0]
    return ast.unparse(tree)


def make_eye(out: Path, steps: int | None = None) -> None:
    """Train and save; see the module's docstring."""
    from dataclasses import replace

    import torch
    import transformers

    from dataset.demo_world.encoder import EyeRecipe, EyeTraining, clip_tokenizer, clip_words, save_encoder
    from dataset.demo_world.tokenizer import train_tokenizer
    from model.files import atomic_write, write_text
    from model.locks import claimed
    from trainer.logger import progress_bar

    recipe = EyeRecipe()
    if steps is not None:
        recipe = replace(recipe, steps=steps)
    work = out.with_name(out.name + ".building")
    if out.exists():
        raise ValueError(f"{out} exists: choose another --out, or remove it")
    work.mkdir(parents=True, exist_ok=True)
    with claimed(out, "wait until it is made, or choose another --out"):
        mark = {"fingerprint": fingerprint(recipe), "threads": torch.get_num_threads()}
        train_tokenizer(work, clip_words())
        training = EyeTraining(recipe, clip_tokenizer(work))
        state_file, log = work / "state.pt", []
        seconds = 0.0
        if state_file.is_file():
            state = read_state(state_file)
            if state.get("mark") == mark:
                training.load_state_dict(state["training"])
                log, seconds = state["log"], state["seconds"]
            else:
                print(f"{state_file} is damaged, or of another recipe or number of threads: begun anew")
        started = time.perf_counter() - seconds
        with progress_bar(total=recipe.steps, initial=training.step, desc="eye", unit="step") as bar:
            while training.step < recipe.steps:
                losses = training.take_step()
                bar.update(1)
                is_last = training.step == recipe.steps
                if training.step % LOG_EVERY == 0 or is_last:
                    log.append({"step": training.step, **losses})
                if training.step % SCORE_EVERY == 0 or is_last:
                    log[-1]["scores"] = training.score()
                    state = {
                        "mark": mark,
                        "training": training.state_dict(),
                        "log": log,
                        "seconds": time.perf_counter() - started,
                    }
                    atomic_write(state_file, lambda file, state=state: torch.save(state, file))
        seconds = time.perf_counter() - started
        save_encoder(training.model.eval(), training.tokenizer, work)
        write_text(work / "training.jsonl", "".join(json.dumps(line) + "\n" for line in log))
        draw_curve(log, work / "training.png")
        about = {
            "command": "python -m dataset.demo_world.eye",
            **mark,
            "recipe": asdict(recipe),
            "scores": log[-1]["scores"],
            "seconds": round(seconds),
            "machine": platform.machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        write_text(work / "eye.json", json.dumps(about, indent=1) + "\n")
        state_file.unlink()
        os.rename(work, out)


def read_state(path: Path) -> dict:
    """What make_eye saved on the way; {} if it cannot be read."""
    import torch

    try:
        state = torch.load(path, weights_only=True)
    except Exception:  # a damaged file surfaces as any of half a dozen types
        return {}
    return state if isinstance(state, dict) else {}


def draw_curve(log: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4))
    losses, scores = figure.subplots(1, 2)
    steps = [line["step"] for line in log]
    for name in ("image_loss", "thing_loss", "word_loss"):
        losses.plot(steps, [line[name] for line in log], label=name.replace("_", " "), linewidth=1)
    losses.set(xlabel="step", title="loss")
    scored = [line for line in log if "scores" in line]
    for split, style in (("unseen", "-"), ("unseen_pairs", "--"), ("unseen_of_3", ":")):
        for number, name in enumerate(("colour", "shape", "position", "size")):
            values = [line["scores"][split][name] for line in scored]
            label = f"{name}, {split}"
            scores.plot([line["step"] for line in scored], values, style, color=f"C{number}", label=label)
    scores.set(xlabel="step", title="share of things told right", ylim=(0, 1.02))
    for axes in (losses, scores):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    make_eye(args.out, args.steps)
    about = json.loads((args.out / "eye.json").read_text())
    print(f"{args.out}: trained in {about['seconds'] / 60:.0f} min; told right: {about['scores']}")


if __name__ == "__main__":
    clean_exit(main)
