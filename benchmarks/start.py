"""How long from Enter until something is there: the help, a refusal, the first step, the first answer.

reads    nothing: a small language model and a CLIP of ViT-B/32's size, with random weights, are made in a
         temporary folder (350 MB)
writes   benchmarks/results/start.json, and a table to the screen

    python -m benchmarks.start                # five rounds, a few minutes
    python -m benchmarks.start --quick        # does it run? one round, a small CLIP

Every figure is a fresh process, from its start until what is waited for has been seen from outside; all take
turns, and the median and the worst of the rounds are given. Seconds of the processor stand beside those of
the clock: on a busy machine these grow, those hardly. Linux only (/proc).
"""

import argparse
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import ROOT, describe_machine, save_results
from benchmarks.synthetic import (
    PRETRAIN_SHAPE,
    SMALL_CLIP,
    make_clip,
    save_clip,
    save_data,
    save_images,
    save_tokenizer,
)
from model.checkpoint import save_weights
from model.LMConfig import LMConfig
from model.names import weights_path
from model.prompt import load_tokenizer
from model.transformer import Transformer

PRETRAIN, CHAT, PAGE = "1-pretrain_vlm.py", "3-eval_chat.py", "web_server.py"
OTHERS = (["2-sft_vlm.py"], ["-m", "trainer.check"], ["-m", "dataset.demo_world"])
PATIENCE = 600  # seconds after which what is waited for will not come


@dataclass
class Case:
    """What a user types and then waits for.

    seen    of a process and its output: has it come? None: the end of the process
    status  of the end
    """

    name: str
    command: list[str]
    seen: Callable[[], bool] | None = None
    status: int = 0


def time_of(case: Case, place: Path) -> tuple[float, float]:
    """Seconds of the clock, and of the processor, which other programs hardly change.

    The output goes to a file, so the process never waits for a reader.
    """
    output, before = place / "output", resource.getrusage(resource.RUSAGE_CHILDREN)
    # Unbuffered, so that an answer is in the file when it is printed, as on a terminal.
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with open(output, "w") as file:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *case.command], cwd=ROOT, env=environment, stdout=file, stderr=file
        )
        try:
            if case.seen:
                wait_for(case, process, output)
                seconds, processor = time.perf_counter() - start, processor_seconds(process.pid)
            else:
                process.wait(PATIENCE)
                seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
                processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        finally:
            stop(process)
    if not case.seen and process.returncode != case.status:
        raise RuntimeError(f"{case.name}: status {process.returncode}\n{output.read_text()}")
    return seconds, processor


def wait_for(case: Case, process: subprocess.Popen, output: Path) -> None:
    end = time.monotonic() + PATIENCE
    while not case.seen():
        if ended(process.pid) or time.monotonic() > end:
            raise RuntimeError(f"{case.name}: it never came\n{output.read_text()}")
        time.sleep(0.005)


def ended(pid: int) -> bool:
    """Has it failed? Its entry in /proc stays until somebody waits for it."""
    end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return end is not None and end.si_status != 0


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# ---- what is waited for ------------------------------------------------------------------------------------


def make_cases(place: Path) -> list[Case]:
    """place: from make_workplace()"""
    recipe, chat_recipe = f"@{place}/pretrain.args", f"@{place}/chat.args"
    record = place / "out" / "64_vlm_pretrain.metrics.jsonl"
    port = free_port()
    cases = [
        Case("python alone", ["-c", "pass"]),
        Case("import torch", ["-c", "import torch"]),
        *(Case(f"{' '.join(command)}: --help", [*command, "--help"]) for command in OTHERS),
    ]
    for script, flags in ((PRETRAIN, recipe), (CHAT, chat_recipe), (PAGE, chat_recipe)):
        cases += [
            Case(f"{script}: --help", [script, "--help"]),
            Case(f"{script}: wrong flag refused", [script, flags, "--nonsense=1"], status=2),
            Case(f"{script}: missing file refused", [script, flags, f"--out_dir={place}/gone"], status=2),
        ]
    return [
        *cases,
        Case(f"{PRETRAIN}: first step", [PRETRAIN, recipe], lambda: holds_line(record)),
        Case(f"{CHAT}: first answer", [CHAT, chat_recipe, "--max_new_tokens=8"], lambda: answered(place)),
        Case(f"{PAGE}: page", [PAGE, chat_recipe, f"--port={port}"], lambda: is_open(port)),
    ]


