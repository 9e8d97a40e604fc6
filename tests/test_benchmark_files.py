"""POPE's and VLMEvalKit's files as they are downloaded: made here in their formats, for no real one could be
had. One command scores each, and the scores are those counted by hand."""

import base64
import csv
import json
import tracemalloc
from math import comb
from pathlib import Path

import pandas
import pytest
from conftest import (
    check_refused,
    make_question,
    run_clean,
    run_inside,
    run_script,
    save_image,
    write_questions,
)

from model.chat import load_chat
from model.images import open_image
from trainer.benchmark_files import open_benchmark
from trainer.question_files import open_question_files
from trainer.tables import Table, long_cells


def base64_of(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def make_table(path: Path, images: list[Path], count: int, answers: str = "ABCD", **columns) -> Path:
    """As VLMEvalKit writes it: pandas, tabs, images as base64; columns: others, or other values."""
    table = pandas.DataFrame(
        {
            "index": range(count),
            "question": [
                f"什么 {number}？" if number % 2 else f"What is {number}?" for number in range(count)
            ],
            "hint": ["" if number % 3 else 'a hint\nof\t"two" lines' for number in range(count)],
            "A": ["红"] * count,
            "B": ["a large green star"] * count,
            "C": ["它是蓝色。"] * count,
            "D": ["square" if number % 4 else None for number in range(count)],
            "answer": [answers[number * 7 % 3] for number in range(count)],
            "category": ["colour" if number % 2 else "shape" for number in range(count)],
            "image": [base64_of(images[number % len(images)]) for number in range(count)],
            **columns,
        }
    )
    table.to_csv(path, sep="\t", index=False)
    return path


@pytest.fixture
def images(workplace) -> list[Path]:
    return sorted((workplace / "images").glob("*.png"))


def scores_of(report: Path) -> dict:
    """(kind, measure, control) -> the row of r.scores.csv"""
    with open(report.with_name(report.stem + ".scores.csv")) as file:
        return {(row["kind"], row["measure"], row["control"]): row for row in csv.DictReader(file)}


def answers_of(report: Path) -> list[dict]:
    lines = report.with_name(report.stem + ".answers.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_table_of_options_is_scored_as_by_hand(
    workplace, seeing, images, capsys, tokenizer_path, clip_path
):
    """By hand: each question alone, each of its options alone, the likeliest by its mean per token."""
    path = make_table(workplace / "MMTiny.tsv", images, 12)
    run_inside("3-eval_chat.py", *seeing, f"--questions={path}", f"--report={workplace}/r.json")
    printed = capsys.readouterr().out
    assert "MMTiny.tsv, read as VLMEvalKit (options A to D): 12 questions, score choice" in printed
    chat = load_chat(workplace / "out" / "32_vlm_sft.pth", tokenizer_path, clip_path)
    right = []
    table = pandas.read_csv(path, sep="\t")
    for number, row in table.iterrows():
        image = open_image(images[number % len(images)])
        text = row.question if pandas.isna(row.hint) else f"{row.hint}\n{row.question}"
        turns = [{"from": "human", "value": f"<image>\n{text}"}]
        options = {letter: row[letter] for letter in "ABCD" if not pandas.isna(row[letter])}
        means = {}
        for letter, option in options.items():
            ((tokens,),) = chat.log_probabilities([turns], [[option]], [chat.encode([image])])
            means[letter] = float(tokens.mean())
        right.append(max(means, key=means.get) == row.answer)
        (record,) = [
            one
            for one in answers_of(workplace / "r.json")
            if one["control"] == "real" and one["index"] == str(number)
        ]
        assert record["choices"] == list(options.values()) and record["right"] == right[-1]
        assert record["log_probabilities"] == pytest.approx(list(means.values()), abs=1e-4)
    scores = scores_of(workplace / "r.json")
    for kind, hits in (("all", right), ("shape", right[::2]), ("colour", right[1::2])):
        score = scores[kind, "accuracy", "real"]
        assert float(score["value"]) == sum(hits) / len(hits) and int(score["questions"]) == len(hits)
        assert float(score["low"]) < float(score["value"]) < float(score["high"]) or sum(hits) in (
            0,
            len(hits),
        )
    assert float(scores["all", "accuracy", "chance"]["value"]) == pytest.approx((9 / 4 + 3 / 3) / 12)
    assert {control for _, _, control in scores} == {"real", "blank", "shuffled", "chance"}
    report = json.loads((workplace / "r.json").read_text())["MMTiny"]
    assert report["all"]["real"] == round(sum(right) / 12, 4)


def test_images_may_stand_in_another_row_and_rows_that_say_nothing_are_counted(workplace, images):
    """An image that several rows show stands in one of them; the others name its index."""
    cells = [base64_of(images[0]), "0", str([base64_of(images[1]), base64_of(images[2])]), "2", "", "99"]
    path = make_table(
        workplace / "x.tsv", images, 6, image=cells, index=[0, 1000000, 2, 3, 4, 5], answer=list("ABAAAA")
    )
    file = open_benchmark(path, None)
    assert [entry.row["index"] for entry in file.entries] == ["0", "2", "3"]
    assert file.left_out == {"that repeat others with rotated options": 1, "without an image": 2}
    shown = [[image.read() for image in entry.files] for entry in file.entries]
    pair = [images[1].read_bytes(), images[2].read_bytes()]
    assert shown == [[images[0].read_bytes()], pair, pair]
    assert file.entries[1].files == file.entries[2].files  # encoded once
    assert "3 questions" in file.describe(3, "choice") and "left out: 1 that repeat" in file.describe(
        3, "choice"
    )


def test_yes_and_no_are_said_in_the_language_of_the_file(workplace, images):
    for name, columns, expected in (
        (
            "mme",
            {"question": ["Is it? Please answer yes or no."] * 4, "answer": ["Yes", "No"] * 2},
            ["Yes", "No"],
        ),
        ("cn", {"question": ["是吗？"] * 4, "answer": ["Yes", "No"] * 2}, ["是", "否"]),
        ("have", {"question": ["有吗？"] * 4, "answer": ["有", "没有"] * 2}, ["有", "没有"]),
    ):
        frame = {"index": range(4), "image": [base64_of(images[0])] * 4, "category": ["x"] * 4, **columns}
        pandas.DataFrame(frame).to_csv(workplace / f"{name}.tsv", sep="\t", index=False)
        file = open_benchmark(workplace / f"{name}.tsv", None)
        assert [entry.row["choices"] for entry in file.entries] == [expected] * 4
        assert [entry.row["answer"] for entry in file.entries] == expected * 2 and file.yes == expected[0]


def save_pope(
    folder: Path, name: str, labels: list[str], question: str = "Is there a star in the image?"
) -> Path:
    rows = [
        {"question_id": n + 1, "image": f"{n % 6}.png", "text": question, "label": label}
        for n, label in enumerate(labels)
    ]
    (folder / name).write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder / name


def test_pope_is_scored_by_one_command(workplace, seeing, capsys):
    """Its .json holds one object per line; what is counted are the verdicts in the report."""
    paths = [
        save_pope(workplace, f"coco_pope_{name}.json", ["yes", "no"] * 6) for name in ("random", "popular")
    ]
    flags = [f"--image_dir={workplace}/images", f"--report={workplace}/r.json"]
    run_inside("3-eval_chat.py", *seeing, "--questions", *paths, *flags)
    printed = capsys.readouterr().out
    assert "coco_pope_random.json, read as POPE (Yes or No): 12 questions, score choice" in printed
    assert "all: said yes" in printed and "all: F1" in printed
    records = [one for one in answers_of(workplace / "r.json") if one["split"] == "coco_pope_random"]
    blank = [one for one in records if one["control"] == "blank"]
    assert len(blank) == 12 and len({one["given"] for one in blank}) == 1  # one question, blind: one answer
    report = json.loads((workplace / "r.json").read_text())["coco_pope_random"]
    assert report["all"]["blank"] == 0.5 and report["all: said yes"]["blank"] in (0, 1)
    for control in ("real", "blank", "shuffled"):
        of = [one for one in records if one["control"] == control]
        said = sum(one["given"] == "Yes" for one in of)
        both = sum(one["given"] == one["answer"] == "Yes" for one in of)
        assert report["all: said yes"][control] == round(said / 12, 4)
        assert report["all: recall"][control] == round(both / 6, 4)
        assert report["all: F1"][control] == round(2 * both / (said + 6), 4)
        if said:
            assert report["all: precision"][control] == round(both / said, 4)


def test_random_weights_score_as_guessing_does(workplace, seeing, images):
    """Within the interval of the binomial distribution that holds all but one in ten thousand."""
    count = 160
    answers = [("ABC" * 80)[number * 31 % 97] for number in range(count)]
    path = make_table(workplace / "x.tsv", images, count, answer=answers, D=[None] * count, hint=[""] * count)
    run_inside("3-eval_chat.py", *seeing, f"--questions={path}", f"--report={workplace}/r.json")
    chances = [comb(count, k) * (1 / 3) ** k * (2 / 3) ** (count - k) for k in range(count + 1)]
    report = json.loads((workplace / "r.json").read_text())["x"]["all"]
    for control in ("real", "blank", "shuffled"):
        hits = round(report[control] * count)
        assert sum(chances[: hits + 1]) > 5e-5 and sum(chances[hits:]) > 5e-5, (control, hits)
    assert report["chance"] == 0.3333


def test_a_table_is_read_without_holding_its_images(tmp_path):
    """40 MB of base64 in rows of 1 MB: in memory never more than a few of them."""
    rows = [{"index": n, "question": f"q{n}\n?", "answer": "A", "image": "QUJD" * 250_000} for n in range(40)]
    pandas.DataFrame(rows).to_csv(tmp_path / "x.tsv", sep="\t", index=False)
    rows.clear()
    table = Table(tmp_path / "x.tsv")
    tracemalloc.start()
    questions = [row["question"] for row in table.scan()]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert questions == [f"q{n}\n?" for n in range(40)] and len(table) == 40
    assert peak < 16e6, peak
    assert table[7]["question"] == "q7\n?" and len(table[39]["image"]) == 1_000_000
    before = csv.field_size_limit()
    with long_cells():
        assert csv.field_size_limit() > 1_000_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content", "fragments"),
    [
        ("a.tsv", "", ["a.tsv is empty"]),
        (
            "a.tsv",
            "index\tquestion\timage\n1\tq\tx\n",
            ["has the columns question, answer", "it has index, question"],
        ),
        ("a.tsv", "question\tanswer\timage\nq\tA\n", ["row 1: it has 2 cells under 3 columns"]),
        (
            "a.tsv",
            "question\tanswer\timage\nq\tA\t\n",
            ["none of its questions can be scored: 1 without an image"],
        ),
        ("a.tsv", b"question\tanswer\timage\n\xff\tA\tx\n", ["not UTF-8 text"]),
        (
            "a.tsv",
            "question\tanswer\timage_path\nq\tA\tgone.png\n",
            ["row 1: image not found", "--image_dir"],
        ),
        (
            "a.json",
            '{"image": "0.png", "text": "q", "label": "yes"}\n'
            '{"image": "0.png", "text": "q", "label": "maybe"}\n',
            ["line 2: a row of POPE has"],
        ),
        (
            "a.json",
            '{"image": "gone.png", "text": "q", "label": "yes"}\n',
            ["line 1: image not found", "--image_dir"],
        ),
        ("a.json", '{"image": "0.png", "text": "q", "label": "yes"}\n{"image\n', ["line 2: not JSON"]),
    ],
)
def test_a_benchmark_that_cannot_be_scored_is_named_before_a_model_is_loaded(
    workplace, capsys, name, content, fragments
):
    (workplace / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    flags = [f"--questions={workplace / name}", f"--image_dir={workplace}/images", "--load_from=README.md"]
    check_refused(run_clean(capsys, "3-eval_chat.py", *flags, "--device=cpu"), *fragments)


def test_what_does_not_fit_the_context_is_left_out_and_a_long_hint_goes(workplace, seeing, images, capsys):
    path = make_table(
        workplace / "x.tsv",
        images,
        3,
        hint=["", "什么" * 300, ""],
        question=["什么？", "什么？", "什么" * 300],
    )
    run_inside("3-eval_chat.py", *seeing, f"--questions={path}", "--control=real")
    printed = capsys.readouterr().out
    assert "2 questions, score choice; 1 without their hint, which does not fit the context" in printed
    assert "left out: 1 that do not fit the context" in printed


# ---- rows of our own ---------------------------------------------------------------------------------------


def test_own_rows_with_choices(workplace, seeing, capsys):
    good = make_question("红", choices=["红", "蓝", 3])
    path = write_questions(workplace / "q.jsonl", good)
    (entry,) = open_question_files([path])["q"].entries
    assert entry.row["choices"] == ["红", "蓝", "3"]
    for bad, fragment in (
        (["红"], '"choices" must be a list of two or more'),
        ("红蓝", '"choices" must be a list'),
        (["蓝", "绿"], "is none of its"),
        (["红", "红"], "the same one twice"),
        (["红", None], 'its "choices" must be a text or a number'),
    ):
        write_questions(path, good, good | {"choices": bad})
        result = run_clean(capsys, "3-eval_chat.py", *seeing, f"--questions={path}")
        check_refused(result, f"{path}, row 2: ", fragment)
    write_questions(path, good, make_question())
    check_refused(
        run_clean(capsys, "3-eval_chat.py", *seeing, f"--questions={path}", "--score=choice"), 'no "choices"'
    )
    check_refused(
        run_clean(capsys, "3-eval_chat.py", *seeing, "--score=choice"), "--score says how --questions"
    )


def test_losses_and_the_visual_gain(workplace, seeing, tokenizer_path, clip_path):
    """The loss of the answers is training's, over the tokens of all answers, and the gain its difference."""
    rows = [
        make_question(answer, image=f"images/{n}.png", kind="one" if n < 4 else "two")
        for n, answer in enumerate(
            ["红", "它是蓝色。", "图片里有一个红色圆形。", "a large green star", "红", "蓝"]
        )
    ]
    path = write_questions(workplace / "q.jsonl", *rows)
    flags = [f"--questions={path}", "--score=loss", f"--report={workplace}/r.json"]
    run_inside("3-eval_chat.py", *seeing, *flags)
    chat = load_chat(workplace / "out" / "32_vlm_sft.pth", tokenizer_path, clip_path)
    report, scores = json.loads((workplace / "r.json").read_text())["q"], scores_of(workplace / "r.json")
    totals = {"real": [], "blank": []}
    for row in rows:
        turns = [{"from": "human", "value": f"<image>\n{row['question']}"}]
        features = chat.encode([open_image(workplace / row["image"])])
        for control, shown in (("real", features), ("blank", 0 * features)):
            ((tokens,),) = chat.log_probabilities([turns], [[row["answer"]]], [shown])
            totals[control].append(tokens)
    counts = [len(tokens) for tokens in totals["real"]]
    for kind, part in (("one", slice(4)), ("two", slice(4, 6)), ("all", slice(6))):
        real, blank = (-float(sum(map(sum, totals[control][part]))) / sum(counts[part]) for control in totals)
        assert report[kind]["real"] == pytest.approx(real, abs=2e-4)
        assert report[kind]["blank"] == pytest.approx(blank, abs=2e-4)
        gain = scores[kind, "visual gain", "blank"]
        assert float(gain["value"]) == pytest.approx(blank - real, abs=2e-4)
        assert float(gain["low"]) < float(gain["value"]) < float(gain["high"])
        assert {"blank", "shuffled"} == set(report[f"{kind}: visual gain"])


def test_choices_come_out_the_same_in_batches_of_any_size_and_on_any_number_of_processes(
    workplace, seeing, images
):
    path = make_table(workplace / "x.tsv", images, 10)
    flags = [*seeing, f"--questions={path}", "--control", "real", "shuffled"]
    for name, size in (("one", 1), ("four", 4)):
        run_inside("3-eval_chat.py", *flags, f"--batch_size={size}", f"--report={workplace}/{name}.json")
    result = run_script(
        "3-eval_chat.py", *flags, "--batch_size=4", f"--report={workplace}/two.json", processes=2
    )
    assert result.returncode == 0, result.stderr
    for suffix in (".json", ".answers.jsonl", ".scores.csv"):
        assert (workplace / f"four{suffix}").read_bytes() == (workplace / f"two{suffix}").read_bytes()
    alone, together = (answers_of(workplace / f"{name}.json") for name in ("one", "four"))
    for one, other in zip(alone, together, strict=True):
        assert one["log_probabilities"] == pytest.approx(other["log_probabilities"], abs=1e-4)
        assert one["given"] == other["given"]


def test_a_damaged_image_is_named_with_its_row(workplace, seeing, images, capsys):
    path = make_table(
        workplace / "x.tsv", images, 3, image=[base64_of(images[0]), "QUJD" * 30, base64_of(images[1])]
    )
    result = run_clean(capsys, "3-eval_chat.py", *seeing, f"--questions={path}")
    check_refused(result, "cannot read image 1 in", "x.tsv, row 2")


def test_a_list_of_texts_is_never_taken_for_pope(workplace):
    save_image(workplace / "0.png", 1)
    path = write_questions(workplace / "q.jsonl", make_question())
    assert open_benchmark(path, None) is None
