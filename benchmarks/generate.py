"""How fast is an answer? Ours against transformers' generate() on the same weights, in one process, in turns.

reads    nothing: weights, image and prompt are made up, in the real sizes (CLIP ViT-B/32, 50 tokens)
writes   benchmarks/results/generate.json, and tables to the screen

    python benchmarks/generate.py                              # a few minutes
    python benchmarks/generate.py --sizes 512x8 --threads 2    # less
"""

import argparse
import copy
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM  # noqa: E402

from benchmarks.llava import to_llama, to_llava, to_llava_ids  # noqa: E402
from model.decode import Decoder, pack_linears  # noqa: E402
from model.generate import Sampling, generate  # noqa: E402
from model.LMConfig import LMConfig  # noqa: E402
from model.names import DTYPES  # noqa: E402
from model.prompt import Prompt  # noqa: E402
from model.transformer import Transformer  # noqa: E402
from model.vision_proj import placeholder_ids  # noqa: E402
from model.vision_utils import get_img_embedding  # noqa: E402

PROMPT, NEW, NO_EOS = 70, 100, -1  # tokens of the prompt, of the answer; no answer ends sooner


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["512x8", "768x16"], help="dim x layers")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="CPU threads")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="prompts answered at once")
    parser.add_argument("--rounds", type=int, default=3, help="rounds in which all take turns")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/generate.json")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)  # the process that measures itself
    return parser.parse_args(argv)


# ---- models, prompt ----------------------------------------------------------------------------------------


def make_model(size: str) -> Transformer:
    """Random weights, loud enough that greedy decoding does not repeat one token for ever."""
    dim, n_layers = map(int, size.split("x"))
    torch.manual_seed(0)
    model = Transformer(LMConfig(dim=dim, n_layers=n_layers)).eval().requires_grad_(False)
    for parameter in model.layers.parameters():
        if parameter.ndim > 1:
            parameter.mul_(3)
    return model


def make_clip() -> CLIPVisionModel:
    """ViT-B/32 with random weights."""
    torch.manual_seed(0)
    return (
        CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                image_size=224,
                patch_size=32,
            )
        )
        .eval()
        .requires_grad_(False)
    )


def make_prompt() -> Prompt:
    """70 tokens, 50 of them an image."""
    words = torch.randint(100, 6400, (PROMPT - 50,), generator=torch.Generator().manual_seed(1)).tolist()
    ids = words[:5] + placeholder_ids() + words[5:]
    return Prompt(ids, [False] * PROMPT, [list(range(5, 55))])


class Contest:
    """Ours and theirs on one set of weights: time to the first token, and per token after it."""

    def __init__(
        self, model: Transformer, clip: CLIPVisionModel, dtype: torch.dtype, device: str, batches: list[int]
    ):
        self.llava = to_llava(model, clip).to(device, dtype)
        self.llama: LlamaForCausalLM = to_llama(model).to(device, dtype)
        self.decoders = {batch: Decoder(copy.deepcopy(model).to(device, dtype), batch) for batch in batches}
        self.clip = copy.deepcopy(clip).to(device, dtype)
        if dtype != torch.float32:  # as load_chat does
            pack_linears(self.clip, 50)
        self.pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(2)).to(device)
        self.prompt = make_prompt()

    def ours(self, batch: int, num_tokens: int, with_clip: bool) -> list[int]:
        prompt, features = Prompt(self.prompt.input_ids, self.prompt.answer_mask, []), None
        if with_clip:
            prompt = self.prompt
            features = get_img_embedding(self.pixels.expand(batch, -1, -1, -1), self.clip)
        steps = list(
            generate(
                self.decoders[batch], [prompt] * batch, NO_EOS, Sampling(max_new_tokens=num_tokens), features
            )
        )
        return [tokens[0] for tokens in steps]

    def theirs(self, batch: int, num_tokens: int, with_clip: bool) -> list[int]:
        ids = torch.tensor([self.prompt.input_ids], device=self.pixels.device)
        model, more = self.llama, {}
        if with_clip:
            ids = to_llava_ids(ids, torch.tensor(self.prompt.image_slots, device=ids.device))
            model = self.llava
            more = {"pixel_values": self.pixels.to(model.dtype).expand(batch, -1, -1, -1)}
        ids = ids.expand(batch, -1)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            **more,
        )
        return out[0, PROMPT:].tolist()

    def measure(self, batch: int, rounds: int) -> dict[str, float]:
        """Medians of rounds in which both take turns: seconds to the first token with and without an image,
        and seconds per token."""
        seconds: dict[str, list[float]] = {}
        for round_number in range(rounds + 1):
            for who, answer in (("ours", self.ours), ("theirs", self.theirs)):
                lm, image, whole = (
                    timed(answer, batch, *what) for what in ((1, False), (1, True), (NEW, False))
                )
                if round_number:  # the first round warms up
                    token = (whole - lm) / (NEW - 1)
                    for name, value in (("first_lm", lm), ("first", image), ("token", token)):
                        seconds.setdefault(f"{who}_{name}", []).append(value)
        return {name: median(values) for name, values in seconds.items()}


