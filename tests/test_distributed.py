"""Several machines, played by several torchruns that meet at a port of this one."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LONG, ROOT, check_same, children_of, run_script, train, wait_until, weights_of

from trainer.logger import read_metrics

METRICS = "32_vlm_pretrain.metrics.jsonl"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Machines:
    """Two torchruns with a c10d rendezvous, each with an out_dir of its own: there is no common disk."""

    def __init__(self, workplace: Path, *flags: str):
        self.folders = [workplace / "out", workplace / "out_of_the_second"]
        self.folders[1].mkdir(exist_ok=True)
        shutil.copy(self.folders[0] / "32_llm.pth", self.folders[1])
        shutil.copy(self.folders[0] / "32_llm.json", self.folders[1])
        port = free_port()
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            "--nproc_per_node=1",
            "--rdzv_backend=c10d",
            f"--rdzv_endpoint=127.0.0.1:{port}",
            "--rdzv_id=test",
            "--local_addr=127.0.0.1",
        ]
        self.processes = [
            subprocess.Popen(
                [
                    *launcher,
                    f"--rdzv_conf=is_host={int(number == 0)}",
                    "1-pretrain_vlm.py",
                    f"@{workplace}/args",
                    f"--out_dir={folder}",
                    *flags,
                ],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for number, folder in enumerate(self.folders)
        ]

    def wait_for_steps(self) -> None:
        metrics = self.main_folder() / METRICS
        wait_until(lambda: len(read_metrics(metrics)) >= 3)

    def main_folder(self) -> Path:
        """Where global rank 0 runs: the rendezvous decides which of the two that is."""
        wait_until(lambda: any((folder / METRICS).is_file() for folder in self.folders))
        return next(folder for folder in self.folders if (folder / METRICS).is_file())

    def worker(self, number: int) -> int:
        return children_of(self.processes[number].pid)[0]

    def end(self) -> None:
        for process in self.processes:
            for pid in [*children_of(process.pid), process.pid] if process.poll() is None else []:
                os.kill(pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture
def machines(workplace):
    started = []

    def start(*flags: str) -> Machines:
        started.append(Machines(workplace, *flags))
        return started[-1]

    yield start
    for pair in started:
        pair.end()


def test_two_machines_train_as_one_and_only_rank_0_writes(workplace, machines):
    train(workplace, "--max_steps=6", processes=2)
    expected = weights_of(workplace)
    for path in (workplace / "out").glob("32_vlm_pretrain.*"):
        path.unlink()
    pair = machines("--max_steps=6", "--save_interval=3")
    outputs = [process.communicate(timeout=LONG)[0] for process in pair.processes]
    assert [process.returncode for process in pair.processes] == [0, 0], outputs
    assert "".join(outputs).count("saved ") == 1
    main = pair.main_folder()
    other = next(folder for folder in pair.folders if folder != main)
    assert sorted(path.name for path in other.iterdir()) == ["32_llm.json", "32_llm.pth"]
    check_same(weights_of(main.parent, folder=main.name), expected)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_machine_ends_the_run_with_a_clear_line(workplace, machines, number):
    """Killed, its connections break; stopped, as behind a cut cable, it just does not answer."""
    pair = machines("--max_steps=100000", "--save_interval=0", "--timeout=20")
    pair.wait_for_steps()
    living = pair.folders.index(pair.main_folder())
    os.kill(pair.worker(1 - living), number)
    if number == signal.SIGSTOP:
        os.kill(pair.processes[1 - living].pid, number)
    output = pair.processes[living].communicate(timeout=LONG)[0]
    assert "error: another process of this run has ended or does not answer" in output, output
    assert "loop.py" not in output and pair.processes[living].returncode != 0
    assert (pair.folders[living] / "32_vlm_pretrain.resume").is_file()


@pytest.mark.parametrize("ending", ["return", "raise AgreedError"])
def test_a_ddp_module_never_is_the_last_to_hold_the_process_group(ending):
    """Or the end of a run could wait for ever: see Run.__exit__."""
    code = f"""
import sys, weakref
from unittest import mock
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from trainer.distributed import start_run
from trainer.script import AgreedError

def train():
    module = DistributedDataParallel(torch.nn.Linear(2, 2))
    module(torch.ones(1, 2)).sum().backward()
    modules.append(weakref.ref(module))
    try:
        raise ValueError
    except ValueError:
        {ending}

def destroy():
    print("alive" if modules[0]() else "freed", flush=True)
    original()

modules, original = [], dist.destroy_process_group
with mock.patch.object(dist, "destroy_process_group", destroy):
    try:
        with start_run("cpu"):
            train()
    except AgreedError:
        sys.exit(3)
"""
    result = run_script("--no-python", sys.executable, "-c", code, processes=2)
    assert result.stdout.split() == ["freed", "freed"], result.stderr
