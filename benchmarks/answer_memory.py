"""Peak memory of a process that loads a chat from files and answers one question about an image, in MB.

python -m benchmarks.answer_memory 512x8 float32
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from PIL import Image

from benchmarks.machine import DTYPES, peak_memory, run_module
from benchmarks.synthetic import config_of, make_answering_model, make_clip, save_clip, save_tokenizer
from model.chat import load_chat
from model.checkpoint import save_weights
from model.generate import Sampling

NUM_TOKENS = 100  # of the answer


def peak_mb(size: str, dtype: str, clip_layers: int = 12) -> dict[str, float]:
    """In all, and above what the imported libraries take: {"peak": ..., "above_libraries": ...}.

    The process that answers does nothing else: the files that it reads are made here.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_clip(folder / "clip", make_clip(num_hidden_layers=clip_layers))
        save_tokenizer(folder / "tokenizer")
        save_weights(make_answering_model(config_of(size)), folder / "vlm.pth")
        return json.loads(run_module("answer_memory", size, dtype, "--folder", folder).splitlines()[-1])


def measure(folder: Path, dtype: str) -> dict[str, float]:
    torch.set_num_threads(2)
    libraries = peak_memory()
    chat = load_chat(folder / "vlm.pth", folder / "tokenizer", folder / "clip", dtype=DTYPES[dtype])
    turns = [{"from": "human", "value": "<image>\nWhat is in the image?"}]
    image = Image.new("RGB", (640, 480), "teal")
    for _ in chat.stream(turns, [image], Sampling(max_new_tokens=NUM_TOKENS)):
        pass
    return {"peak": peak_memory() / 1e6, "above_libraries": (peak_memory() - libraries) / 1e6}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", help="of the language model: dim x layers")
    parser.add_argument("dtype", choices=DTYPES)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # in the process that is measured
    args = parser.parse_args(argv)
    print(json.dumps(measure(args.folder, args.dtype) if args.folder else peak_mb(args.size, args.dtype)))


if __name__ == "__main__":
    main()
