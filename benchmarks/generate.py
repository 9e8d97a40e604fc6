"""How fast is an answer? Ours against transformers' generate() on the same weights, in one process, in turns.

reads    nothing: weights, image and prompt are made up, in the real sizes (CLIP ViT-B/32, 50 tokens)
writes   benchmarks/results/generate.json, and tables to the screen

    python -m benchmarks.generate                              # a few minutes
    python -m benchmarks.generate --sizes 512x8 --threads 2    # less
    python -m benchmarks.generate --quick                      # does it run? small sizes, no meaning
"""

import argparse
import copy
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch import nn
from transformers import LlamaForCausalLM

from benchmarks.answer_memory import peak_mb
from benchmarks.llava import to_llama, to_llava, to_llava_ids
from benchmarks.machine import DTYPES, describe_machine, read_speed, save_results
from benchmarks.synthetic import config_of, make_answering_model, make_clip, save_clip
from model.decode import Decoder
from model.generate import Sampling, generate
from model.packing import pack_linears
from model.prompt import Prompt
from model.transformer import Transformer
from model.vision_proj import placeholder_ids
from model.vision_utils import get_img_embedding, get_vision_model

PROMPT, NO_EOS = 70, -1  # tokens of the prompt; no answer ends before its length
QUICK = ["--sizes", "64x2", "--dtypes", "float32", "--threads", "1", "--batches", "1", "2", "--rounds", "1"]
QUICK += ["--new", "8", "--clip_layers", "1"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["512x8", "768x16"], help="dim x layers")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="CPU threads")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="prompts answered at once")
    parser.add_argument("--rounds", type=int, default=3, help="rounds in which all take turns")
    parser.add_argument("--new", type=int, default=100, help="tokens of the answer")
    parser.add_argument("--clip_layers", type=int, default=12, help="CLIP's depth (ViT-B/32: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that everything runs")
    args = parser.parse_args(argv)
    return parser.parse_args(QUICK, args) if args.quick else args


def make_prompt() -> Prompt:
    """70 tokens, 50 of them an image."""
    words = torch.randint(100, 6400, (PROMPT - 50,), generator=torch.Generator().manual_seed(1)).tolist()
    ids = words[:5] + placeholder_ids() + words[5:]
    return Prompt(ids, [False] * PROMPT, [list(range(5, 55))])


class Contest:
    """Ours and theirs on one set of weights: time to the first token, and per token after it."""

    def __init__(self, model: Transformer, tower: nn.Module, dtype: torch.dtype, args: argparse.Namespace):
        self.new = args.new
        self.llava = to_llava(model, tower).to(args.device, dtype)
        self.llama: LlamaForCausalLM = to_llama(model).to(args.device, dtype)
        self.decoders = {
            batch: Decoder(copy.deepcopy(model).to(args.device, dtype), batch) for batch in args.batches
        }
        self.tower = copy.deepcopy(tower).to(args.device, dtype)
        if dtype != torch.float32:  # as load_chat does
            pack_linears(self.tower, 50)
        self.pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(2)).to(args.device)
        self.prompt = make_prompt()

    def ours(self, batch: int, num_tokens: int, with_clip: bool) -> list[int]:
        prompt, features = Prompt(self.prompt.input_ids, self.prompt.answer_mask, []), None
        if with_clip:
            prompt = self.prompt
            features = get_img_embedding(self.pixels.expand(batch, -1, -1, -1), self.tower).split(1)
        sampling = Sampling(max_new_tokens=num_tokens)
        steps = generate(self.decoders[batch], [prompt] * batch, NO_EOS, sampling, features)
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

    def same_tokens(self) -> bool:
        theirs = self.theirs(1, self.new, True)
        return all(self.ours(batch, self.new, True) == theirs for batch in self.decoders)

    def measure(self, batch: int, rounds: int) -> dict[str, float]:
        """Medians of rounds in which both take turns: seconds to the first token with and without an image,
        and seconds per token."""
        seconds: dict[str, list[float]] = {}
        for round_number in range(rounds + 1):
            for who, answer in (("ours", self.ours), ("theirs", self.theirs)):
                lm, image, whole = (
                    timed(answer, batch, *what) for what in ((1, False), (1, True), (self.new, False))
                )
                if round_number:  # the first round warms up
                    token = (whole - lm) / (self.new - 1)
                    for name, value in (("first_lm", lm), ("first", image), ("token", token)):
                        seconds.setdefault(f"{who}_{name}", []).append(value)
        return {name: median(values) for name, values in seconds.items()}


def timed(function, *arguments) -> float:
    """Seconds of the clock; on one thread seconds of the processor, to which other programs add little."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    function(*arguments)  # ends in a list of ints, so a GPU has finished too
    return clock() - start


# ---- tables ------------------------------------------------------------------------------------------------


def measure_speed(args: argparse.Namespace) -> tuple[list[dict], dict[str, bool]]:
    """A line per size, dtype, number of threads and batch, printed as it is measured; and per size, whether
    both gave the same tokens in float32."""
    print(
        "| size | dtype | threads | batch | theirs tok/s | ours tok/s | ratio | share of bandwidth floor "
        "| first token, LM only, ms: theirs / ours | with CLIP | ratio |\n" + "|---" * 11 + "|"
    )
    records, same_tokens = [], {}
    with tempfile.TemporaryDirectory() as folder:
        save_clip(Path(folder), make_clip(num_hidden_layers=args.clip_layers))
        tower, _ = get_vision_model(folder)
        for size in args.sizes:
            model = make_answering_model(config_of(size))
            for dtype in args.dtypes:
                contest = Contest(model, tower, DTYPES[dtype], args)
                if dtype == "float32":
                    same_tokens[size] = contest.same_tokens()
                matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)
                for threads in args.threads:
                    torch.set_num_threads(threads)
                    floor = matrices * DTYPES[dtype].itemsize / read_speed(args.device)
                    for batch in args.batches:
                        record = {"size": size, "dtype": dtype, "threads": threads, "batch": batch}
                        record |= contest.measure(batch, args.rounds)
                        record["share_of_floor"] = floor / record["ours_token"]
                        records.append(record)
                        print_speed(record)
    return records, same_tokens


def print_speed(record: dict) -> None:
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


def measure_memory(args: argparse.Namespace) -> list[dict]:
    print(
        "| size | dtype | peak memory of a chat, MB | above the imported libraries, MB |\n" + "|---" * 4 + "|"
    )
    records = []
    for size in args.sizes:
        for dtype in args.dtypes:
            memory = peak_mb(size, dtype, args.clip_layers)
            records.append({"size": size, "dtype": dtype, **memory})
            print(
                f"| {size} | {dtype} | {memory['peak']:.0f} | {memory['above_libraries']:.0f} |", flush=True
            )
    return records


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(max(args.threads))
    results = {"machine": describe_machine(), "device": args.device, "prompt": PROMPT, "new": args.new}
    print(
        f"{results['machine']}; prompt of {PROMPT} tokens, {args.new} new ones, greedy; theirs: transformers"
    )
    results["speed"], results["same_tokens"] = measure_speed(args)
    print(f"\nthe same {args.new} tokens in float32: {results['same_tokens']}\n")
    results["memory"] = measure_memory(args)
    save_results("generate_quick" if args.quick else "generate", results)


if __name__ == "__main__":
    main()
