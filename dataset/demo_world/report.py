"""The last step of quickstart.sh: what the demo model learnt, as a table, a report and a sheet of answers.

reads    OUT/scores.json and scores.answers.jsonl (3-eval_chat.py --report), OUT/.*.seconds (quickstart.sh),
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
from trainer.args import Parser, clean_exit

STAGES = ("world", "pretrain", "sft", "evaluation")
# Fonts with Chinese characters of Linux, macOS and Windows; without one the sheet shows English questions
# only.
CHINESE_FONTS = re.compile(r"NotoSansCJK|NotoSansSC|SourceHanSans|wqy-|WenQuanYi|DroidSansFallback|"
                           r"msyh|simhei|PingFang|STHeiti")
SHEET_KINDS = ("description", "colour", "shape", "position", "size", "description")
COLUMNS, ROWS = 4, 3


def read_records(path: Path) -> list[dict]:
    """The answers to real pictures of combinations that were never trained on."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [record for record in records if record["split"] == "unseen" and record["control"] == "real"]


def chinese_font() -> font_manager.FontProperties | None:
    found = [path for path in font_manager.findSystemFonts() if CHINESE_FONTS.search(Path(path).name)]
    regular = [path for path in found if "Regular" in path] or found
    return font_manager.FontProperties(fname=regular[0]) if regular else None


def choose_records(records: list[dict], with_chinese: bool) -> list[dict]:
    """The first records of every kind in turn, each about another picture, every fourth in English; whether
    they are right plays no part."""
    chosen: list[dict] = []
    for number in range(COLUMNS * ROWS):
        kind = SHEET_KINDS[number % len(SHEET_KINDS)]
        english = not with_chinese or number % 4 == 3
        shown = {tuple(record["image"]) for record in chosen}
        fresh = [record for record in records if record["kind"] == kind
                 and record["question"].isascii() == english and tuple(record["image"]) not in shown]
        chosen += fresh[:1]
    return chosen


def draw_answers(records: list[dict], path: Path) -> None:
    """A sheet of pictures never seen, each with its question, the right answer and the model's."""
    font = chinese_font()
    figure = Figure(figsize=(4 * COLUMNS, 4.2 * ROWS))
    cells = figure.subplots(ROWS, COLUMNS).flat
    figure.subplots_adjust(left=0.02, right=0.98, top=0.88, bottom=0.07, hspace=0.42, wspace=0.08)
    figure.text(0.5, 0.955, "Pictures of combinations that were never shown or named in training",
                ha="center", fontsize=20)
    figure.text(0.5, 0.928, "above: the question; below: the right answer, and in colour the model's",
                ha="center", fontsize=14)
    for axes, record in zip(cells, choose_records(records, font is not None), strict=False):
        axes.imshow(Image.open(record["image"][0]))
        axes.set(xticks=[], yticks=[])
        question = record["question"].replace("<image>", "").strip()
        mark, colour = ("\u2713", "#1a7f37") if record["right"] else ("\u2717", "#c62828")
        axes.set_title(question, fontproperties=font, fontsize=15)
        axes.set_xlabel(record["answer"], fontproperties=font, fontsize=14)
        axes.text(0.5, -0.135, record["given"], transform=axes.transAxes, ha="center", va="top",
                  fontproperties=font, fontsize=14, color=colour)
        axes.text(1.03, 0.45, mark, transform=axes.transAxes, fontsize=26, color=colour)
    figure.savefig(path, dpi=72)


def closing_text(world: Path, out: Path, scores: dict, seconds: dict) -> str:
    rows = {(split, kind): values for split, kinds in scores.items() for kind, values in kinds.items()}
    table = pandas.DataFrame.from_dict(rows, orient="index").to_string(float_format="{:.2f}".format)
    return f"""
What was learnt (share of answers that are right to the letter; blank and shuffled: the model was shown \
nothing, or
another picture, so these columns say what guessing gives):

{table}

known: new pictures of combinations seen in training; unseen: colour + shape + position never seen together;
unseen_pairs: colour + shape never seen together.

time       {', '.join(f'{name} {value:.0f} s' for name, value in seconds.items())}
pictures   {out}/answers.png (what it says about pictures it never saw), {out}/*_vlm_*.png (loss curves)
weights    {', '.join(str(path) for path in sorted(out.glob('*.pth')))}

What to run next
  describe pictures    .venv/bin/python 3-eval_chat.py @{world}/eval.args
  chat about one       .venv/bin/python 3-eval_chat.py @{world}/eval.args \
--chat {world}/eval_images/unseen_0000.jpg
  in the browser       .venv/bin/python web_server.py @{world}/eval.args
  two pictures         .venv/bin/python 2-sft_vlm.py @{world}/sft_multi.args
  the real data        README.md, "Train on the real data"
"""


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--world", type=Path, default=Path("dataset/demo"))
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    args = parser.parse_args(argv)
    scores = read_json(args.out / "scores.json")
    marks = {name: args.out / f".{name}.seconds" for name in STAGES}
    seconds = {name: float(mark.read_text()) for name, mark in marks.items() if mark.is_file()}
    details = {f"world/{part}": value
               for part, value in read_json(args.world / "world.json").get("seconds", {}).items()}
    write_json(args.out / "report.json", scores | {"seconds": {**seconds, **details}})
    draw_answers(read_records(args.out / "scores.answers.jsonl"), args.out / "answers.png")
    print(closing_text(args.world, args.out, scores, seconds))


if __name__ == "__main__":
    clean_exit(main)
