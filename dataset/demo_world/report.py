"""The last step of quickstart.sh: what the demo model learnt, as a table, a report and a sheet of answers.

reads    OUT/scores*.json and .answers.jsonl (3-eval_chat.py --report), OUT/.*.seconds (quickstart.sh),
         WORLD/world.json
writes   OUT/report.json, OUT/answers.png
"""

import json
import textwrap
from pathlib import Path

import pandas
from matplotlib.figure import Figure
from PIL import Image

from dataset.demo_world.build import read_json, write_json
from dataset.demo_world.colours import COLOURS
from dataset.demo_world.sentences import spoken
from dataset.demo_world.things import SHAPES, SIDE
from dataset.demo_world.videos import SECONDS
from dataset.demo_world.wording import CHINESE, COLOUR_CHANGE, ENGLISH, LANGUAGES, MOVEMENT, TWO_IMAGES, fill
from model.data.video import read_frames
from model.images import open_image
from trainer.drawing import chinese_font
from trainer.script import Parser, clean_exit

STAGES = ("world", "pretrain", "sft", "multi", "evaluation", "evaluation_multi")
SHEET_KINDS = (  # of single images, in the order of the sheet
    "description",
    "colour_of",
    "count",
    "description_of_two",
    "where",
    "shape",
    "presence",
    "description_of_three",
    "shape_of",
    "left_of",
    "colour",
    "description_of_two",
)
LINE, WIDE_LINE = 21, 40  # Chinese characters of an answer that stand in a line; twice as many Latin ones
WIDE_KINDS = (f"{TWO_IMAGES}_zh", f"{TWO_IMAGES}_en", MOVEMENT, COLOUR_CHANGE)
# How an answer about presence ends that says yes.
YES = tuple(fill(language.yes.rpartition("}")[2]) for language in LANGUAGES.values())
COLUMNS, ROWS = 4, len(SHEET_KINDS) // 4  # of single images; below them two videos or pairs in a row
WIDE_ROWS = len(WIDE_KINDS) // 2


def read_records(out: Path) -> list[dict]:
    """All answers, whatever was shown."""
    lines = [
        line
        for path in sorted(out.glob("scores*.answers.jsonl"))
        for line in path.read_text(encoding="utf-8").split("\n")  # splitlines() also cuts within answers
        if line
    ]
    return list(map(json.loads, lines))


def were_never_shown(record: dict) -> bool:
    """Whether it is about a combination that was never trained on."""
    return record["split"].endswith("unseen")


def gather_scores(out: Path, records: list[dict]) -> dict:
    """scores.json, and from the last stage's scores {"two_images": {"zh", "en", "colour", "shape"}} and
    {"videos": kinds}; colour and shape: the share of answers that name those of both images, in order. And
    "said_yes", split -> control -> the share of answers to "is there ...?" that say yes."""
    multi = read_json(out / "scores_multi.json")
    two = {name: multi["multi_unseen"][f"{TWO_IMAGES}_{name}"] for name in LANGUAGES}
    pairs = [record for record in records if record["split"] == "multi_unseen"]
    return read_json(out / "scores.json") | {
        TWO_IMAGES: two | {"colour": score_words(pairs, COLOURS), "shape": score_words(pairs, SHAPES)},
        "videos": multi["videos_unseen"],
        "said_yes": count_yes(records),
    }


def count_yes(records: list[dict]) -> dict[str, dict[str, float]]:
    said: dict[str, dict[str, list[bool]]] = {}
    for record in records:
        if record["kind"] == "presence":
            answers = said.setdefault(record["split"], {}).setdefault(record["control"], [])
            answers.append(record["given"].endswith(YES))
    return {
        split: {control: round(sum(yes) / len(yes), 4) for control, yes in controls.items()}
        for split, controls in said.items()
    }


