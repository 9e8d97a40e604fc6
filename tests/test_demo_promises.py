"""What the demo promises is the worst of several runs, and a run that falls below says so."""

import json
from pathlib import Path

import pytest

from dataset.demo_world import promises, report


def scores(value: float, split: str = "unseen") -> dict:
    return {split: {kind: {"real": value, "blank": 0.1} for kind in ("colour", "shape")}}


def records(split: str, kind: str, right: list[bool]) -> list[dict]:
    return [{"split": split, "kind": kind, "control": "real", "right": one} for one in right]


def test_the_worst_of_the_runs_is_promised():
    runs = [scores(0.9), scores(0.7), scores(0.8)]
    runs[2]["unseen"]["shape"]["real"] = 0.6
    assert promises.worst(runs) == {"runs": 3, "lowest": {"unseen": {"colour": 0.7, "shape": 0.6}}}
    del runs[1]["unseen"]["shape"]
    with pytest.raises(ValueError, match="unseen shape"):
        promises.worst(runs)


def test_a_figure_below_its_promise_is_marked_and_named():
    promised = promises.worst([scores(0.8)])
    run = scores(0.9)
    run["unseen"]["shape"]["real"] = 0.75
    assert promises.below(run, promised) == [("unseen", "shape", 0.75, 0.8)]
    seen = [*records("unseen", "colour", [True] * 20), *records("unseen", "shape", [True] * 20)]
    marked = [line for line in report.closing_table(run, seen, promised).splitlines() if "!" in line]
    assert len(marked) == 1 and "shape" in marked[0] and "0.53-0.89" in marked[0]  # Wilson, 15 of 20
    said = report.verdict(run, promised)
    assert "unseen shape 0.750 (0.800)" in said and "colour" not in said
    assert "No figure is lower" in report.verdict(scores(0.8), promised)


def test_questions_are_counted_under_the_names_of_the_report():
    seen = records("multi_unseen", "two_images_en", [True] * 3) + records("videos_unseen", "movement", [True])
    seen += [one | {"control": "blank"} for one in seen]
    counts = report.count_questions(seen)
    assert counts["two_images", "en"] == counts["two_images", "colour"] == 3
    assert counts["videos", "movement"] == 1


def test_nothing_is_promised_of_other_worlds():
    assert promises.promises_of({"preset": "full"})["runs"] >= 3
    for other in ({}, {"preset": "tiny"}, {"preset": "full", "use_moe": True}):
        assert promises.promises_of(other) is None
    assert "promises nothing" in report.verdict(scores(0.1), None)
    seen = [*records("unseen", "colour", [True]), *records("unseen", "shape", [True])]
    assert "!" not in report.closing_table(scores(0.1), seen, None)


def test_readme_shows_what_is_promised():
    promised = json.loads(promises.PROMISES.read_text())
    assert promises.markdown(promised) in Path("README.md").read_text(encoding="utf-8")
    for split in ("known", "unseen", "unseen_pairs", "several_unseen", "two_images", "videos"):
        assert promised["lowest"][split]


def test_the_command_writes_the_worst(tmp_path, capsys):
    for number, value in enumerate((0.9, 0.7)):
        (tmp_path / f"{number}.json").write_text(json.dumps(scores(value)))
    out = tmp_path / "promises.json"
    promises.main([str(tmp_path / "0.json"), str(tmp_path / "1.json"), "--out", str(out)])
    assert json.loads(out.read_text()) == promises.worst([scores(0.9), scores(0.7)])
    assert "| colour |  | 0.700 |  |" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        promises.main([str(tmp_path / "nowhere.json")])
