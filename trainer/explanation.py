"""What 3-eval_chat.py --explain draws: what mattered in each image for an answer, as one PNG."""

import argparse
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
WIDTH, HEIGHT, HEAD = 13.0, 5.95, 1.1  # of the sheet; of each image's part; of what stands above
LARGE, SMALL = 4.6, 1.26
LEFT, RIGHT, STEP = 0.35, 5.55, 1.42  # where the large map and the small ones begin, and from one to the next
COLUMNS, ROW, ABOVE = 5, 1.75, 0.5
MOST_WORDS = 2 * COLUMNS
UNIT = "log-probability lost, nats"
INK, PALE = "#1f2328", "#6b7280"
HOW = (
    "Windows of 2 x 2 patches are hidden one by one, and the answer's log-probability is measured again. "
    "Warm colours: what is lost without this part. Blue: what is gained. Below a word: its largest loss. "
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
        axes.set_anchor("N")
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
    word_scale, chosen = scale_of(*(each.maps for each in explanations)), choose_words(explanations)
    for number, (name, explanation) in enumerate(zip(names, explanations, strict=True)):
        top = HEAD + HEIGHT * number
        sheet.text(f"the whole answer   {shorten(name, 40)}", LEFT, top, color=PALE)
        sheet.image(draw_heat(explanation.image, explanation.total, scale), LEFT, top + ABOVE, LARGE)
        draw_scale(sheet, LEFT, top + ABOVE + LARGE + 0.1, LARGE, scale, explanation.total)
        sheet.text(UNIT, LEFT + LARGE / 2, top + ABOVE + LARGE + 0.5, 9, PALE, ha="center")
        draw_words(sheet, top, explanation, chosen, word_scale)
        draw_beside(sheet, top + ABOVE + 2 * ROW, explanation)

    return sheet.figure


def draw_words(
    sheet: Sheet, top: float, explanation: Explanation, chosen: Sequence[int], scale: float
) -> None:
    few = f", the {len(chosen)} that lose most" if len(chosen) < len(spoken_words(explanation)) else ""
    sheet.text(f"its words{few}", RIGHT, top, color=PALE)
    sheet.text(UNIT, RIGHT + 3 * STEP - 0.15, top + 0.02, 9, PALE, ha="right")
    draw_scale(sheet, RIGHT + 3 * STEP, top + 0.04, 2 * STEP - 0.16, scale, explanation.maps)
    for place, word in enumerate(chosen):
        row, column = divmod(place, COLUMNS)
        left, above = RIGHT + STEP * column, top + ABOVE + ROW * row
        drops = explanation.maps[word]
        sheet.image(draw_heat(explanation.image, drops, scale), left, above, SMALL)
        middle = {"left": left + SMALL / 2, "ha": "center"}
        sheet.text(shorten(explanation.words[word], 12), top=above + SMALL + 0.03, size=12, **middle)
        sheet.text(f"{max(0, drops.max()):.2f}", top=above + SMALL + 0.25, size=8.5, color=PALE, **middle)


def draw_beside(sheet: Sheet, top: float, explanation: Explanation) -> None:
    """The image as it is, attention, and how all this is to be read."""
    attention = draw_heat(explanation.image, explanation.attention, explanation.attention.max())
    for column, (title, pixels) in enumerate((("the image", explanation.image), ("attention", attention))):
        sheet.image(pixels, RIGHT + STEP * column, top, SMALL)
        sheet.text(title, RIGHT + STEP * column + SMALL / 2, top + SMALL + 0.05, 9, PALE, ha="center")
    lines = "\n".join(textwrap.wrap(HOW, 62))
    sheet.text(lines, RIGHT + 2 * STEP + 0.05, top + 0.05, 9, PALE, linespacing=1.5)


def draw_scale(sheet: Sheet, left: float, top: float, width: float, scale: float, drops: np.ndarray) -> None:
    """What the colours stand for, in nats; the blue ones only where there are any."""
    low = -1 if drops.min() < -0.05 * scale else 0
    axes = sheet.axes(left, top, width, 0.13)
    colours = colours_of(np.linspace(low, 1, 256))[None].astype(np.uint8)
    axes.imshow(colours, aspect="auto", extent=(low * scale, scale, 0, 1))
    axes.set_yticks([])
    axes.tick_params(labelsize=9, color=PALE, labelcolor=PALE)
    for side in axes.spines.values():
        side.set_visible(False)


def choose_words(explanations: Sequence[Explanation]) -> list[int]:
    """The words to draw, in their order: those that lose most, in whichever image."""
    spoken = spoken_words(explanations[0])
    spoken.sort(key=lambda number: -max(each.maps[number].max() for each in explanations))
    return sorted(spoken[:MOST_WORDS])


def spoken_words(explanation: Explanation) -> list[int]:
    """All but the marks of punctuation."""
    return [number for number, word in enumerate(explanation.words) if any(map(str.isalnum, word))]


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
