"""Does occlusion find what an answer is about, and how long does it take?

reads    a trained demo world: dataset/demo and out/demo (bash quickstart.sh)
writes   benchmarks/results/explain.json, and tables to the screen

    python -m benchmarks.explain                      # some minutes
    python -m benchmarks.explain --count 20           # less
    python -m benchmarks.explain --hide               # and other ways to hide a part of an image

Of the demo world's images it is known which thing stands where: on the patches that the box around it
touches. Of a map are told: whether its strongest patch is on the thing, and the thing's share of all that is
lost (of attention: of its weight). Of several things that one counts which a question asks for.
"""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.machine import describe_machine, save_results
from benchmarks.synthetic import (
    config_of,
    make_answering_model,
    make_clip,
    make_words,
    save_clip,
    save_tokenizer,
)
from dataset.demo_world.build import World, read_json
from dataset.demo_world.colours import COLOURS
from dataset.demo_world.scenes import Scene, draw, make_paper
from dataset.demo_world.sentences import spoken
from dataset.demo_world.things import SHAPES, Thing, cover
from dataset.demo_world.wording import ATTRIBUTES, CHINESE, DESCRIPTION, ENGLISH
from model.chat import Chat, load_chat
from model.checkpoint import save_weights
from model.explain import Explanation, blank_sheet, explain, occlude, windows_of
from model.images import open_image
from trainer.script import Parser, at_least, clean_exit

KINDS = {"unseen": (*ATTRIBUTES, DESCRIPTION), "several_unseen": ("colour_of", "shape_of", "where")}
SIDE = 7
COLUMNS = {  # what is measured of a question, and how a table calls it
    "right": "answers right",
    "area": "it covers",
    "peak": "strongest patch on it",
    "share": "share on it",
    "word_peak": "one word: strongest patch",
    "word_share": "one word: share",
    "attention_peak": "attention: strongest patch",
    "attention_share": "attention: share",
    "nats": "largest drop, nats",
}
NUM_BLANK = 40  # sheets without anything on them


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.prog = "python -m benchmarks.explain"
    parser.add_argument("--world", type=Path, default=Path("dataset/demo"))
    parser.add_argument("--weights", type=Path, default=Path("out/demo/128_vlm_sft.pth"))
    parser.add_argument("--count", type=at_least(1), default=200, help="questions of each kind")
    parser.add_argument("--hide", action="store_true", help="compare other ways to hide a part of an image")
    parser.add_argument("--threads", type=at_least(1), default=2, help="CPU threads")
    parser.add_argument("--size", default="512x8", help="dim x layers of what is timed")
    parser.add_argument(
        "--clip_layers", type=at_least(1), default=12, help="its CLIP's (ViT-B/32: %(default)s)"
    )
    parser.add_argument("--rounds", type=at_least(1), default=5, help="of timing")
    return parser.parse_args(argv)


# ---- where things are --------------------------------------------------------------------------------------


def open_world(folder: Path) -> World:
    """The world in a folder. Raises ValueError if this code would draw another one."""
    identity = read_json(folder / "world.json").get("identity", {})
    world = World(folder, identity.get("preset", "full"), identity.get("seed", 0), "use_moe" in identity)
    world.check_identity()
    return world


