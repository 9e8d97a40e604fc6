"""Interrupted runs: they go on to the same bits, nothing good is lost, other settings are refused."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    LONG,
    ROOT,
    PowerCut,
    check_refused,
    check_same,
    children_of,
    cut_after,
    make_rows,
    run_inside,
    train,
    wait_until,
    weights_of,
)

from model.description import read_description
from trainer.distributed import Run
from trainer.interrupt import Interruption
from trainer.logger import read_metrics
from trainer.loop import Trainer
from trainer.saves import RunFiles

SCRIPT = "1-pretrain_vlm.py"


def records_of(workplace: Path) -> list[dict]:
    """The metrics, without what depends on the clock."""
    records = read_metrics(workplace / "out" / "32_vlm_pretrain.metrics.jsonl")
    return [
        {name: value for name, value in record.items() if name not in ("seconds", "tokens_per_s")}
        for record in records
    ]


@pytest.mark.parametrize(
    "flags",
    [
        ["--dtype=float32"],
        ["--dtype=bfloat16"],
        ["--dtype=float16", "--batch_size=2", "--accumulation_steps=2"],
        [
            "--batch_size=2",
            "--accumulation_steps=3",
            "--val_fraction=0.2",
            "--save_interval=4",
            "--log_interval=3",
        ],
        ["--num_workers=2", "--save_interval=0", "--warmup_steps=3", "--weight_decay=0.1"],
        ["--train=projection+last"],
    ],
)
def test_a_resumed_run_ends_in_the_same_bits_and_the_same_record(workplace, monkeypatch, flags):
    """Twice interrupted, in the middle of a step; 23 rows: epochs end raggedly, within the run."""
    (workplace / "data.json").write_text(json.dumps(make_rows(23)))
    flags = [f"@{workplace}/args", "--max_steps=10", "--save_interval=3", "--log_interval=1", *flags]
    run_inside(SCRIPT, *flags)
    expected, record = weights_of(workplace), records_of(workplace)
    assert len(record) >= 4 and not (workplace / "out" / "32_vlm_pretrain.resume").exists()
    for path in (workplace / "out").glob("32_vlm_pretrain.*"):
        path.unlink()
    for steps in (4, 3):
        with monkeypatch.context() as patch, pytest.raises(PowerCut):
            cut_after(patch, steps)
            run_inside(SCRIPT, *flags, "--resume")
    run_inside(SCRIPT, *flags, "--resume")
    check_same(weights_of(workplace), expected)
    assert records_of(workplace) == record


def test_random_numbers_go_on_too(workplace, monkeypatch):
    """MiniMind has no dropout; whoever adds it finds that every step and rank has a stream of its own."""
    original = Trainer.loss

    def noisy(self, *arguments):
        return original(self, *arguments) * (1 + torch.rand(()))

    monkeypatch.setattr(Trainer, "loss", noisy)
    flags = [f"@{workplace}/args", "--max_steps=4"]
    run_inside(SCRIPT, *flags)
    expected = weights_of(workplace)
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_after(patch, 2)
        run_inside(SCRIPT, *flags)
    run_inside(SCRIPT, *flags, "--resume")
    check_same(weights_of(workplace), expected)


def test_an_unfinished_run_is_never_overwritten_silently(workplace, monkeypatch, capsys):
    flags = [f"@{workplace}/args", "--max_steps=6"]
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_after(patch, 4)
        run_inside(SCRIPT, *flags)
    interrupted = weights_of(workplace)
    description = read_description(workplace / "out" / "32_vlm_pretrain.pth")
    assert (description["step"], description["total_steps"], description["stage"]) == (4, 6, "vlm_pretrain")
    assert description["versions"]["torch"] == torch.__version__ and description["settings"]["rows"] == 24
    with pytest.raises(ValueError, match="32_vlm_pretrain.resume is an unfinished run.* --resume,"):
        run_inside(SCRIPT, *flags)
    (workplace / "data.json").write_text(json.dumps(make_rows(25)))
    with pytest.raises(
        ValueError,
        match="rows 24 then, 25 now; batch_size 4 then, 2 now; "
        r"data \w+ then, \w+ now.*--resume_weights_only",
    ):
        run_inside(SCRIPT, *flags, "--resume", "--batch_size=2")
    check_same(weights_of(workplace), interrupted)

    run_inside("2-sft_vlm.py", *flags, "--max_steps=1")  # it may be used, but not unknowingly
    assert "; of an unfinished run (step 4 of 6)" in capsys.readouterr().out
    run_inside(SCRIPT, *flags, "--resume_weights_only", "--max_steps=1", "--learning_rate=1e-30")
    assert "new schedule from the weights in" in capsys.readouterr().out
    for name, tensor in weights_of(workplace).items():  # a step of no length: they were really loaded
        torch.testing.assert_close(tensor, interrupted[name])


def test_a_finished_run_is_not_repeated_under_resume(workplace, capsys):
    flags = [f"@{workplace}/args", "--max_steps=2", "--resume"]
    run_inside(SCRIPT, *flags)
    written = (workplace / "out" / "32_vlm_pretrain.pth").stat().st_mtime_ns
    run_inside(SCRIPT, *flags)
    assert "is finished: nothing to do" in capsys.readouterr().out
    assert (workplace / "out" / "32_vlm_pretrain.pth").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="learning_rate 0.001 then, 0.002 now.*without --resume"):
        run_inside(SCRIPT, *flags, "--learning_rate=2e-3")


def test_a_damaged_resume_file_is_named(workplace):
    path = workplace / "out" / "32_vlm_pretrain.resume"
    for content, reason in ((b"PK nonsense", "not a readable resume file"), (b"", "is empty")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"32_vlm_pretrain.resume.*{reason}"):
            run_inside(SCRIPT, f"@{workplace}/args", "--max_steps=1", "--resume")


def start(workplace: Path, *flags: str, processes: int = 1) -> subprocess.Popen:
    """A long run in the background, once it is taking steps."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    process = subprocess.Popen(
        [sys.executable, *(launcher if processes > 1 else []), SCRIPT, f"@{workplace}/args", *flags],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the suite may run under nohup
    )
    metrics = workplace / "out" / "32_vlm_pretrain.metrics.jsonl"
    wait_until(lambda: process.poll() is not None or metrics.is_file() and len(read_metrics(metrics)) >= 3)
    assert process.poll() is None, process.communicate()[0]
    return process


