"""Pictures by another hand: does the demo model see what its own world never drew?

    python -m benchmarks.drawn --out out/drawn
    python 3-eval_chat.py @dataset/demo/eval.args --questions out/drawn/*.jsonl --report out/drawn/scores.json

The demo world draws with Pillow, in its own proportions and colours. These pictures come from matplotlib,
with proportions, colour values and line ends of its own: the named colours of CSS and of two paint programs.
Each family is a folder of 640 x 480 or other images, and a question file about colour and shape:

    plain        a filled thing somewhere on white paper
    tilted       turned by up to 25 degrees (squares and diamonds 15, or they would be each other)
    outlined     only its outline, of a pen 3 to 8 pixels wide
    edged        filled, with a thin black outline
    dark         on black, dark grey or dark blue paper
    wide         640 x 360, saved as PNG
    small        128 x 128
    two          two things, each asked for by a word of it: the colour of the star, the shape that is red
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Polygon, Rectangle
from matplotlib.transforms import Affine2D

from dataset.demo_world.wording import CHINESE, fill
from trainer.script import Parser, at_least, clean_exit

# The same names in CSS, in Windows Paint and in the GNU image manipulation program's palettes.
COLOURS = {
    "red": ("#ff0000", "#ed1c24", "#dc143c", "#e01b24"),
    "yellow": ("#ffff00", "#fff200", "#ffd700", "#f6d32d"),
    "green": ("#008000", "#22b14c", "#00c000", "#33d17a"),
    "blue": ("#0000ff", "#3f48cc", "#1e60e0", "#3584e4"),
    "purple": ("#800080", "#a349a4", "#7b2cbf", "#9141ac"),
    "orange": ("#ffa500", "#ff7f27", "#ff8c00", "#ff7800"),
    "pink": ("#ffc0cb", "#ffaec9", "#ff9ecf", "#ffb6c1"),
    "cyan": ("#00ffff", "#00e5ee", "#40e0d0", "#1fd6e8"),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
WORDS = CHINESE.words
FAMILIES = ("plain", "tilted", "outlined", "edged", "dark", "wide", "small", "two")
SIZES = {"wide": (640, 360), "small": (128, 128)}
LIGHT_PAPERS, DARK_PAPERS = ("#ffffff",), ("#000000", "#202020", "#10183a")
RADII = (0.08, 0.19)  # of the shorter side


def patch_of(shape: str, radius: float, **style):
    """A shape around (0, 0) as matplotlib's own patch."""
    r = radius
    if shape == "circle":
        return Circle((0, 0), r, **style)
    if shape == "square":
        return Rectangle((-0.8 * r, -0.8 * r), 1.6 * r, 1.6 * r, **style)
    corners = {
        "triangle": [(r * math.cos(a), r * math.sin(a)) for a in np.radians([90, 210, 330])],
        "diamond": [(0, r), (0.7 * r, 0), (0, -r), (-0.7 * r, 0)],
        "star": [
            (
                r * (0.45 if n % 2 else 1) * math.sin(n * math.pi / 5),
                r * (0.45 if n % 2 else 1) * math.cos(n * math.pi / 5),
            )
            for n in range(10)
        ],
        "cross": [
            (r * x, r * y)
            for x, y in zip(
                (-0.3, 0.3, 0.3, 1, 1, 0.3, 0.3, -0.3, -0.3, -1, -1, -0.3),
                (1, 1, 0.3, 0.3, -0.3, -0.3, -1, -1, -0.3, -0.3, 0.3, 0.3),
                strict=True,
            )
        ],
    }[shape]
    return Polygon(corners, closed=True, **style)


def draw(family: str, things: list[tuple[str, str]], path: Path, rng: np.random.Generator) -> None:
    """A picture of (colour, shape) things side by side or anywhere, written to path."""
    width, height = SIZES.get(family, (640, 480))
    paper = str(rng.choice(DARK_PAPERS if family == "dark" else LIGHT_PAPERS))
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor=paper)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    share = width / len(things)
    for number, (colour, shape) in enumerate(things):
        rgb = str(rng.choice(COLOURS[colour]))
        while family == "dark" and rgb in ("#800080", "#0000ff") and paper == "#10183a":
            rgb = str(rng.choice(COLOURS[colour]))  # hardly to be seen
        radius = float(rng.uniform(*RADII)) * min(width, height)
        style = {"facecolor": rgb, "edgecolor": "none"}
        if family == "outlined":
            style = {"facecolor": "none", "edgecolor": rgb, "linewidth": float(rng.uniform(2.2, 5.8))}
        if family == "edged":
            style = {"facecolor": rgb, "edgecolor": "#000000", "linewidth": float(rng.uniform(1, 2.2))}
        patch = patch_of(shape, radius, **style)
        tilt = 0.0
        if family == "tilted":
            tilt = float(rng.uniform(-1, 1)) * (15 if shape in ("square", "diamond") else 25)
        room = 1.15 * radius
        x = float(rng.uniform(number * share + room, (number + 1) * share - room))
        y = float(rng.uniform(room, height - room))
        patch.set_transform(Affine2D().rotate_deg(tilt).translate(x, y) + axes.transData)
        axes.add_patch(patch)
    canvas.draw()
    figure.savefig(path, dpi=100, facecolor=paper)


def make_family(family: str, folder: Path, count: int, seed: int) -> None:
    rng = np.random.default_rng([seed, FAMILIES.index(family)])
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    rows = []
    (folder / family).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        things = [kinds[number % len(kinds)]]
        while family == "two" and len(things) < 2:
            other = kinds[int(rng.integers(len(kinds)))]
            if other[0] != things[0][0] and other[1] != things[0][1]:
                things.append(other)
        name = f"{family}/{number:03d}.{'png' if family in ('wide', 'small') else 'jpg'}"
        draw(family, things, folder / name, rng)
        # Asked and answered in the demo's own words, of which it knows no others.
        colour, shape = (WORDS[word] for word in things[0])
        said = {"colour": colour, "shape": shape, "asked_colour": colour, "asked_shape": shape}
        suffix = "_of" if family == "two" else ""
        for kind in ("colour", "shape"):
            question = fill(CHINESE.questions[kind + suffix][0], **said)
            answer = fill(CHINESE.answers[kind + suffix], **said)
            text = f"<image>\n{question}"
            rows.append(
                {"id": f"{kind}-{number}", "image": name, "kind": kind, "question": text, "answer": answer}
            )
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / f"{family}.jsonl").write_text(lines, encoding="utf-8")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.prog = "python -m benchmarks.drawn"
    parser.add_argument("--out", type=Path, default=Path("out/drawn"), help="folder (default: %(default)s)")
    parser.add_argument("--count", type=at_least(1), default=96, help="pictures of a family")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES, metavar="FAMILY")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for family in args.families:
        make_family(family, args.out, args.count, args.seed)
    print(f"{len(args.families)} families of {args.count} pictures in {args.out}")


if __name__ == "__main__":
    clean_exit(main)
