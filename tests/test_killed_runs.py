"""Runs that are killed (SIGKILL) at any moment and resumed end in the same bits.

MINIMIND_KILLS=15 MINIMIND_KILL_SEED=1    the long form: so many kills of each of seven kinds, ten minutes
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, check_same, children_of, run_script, wait_until
from test_resume import records_of

from model.checkpoint import read_state_dict
from model.description import read_description
from trainer.saves import read_resume_file

SCRIPT, NAME = "1-pretrain_vlm.py", "32_vlm_pretrain"
KILLS = int(os.environ.get("MINIMIND_KILLS", 1))
SEED = int(os.environ.get("MINIMIND_KILL_SEED", 0))
MODES = {
    "one process": [],
    "two workers": ["--num_workers=2"],
    "a cache is filled": ["--feature_cache={}/features", "--val_fraction=0.2", "--keep_best"],
    "accumulation in 16 bits": ["--dtype=bfloat16", "--batch_size=2", "--accumulation_steps=2"],
    "generations": ["--keep=3", "--save_interval=2"],
    "a rank": [],
    "the agent": [],
}
SHORT = ("a cache is filled", "accumulation in 16 bits")


class Killing:
    """A run that is started again and again with --resume, and killed each time."""

    def __init__(self, workplace: Path, mode: str, flags: list[str]):
        self.out, self.mode, self.flags = workplace / "out", mode, flags
        self.random = np.random.default_rng(SEED)
        self.processes = 2 if mode in ("a rank", "the agent") else 1

    @property
    def command(self) -> list[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        return [sys.executable, *(launcher if self.processes == 2 else []), SCRIPT, *self.flags]

    def kill(self) -> str:
        """At a random moment: soon after the start; up to a second after a save; while one is written."""
        moment = self.random.choice(["start", "steps", "save", "save"] if KILLS > 1 else ["save"])
        weights = self.out / f"{NAME}.pth"
        before = weights.stat().st_mtime_ns if weights.is_file() else 0
        run = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        if moment == "start":
            time.sleep(self.random.uniform(0, 8))
        else:
            wait_until(
                lambda: weights.is_file() and weights.stat().st_mtime_ns > before or run.poll() is not None
            )
            time.sleep(self.random.uniform(0, 1))
        if moment == "save":
            wait_until(lambda: any(self.out.glob(".*.tmp")) or run.poll() is not None, pause=0)
        assert run.poll() is None, "the run ended before it could be killed"
        workers = children_of(run.pid) if self.processes == 2 else []
        victims = workers[:1] if self.mode == "a rank" and workers else [run.pid]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        run.wait()
        for pid in workers:  # whose agent is gone may go on, and hold what they write
            wait_until(lambda pid=pid: not is_alive(pid), pause=0.1) if self.mode == "a rank" else end(pid)
        return moment

    def check_whole(self) -> int:
        """Every file can be read; returns the step that was saved last."""
        for path in self.out.glob(f"{NAME}*.pth"):
            assert read_state_dict(path) and read_description(path)["step"] > 0
        steps = [read_resume_file(path)["step"] for path in self.out.glob(f"{NAME}.resume*")]
        return max(steps, default=0)

    def finish(self) -> None:
        result = run_script(*self.command[1:])
        assert result.returncode == 0, result.stderr


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def end(pid: int) -> None:
    if is_alive(pid):
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(pid))


@pytest.mark.parametrize("mode", MODES if KILLS > 1 else SHORT)
def test_killed_at_any_moment_it_ends_in_the_same_bits(workplace, mode, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    flags = [f"@{workplace}/args", f"--max_steps={40 * KILLS + 10}", "--save_interval=1"]
    flags += [flag.format(workplace) for flag in MODES[mode]]
    undisturbed = Killing(workplace, mode, flags)
    undisturbed.finish()
    files = sorted((workplace / "out").glob(f"{NAME}*.pth"))  # and *.best.pth
    expected, record = [read_state_dict(path) for path in files], records_of(workplace)
    for path in [*(workplace / "out").glob(f"{NAME}*"), *workplace.glob("features/*/*")]:
        path.unlink()
    killing = Killing(workplace, mode, [*flags, "--resume"])
    steps = []
    for _ in range(KILLS):
        moment = killing.kill()
        steps.append(f"{killing.check_whole()} ({moment})")
    killing.finish()
    print(f"{mode}: killed with {', '.join(steps)} steps saved")
    assert sorted((workplace / "out").glob(f"{NAME}*.pth")) == files
    for path, state in zip(files, expected, strict=True):
        check_same(read_state_dict(path), state)
    assert records_of(workplace) == record
    assert not list((workplace / "out").glob(f"{NAME}.resume*"))
    assert not list((workplace / "out").glob(".*"))
