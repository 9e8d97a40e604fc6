"""Many visitors at once: how long each waits, and what memory it takes.

reads    nothing: weights, CLIP (ViT-B/32's size) and images are made up
writes   benchmarks/results/visitors.json, and tables to the screen

    python -m benchmarks.visitors                         # 50 at once, each with an image: minutes
    python -m benchmarks.visitors --requests 5000         # the memory of web_server.py, meanwhile
    python -m benchmarks.visitors --quick                 # does it run? small sizes, no meaning
"""

import argparse
import base64
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from benchmarks.machine import ROOT, describe_machine, memory_of, peak_memory, save_results
from benchmarks.synthetic import config_of, make_answering_model, make_clip, save_clip, save_tokenizer
from model.chat import Chat, load_chat
from model.checkpoint import save_weights
from model.generate import Sampling
from serving.engine import Engine

QUESTION = "What is in the image?"
QUICK = ["--sizes", "64x2", "--visitors", "6", "--tokens", "8", "--clip_layers", "1"]
AT_ONCE = 8  # requests to the server


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["128x3", "512x8"], help="dim x layers")
    parser.add_argument("--visitors", type=int, default=50, help="who ask at once")
    parser.add_argument(
        "--tokens", type=int, default=60, help="of an answer; theirs are of 1 to 2 times as many"
    )
    parser.add_argument("--clip_layers", type=int, default=12, help="CLIP's depth (ViT-B/32: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--requests", type=int, help="instead: so many to web_server.py, and its memory")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that everything runs")
    args = parser.parse_args(argv)
    return parser.parse_args(QUICK, args) if args.quick else args


def make_files(folder: Path, size: str, clip_layers: int) -> Path:
    save_clip(folder / "clip", make_clip(num_hidden_layers=clip_layers))
    save_tokenizer(folder / "tokenizer")
    paths = {"tokenizer_path": str(folder / "tokenizer"), "clip_path": str(folder / "clip")}
    save_weights(make_answering_model(config_of(size)), folder / "vlm.pth", **paths)
    return folder / "vlm.pth"


def make_image(number: int, size: tuple[int, int] = (640, 480)) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size)


# ---- the engine --------------------------------------------------------------------------------------------


def measure_visitors(chat: Chat, together: int | None, num_visitors: int, num_tokens: int) -> dict:
    """All ask at the same moment. together 1: one after the other, as the page once answered."""
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}]
    with Engine(chat, together) as engine:
        if together == 1:
            engine.most_started = 1
        start, work = time.monotonic(), time.process_time()
        answers = [
            engine.submit(
                turns, [make_image(number)], Sampling(max_new_tokens=num_tokens + number % (num_tokens + 1))
            )
            for number in range(num_visitors)
        ]
        texts = ["".join(answer) for answer in answers]
        seconds, work = time.monotonic() - start, time.process_time() - work
    waits = [answer.seconds_to_first for answer in answers]
    tokens = sum(answer.num_tokens for answer in answers)
    return {
        "together": engine.together,
        "texts": texts,
        "first_median": median(waits),
        "first_worst": max(waits),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "tokens_per_processor_second": tokens / work,
        "peak_mb": peak_memory() / 1e6,
    }


def compare(args: argparse.Namespace) -> list[dict]:
    print(
        "| size | in a batch | first token, median (s) | worst (s) | all answered (s) | tokens/s | tokens "
        "per second of processor | the process's peak (MB) |\n" + "|---" * 8 + "|"
    )
    records = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            weights = make_files(Path(folder), size, args.clip_layers)
            chat = load_chat(weights, batch_size=8)
            results = [measure_visitors(chat, one, args.visitors, args.tokens) for one in (1, None)]
        alone, together = (result.pop("texts") for result in results)
        assert alone == together, "an answer depends on who else asks"
        for result in results:
            records.append({"size": size, **result})
            print(
                f"| {size} | {result['together']} "
                f"| {result['first_median']:.1f} | {result['first_worst']:.1f} "
                f"| {result['seconds']:.1f} | {result['tokens_per_second']:.0f} "
                f"| {result['tokens_per_processor_second']:.0f} | {result['peak_mb']:.0f} |",
                flush=True,
            )
    return records


# ---- the server --------------------------------------------------------------------------------------------


def ask_server(address: str, number: int) -> None:
    file = io.BytesIO()
    make_image(number, (160, 120)).save(file, "JPEG")  # what is measured is not how long it takes
    url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    fields = {"messages": [{"role": "user", "content": parts}], "max_tokens": 8, "stream": number % 2 == 0}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(fields).encode())
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
        answer.read()


def measure_server(args: argparse.Namespace) -> list[dict]:
    """Memory of the process and of those that it has started, idle and after every tenth of the requests."""
    with tempfile.TemporaryDirectory() as folder:
        weights = make_files(Path(folder), args.sizes[0], args.clip_layers)
        process = subprocess.Popen(
            [sys.executable, "web_server.py", f"--load_from={weights}", "--port=0", "--device=cpu"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(args.threads)},
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            address = next(
                found[0] for line in process.stdout if (found := re.match(r"http://\S+:\d+", line))
            )
            records = [{"requests": 0, "mb": memory_of(process.pid) / 1e6}]
            print("| requests | memory (MB) |\n|---|---|\n" + f"| 0 | {records[0]['mb']:.0f} |", flush=True)
            piece = max(1, args.requests // 10)
            with ThreadPoolExecutor(AT_ONCE) as pool:
                for done in range(0, args.requests, piece):
                    list(pool.map(lambda number: ask_server(address, number), range(done, done + piece)))
                    records.append({"requests": done + piece, "mb": memory_of(process.pid) / 1e6})
                    print(f"| {done + piece} | {records[-1]['mb']:.0f} |", flush=True)
        finally:
            process.terminate()
            process.wait()
    return records


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    results = {"machine": describe_machine(), "load": os.getloadavg()[0]}
    print(f"{results['machine']}; load of the machine {results['load']:.0f}\n")
    if args.requests:
        results["server"] = measure_server(args)
    else:
        results["engine"] = compare(args)
    name = "visitors_server" if args.requests else "visitors"
    save_results(f"{name}_quick" if args.quick else name, results)


if __name__ == "__main__":
    main()
