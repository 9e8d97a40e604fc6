"""The numbered scripts, each run as a process: the stages, torchrun, same seed same bits, evaluation."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import LONG, ROOT, check_refused, make_rows, run_inside, run_script, train, weights_of

from model.chat import load_chat
from model.description import read_description
from model.printable import printable
from trainer.logger import read_metrics


def test_the_chain_of_stages(workplace):
    """llm -> vlm_pretrain -> vlm_sft -> vlm_sft_multi, each from the one before, each with its record."""
    train(workplace)
    train(workplace, script="2-sft_vlm.py")
    rows = [row | {"image": "0.png, 1.png"} for row in make_rows(12)]
    for row in rows:
        row["conversations"][0]["value"] += "<image>"
    (workplace / "multi.json").write_text(json.dumps(rows))
    train(workplace, f"--data_path={workplace}/multi.json", "--multi", "True", script="2-sft_vlm.py")
    before = torch.load(workplace / "out" / "32_llm.pth", weights_only=True)
    for stage in ("vlm_pretrain", "vlm_sft", "vlm_sft_multi"):
        now = weights_of(workplace, stage)
        assert not torch.equal(before["norm.weight"], now["norm.weight"])
        assert not any("vision_model" in name for name in now)  # CLIP is in no checkpoint
        path = workplace / "out" / f"32_{stage}.pth"
        assert read_description(path)["stage"] == stage and read_description(path)["step"] == 6
        records = read_metrics(path.with_suffix(".metrics.jsonl"))
        assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
        assert {"loss", "learning_rate", "tokens_per_s", "grad_norm"} <= set(records[0])
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        before = now


def test_the_same_seed_gives_the_same_bits_and_workers_change_nothing(workplace):
    runs = []
    for flags in (["--seed=5"], ["--seed=5", "--num_workers=2"], ["--seed=6"]):
        train(workplace, *flags)
        runs.append(weights_of(workplace))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not torch.equal(runs[0]["norm.weight"], runs[2]["norm.weight"])


@pytest.mark.parametrize(
    ("flags", "processes"),
    [
        (["--batch_size=4"], 2),
        (["--batch_size=2", "--accumulation_steps=4"], 1),
        (["--batch_size=2", "--accumulation_steps=2"], 2),
    ],
)
def test_one_global_batch_however_it_is_split(workplace, flags, processes):
    """1 x 8, 2 x 4 and 2 x 2 x 2 accumulated end in the same weights after 20 steps, though answers differ
    much in length: the loss is normalised by the target token of the whole global batch. 7 samples are left
    for an epoch's last step."""
    (workplace / "data.json").write_text(json.dumps(make_rows(23)))
    run_inside("1-pretrain_vlm.py", f"@{workplace}/args", "--max_steps=20", "--batch_size=8")
    expected, losses = (
        weights_of(workplace),
        read_metrics(workplace / "out" / "32_vlm_pretrain.metrics.jsonl"),
    )
    train(workplace, "--max_steps=20", *flags, processes=processes)
    for name, tensor in weights_of(workplace).items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-4, atol=5e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    split = read_metrics(workplace / "out" / "32_vlm_pretrain.metrics.jsonl")
    for one, other in zip(losses, split, strict=True):
        assert abs(one["loss"] - other["loss"]) < 1e-4 and one["step"] == other["step"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_reduced_precision_stays_close_to_float32(workplace, dtype):
    losses = []
    for flag in ("--dtype=float32", f"--dtype={dtype}"):
        train(workplace, flag)
        losses.append(
            [record["loss"] for record in read_metrics(workplace / "out" / "32_vlm_pretrain.metrics.jsonl")]
        )
    assert losses[0] != losses[1]  # it really decides
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 0.05


def test_evaluation_describes_and_scores_the_same_with_two_processes(workplace):
    train(workplace)
    train(workplace, script="2-sft_vlm.py")
    questions = [
        {"image": f"images/{n % 6}.png", "question": "什么颜色？", "answer": "它是蓝色。", "kind": "colour"}
        for n in range(11)
    ]
    (workplace / "questions_x.jsonl").write_text("\n".join(json.dumps(row) for row in questions))
    outputs, reports = [], []
    for processes in (1, 2):
        common = [
            f"--out_dir={workplace}/out",
            "--dim=32",
            "--device=cpu",
            "--max_new_tokens=8",
            "--batch_size=4",
        ]
        described = run_script(
            "3-eval_chat.py",
            *common,
            f"--image_dir={workplace}/images",
            "--temperature=0.9",
            processes=processes,
        )
        assert described.returncode == 0, described.stderr
        outputs.append(described.stdout[described.stdout.index("[") :])
        scored = run_script(
            "3-eval_chat.py",
            *common,
            f"--questions={workplace}/questions_x.jsonl",
            "--control",
            "real",
            "blank",
            "shuffled",
            f"--report={workplace}/report.json",
            processes=processes,
        )
        assert scored.returncode == 0, scored.stderr
        reports.append(
            ((workplace / "report.json").read_text(), (workplace / "report.answers.jsonl").read_text())
        )
    assert outputs[0] == outputs[1] and outputs[0].count("这个图片描述的是什么内容？") == 6
    assert reports[0] == reports[1]
    assert set(json.loads(reports[0][0])["x"]["colour"]) == {"real", "blank", "shuffled"}
    assert len(reports[0][1].splitlines()) == 33


def test_chat_in_the_terminal(workplace):
    train(workplace)
    result = subprocess.run(
        [
            sys.executable,
            "3-eval_chat.py",
            f"--out_dir={workplace}/out",
            "--dim=32",
            "--stage=vlm_pretrain",
            f"--chat={workplace}/images/0.png",
            "--max_new_tokens=5",
            "--device=cpu",
        ],
        cwd=ROOT,
        timeout=LONG,
        input="什么颜色？\nand the shape?\n\n",
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    chat = load_chat(workplace / "out" / "32_vlm_pretrain.pth")
    first = "".join(chat.stream("什么颜色？", workplace / "images" / "0.png", max_new_tokens=5))
    assert result.returncode == 0 and result.stdout.startswith(printable(first) + "\n"), result.stderr
    assert "tensors loaded" not in result.stdout


def test_multi_false_means_false(workplace):
    """bool("False") is True: `--multi False` once trained on several images."""
    train(workplace)
    result = train(workplace, "--multi", "False", script="2-sft_vlm.py")
    assert (workplace / "out" / "32_vlm_sft.pth").is_file() and "32_vlm_sft_multi" not in result.stdout
    check_refused(run_script("2-sft_vlm.py", "--multi", "perhaps"), "--multi", "True or False")