def holds_line(path: Path) -> bool:
    return path.exists() and b"\n" in path.read_bytes()


def answered(place: Path) -> bool:
    """Is there a whole line after "[image] question"?"""
    lines = (place / "output").read_text(errors="replace").splitlines(keepends=True)
    asked = [number for number, line in enumerate(lines) if line.startswith("[") and "0.jpg" in line]
    return bool(asked) and len(lines) > asked[0] + 1 and lines[asked[0] + 1].endswith("\n")


def is_open(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as connection:
        connection.bind(("127.0.0.1", 0))
        return connection.getsockname()[1]


def make_workplace(place: Path, quick: bool) -> None:
    """A folder from which the scripts can run: weights, tokenizer, CLIP, rows, images, and two recipes."""
    save_tokenizer(place / "tokenizer")
    clip = make_clip(**SMALL_CLIP if quick else {})
    save_clip(place / "clip", clip)
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
    for stage, vision_dim in (("llm", 0), ("vlm_sft", clip.config.hidden_size)):
        model = Transformer(LMConfig(**sizes, vision_dim=vision_dim))
        save_weights(model, weights_path(place / "out", model.config, stage))
    data = save_data(place / "data", PRETRAIN_SHAPE, 64, 8, load_tokenizer(place / "tokenizer"))
    save_images(place / "images", 1, (640, 480))
    paths = [f"--{name}_path={place}/{name}" for name in ("tokenizer", "clip")]
    chat = [*paths, f"--out_dir={place}/out", f"--image_dir={place}/images", "--device=cpu"]
    pretrain = [*paths, f"--out_dir={place}/out", f"--image_dir={data.parent}", f"--data_path={data}"]
    pretrain += [f"--{name}={value}" for name, value in sizes.items()]
    pretrain += ["--device=cpu", "--batch_size=8", "--max_steps=1", "--log_interval=1"]
    (place / "chat.args").write_text("\n".join(chat))
    (place / "pretrain.args").write_text("\n".join(pretrain))


# ---- table -------------------------------------------------------------------------------------------------


def measure(rounds: int, place: Path) -> dict[str, list[tuple[float, float]]]:
    """(seconds of the clock, of the processor), case by case."""
    times: dict[str, list[tuple[float, float]]] = {}
    for number in range(rounds):
        for case in make_cases(place):
            for trained in (place / "out").glob("64_vlm_pretrain*"):
                trained.unlink()  # of the last round: each begins anew
            times.setdefault(case.name, []).append(time_of(case, place))
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return times


def table(times: dict[str, list[tuple[float, float]]]) -> str:
    lines = ["| until | median (s) | worst (s) | processor, median (s) |", "|---|---|---|---|"]
    for name, taken in times.items():
        clock, processor = zip(*taken, strict=True)
        lines.append(
            f"| {name} | {statistics.median(clock):.2f} | {max(clock):.2f} "
            f"| {statistics.median(processor):.2f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="processes of each kind (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round, a small CLIP: shows that it runs")
    args = parser.parse_args(argv)
    rounds = 1 if args.quick else args.rounds
    with tempfile.TemporaryDirectory(prefix="minimind_start_") as folder:
        make_workplace(Path(folder), args.quick)
        times = measure(rounds, Path(folder))
    print(f"{describe_machine()}; {rounds} rounds\n\n{table(times)}")
    save_results("start_quick" if args.quick else "start", {"machine": describe_machine(), "seconds": times})


if __name__ == "__main__":
    main()