def patches_of(thing: Thing, scene: Scene) -> np.ndarray:
    """(SIDE, SIDE) bool: those that the box around a thing touches."""
    covered = sum(
        np.asarray(part, dtype=int) for part in cover(thing, scene.width, scene.height, 4) if part is not None
    )
    spans = []
    for axis, length in ((1, scene.height), (0, scene.width)):
        (places,) = np.nonzero((covered > 127).any(axis))
        spans.append(slice(places[0] * SIDE // length, places[-1] * SIDE // length + 1))
    patches = np.zeros((SIDE, SIDE), dtype=bool)
    patches[tuple(spans)] = True
    return patches


def find_asked(question: dict, scene: Scene) -> Thing:
    """The one thing of a scene that has the colour and the shape which a question names."""
    language = ENGLISH if question["answer"].isascii() else CHINESE
    colours, shapes = (spoken(question["question"], names, language) for names in (COLOURS, SHAPES))
    (thing,) = (
        thing
        for thing in scene.things
        if (not colours or thing.colour in colours) and (not shapes or thing.shape in shapes)
    )
    return thing


def read_questions(world: World, split: str, kind: str, count: int) -> Iterable[tuple[dict, np.ndarray]]:
    """Questions of a kind, and the patches of what they ask about."""
    scenes = world.images(split)
    with open(world.folder / f"questions_{split}.jsonl", encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["kind"] == kind]
    for row in rows[:count]:
        scene = scenes[Path(row["image"]).name]
        yield row, patches_of(find_asked(row, scene), scene)


# ---- how well it is found ----------------------------------------------------------------------------------


def judge(heat: np.ndarray, thing: np.ndarray) -> tuple[float, float]:
    """Is the strongest patch on the thing, and what share of all that is lost lies there?"""
    lost = heat.clip(min=0)
    return float(thing.flat[heat.argmax()]), float(lost[thing].sum() / max(lost.sum(), 1e-9))


def answer_word(explanation: Explanation) -> np.ndarray:
    """The map of the word that loses most."""
    return max(explanation.maps, key=np.max)


def measure_kind(chat: Chat, world: World, split: str, kind: str, count: int) -> dict:
    """Means over the questions of a kind."""
    found = []
    for row, thing in read_questions(world, split, kind, count):
        explanation = explain(chat, row["question"], open_image(world.folder / row["image"]))
        maps = (explanation.total, answer_word(explanation), explanation.attention)
        verdicts = itertools.chain.from_iterable(judge(heat, thing) for heat in maps)
        right = explanation.answer.strip() == row["answer"]
        found.append([right, thing.mean(), *verdicts, explanation.total.max()])
    means = zip(COLUMNS, np.mean(found, axis=0).round(3).tolist(), strict=True)
    return {"split": split, "kind": kind, "count": len(found), **dict(means)}


def measure_all(chat: Chat, world: World, count: int) -> list[dict]:
    print(f"| asked | {' | '.join(COLUMNS.values())} |\n" + "|---" * (len(COLUMNS) + 1) + "|")
    records = []
    for split, kinds in KINDS.items():
        for kind in kinds:
            records.append(measure_kind(chat, world, split, kind, count))
            cells = " | ".join(f"{records[-1][name]:.2f}" for name in COLUMNS)
            print(f"| {split} {kind} | {cells} |", flush=True)
    return records


def measure_blank(chat: Chat) -> dict[str, tuple[float, float]]:
    """The largest drop, up or down, on sheets without anything, median and worst: of one colour, and as the
    demo world draws its paper, with light and noise."""
    rng = np.random.default_rng(0)
    largest: dict[str, list[float]] = {"plain": [], "papers": []}
    for number in range(NUM_BLANK):
        scene = Scene((), make_paper(rng), noise=3.0 * (number % 2), seed=number)
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        for name, image in (("plain", Image.new("RGB", (90, 60), colour)), ("papers", draw(scene))):
            question = ("图形是什么颜色？", "Describe this picture.")[number // 2 % 2]
            largest[name].append(float(np.abs(explain(chat, question, image).total).max()))
    return {name: (float(np.median(drops)), max(drops)) for name, drops in largest.items()}


# ---- other ways to hide ------------------------------------------------------------------------------------


def slide(width: int, first: int) -> Tensor:
    """Windows of width x width patches in all places from `first` on, (W, SIDE, SIDE)."""
    starts = range(first, SIDE if first < 0 or width == 1 else SIDE - width + 1)
    windows = torch.zeros(len(starts) ** 2, SIDE, SIDE, dtype=torch.bool)
    for window, (top, left) in zip(windows, itertools.product(starts, starts), strict=True):
        window[max(0, top) : top + width, max(0, left) : left + width] = True
    return windows


def other_ways(chat: Chat) -> dict[str, Callable[[Image.Image], tuple[Tensor, Tensor, Tensor]]]:
    """Name -> image -> its features, those of nothing, and windows, as occlude() takes them."""
    usual = windows_of(SIDE)

    def encode(image: Image.Image, sheet: Image.Image) -> tuple[Tensor, Tensor]:
        return chat.encode([image, sheet]).split(1)

    def usual_blank(windows: Tensor) -> Callable:
        return lambda image: (*encode(image, blank_sheet(image)), windows)

    def class_kept(image: Image.Image) -> tuple[Tensor, Tensor, Tensor]:
        seen, blank = encode(image, blank_sheet(image))
        return seen, torch.cat([seen[:, :1], blank[:, 1:]], dim=1), usual

    def zeros(image: Image.Image) -> tuple[Tensor, Tensor, Tensor]:
        seen = chat.encode([image])
        return seen, torch.zeros_like(seen), usual

    return {
        "as explain() does": usual_blank(usual),
        "class token kept": class_kept,
        "a white sheet": lambda image: (*encode(image, Image.new("RGB", (1, 1), "white")), usual),
        "features of zero": zeros,
        "windows within the image only": usual_blank(slide(2, 0)),
        "single patches": usual_blank(slide(1, 0)),
        "windows of 3 x 3": usual_blank(slide(3, -2)),
    }


def compare_ways(chat: Chat, world: World, count: int) -> list[dict]:
    kinds = [(split, kind) for split, kinds in KINDS.items() for kind in kinds]
    print("\n| strongest patch on it / share on it | " + " | ".join(kind for _, kind in kinds) + " |")
    print("|---" * (len(kinds) + 1) + "|")
    records = []
    for name, way in other_ways(chat).items():
        cells = []
        for split, kind in kinds:
            verdicts = []
            for row, thing in read_questions(world, split, kind, count):
                prompt = chat.render([{"from": "human", "value": row["question"]}])
                ids = chat.renderer.encode(row["answer"])
                with torch.inference_mode():
                    seen, blank, windows = way(open_image(world.folder / row["image"]))
                    _, drops, _ = occlude(chat.decoder, prompt, ids, seen, blank, windows)
                verdicts.append(judge(drops[0].sum(0).numpy(), thing))
            peak, share = np.mean(verdicts, axis=0).tolist()
            records.append({"way": name, "kind": kind, "peak": peak, "share": share})
            cells.append(f"{peak:.2f} / {share:.2f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return records


# ---- time --------------------------------------------------------------------------------------------------


def load_random(folder: Path, size: str, clip_layers: int) -> Chat:
    """A chat of real sizes with random weights, loaded as every other is."""
    save_tokenizer(folder / "tokenizer")
    save_clip(folder / "clip", make_clip(num_hidden_layers=clip_layers))
    config = config_of(size)
    save_weights(make_answering_model(config), folder / "random.pth")
    return load_chat(folder / "random.pth", folder / "tokenizer", folder / "clip")


def time_explanations(
    chat: Chat, rounds: int, lengths: Iterable[int] = (10, 30)
) -> dict[int, list[tuple[float, float]]]:
    """Tokens of an answer that is given -> seconds of the clock and of the processor for its explanation,
    image included. On a busy machine those of the processor hold."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8))
    question = " ".join(make_words(3))  # 13 tokens
    seconds: dict[int, list[tuple[float, float]]] = {}
    for length in lengths:
        answer = chat.tokenizer.decode(range(4000, 4000 + length))
        assert len(chat.renderer.encode(answer)) == length
        for _ in range(rounds + 1):
            start, worked = time.perf_counter(), time.process_time()
            explain(chat, question, image, answer)
            taken = (round(time.perf_counter() - start, 3), round(time.process_time() - worked, 3))
            seconds.setdefault(length, []).append(taken)
        seconds[length].pop(0)  # it warmed up
    return seconds


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    world = open_world(args.world)
    chat = load_chat(args.weights, args.world / "tokenizer", args.world / "clip")
    results: dict = {"machine": describe_machine()}
    print(f"{results['machine']}; {args.weights}\n")
    results["kinds"] = measure_all(chat, world, args.count)
    single = [record for record in results["kinds"] if record["split"] == "unseen"]
    for name in ("peak", "share"):
        results[name] = sum(record[name] for record in single) / len(single)
    print(f"\none thing, all kinds: strongest patch {results['peak']:.3f}, share {results['share']:.3f}")
    results["blank"] = measure_blank(chat)
    for name, (middle, worst) in results["blank"].items():
        print(f"largest drop on {name} without anything: median {middle:.2g}, worst {worst:.2g} nats")
    if args.hide:
        results["ways"] = compare_ways(chat, world, args.count)
    with tempfile.TemporaryDirectory() as folder:
        chat = load_random(Path(folder), args.size, args.clip_layers)
        results["seconds"] = time_explanations(chat, args.rounds)
    for length, seconds in results["seconds"].items():
        clock, processor = zip(*seconds, strict=True)
        print(
            f"{args.size}, {args.threads} threads, answer of {length} tokens: {min(clock):.2f} to "
            f"{max(clock):.2f} s, of the processor {min(processor):.2f} to {max(processor):.2f} s"
        )
    save_results("explain", results)


if __name__ == "__main__":
    clean_exit(main)
