"""Question files and reports: all that can be wrong is said before a model is loaded, and no two scores
mix."""

import json
import os
from pathlib import Path

import pytest
from conftest import (
    check_refused,
    make_question,
    run_clean,
    run_inside,
    run_script,
    write_questions,
)

from model.locks import claimed
from trainer.question_files import name_files


@pytest.mark.parametrize(
    ("bad", "fragments"),
    [
        (make_question(["红", "红色"]), ['its "answer" must be a text or a number, not ["']),
        (make_question(True), ['its "answer" must be a text or a number, not true']),
        (make_question(kind=["colour"]), ['its "kind" must be a text']),
        (make_question(swapped_answer={}), ['its "swapped_answer" must be a text']),
        (make_question(" "), ["it has no answer"]),
        (make_question(image="images/gone.png"), ["image not found: ", "gone.png"]),
        (make_question(image="https://example.org/a.png"), ['its "image" is an address: download it']),
        (make_question(question="<image><image>？"), ["the question marks 2 image(s) but 1 were given"]),
        ([1], ["it has no image, question, answer, kind"]),
    ],
)
def test_a_question_that_cannot_be_scored_is_named_before_a_model_is_loaded(
    workplace, capsys, bad, fragments
):
    """An answer that was a list ended the evaluation when all questions of all files had been answered."""
    first = write_questions(workplace / "first.jsonl", make_question())
    last = write_questions(workplace / "last.jsonl", make_question(), bad)
    flags = ["--questions", first, last, "--load_from=README.md", "--device=cpu"]
    check_refused(run_clean(capsys, "3-eval_chat.py", *flags), f"{last}, row 2: ", *fragments)


@pytest.mark.parametrize(
    ("report", "fragments"),
    [
        ("file/r.json", ["file is no folder"]),
        ("images", ["it is a folder"]),
        ("r" * 250, ["File name too long"]),
    ],
)
def test_a_report_that_cannot_be_written_is_named_before_a_model_is_loaded(
    workplace, capsys, report, fragments
):
    """It was tried when an hour had gone into the answers."""
    (workplace / "file").write_text("")
    questions = write_questions(workplace / "q.jsonl", make_question())
    flags = ["--questions", questions, f"--report={workplace / report}", "--load_from=README.md"]
    check_refused(run_clean(capsys, "3-eval_chat.py", *flags), "--report: cannot write ", report, *fragments)
    check_refused(run_clean(capsys, "3-eval_chat.py", *flags[2:]), "descriptions go to a .jsonl or a .csv")


def test_numbers_are_answers_and_kinds(workplace, seeing):
    path = write_questions(
        workplace / "q.jsonl", make_question(3), make_question(0.5), make_question(0, kind=2)
    )
    run_inside("3-eval_chat.py", *seeing, "--questions", path, f"--report={workplace}/r.json")
    records = [json.loads(line) for line in (workplace / "r.answers.jsonl").read_text().splitlines()]
    assert [record["answer"] for record in records] == 2 * ["3", "0.5", "0"]
    nothing = {"real": 0.0, "blank": 0.0}  # one image alone: none to shuffle
    assert json.loads((workplace / "r.json").read_text()) == {"q": {"colour": nothing, "2": nothing}}


def test_a_question_too_long_is_named_before_the_first_is_answered(workplace, seeing, capsys):
    path = write_questions(workplace / "q.jsonl", make_question(), make_question(question="什么" * 300))
    result = run_clean(capsys, "3-eval_chat.py", *seeing, "--questions", path)
    check_refused(result, "q.jsonl, row 2: the question has ", "context holds 256 with the answer")


def test_files_of_one_name_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def names(*paths: str) -> list[str]:
        return list(name_files(map(Path, paths)))

    assert names("questions_x.jsonl", "b/questions_y.json", "c/z.v2.jsonl.gz") == ["x", "y", "z.v2"]
    assert names("a/questions_x.jsonl", "b/questions_x.jsonl", "b/questions_y.jsonl") == ["a/x", "b/x", "y"]
    assert names("a/q/x.json", "b/q/x.json", "c/x.json") == ["a/q/x", "b/q/x", "c/x"]
    assert names("x.json", "a/x.json") == [f"{tmp_path.name}/x", "a/x"]
    assert names("a/x.json", "a/x.jsonl", "y.json") == [f"{tmp_path}/a/x.json", f"{tmp_path}/a/x.jsonl", "y"]
    assert names("x.json", "./x.json", f"{tmp_path}/x.json") == ["x"]


def test_scores_and_answers_do_not_mix(workplace, seeing):
    """Two files of one name were averaged, and the answers of one report overwrote those of another whose
    name began alike."""
    first = write_questions(workplace / "a" / "questions_x.jsonl", make_question(image="../images/0.png"))
    second = write_questions(
        workplace / "b" / "questions_x.jsonl", *2 * [make_question(image="../images/1.png")]
    )
    for report, paths in (("r-1.0", [first, second]), ("r-1.5", [first]), ("r.json", [second])):
        flags = ["--control", "real", "real", f"--report={workplace / report}"]
        run_inside("3-eval_chat.py", *seeing, "--questions", *paths, *flags)
    assert set(json.loads((workplace / "r-1.0").read_text())) == {"a/x", "b/x"}
    assert set(json.loads((workplace / "r-1.5").read_text())) == {"x"}
    found = {path.name: len(path.read_text().splitlines()) for path in workplace.glob("*.answers.jsonl")}
    assert found == {"r-1.0.answers.jsonl": 3, "r-1.5.answers.jsonl": 1, "r.answers.jsonl": 2}


def test_two_evaluations_do_not_write_one_report(workplace, seeing, capsys):
    """The second overwrote the first's answers, and the scores beside them were of either."""
    path = write_questions(workplace / "questions.jsonl", make_question())
    flags = [*seeing, "--questions", path, f"--report={workplace}/r.json"]
    with claimed(workplace / "r.json", "x"):
        second = run_script("3-eval_chat.py", *flags)  # a process of its own: a lock keeps out no other part
    check_refused(second, f"{workplace}/r.json is being written by process {os.getpid()} on ", "--report")
    assert run_clean(capsys, "3-eval_chat.py", *flags).returncode == 0
    assert not list(workplace.glob("*.lock")) and not list(workplace.glob("*.tmp"))
