"""The last step of quickstart.sh: what the demo model learnt, as a table, a report and a sheet of answers.

reads    OUT/scores*.json and .answers.jsonl (3-eval_chat.py --report), OUT/.*.seconds (quickstart.sh),
         WORLD/world.json
writes   OUT/report.json, OUT/answers.png
"""

import json
import re
from pathlib import Path

import pandas
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image

from dataset.demo_world.build import read_json, write_json
from dataset.demo_world.scenes import COLOURS, SHAPES
from dataset.demo_world.sentences import CHINESE, ENGLISH, LANGUAGES, TWO_IMAGES, spoken
from dataset.demo_world.videos import COLOUR_CHANGE, MOVEMENT, SECONDS
from model.data.video import read_frames
from model.images import open_image
from trainer.script import Parser, clean_exit

STAGES = ("world", "pretrain", "sft", "multi", "evaluation", "evaluation_multi")
# Fonts with Chinese characters of Linux, macOS and Windows; without one the sheet shows English questions
# only.
CHINESE_FONTS = re.compile(
    r"NotoSansCJK|NotoSansSC|SourceHanSans|wqy-|WenQuanYi|DroidSansFallback|"
    r"msyh|simhei|PingFang|STHeiti"
)
SHEET_KINDS = ("description", "colour", "shape", "position", "size", "description")
WIDE_KINDS = (f"{TWO_IMAGES}_zh", f"{TWO_IMAGES}_en", MOVEMENT, COLOUR_CHANGE)
COLUMNS, ROWS = 4, 3  # of single images; below them two videos or pairs in a row
WIDE_ROWS = len(WIDE_KINDS) // 2


def read_records(out: Path) -> list[dict]:
    """All answers about combinations that were never trained on, whatever was shown."""
    lines = [
        line
        for path in sorted(out.glob("scores*.answers.jsonl"))
        for line in path.read_text(encoding="utf-8").split("\n")  # splitlines() also cuts within answers
        if line
    ]
    return [record for record in map(json.loads, lines) if record["split"].endswith("unseen")]


def gather_scores(out: Path, records: list[dict]) -> dict:
    """scores.json, and from the last stage's scores {"two_images": {"zh", "en", "colour", "shape"}} and
    {"videos": kinds}; colour and shape: the share of answers that name those of both images, in order."""
    multi = read_json(out / "scores_multi.json")
    two = {name: multi["multi_unseen"][f"{TWO_IMAGES}_{name}"] for name in LANGUAGES}
    pairs = [record for record in records if record["split"] == "multi_unseen"]
    return read_json(out / "scores.json") | {
        TWO_IMAGES: two | {"colour": score_words(pairs, COLOURS), "shape": score_words(pairs, SHAPES)},
        "videos": multi["videos_unseen"],
    }


def score_words(records: list[dict], names: tuple[str, ...] | dict) -> dict[str, float]:
    """control -> share of the answers that say just those of the names which the right answer says."""
    right: dict[str, list[bool]] = {}
    for record in records:
        language = ENGLISH if record["answer"].isascii() else CHINESE
        said, expected = (spoken(record[key], names, language) for key in ("given", "answer"))
        right.setdefault(record["control"], []).append(said == expected)
    return {control: round(sum(values) / len(values), 4) for control, values in right.items()}


def chinese_font() -> font_manager.FontProperties | None:
    found = [path for path in font_manager.findSystemFonts() if CHINESE_FONTS.search(Path(path).name)]
    regular = [path for path in found if "Regular" in path] or found
    return font_manager.FontProperties(fname=regular[0]) if regular else None


def choose_records(records: list[dict], with_chinese: bool) -> list[dict]:
    """The first records of every kind in turn, each about other images, every fourth in English (of the
    wide ones every second); whether they are right plays no part."""
    wanted = [(SHEET_KINDS[n % len(SHEET_KINDS)], n % 4 == 3) for n in range(COLUMNS * ROWS)]
    wanted += [(kind, n % 2 == 1) for n, kind in enumerate(WIDE_KINDS)]
    chosen: list[dict] = []
    for kind, english in wanted:
        shown = [what_is_seen(record) for record in chosen]
        fresh = [
            record
            for record in records
            if record["kind"] == kind
            and record["question"].isascii() == (english or not with_chinese)
            and what_is_seen(record) not in shown
        ]
        chosen += fresh[:1]
    return chosen


def what_is_seen(record: dict) -> list[str]:
    return record.get("video") or record["image"]


