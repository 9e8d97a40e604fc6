"""Look at what was learnt: describe pictures, chat in the terminal, or score questions with known answers.

reads    out/512_vlm_sft.pth (or --stage, or --load FILE), pictures, question files
writes   --report FILE: accuracies as JSON, and every answer beside it (.answers.jsonl)

    python 3-eval_chat.py                                        # describe dataset/eval_images/*
    python 3-eval_chat.py --image_dir my_pictures --prompt "What is this?"
    python 3-eval_chat.py --chat my_pictures/cat.jpg             # ask about one picture, as often as you like
    python 3-eval_chat.py @dataset/demo/eval.args --questions dataset/demo/questions_unseen.jsonl \\
        --control real blank
    torchrun --standalone --nproc_per_node 2 3-eval_chat.py      # the same answers, shared out over processes
"""
import argparse
import json
from pathlib import Path

import pandas
import torch
from torch import Tensor

from model.chat import Chat, load_chat
from model.checkpoint import STAGES, atomic_write, weights_path
from model.dataset import file_names
from model.device import choose_dtype
from model.generate import Sampling
from model.LMConfig import LMConfig
from model.prompt import put_marks
from model.rows import Rows
from model.vision_utils import open_image
from trainer.args import Parser, add_model_flags, check_args, clean_exit
from trainer.distributed import Run, start_run
from trainer.logger import progress_bar

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
CONTROLS = ("real", "blank", "shuffled")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_model_flags(parser)
    group = parser.add_argument_group("what to load")
    group.add_argument("--stage", default="vlm_sft", choices=STAGES[1:],
                       help="weights of this stage in --out_dir")
    group.add_argument("--load", type=Path, help="weight file, instead of --out_dir, --dim and --stage")
    group = parser.add_argument_group("what to do")
    group.add_argument("--image_dir", type=Path, default=Path("dataset/eval_images"),
                       help="describe all pictures in it")
    group.add_argument("--prompt", default="这个图片描述的是什么内容？",
                       help="what to ask about each (default: %(default)s)")
    group.add_argument("--chat", type=Path, metavar="PICTURE",
                       help="ask questions about one picture, typed line by line")
    group.add_argument("--questions", type=Path, nargs="+", metavar="FILE",
                       help='score question files: rows of {"image", "question", "answer", "kind"}, '
                            "pictures beside the file")
    group.add_argument("--control", nargs="+", default=["real"], choices=CONTROLS,
                       help="what the model is shown: "
                            "the picture, blank features, or another question's picture")
    group.add_argument("--report", type=Path, help="write the scores to this JSON file")
    group.add_argument("--batch_size", type=int, default=64, help="questions answered at once when scoring")
    group = parser.add_argument_group("answers")
    group.add_argument("--temperature", type=float, default=0.0, help="0 = always the likeliest token")
    group.add_argument("--top_k", type=int, default=0, help="choose among the k likeliest tokens (0 = all)")
    group.add_argument("--top_p", type=float, default=1.0,
                       help="choose among the likeliest tokens of this total probability")
    group.add_argument("--repetition_penalty", type=float, default=1.0,
                       help="above 1, seen tokens become less likely")
    group.add_argument("--max_new_tokens", type=int, default=200, help="longest answer, in tokens")
    return check_args(parser.parse_args(argv))


def make_sampling(args: argparse.Namespace, position: int = 0) -> Sampling:
    """position: number of the picture or question; each draws from a stream of its own, whatever process
    answers it."""
    return Sampling(args.temperature, args.top_k, args.top_p, args.repetition_penalty, args.max_new_tokens,
                    args.seed + position)


def ask(text: str) -> list[dict]:
    return [{"from": "human", "value": put_marks(text, 1)}]


# ---- (a) describe the pictures of a folder -----------------------------------------------------------------

def describe_folder(run: Run, args: argparse.Namespace, chat: Chat) -> None:
    """One answer per picture, streamed; with several processes each answers its share and rank 0 prints all
    in order."""
    pictures = list_pictures(args.image_dir)
    if run.world_size == 1:
        for position, picture in enumerate(pictures):
            print(f"\n[{picture}] {args.prompt}")
            stream_answer(chat, picture, args.prompt, make_sampling(args, position))
        return
    mine = {position: "".join(chat.stream(ask(args.prompt), [open_image(pictures[position])],
                                          make_sampling(args, position)))
            for position in range(run.rank, len(pictures), run.world_size)}
    for position, answer in merge(run.gather(mine)):
        print(f"\n[{pictures[position]}] {args.prompt}\n{answer}")


def stream_answer(chat: Chat, picture: Path, prompt: str, sampling: Sampling) -> None:
    for text in chat.stream(ask(prompt), [open_image(picture)], sampling):
        print(text, end="", flush=True)
    print()