def score_words(records: list[dict], names: tuple[str, ...] | dict) -> dict[str, float]:
    """control -> share of the answers that say just those of the names which the right answer says."""
    right: dict[str, list[bool]] = {}
    for record in records:
        language = ENGLISH if record["answer"].isascii() else CHINESE
        said, expected = (spoken(record[key], names, language) for key in ("given", "answer"))
        right.setdefault(record["control"], []).append(said == expected)
    return {control: round(sum(values) / len(values), 4) for control, values in right.items()}


def choose_records(records: list[dict], with_chinese: bool) -> list[dict]:
    """The first records of every kind in turn, each about other images, every fourth in English (of the
    wide ones every second); whether they are right plays no part."""
    wanted = [(kind, n % 4 == 3) for n, kind in enumerate(SHEET_KINDS)]
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
    gap = 8
    images = [image.resize((image.width * SIDE // image.height, SIDE)) for image in images]
    sheet = Image.new("RGB", (sum(image.width + gap for image in images) - gap, SIDE), "white")
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width + gap
    return sheet


def break_lines(text: str, length: int = LINE) -> str:
    return "\n".join(textwrap.wrap(text, 2 * length if text.isascii() else length)) or " "


def draw_answers(records: list[dict], path: Path) -> None:
    """A sheet of images never seen, each with its question, the right answer and the model's."""
    font = chinese_font()
    figure = Figure(figsize=(4 * COLUMNS, 5.6 * ROWS + 3.2 * WIDE_ROWS))
    grid = figure.add_gridspec(
        ROWS + WIDE_ROWS,
        COLUMNS,
        height_ratios=[5] * ROWS + [2.7] * WIDE_ROWS,
        left=0.02,
        right=0.98,
        top=0.93,
        bottom=0.04,
        hspace=0.75,
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
        question = record["question"].split("\n")[-1]  # before it stand the marks of the images
        mark, colour = ("\u2713", "#1a7f37") if record["right"] else ("\u2717", "#c62828")
        axes.set_title(question, fontproperties=font, fontsize=15)
        length = WIDE_LINE if record["kind"] in WIDE_KINDS else LINE
        answer, given = (break_lines(record[key], length) for key in ("answer", "given"))
        axes.set_xlabel(answer, fontproperties=font, fontsize=13)
        beside = {"xycoords": "axes fraction", "textcoords": "offset points", "color": colour}
        axes.annotate(
            given,
            (0.5, 0),
            (0, -23 - 18 * answer.count("\n")),
            **beside,
            ha="center",
            va="top",
            fontsize=13,
            fontproperties=font,
        )
        axes.annotate(mark, (1, 0.5), (4, 0), **beside, va="center", fontsize=26)
    figure.savefig(path, dpi=72)


def closing_text(world: Path, out: Path, scores: dict, seconds: dict) -> str:
    splits = {split: kinds for split, kinds in scores.items() if split != "said_yes"}
    rows = {(split, kind): values for split, kinds in splits.items() for kind, values in kinds.items()}
    yes = ", ".join(f"{split}: {said['real']:.2f} said yes" for split, said in scores["said_yes"].items())
    table = pandas.DataFrame.from_dict(rows, orient="index")
    table = table.to_string(float_format="{:.2f}".format, na_rep="")
    return f"""
What was learnt (share of answers that are right to the letter; blank and shuffled: the model was shown \
nothing, or
another image, so these columns say what guessing gives):

{table}

known: new images of combinations seen in training; unseen: colour + shape + position never seen together;
unseen_pairs: colour + shape never seen together; several_unseen: things never seen side by side.
presence: is there a ...? Half of the right answers are yes; {yes}.
two_images and videos: of unseen, after the third stage;
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
    seen = [record for record in records if record["control"] == "real" and were_never_shown(record)]
    draw_answers(seen, args.out / "answers.png")
    print(closing_text(args.world, args.out, scores, seconds))


if __name__ == "__main__":
    clean_exit(main)