def show(record: dict) -> Image.Image:
    """Its image, its two images, or the frames of its video, side by side."""
    if "video" in record:
        images = read_frames(record["video"][0], SECONDS)
    else:
        images = [open_image(path) for path in record["image"]]
    side, gap = images[0].width, 8
    sheet = Image.new("RGB", (len(images) * (side + gap) - gap, images[0].height), "white")
    for number, image in enumerate(images):
        sheet.paste(image, (number * (side + gap), 0))
    return sheet


def draw_answers(records: list[dict], path: Path) -> None:
    """A sheet of images never seen, each with its question, the right answer and the model's."""
    font = chinese_font()
    figure = Figure(figsize=(4 * COLUMNS, 4.2 * ROWS + 3.2 * WIDE_ROWS))
    grid = figure.add_gridspec(
        ROWS + WIDE_ROWS,
        COLUMNS,
        height_ratios=[4.2] * ROWS + [2.7] * WIDE_ROWS,
        left=0.02,
        right=0.98,
        top=0.93,
        bottom=0.04,
        hspace=0.4,
        wspace=0.14,
    )
    cells = [grid[row, column] for row in range(ROWS) for column in range(COLUMNS)]
    cells += [grid[ROWS + row, start : start + 2] for row in range(WIDE_ROWS) for start in (0, 2)]
    figure.text(
        0.5,
        0.973,
        "Images of combinations that were never shown or named in training",
        ha="center",
        fontsize=20,
    )
    figure.text(
        0.5,
        0.957,
        "above: the question; below: the right answer, and in colour the model's",
        ha="center",
        fontsize=14,
    )
    for cell, record in zip(cells, choose_records(records, font is not None), strict=False):
        axes = figure.add_subplot(cell)
        axes.imshow(show(record))
        axes.set(xticks=[], yticks=[])
        question = re.sub(r"<image>|<video>", "", record["question"]).strip()
        mark, colour = ("\u2713", "#1a7f37") if record["right"] else ("\u2717", "#c62828")
        axes.set_title(question, fontproperties=font, fontsize=15)
        axes.set_xlabel(f"{record['answer']}\n", fontproperties=font, fontsize=14)
        beside = {"xycoords": "axes fraction", "textcoords": "offset points", "color": colour}
        axes.annotate(
            record["given"],
            (0.5, 0),
            (0, -24),
            **beside,
            ha="center",
            va="top",
            fontsize=14,
            fontproperties=font,
        )
        axes.annotate(mark, (1, 0.5), (4, 0), **beside, va="center", fontsize=26)
    figure.savefig(path, dpi=72)


def closing_text(world: Path, out: Path, scores: dict, seconds: dict) -> str:
    rows = {(split, kind): values for split, kinds in scores.items() for kind, values in kinds.items()}
    table = pandas.DataFrame.from_dict(rows, orient="index")
    table = table.to_string(float_format="{:.2f}".format, na_rep="")
    return f"""
What was learnt (share of answers that are right to the letter; blank and shuffled: the model was shown \
nothing, or
another image, so these columns say what guessing gives):

{table}

known: new images of combinations seen in training; unseen: colour + shape + position never seen together;
unseen_pairs: colour + shape never seen together. two_images and videos: of unseen, after the third stage;
swapped: the two images in reversed order; swapped_follows: answers that are right for that order;
shuffled_frames: the frames of a video in another order.

time       {", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())}
images     {out}/answers.png (what it says about images it never saw), {out}/*_vlm_*.png (loss curves)
weights    {", ".join(str(path) for path in sorted(out.glob("*.pth")))}

What to run next
  describe images      .venv/bin/python 3-eval_chat.py @{world}/eval.args
  chat about one       .venv/bin/python 3-eval_chat.py @{world}/eval.args \
--chat {world}/eval_images/unseen_0000.jpg
  in the browser       .venv/bin/python web_server.py @{world}/eval.args
  the real data        README.md, "Train on the real data"
"""


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--world", type=Path, default=Path("dataset/demo"))
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    args = parser.parse_args(argv)
    records = read_records(args.out)
    scores = gather_scores(args.out, records)
    marks = {name: args.out / f".{name}.seconds" for name in STAGES}
    seconds = {name: float(mark.read_text()) for name, mark in marks.items() if mark.is_file()}
    details = {
        f"world/{part}": value
        for part, value in read_json(args.world / "world.json").get("seconds", {}).items()
    }
    write_json(args.out / "report.json", scores | {"seconds": {**seconds, **details}})
    draw_answers([record for record in records if record["control"] == "real"], args.out / "answers.png")
    print(closing_text(args.world, args.out, scores, seconds))


if __name__ == "__main__":
    clean_exit(main)