def timed(function, *arguments) -> float:
    """Seconds of the clock; on one thread seconds of the processor, to which other programs add little."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    function(*arguments)  # ends in a list of ints, so a GPU has finished too
    return clock() - start


def read_bandwidth(device: str) -> float:
    """Bytes per second at which memory is read: the largest of ten sums over 256 MB."""
    numbers = torch.ones(2**26, device=device)
    numbers.sum().item()
    return max(numbers.nbytes / timed(lambda: numbers.sum().item()) for _ in range(10))


# ---- memory ------------------------------------------------------------------------------------------------


def peak_memory(size: str, dtype: str) -> dict[str, float]:
    """MB of a fresh process that loads a chat from files and answers once: in all, above its libraries."""
    command = [sys.executable, __file__, "--memory_of", f"{size} {dtype}", "--threads", "2"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def measure_memory(size: str, dtype: str) -> None:
    """Runs in the fresh process; its files are made by a process of their own, so they cost it nothing."""
    import tempfile

    from PIL import Image

    from model.chat import load_chat

    def peak() -> float:
        # Not getrusage: a child inherits its parent's maximum.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    with tempfile.TemporaryDirectory() as folder:
        maker = (
            "import sys; sys.argv = ['']; sys.path.insert(0, {root!r}); "
            "from benchmarks.generate import make_files; make_files({folder!r}, {size!r})"
        )
        maker = maker.format(root=str(ROOT), folder=folder, size=size)
        subprocess.run([sys.executable, "-c", maker], check=True)
        libraries = peak()
        chat = load_chat(f"{folder}/vlm.pth", f"{folder}/tokenizer", f"{folder}/clip", dtype=DTYPES[dtype])
        for _ in chat.stream(
            [{"from": "human", "value": "<image>\n图片里有什么？"}],
            [Image.new("RGB", (640, 480), "teal")],
            Sampling(max_new_tokens=NEW),
        ):
            pass
        print(json.dumps({"peak_mb": peak(), "above_libraries_mb": peak() - libraries}))


def make_files(folder: str, size: str) -> None:
    """A weight file, a CLIP folder and a tokenizer in the real formats."""
    from dataset.demo_world.sentences import train_tokenizer
    from model.checkpoint import save_weights

    clip = Path(folder) / "clip"
    make_clip().save_pretrained(clip)
    processor = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (clip / "preprocessor_config.json").write_text(json.dumps(processor))
    train_tokenizer(Path(folder) / "tokenizer")
    save_weights(make_model(size), Path(folder) / "vlm.pth")


# ---- tables ------------------------------------------------------------------------------------------------


def describe_machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall("model name\\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"


def show(record: dict) -> None:
    times = {name: 1e3 * value for name, value in record.items() if name.startswith(("ours_", "theirs_"))}
    batch = record["batch"]
    print(
        f"| {record['size']} | {record['dtype']} | {record['threads']} | {batch} "
        f"| {1e3 * batch / times['theirs_token']:.0f} | {1e3 * batch / times['ours_token']:.0f} "
        f"| {times['theirs_token'] / times['ours_token']:.2f} | {record['share_of_floor']:.0%} "
        f"| {times['theirs_first_lm']:.0f} / {times['ours_first_lm']:.0f} "
        f"| {times['theirs_first']:.0f} / {times['ours_first']:.0f} "
        f"| {times['theirs_first'] / times['ours_first']:.2f} |",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(max(args.threads))
    if args.memory_of:
        measure_memory(*args.memory_of.split())
        return
    results = {
        "machine": describe_machine(),
        "device": args.device,
        "prompt": PROMPT,
        "new": NEW,
        "speed": [],
        "memory": [],
        "same_tokens": {},
    }
    print(f"{results['machine']}; prompt of {PROMPT} tokens, {NEW} new ones, greedy; theirs: transformers")
    print(
        "| size | dtype | threads | batch | theirs tok/s | ours tok/s | ratio | share of bandwidth floor "
        "| first token, LM only, ms: theirs / ours | with CLIP | ratio |\n" + "|---" * 11 + "|"
    )
    clip = make_clip()
    for size in args.sizes:
        model = make_model(size)
        for dtype in args.dtypes:
            contest = Contest(model, clip, DTYPES[dtype], args.device, args.batches)
            if dtype == "float32":
                theirs = contest.theirs(1, NEW, True)
                results["same_tokens"][size] = all(
                    contest.ours(batch, NEW, True) == theirs for batch in args.batches
                )
            num_bytes = sum(p.numel() for p in model.parameters() if p.ndim > 1) * DTYPES[dtype].itemsize
            for threads in args.threads:
                torch.set_num_threads(threads)
                floor = num_bytes / read_bandwidth(args.device)
                for batch in args.batches:
                    record = {
                        "size": size,
                        "dtype": dtype,
                        "threads": threads,
                        "batch": batch,
                        **contest.measure(batch, args.rounds),
                    }
                    record["floor_s"] = floor
                    record["share_of_floor"] = floor / record["ours_token"]
                    results["speed"].append(record)
                    show(record)
    print(f"\nthe same {NEW} tokens in float32: {results['same_tokens']}\n")
    print(
        "| size | dtype | peak memory of a chat, MB | above the imported libraries, MB |\n" + "|---" * 4 + "|"
    )
    for size in args.sizes:
        for dtype in args.dtypes:
            memory = peak_memory(size, dtype)
            results["memory"].append({"size": size, "dtype": dtype, **memory})
            print(
                f"| {size} | {dtype} | {memory['peak_mb']:.0f} | {memory['above_libraries_mb']:.0f} |",
                flush=True,
            )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
