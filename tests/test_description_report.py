"""Many images described into a file: in batches as one by one, every image once, whatever happens on the way;
and one answer for a script."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LONG, ROOT, check_refused, run_clean, run_inside, run_script, save_image, wait_until

from model.chat import load_chat
from model.checkpoint import save_weights
from model.generate import Sampling
from model.images import open_image
from model.printable import printable
from trainer import description_report

NUMBER = 13  # images, in batches of 4


@pytest.fixture
def place(workplace, lively, seeing) -> list[str]:
    """Flags for a model whose answers differ, and a folder of images, of which one is none."""
    save_weights(lively, workplace / "out" / "32_vlm_sft.pth")
    (workplace / "many").mkdir()
    for number in range(NUMBER):
        save_image(workplace / "many" / f"{number:02}.png", 100 + number)
    (workplace / "many" / "05.png").write_bytes(b"no image")
    flags = [flag for flag in seeing if not flag.startswith("--max_new_tokens")]
    return [
        *flags,
        f"--image_dir={workplace}/many",
        "--prompt=什么？",
        "--max_new_tokens=8",
        "--batch_size=4",
    ]


def rows_of(path: Path) -> list[dict]:
    if path.suffix == ".csv":
        with open(path, newline="") as file:
            return list(csv.DictReader(file))
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def contents(path: Path) -> list[tuple]:
    return [(Path(row["file"]).name, row["answer"], row["tokens"]) for row in rows_of(path)]


@pytest.mark.parametrize("sampled", [[], ["--temperature=1", "--top_k=9", "--seed=5"]])
def test_a_batch_answers_as_one_by_one(place, workplace, capsys, sampled, tokenizer_path, clip_path):
    result = run_clean(capsys, "3-eval_chat.py", *place, *sampled, f"--report={workplace}/r.jsonl")
    check_refused(result, f'1 of {NUMBER} could not be described: see "error" in')
    rows = rows_of(workplace / "r.jsonl")
    assert [Path(row["file"]).name for row in rows] == [f"{number:02}.png" for number in range(NUMBER)]
    chat = load_chat(workplace / "out" / "32_vlm_sft.pth", tokenizer_path, clip_path)
    for position, row in enumerate(rows):
        assert row["question"] == "什么？" and row["weights"] == rows[0]["weights"]
        if position == 5:
            assert row["answer"] is row["tokens"] is None and "05.png: it is damaged" in row["error"]
            continue
        settings = {"temperature": 1, "top_k": 9, "seed": 5 + position} if sampled else {}
        turns = [{"from": "human", "value": "<image>\n什么？"}]
        sampling = Sampling(max_new_tokens=8, **settings)
        answer = "".join(chat.stream(turns, [open_image(row["file"])], sampling))
        assert row["answer"] == answer.strip() and 0 < row["tokens"] <= 8 and row["seconds"] > 0
    assert len({row["answer"] for row in rows}) > 3


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_report_goes_on_from_every_place_where_a_kill_may_leave_it(place, workplace, capsys, suffix):
    """Cut at every kind of byte: within a row, within a character, between two rows, within the header."""
    run_clean(capsys, "3-eval_chat.py", *place, f"--report={workplace}/whole{suffix}")
    whole = (workplace / f"whole{suffix}").read_bytes()
    ends = [place for place in range(len(whole)) if whole[place : place + 1] == b"\n"]
    half = whole.index("什".encode()) + 1
    for cut in (0, 3, half, ends[0], ends[0] + 1, ends[6] - 5, ends[6] + 1, ends[-2] + 2):
        report = workplace / f"cut{suffix}"
        report.write_bytes(whole[:cut])
        before = contents(report) if cut and whole[cut - 1 : cut] == b"\n" else []
        result = run_clean(capsys, "3-eval_chat.py", *place, f"--report={report}")
        assert result.returncode == 2, result.stderr
        assert contents(report) == contents(workplace / f"whole{suffix}"), cut
        assert contents(report)[: len(before)] == before


def test_what_is_described_is_not_asked_again(place, workplace, capsys, monkeypatch):
    run_clean(capsys, "3-eval_chat.py", *place, f"--report={workplace}/r.csv")
    before = (workplace / "r.csv").read_bytes()
    save_image(workplace / "many" / "99.png", 7)
    asked, original = [], description_report.describe_batch

    def describe_batch(args, chat, shown, places):
        asked.extend(shown[position][0].name for position in places)
        return original(args, chat, shown, places)

    monkeypatch.setattr(description_report, "describe_batch", describe_batch)
    monkeypatch.chdir(workplace)
    again = [flag.replace(f"--image_dir={workplace}/", "--image_dir=") for flag in place]  # another spelling
    result = run_clean(capsys, "3-eval_chat.py", *again, f"--report={workplace}/r.csv")
    assert asked == ["99.png"] and f"{NUMBER} of {NUMBER + 1} are in" in result.stdout
    assert (workplace / "r.csv").read_bytes().startswith(before) and len(
        rows_of(workplace / "r.csv")
    ) == NUMBER + 1


def test_answers_of_another_kind_do_not_mix(place, workplace, capsys, lively):
    report = workplace / "r.jsonl"
    flags = [*place, f"--report={report}"]
    run_clean(capsys, "3-eval_chat.py", *flags)
    before = report.read_bytes()
    for more, fragments in (
        (["--prompt=怎么？"], ["with another --prompt (什么？; now 怎么？)"]),
        (
            ["--temperature=0.5"],
            ["with other settings (float32, temperature 0.0", "now float32, temperature 0.5"],
        ),
        (["--max_new_tokens=9"], ["with other settings", "max_new_tokens 9"]),
        (["--dtype=bfloat16"], ["with other settings", "now bfloat16"]),
    ):
        check_refused(
            run_clean(capsys, "3-eval_chat.py", *flags, *more), str(report), "give another one", *fragments
        )
    image = workplace / "many" / "03.png"
    original = image.read_bytes()
    save_image(image, 7)
    check_refused(run_clean(capsys, "3-eval_chat.py", *flags), f"describes {image} as it was before")
    image.write_bytes(original)
    lively.norm.weight[0] += 0.001
    save_weights(lively, workplace / "out" / "32_vlm_sft.pth")
    check_refused(run_clean(capsys, "3-eval_chat.py", *flags), "was made with other weights (")
    assert report.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.csv", "name,price\napple,3\n"),
        ("r.csv", "name,price"),
        ("r.jsonl", '{"a": 1}\n'),
        ("r.jsonl", '[{"a": 1}]'),
        ("r.jsonl", "my notes\nmore of them"),
    ],
)
def test_a_file_of_somebody_else_is_left_as_it_is(place, workplace, capsys, name, content):
    (workplace / name).write_text(content)
    result = run_clean(capsys, "3-eval_chat.py", *place, f"--report={workplace / name}")
    check_refused(result, f"--report: {workplace / name} is no report of descriptions", "give another one")
    assert (workplace / name).read_text() == content


def test_a_report_that_cannot_be_is_refused_before_anything_is_loaded(place, workplace, capsys):
    for flags, fragment in (
        ([f"--report={workplace}/r.json"], "descriptions go to a .jsonl or a .csv"),
        ([f"--report={workplace}/data.json/r.csv"], "--report: cannot write"),
        (["--report=r.csv", f"--image={workplace}/images/0.png"], "--report keeps"),
    ):
        check_refused(run_clean(capsys, "3-eval_chat.py", *place, *flags), fragment)


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_two_processes_killed_in_the_middle_and_resumed_describe_every_image_once(place, workplace, capsys):
    """Killed as soon as there are rows, without a chance to say anything; then resumed by two. It all is as
    one process describes it in one go."""
    for number in range(20, 60):
        save_image(workplace / "many" / f"{number:02}.png", number)
    report = workplace / "both.jsonl"
    place = [*place, "--batch_size=1", "--max_new_tokens=60"]  # the kill finds many rounds still to come
    command = ["3-eval_chat.py", *place, f"--report={report}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [*launcher, *command], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_until(lambda: report.exists() and report.stat().st_size, LONG, 0.001)
    # torchrun's workers outlive it: they are in sessions of their own.
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in [*map(int, workers), process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(is_running(pid) for pid in workers))
    before = report.read_bytes()
    result = run_script(*command, processes=2)
    assert f'1 of {NUMBER + 40} could not be described: see "error"' in result.stderr, result.stderr
    run_clean(capsys, "3-eval_chat.py", *place, f"--report={workplace}/alone.jsonl")
    assert contents(report) == contents(workplace / "alone.jsonl")
    whole = before[: before.rfind(b"\n") + 1]
    assert report.read_bytes().startswith(whole) and 0 < whole.count(b"\n") < NUMBER + 40


def test_sets_of_images_go_to_a_report_too(place, workplace, capsys):
    save_weights_as_multi = (workplace / "out" / "32_vlm_sft.pth").read_bytes()
    (workplace / "out" / "32_vlm_sft_multi.pth").write_bytes(save_weights_as_multi)
    for name in "ab":
        (workplace / "sets" / name).mkdir(parents=True)
        for number in range(2):
            save_image(workplace / "sets" / name / f"{number}.png", ord(name) + number)
    flags = [*place, "--multi", f"--image_dir={workplace}/sets", f"--report={workplace}/r.jsonl"]
    run_inside("3-eval_chat.py", *flags)
    assert [Path(row["file"]).name for row in rows_of(workplace / "r.jsonl")] == ["a", "b"]
    assert all(row["answer"] for row in rows_of(workplace / "r.jsonl"))


# ---- one answer for a script -------------------------------------------------------------------------------


def test_one_answer_stands_alone_on_standard_output(place, workplace, tokenizer_path, clip_path):
    image = workplace / "images" / "0.png"
    flags = [flag for flag in place if not flag.startswith("--image_dir")]
    result = run_script("3-eval_chat.py", *flags, f"--image={image}")
    chat = load_chat(workplace / "out" / "32_vlm_sft.pth", tokenizer_path, clip_path)
    turns = [{"from": "human", "value": "<image>\n什么？"}]
    answer = "".join(chat.stream(turns, [open_image(image)], Sampling(max_new_tokens=8)))
    assert result.returncode == 0 and result.stdout == printable(answer) + "\n", result.stderr
    assert "22 tensors loaded" in result.stderr


def test_several_images_for_one_answer_where_the_weights_allow(place, workplace, capsys, lively):
    images = [f"{workplace}/images/{number}.png" for number in range(2)]
    flags = [*place, "--image", *images]
    save_weights(lively, workplace / "out" / "32_vlm_sft_multi.pth", stage="vlm_sft_multi")
    together = run_clean(capsys, "3-eval_chat.py", *flags)
    split = run_clean(capsys, "3-eval_chat.py", *place, "--image", images[0], "--image", images[1])
    assert together.returncode == 0 and together.stdout == split.stdout and together.stdout.count("\n") == 1
    save_weights(lively, workplace / "out" / "32_vlm_sft_multi.pth", stage="vlm_sft")
    check_refused(run_clean(capsys, "3-eval_chat.py", *flags), "(vlm_sft) never saw several images at once")
    save_weights(lively, workplace / "out" / "32_vlm_sft_multi.pth")
    many = [*place, "--image", *(5 * images[:1])]
    check_refused(
        run_clean(capsys, "3-eval_chat.py", *many), "--image names 5 images", "at most 4 images fit"
    )


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        (["--image=gone.png"], "--image: there is no file gone.png"),
        (["--image={}/many/05.png"], "cannot read image"),
        (["--image={}/images/0.png", "--multi"], "leave out --multi"),
        (["--image={}/images/0.png", "--questions=q.jsonl"], "leave out --questions"),
    ],
)
def test_what_cannot_be_answered_ends_in_one_line_and_prints_nothing(
    place, workplace, capsys, flags, fragment
):
    result = run_clean(capsys, "3-eval_chat.py", *place, *[flag.format(workplace) for flag in flags])
    check_refused(result, fragment)
    assert result.stdout == ""
