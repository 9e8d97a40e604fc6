"""What the demo promises: of every figure the worst of several runs, kept in promises.json beside this file.

reads    report.json of several runs of quickstart.sh: other seeds, threads, processors
writes   dataset/demo_world/promises.json, and prints the table that README.md shows

    python -m dataset.demo_world.promises out/demo/report.json elsewhere/report.json
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dataset.demo_world.build import write_json
from dataset.demo_world.scenes import SEVERAL_SPLITS, SINGLE_SPLITS
from dataset.demo_world.wording import TWO_IMAGES
from model.files import read_json
from trainer.script import Parser, clean_exit

PROMISES = Path(__file__).with_name("promises.json")
VIDEOS = "videos"
PROMISED = (*SINGLE_SPLITS, *SEVERAL_SPLITS, TWO_IMAGES, VIDEOS)  # parts of a report that hold scores


def promises_of(identity: Mapping) -> dict | None:
    """What is promised of a world with this identity (world.json); None: nothing is, of another preset or of
    experts."""
    if identity.get("preset") != "full" or identity.get("use_moe"):
        return None
    return read_json(PROMISES, "restore it from the repository")


def score_rows(scores: Mapping) -> Iterator[tuple[str, str, dict[str, float]]]:
    """(split, kind, {control: score}) of a report, in its order."""
    for split in PROMISED:
        for kind, values in scores.get(split, {}).items():
            yield split, kind, values


def worst(reports: Sequence[Mapping]) -> dict:
    """{"runs": how many, "lowest": {split: {kind: score}}}. Raises ValueError where one lacks a figure."""
    figures = [{(split, kind): values["real"] for split, kind, values in score_rows(one)} for one in reports]
    lowest: dict[str, dict[str, float]] = {}
    for split, kind in figures[0]:
        if not all((split, kind) in of for of in figures):
            raise ValueError(
                f"not every report has a figure for {split} {kind}: were they made by one version?"
            )
        lowest.setdefault(split, {})[kind] = min(of[split, kind] for of in figures)
    return {"runs": len(reports), "lowest": lowest}


def below(scores: Mapping, promises: Mapping) -> list[tuple[str, str, float, float]]:
    """(split, kind, score, promised) of every figure that is lower than promised."""
    return [
        (split, kind, values["real"], promised)
        for split, kind, values in score_rows(scores)
        if (promised := promises["lowest"].get(split, {}).get(kind, 0.0)) > values["real"]
    ]


def markdown(promises: Mapping) -> str:
    """The figures as README.md shows them: kinds down, splits across."""

    def table(splits: Sequence[str]) -> list[str]:
        columns = [promises["lowest"].get(split, {}) for split in splits]
        kinds = list(dict.fromkeys(kind for column in columns for kind in column))
        head = ["", *splits]
        rows = [[kind, *(f"{of[kind]:.3f}" if kind in of else "" for of in columns)] for kind in kinds]
        return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]

    parts = [table(SINGLE_SPLITS), table(SEVERAL_SPLITS), table((TWO_IMAGES,)), table((VIDEOS,))]
    return "\n\n".join("\n".join(lines) for lines in parts)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("reports", nargs="+", type=Path, metavar="REPORT", help="report.json of a run")
    parser.add_argument("--out", type=Path, default=PROMISES, help="file to write (default: %(default)s)")
    args = parser.parse_args(argv)
    for path in args.reports:
        if not path.is_file():
            raise FileNotFoundError(f"report not found: {path} (quickstart.sh writes out/demo/report.json)")
    promises = worst([read_json(path, "run quickstart.sh again") for path in args.reports])
    write_json(args.out, promises)
    print(markdown(promises))


if __name__ == "__main__":
    clean_exit(main)
