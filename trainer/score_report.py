"""From the records of questions to scores with 95 % intervals: a table, and three files beside each other.

r.json            file -> kind -> control -> score, rounded; other measures as kinds, "colour: visual gain"
r.scores.csv      the same, each with its number of questions and its interval
r.answers.jsonl   every question under every control
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from model.files import encode_text, write_together
from model.printable import printable
from trainer.benchmark_files import ALL
from trainer.inputs import answers_path, table_path
from trainer.intervals import ratio, wilson
from trainer.questions import QuestionFile

FOLLOWS = "swapped_follows"  # answers that are right for the images as they were shown
ACCURACY, LOSS, GAIN = "accuracy", "loss", "visual gain"


@dataclass(frozen=True)
class Score:
    split: str
    kind: str
    measure: str
    control: str
    questions: int  # that it is made of
    value: float
    low: float | None = None  # of its 95 % interval, where it has one
    high: float | None = None

    @property
    def row(self) -> str:
        """The row of the table that it stands in."""
        return self.kind if self.measure in (ACCURACY, LOSS) else f"{self.kind}: {self.measure}"

    @property
    def cell(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.value:.3f}{interval}"


def share(split: str, kind: str, measure: str, control: str, hits: list[bool]) -> Score:
    return Score(
        split, kind, measure, control, len(hits), sum(hits) / len(hits), *wilson(sum(hits), len(hits))
    )


def score_records(records: list[dict], files: dict[str, QuestionFile]) -> list[Score]:
    """Scores of every file, kind and control; where questions are chosen from or of a benchmark, of all kinds
    together too."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for record in records:
        file = files[record["split"]]
        kinds = record["kind"].split(",") if file.yes else [record["kind"]]  # POPE.tsv names several
        for kind in kinds:
            groups.setdefault((record["split"], kind), []).append(record)
    for split, file in files.items():
        of_file = [record for record in records if record["split"] == split]
        has_total = file.is_benchmark or any("right" not in one or "choices" in one for one in of_file)
        if has_total and of_file:
            groups[split, ALL] = of_file
    return [
        score
        for (split, kind), of in groups.items()
        for score in score_group(split, kind, of, files[split].yes)
    ]


def score_group(split: str, kind: str, records: list[dict], yes: str) -> Iterator[Score]:
    controls: dict[str, list[dict]] = {}
    for record in records:
        controls.setdefault(record["control"], []).append(record)
    if "loss" in records[0]:
        yield from score_losses(split, kind, controls)
        return
    for control, of in controls.items():
        yield share(split, kind, ACCURACY, control, [record["right"] for record in of])
    if follows := [record["follows"] for record in records if "follows" in record]:
        yield share(split, kind, ACCURACY, FOLLOWS, follows)
    if "choices" in records[0]:
        first = next(iter(controls.values()))
        chance = sum(1 / len(record["choices"]) for record in first) / len(first)
        yield Score(split, kind, ACCURACY, "chance", len(first), chance)
    if yes:
        for control, of in controls.items():
            yield from score_yes(split, kind, control, of, yes)


def score_yes(split: str, kind: str, control: str, records: list[dict], yes: str) -> Iterator[Score]:
    """What POPE reports: how often yes is said, and how well those are found whose answer is yes."""
    said = [record["given"] == yes for record in records]
    true = [record["answer"] == yes for record in records]
    yield share(split, kind, "said yes", control, said)
    found = [is_true for is_true, says in zip(true, said, strict=True) if says]
    recalled = [says for is_true, says in zip(true, said, strict=True) if is_true]
    if found:  # of no yes there is no precision
        yield share(split, kind, "precision", control, found)
    if recalled:
        yield share(split, kind, "recall", control, recalled)
        f1 = 2 * sum(recalled) / (sum(said) + sum(true))
        yield Score(split, kind, "F1", control, len(records), f1)


def score_losses(split: str, kind: str, controls: dict[str, list[dict]]) -> Iterator[Score]:
    """Loss per token, and by how much every control is worse than the images themselves, question by
    question."""
    for control, of in controls.items():
        totals = [record["loss"] * record["tokens"] for record in of]
        yield mean_score(split, kind, LOSS, control, totals, [record["tokens"] for record in of])
    seen = {record["number"]: record for record in controls.get("real", [])}
    for control, of in controls.items():
        if control != "real" and seen:
            counts = [record["tokens"] for record in of]
            gains = [(record["loss"] - seen[record["number"]]["loss"]) * record["tokens"] for record in of]
            yield mean_score(split, kind, GAIN, control, gains, counts)


def mean_score(
    split: str, kind: str, measure: str, control: str, totals: list[float], counts: list[int]
) -> Score:
    mean, low, high = ratio(totals, counts)
    ends = (low, high) if math.isfinite(low) else (None, None)
    return Score(split, kind, measure, control, len(totals), mean, *ends)


# ---- what becomes of them ----------------------------------------------------------------------------------


def report_scores(records: list[dict], files: dict[str, QuestionFile], report_path: Path | None) -> None:
    scores = score_records(records, files)
    print(printable(make_table(scores)))
    if not report_path:
        return
    report: dict = {}
    for score in scores:
        report.setdefault(score.split, {}).setdefault(score.row, {})[score.control] = round(score.value, 4)
    answers = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    contents = {
        answers_path(report_path): answers,
        table_path(report_path): make_csv(scores),
        report_path: json.dumps(report, indent=1) + "\n",
    }
    report_path.parent.mkdir(parents=True, exist_ok=True)
    write_together(  # or a report could stand beside another's answers
        {path: lambda file, text=text: file.write(encode_text(text)) for path, text in contents.items()}
    )


def make_table(scores: list[Score]) -> str:
    import pandas  # only here: it takes longer to import than an answer to come

    rows: dict[tuple[str, str], dict[str, str]] = {}
    for score in scores:
        cells = rows.setdefault((score.split, score.row), {"questions": str(score.questions)})
        few = "" if cells["questions"] == str(score.questions) else f" of {score.questions}"
        cells[score.control] = score.cell + few
    table = pandas.DataFrame.from_dict(rows, orient="index").fillna("")
    return f"{table.to_string()}\nin brackets: 95 % intervals"


def make_csv(scores: list[Score]) -> str:
    import pandas

    return pandas.DataFrame(map(asdict, scores)).to_csv(index=False, lineterminator="\n")