@pytest.mark.parametrize(
    ("number", "processes", "workers", "status"),
    [
        (signal.SIGHUP, 1, 0, 129),
        (signal.SIGINT, 1, 0, 130),
        (signal.SIGTERM, 1, 2, 143),
        (signal.SIGTERM, 2, 0, 0),
    ],
)
def test_asked_to_stop_it_saves_once_and_ends_as_the_signal_says(
    workplace, number, processes, workers, status
):
    """With loader processes the whole group gets the signal, as from a job scheduler or a terminal. Under
    torchrun the processes that train get it: torchrun itself, when asked to stop, always ends with a
    traceback of its own and exit status 1."""
    flags = ["--max_steps=100000", "--save_interval=0", f"--num_workers={workers}"]
    process = start(workplace, *flags, processes=processes)
    if workers:
        os.killpg(process.pid, number)
    else:
        for pid in children_of(process.pid) if processes > 1 else [process.pid]:
            os.kill(pid, number)
    output = process.communicate(timeout=LONG)[0]
    assert process.returncode == status and "Traceback" not in output, output
    assert output.count("stopped and saved at step") == 1
    step = read_description(workplace / "out" / "32_vlm_pretrain.pth")["step"]
    assert (
        3 <= step < 100000 and len(read_metrics(workplace / "out" / "32_vlm_pretrain.metrics.jsonl")) == step
    )
    resume_file = torch.load(workplace / "out" / "32_vlm_pretrain.resume", weights_only=True)
    assert resume_file["step"] == step and resume_file["settings"]["total_steps"] == 100000


def test_two_processes_stopped_by_torchrun_and_resumed_end_in_the_same_bits(workplace):
    flags = [
        "--max_steps=60",
        "--save_interval=0",
        "--batch_size=2",
        "--accumulation_steps=2",
        "--dtype=bfloat16",
    ]
    train(workplace, *flags, processes=2)
    expected, record = weights_of(workplace), records_of(workplace)
    for path in (workplace / "out").glob("32_vlm_pretrain.*"):
        path.unlink()
    process = start(workplace, *flags, processes=2)
    os.kill(process.pid, signal.SIGTERM)  # torchrun passes it on
    output = process.communicate(timeout=LONG)[0]
    assert "stopped and saved at step" in output, output
    train(workplace, *flags, "--resume", processes=2)
    check_same(weights_of(workplace), expected)
    assert records_of(workplace) == record


def test_a_second_signal_ends_the_process_at_once():
    """But not one that comes within Interruption.GRACE: torchrun repeats a Ctrl-C within milliseconds."""
    code = (
        "import os, signal\nfrom trainer.interrupt import Interruption\n"
        "Interruption.GRACE = 1000\n"
        "with Interruption() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still here', stop.requested, flush=True)\n"
        "    Interruption.GRACE = 0\n"
        "    os.kill(os.getpid(), signal.SIGINT); print('too late', flush=True)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == -signal.SIGINT and result.stdout == "still here True\n"
    assert Interruption.GRACE > 0.5


def test_a_full_disk_costs_no_good_file(workplace, monkeypatch):
    """RLIMIT_FSIZE stands in for it: the resume file does not fit, the metrics do."""
    flags = [f"@{workplace}/args", "--max_steps=6", "--save_interval=1", "--resume"]
    run_inside(SCRIPT, *flags)
    expected = weights_of(workplace)
    for path in (workplace / "out").glob("32_vlm_pretrain.*"):
        path.unlink()
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_after(patch, 2)
        run_inside(SCRIPT, *flags)
    good = weights_of(workplace)
    limited = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
        f"sys.argv[0] = {SCRIPT!r}; runpy.run_path({SCRIPT!r}, run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", limited, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    check_refused(result, "cannot write", "32_vlm_pretrain.pth: File too large", "as it was")
    assert result.stdout.count("training continues and will save again later") == 3
    check_same(weights_of(workplace), good)
    assert not list((workplace / "out").glob(".*.tmp"))
    run_inside(SCRIPT, *flags)
    check_same(weights_of(workplace), expected)


def test_no_room_and_no_permission_are_reported_before_training(workplace, monkeypatch):
    usage = shutil.disk_usage(workplace)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"out has 0 MB free, but the saves of this run need \d+ MB.*--out_dir"):
        run_inside(SCRIPT, f"@{workplace}/args", "--max_steps=1")
    monkeypatch.undo()
    saves = RunFiles(
        Run(0, 1, torch.device("cpu")),
        argparse.Namespace(keep_best=False, keep=1),
        Path("/proc/self/nowhere/32_vlm_sft.pth"),
        {},
        {},
    )  # not even root can write there
    with pytest.raises(OSError, match="cannot write to /proc/self/nowhere.*--out_dir"):
        saves.check_room(torch.nn.Linear(2, 2))
