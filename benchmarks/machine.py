"""The machine that a benchmark runs on: what it can do, and what a process needs of it."""

import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def describe_machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall("model name\\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    kind = f"{names[0] if names else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
    return (
        f"{kind}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )


def matmul_speed(dtype: torch.dtype, size: int = 2048) -> float:
    """Operations per second of one product of square matrices."""
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    start = time.perf_counter()
    a @ b
    return 2 * size**3 / (time.perf_counter() - start)


def read_speed(device: str = "cpu") -> float:
    """Bytes per second at which memory is read: the best of ten sums over 256 MB."""
    numbers, seconds = torch.ones(2**26, device=device), []
    for _ in range(11):  # the first warms up
        start = time.perf_counter()
        numbers.sum().item()
        seconds.append(time.perf_counter() - start)
    return numbers.nbytes / min(seconds[1:])


def peak_memory(pid: int | str = "self") -> int:
    """Bytes that a process has needed at most (Linux). Not ru_maxrss: a child inherits its parent's."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) * 1024


def family_of(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{one}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def memory_of(pid: int) -> int:
    """Bytes that a process and all that it started have in memory, what they share counted once."""
    total = 0
    for one in family_of(pid):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{one}/smaps_rollup").read_text()
            total += 1024 * int(re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)[1])
    return total


def run_module(name: str, *flags) -> str:
    """What `python -m benchmarks.NAME` prints, in a fresh process."""
    command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{name}", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def save_results(name: str, results: dict, folder: Path = RESULTS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten: {path}")
