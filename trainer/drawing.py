"""What a run leaves to look at: its loss curve, and what it answered while it learned."""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from model.files import atomic_write

# Fonts with Chinese characters of Linux, macOS and Windows.
CHINESE_FONTS = re.compile(
    r"NotoSansCJK|NotoSansSC|SourceHanSans|wqy-|WenQuanYi|DroidSansFallback|"
    r"msyh|simhei|PingFang|STHeiti"
)
BLUE, ORANGE, GREY = "#2a6fbb", "#d1701f", "#8a8a8a"
CURVES = (
    ("loss", "training", {"color": BLUE}),
    ("val_loss", "validation", {"color": ORANGE, "marker": "o"}),
    ("val_loss_real", "validation, rows with images", {"color": ORANGE, "marker": "s", "linewidth": 1}),
    ("val_loss_blank", "with blank images", {"color": GREY, "marker": "o", "linestyle": "--"}),
    ("val_loss_another", "with another row's images", {"color": GREY, "marker": "x", "linestyle": ":"}),
)


SEES = 0.05  # nats per token
MOST_COLUMNS = 9  # steps on a sheet of answers
PAPER, LINES, INK, PALE = "#ffffff", "#d9dde3", "#1f2328", "#6b7280"
RIGHT, WRONG = ("#e3f4e6", "#14642b"), ("#fbeceb", "#a3261f")  # paper and ink of an answer


def draw_loss_curve(records: Sequence[dict], title: str, path: Path) -> None:
    """Loss over optimizer steps as a PNG: of training and, where there was one, of validation, with its own
    images, blank ones and another row's."""
    from matplotlib.figure import Figure  # half a second, needed once; Figure alone needs no display

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label, style in CURVES:
        if name == "val_loss_real" and all(record.get(name) == record.get("val_loss") for record in records):
            continue  # every row shows an image: the same line
        points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, markersize=4, **style)
    if (step := first_seeing(records)) is not None:
        axes.axvline(step, color=GREY, linewidth=0.8, alpha=0.6, zorder=0)
        axes.annotate(f" sees from step {step}", (step, 0.02), xycoords=("data", "axes fraction"), color=INK)
    axes.set(xlabel="optimizer step", ylabel="loss per target token (nats)", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=120))


def first_seeing(records: Sequence[dict]) -> int | None:
    """The first step from which on another row's images were always worse than a row's own, by SEES or more;
    None if none was."""
    measured = [record for record in records if record.get("val_loss_another") is not None]
    first = None
    for record in reversed(measured):
        if record["val_loss_another"] - record["val_loss_real"] < SEES:
            break
        first = record["step"]
    return first


def chinese_font():
    """A matplotlib font with Chinese characters, or None where the system has none."""
    from matplotlib import font_manager

    found = [path for path in font_manager.findSystemFonts() if CHINESE_FONTS.search(Path(path).name)]
    regular = [path for path in found if "Regular" in path] or found
    return font_manager.FontProperties(fname=regular[0]) if regular else None


def draw_answers(records: Sequence[dict], images: dict, title: str, path: Path) -> None:
    """A sheet of what was answered to the same questions as a run went on, as a PNG: a line for each, with
    its image, the question and the right answer; a column for each step, right answers green, others red.

    records  as SampleAnswers writes them
    images   PIL images of the rows, or None
    """
    from matplotlib.figure import Figure

    steps = sorted({record["step"] for record in records})
    if len(steps) > MOST_COLUMNS:  # the first, the last, and others evenly between
        steps = [steps[round(n * (len(steps) - 1) / (MOST_COLUMNS - 1))] for n in range(MOST_COLUMNS)]
    given = {(record["row"], record["step"]): record for record in records}
    rows = list(dict.fromkeys(record["row"] for record in records if record["step"] == steps[-1]))
    wide, high, cell, head = 3.9, 1.18, 1.62, 0.95  # inches: question, line, answer, heading
    width, height = wide + cell * len(steps) + 0.15, high * len(rows) + head + 0.1
    figure = Figure(figsize=(width, height), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    font = chinese_font()

    def write(x: float, y: float, text: str, size: float, colour: str, width: int, **more) -> None:
        lines = break_text(text, width, 4)
        axes.text(x, y, lines, fontsize=size, color=colour, fontproperties=font, linespacing=1.25, **more)

    axes.text(0.18, 0.32, title, fontsize=15, color=INK, weight="bold", va="center")
    axes.text(0.18, 0.68, "question, and the right answer", fontsize=9.5, color=PALE, va="center")
    for column, step in enumerate(steps):
        middle = wide + cell * (column + 0.5)
        right = [given[row, step]["right"] for row in rows if (row, step) in given]
        axes.text(
            middle, 0.32, f"step {step}", fontsize=11, color=INK, weight="bold", ha="center", va="center"
        )
        share = f"{sum(right)} of {len(right)} right"
        axes.text(middle, 0.68, share, fontsize=9.5, color=PALE, ha="center", va="center")
    for line, row in enumerate(rows):
        top = head + high * line
        axes.plot((0.12, width - 0.12), (top, top), color=LINES, linewidth=0.8)
        asked, side = given[row, steps[-1]], high - 0.2
        if images.get(row) is not None:
            draw_image(axes, images[row], 0.18, top + 0.1, side)
        x, size = 0.18 + side + 0.16, 9.5
        write(x, top + 0.14, asked["question"], size, INK, 34, va="top")
        write(x, top + high - 0.14, asked["answer"], size, RIGHT[1], 34, va="bottom")
        for column, step in enumerate(steps):
            if record := given.get((row, step)):
                left = wide + cell * column
                draw_cell(axes, record, left + 0.05, top + 0.08, cell - 0.1, high - 0.16)
                ink = (RIGHT if record["right"] else WRONG)[1]
                text = record["given"] or "(nothing)"
                write(left + cell / 2, top + high / 2, text, 9, ink, 22, ha="center", va="center")
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=110))


def draw_image(axes, image, left: float, top: float, side: float) -> None:
    """An image in the middle of a square."""
    scale = side / max(image.size)
    width, height = image.width * scale, image.height * scale
    x, y = left + (side - width) / 2, top + (side - height) / 2
    axes.imshow(image, extent=(x, x + width, y + height, y), aspect="auto", zorder=2)
    axes.plot((x, x + width, x + width, x, x), (y, y, y + height, y + height, y), color=LINES, linewidth=0.8)


def draw_cell(axes, record: dict, left: float, top: float, width: float, height: float) -> None:
    """The coloured paper of an answer."""
    from matplotlib.patches import FancyBboxPatch

    paper, ink = RIGHT if record["right"] else WRONG
    box = FancyBboxPatch(
        (left, top),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.08",
        facecolor=paper,
        edgecolor="none",
    )
    axes.add_patch(box)
    mark = "\u2713" if record["right"] else "\u2717"
    axes.text(left + width - 0.05, top + 0.05, mark, fontsize=9, color=ink, ha="right", va="top")


def break_text(text: str, width: int, most_lines: int) -> str:
    """Lines of so many Latin letters, or half as many Chinese ones, with an end that is left out marked."""
    lines = textwrap.wrap(" ".join(text.split()), width if text.isascii() else width // 2) or [" "]
    if len(lines) > most_lines:
        lines = [*lines[: most_lines - 1], lines[most_lines - 1][:-1] + "\u2026"]
    return "\n".join(lines).replace("$", "\\$")  # or matplotlib would set formulas
