"""What 3-eval_chat.py --explain draws: what mattered in each image for an answer, as one PNG."""

import argparse
import string
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from model.chat import Chat, mark_images
from model.explain import Explanation, explain_chat
from model.files import atomic_write
from model.generate import Sampling
from model.heat import colours_of, draw_heat, scale_of
from model.images import open_image
from model.printable import one_line, printable
from trainer.drawing import chinese_font

# In inches.
WIDTH, HEIGHT, HEAD = 13.0, 5.6, 1.15  # of the sheet; of each image's part; of what stands above
LARGE, SMALL = 4.6, 1.26
LEFT, RIGHT, STEP = 0.35, 5.55, 1.42  # where the large map and the small ones begin, and from one to the next
COLUMNS = 5
MOST_WORDS = 2 * COLUMNS
INK, PALE = "#1f2328", "#6b7280"
HOW = (
    "Windows of 2 x 2 patches are hidden one by one, and the answer's log-probability is measured again. "
    "Warm colours: what is lost without this part. Blue: what is gained. All maps have one scale. "
    "Attention is no explanation: it shows where the model looks, not what the answer rests on."
)


def explain_files(args: argparse.Namespace, chat: Chat, sampling: Sampling) -> None:
    """Draw --explain IMAGE ... QUESTION OUT.png. Raises FileNotFoundError or ValueError, naming the file."""
    *files, question, out = args.explain
    images = [open_image(file) for file in files]
    turns = [{"from": "human", "value": mark_images(question, len(images))}]
    explanations = explain_chat(chat, turns, images, sampling=sampling)
    names = [Path(file).name for file in files]
    atomic_write(out, lambda file: draw_explanations(question, names, explanations).savefig(file, dpi=110))
    print(printable(explanations[0].answer.strip()))
    print(f"written: {printable(out)}")


class Sheet:
    """A figure whose parts are placed in inches from its top left corner."""

    def __init__(self, height: float):
        self.height, self.font = height, chinese_font()
        self.figure = Figure(figsize=(WIDTH, height), facecolor="white")

    def image(self, pixels, left: float, top: float, side: float) -> None:
        """Fitted into a square, in its own proportions."""
        axes = self.axes(left, top, side, side)
        axes.imshow(pixels)
        axes.axis("off")

    def axes(self, left: float, top: float, width: float, height: float):
        place = (left / WIDTH, 1 - (top + height) / self.height, width / WIDTH, height / self.height)
        return self.figure.add_axes(place)

    def text(self, text: str, left: float, top: float, size: float = 11, color: str = INK, **more) -> None:
        """Begins at this place, its upper edge there. Of what no font can draw, "?" remains."""
        if not self.font:
            text = text.encode("ascii", "replace").decode()
        font = self.font.copy() if self.font else None
        self.figure.text(
            left / WIDTH,
            1 - top / self.height,
            text,
            fontproperties=font,
            fontsize=size,
            color=color,
            va="top",
            parse_math=False,
            **more,
        )


def draw_explanations(question: str, names: Sequence[str], explanations: Sequence[Explanation]) -> Figure:
    """A sheet with a part for each image."""
    sheet = Sheet(HEAD + HEIGHT * len(explanations))
    answer = explanations[0].answer.strip()
    sheet.text(shorten(question), LEFT, 0.25, size=15)
    sheet.text(shorten(answer, 260, 2), LEFT, 0.62, size=13, color="#8a2a10", linespacing=1.4)
    scale = scale_of(*(each.total for each in explanations))
    for number, (name, explanation) in enumerate(zip(names, explanations, strict=True)):
        draw_one(sheet, HEAD + HEIGHT * number, name, explanation, scale)
    return sheet.figure


def draw_one(sheet: Sheet, top: float, name: str, explanation: Explanation, scale: float) -> None:
    sheet.text(f"the whole answer   {shorten(name, 40)}", LEFT, top, color=PALE)
    sheet.image(draw_heat(explanation.image, explanation.total, scale), LEFT, top + 0.28, LARGE)
    draw_scale(sheet, top + LARGE + 0.4, scale, explanation.total.min() < -0.02 * scale)

    chosen = choose_words(explanation)
    few = f", the {len(chosen)} that lose most" if len(chosen) < len(explanation.words) else ""
    sheet.text(f"its words{few}", RIGHT, top, color=PALE)
    for place, word in enumerate(chosen):
        row, column = divmod(place, COLUMNS)
        left, above = RIGHT + STEP * column, top + 0.28 + 1.8 * row
        drops = explanation.maps[word]
        sheet.image(draw_heat(explanation.image, drops, scale), left, above, SMALL)
        middle = {"left": left + SMALL / 2, "ha": "center"}
        sheet.text(shorten(explanation.words[word], 12), top=above + SMALL + 0.03, size=12, **middle)
        sheet.text(f"{drops.max():.2f}", top=above + SMALL + 0.25, size=8.5, color=PALE, **middle)

    below = top + 0.28 + 3.6
    for column, (title, pixels) in enumerate(
        (
            ("the image", explanation.image),
            ("attention", draw_heat(explanation.image, explanation.attention, explanation.attention.max())),
        )
    ):
        sheet.image(pixels, RIGHT + STEP * column, below, SMALL)
        sheet.text(title, RIGHT + STEP * column + SMALL / 2, below + SMALL + 0.05, 9, PALE, ha="center")
    text = "\n".join(textwrap.wrap(HOW, 62))
    sheet.text(text, RIGHT + 2 * STEP + 0.05, below + 0.08, 9, PALE, linespacing=1.5)


def draw_scale(sheet: Sheet, top: float, scale: float, with_gains: bool) -> None:
    """What the colours stand for, in nats."""
    axes = sheet.axes(LEFT, top, LARGE, 0.13)
    low = -1 if with_gains else 0
    shares = np.linspace(low, 1, 256)
    axes.imshow(colours_of(shares)[None].astype(np.uint8), aspect="auto", extent=(low * scale, scale, 0, 1))
    axes.set_yticks([])
    axes.tick_params(labelsize=9, color=PALE, labelcolor=PALE)
    axes.set_xlabel("log-probability lost, nats", fontsize=9, color=PALE)
    for side in axes.spines.values():
        side.set_visible(False)


def choose_words(explanation: Explanation) -> list[int]:
    """The words to draw, in their order: those that lose most; of marks of punctuation none."""
    spoken = [
        number
        for number, word in enumerate(explanation.words)
        if word.strip(string.punctuation + string.whitespace + "。，、？！：；")
    ]
    spoken.sort(key=lambda number: -explanation.maps[number].max())
    return sorted(spoken[:MOST_WORDS])


def shorten(text: str, limit: int = 100, lines: int = 1) -> str:
    """What of a text has room, with nothing in it that a line cannot show; a Chinese character takes two."""
    text, width = one_line(" ".join(text.split()), limit), 0
    broken, line = [], ""
    for character in text:
        width += 1 if character.isascii() else 2
        if width > limit / lines:
            broken, line, width = [*broken, line], "", 1
        line += character
    broken.append(line)
    return "\n".join(broken) if len(broken) <= lines else "\n".join(broken[:lines]) + "..."