def list_pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"picture folder not found: {folder} (name it with --image_dir)")
    pictures = sorted(path for path in folder.glob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    if not pictures:
        raise FileNotFoundError(f"no pictures in {folder}: put some there, or name a folder with --image_dir")
    return pictures


def merge(parts: list[dict] | None) -> list[tuple[int, object]]:
    """The ranks' {position: result} in order of position; empty on all ranks but 0."""
    return sorted((item for part in parts or [] for item in part.items()), key=lambda item: item[0])


# ---- chat in the terminal ----------------------------------------------------------------------------------

def chat_about(run: Run, args: argparse.Namespace, chat: Chat) -> None:
    if run.world_size > 1:
        raise ValueError("--chat reads the terminal: start it with plain python, in one process")
    open_image(args.chat)       # complain before the first question, not after it
    print(f"Ask about {args.chat}; an empty line ends the chat.")
    while question := read_line():
        stream_answer(chat, args.chat, question, make_sampling(args))


def read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


# ---- (b) score question files ------------------------------------------------------------------------------

class PictureFeatures:
    """Features of all pictures of a question file, encoded once, whatever asks for them.

    They are encoded in fixed groups, so the same bits come out however the questions are shared out.
    """

    GROUP = 64

    def __init__(self, chat: Chat, paths: list[Path]):
        self.chat, self.paths = chat, list(dict.fromkeys(paths))
        self.place = {path: number for number, path in enumerate(self.paths)}
        self.groups: dict[int, Tensor] = {}

    def __getitem__(self, path: Path) -> Tensor:
        """(N, vision_dim)"""
        group, member = divmod(self.place[path], self.GROUP)
        if group not in self.groups:
            members = self.paths[group * self.GROUP:][:self.GROUP]
            self.groups[group] = self.chat.encode([open_image(member) for member in members])
        return self.groups[group][member]

    def shuffled(self, seed: int) -> dict[Path, Path]:
        """Every picture's stand-in: another one, never itself."""
        order = torch.randperm(len(self.paths), generator=torch.Generator().manual_seed(seed)).tolist()
        return {self.paths[a]: self.paths[b] for a, b in zip(order, order[1:] + order[:1], strict=True)}


def read_questions(path: Path) -> list[dict]:
    """Rows of a question file with their pictures' paths. Raises ValueError naming file and row."""
    if not path.is_file():
        raise FileNotFoundError(f"question file not found: {path}")
    questions = list(Rows(path))
    for number, row in enumerate(questions, 1):
        missing = [key for key in ("image", "question", "answer", "kind")
                   if not (isinstance(row, dict) and row.get(key))]
        if missing:
            raise ValueError(f"{path}, row {number}: it has no {', '.join(missing)}")
        row["paths"] = [path.parent / name for name in file_names(row, "image")]
        row["turns"] = [{"from": "human", "value": put_marks(row["question"], len(row["paths"]))}]
    return questions


def answer_questions(run: Run, args: argparse.Namespace, chat: Chat, questions: list[dict],
                     features: PictureFeatures, control: str) -> list[str]:
    """Answers in the order of the questions, on rank 0. Whole batches go to one rank each, so that every
    answer is computed in the same company, and comes out the same, whatever the number of processes."""
    stand_in = (features.shuffled(args.seed) if control == "shuffled"
                else {path: path for path in features.paths})
    starts = range(0, len(questions), args.batch_size)
    mine = {}
    for start in progress_bar(starts[run.rank::run.world_size], desc=control, disable=not run.is_main):
        rows = questions[start:start + args.batch_size]
        seen = torch.stack([features[stand_in[path]] for row in rows for path in row["paths"]])    # (M, N, V)
        mine[start] = chat.answer_batch([row["turns"] for row in rows],
                                        torch.zeros_like(seen) if control == "blank" else seen,
                                        make_sampling(args, start))
    return [answer for _, answers in merge(run.gather(mine)) for answer in answers]


def score_questions(run: Run, args: argparse.Namespace, chat: Chat) -> None:
    """Exact matches per file, kind and control: printed as a table, and written to --report."""
    records = []
    for path in args.questions:
        questions = read_questions(path)
        features = PictureFeatures(chat, [picture for row in questions for picture in row["paths"]])
        for control in args.control:
            answers = answer_questions(run, args, chat, questions, features, control)
            if run.is_main:
                records += [{"split": path.stem.removeprefix("questions_"), "kind": row["kind"],
                             "control": control, "image": [str(picture) for picture in row["paths"]],
                             "question": row["question"],
                             "answer": row["answer"], "given": given, "right": given == row["answer"].strip()}
                            for row, given in zip(questions, answers, strict=True)]
    if run.is_main:
        report_scores(records, args.report)


def report_scores(records: list[dict], report_path: Path | None) -> None:
    table = pandas.DataFrame(records).pivot_table(index=["split", "kind"], columns="control", values="right",
                                                  aggfunc="mean", sort=False, observed=True)
    print(table.to_string(float_format="{:.3f}".format))
    if not report_path:
        return
    report: dict = {}
    for (split, kind), scores in table.iterrows():
        report.setdefault(split, {})[kind] = {control: round(float(score), 4)
                                              for control, score in scores.items()}
    report_path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    atomic_write(report_path.with_suffix(".answers.jsonl"), lambda file: file.write(lines.encode()))
    atomic_write(report_path, lambda file: file.write((json.dumps(report, indent=1) + "\n").encode()))


def find_weights(args: argparse.Namespace) -> Path:
    """The weights that the flags name. Raises FileNotFoundError that lists what is there instead."""
    weights = weights_path(args.out_dir, LMConfig(dim=args.dim), args.stage)
    others = ", ".join(sorted(path.name for path in weights.parent.glob("*_vlm_*.pth")))
    if not weights.is_file() and others:
        raise FileNotFoundError(f"{weights} not found, but {others}: choose by --dim and --stage, or --load")
    return weights


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    make_sampling(args)         # wrong settings are told before anything is loaded
    with start_run(args.device) as run:
        weights = args.load or find_weights(args)
        chat = load_chat(weights, args.tokenizer_path, args.clip_path, run.device,
                         choose_dtype(args.dtype, run.device), args.batch_size if args.questions else 1)
        run.print(str(chat.report))
        if args.questions:
            score_questions(run, args, chat)
        elif args.chat:
            chat_about(run, args, chat)
        else:
            describe_folder(run, args, chat)


if __name__ == "__main__":
    clean_exit(main)
