"""Does trainer.gain find rows that are wrong, and rows that need no image? On a demo world that is spoilt on
purpose: a fifth of its captions is given another row's image, another fifth stands in its own question.

    python -m benchmarks.gain --out /tmp/gain          # the tiny world: minutes on a core

A model can do without an image only if it reads what the question says. Real language models do; the
demo's, after its few steps, does not yet, so here it is first taught to repeat a caption that it is told.
Then stage 1 runs on the spoilt captions, and trainer.gain looks at the same file. Printed are the areas under
the ROC curve: at 1.0 all rows of a kind stand before all others, at 0.5 they are mixed.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from dataset.demo_world.build import World, write_json
from dataset.demo_world.recipe import Stage
from trainer import gain
from trainer.script import Parser, at_least, clean_exit
from trainer.stages import SCRIPTS, load_script

SHARE = 0.2  # of the rows that are spoilt in each way
SPOILT = "spoilt"  # in a row: how
OTHERS_IMAGE, TOLD = "another's image", "told in the question"


def spoil(rows: list[dict], seed: int) -> list[dict]:
    """The same rows, a fifth with each other's images, another fifth with the answer behind the question."""
    rows = [dict(row) for row in rows]
    order = np.random.default_rng(seed).permutation(len(rows))
    count = round(SHARE * len(rows))
    misled, told = order[:count], order[count : 2 * count]
    for row, image in zip(misled, [rows[other]["image"] for other in np.roll(misled, 1)], strict=True):
        rows[row] |= {"image": image, SPOILT: OTHERS_IMAGE}
    for row in told:
        rows[row] |= {"conversations": tell(rows[row]["conversations"]), SPOILT: TOLD}
    return rows


def tell(turns: list[dict]) -> list[dict]:
    """A conversation of one round whose question holds the answer."""
    asked, answer = turns
    return [asked | {"value": f"{asked['value']}\n{answer['value']}"}, answer]


def make_world(folder: Path, seed: int, steps: int) -> World:
    """A tiny world with spoilt captions, and a language model that repeats what it is told."""
    world = World(folder, "tiny", seed)
    world.build()
    world.write_recipes(folder)
    rows = json.loads((folder / "pretrain.json").read_text(encoding="utf-8"))
    write_json(folder / "spoilt.json", spoil(rows, seed))
    texts = [
        turns["conversations"] for turns in json.loads((folder / "text.json").read_text(encoding="utf-8"))
    ]
    told = [{"conversations": tell(turns[n : n + 2])} for turns in texts for n in range(0, len(turns), 2)]
    world.work, world.preset = folder, replace(world.preset, llm=Stage(steps, 32, 2e-3))
    write_json(folder / "text.json", told)
    for path in folder.glob("96_llm.*"):
        path.unlink()
    world.make_llm()
    return world


def area(scores: np.ndarray, is_found: np.ndarray) -> float:
    """Under the ROC curve: of all pairs of a row to be found and another one, the share in which the first
    scores higher."""
    ranks = scores.argsort(kind="stable").argsort()
    found, others = is_found.sum(), (~is_found).sum()
    return float((ranks[is_found].sum() - found * (found - 1) / 2) / (found * others))


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/gain"), help="folder of the world")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the world, and of what is spoilt")
    parser.add_argument("--llm_steps", type=at_least(1), default=600, help="to learn to repeat")
    parser.add_argument("--steps", type=at_least(1), default=300, help="of stage 1")
    args = parser.parse_args(argv)
    make_world(args.out, args.seed, args.llm_steps)
    flags = [f"@{args.out}/pretrain.args", f"--data_path={args.out}/spoilt.json", f"--max_steps={args.steps}"]
    load_script(SCRIPTS["pretrain"]).main(flags)
    gain.main(["pretrain", *flags, f"--out={args.out}/gain.jsonl"])
    rows = json.loads((args.out / "spoilt.json").read_text(encoding="utf-8"))
    lines = (args.out / "gain.jsonl").read_text(encoding="utf-8").split("\n")
    print_areas([json.loads(line) for line in lines if line], rows)


def print_areas(found: list[dict], rows: list[dict]) -> None:
    kinds = np.array([rows[record["row"] - 1].get(SPOILT, "") for record in found])
    real, blank = (np.array([record[name] for record in found]) for name in ("real", "blank"))
    print(f"{OTHERS_IMAGE}, by the largest loss with its own image: {area(real, kinds == OTHERS_IMAGE):.3f}")
    print(f"{OTHERS_IMAGE}, by the least gain: {area(real - blank, kinds == OTHERS_IMAGE):.3f}")
    print(f"{TOLD}, by the least loss with a blank image: {area(-blank, kinds == TOLD):.3f}")
    for kind in ("", OTHERS_IMAGE, TOLD):
        verdicts = [record["verdict"] for record, its in zip(found, kinds, strict=True) if its == kind]
        counts = ", ".join(f"{verdicts.count(name)} {name}" for name in sorted(set(verdicts)))
        print(f"{kind or 'as it was'}: {counts}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    clean_exit(main)
