"""Look at what was learnt: describe pictures and films, chat in the terminal, or score questions with known
answers.

reads    out/512_vlm_sft.pth (or --stage, or --load_from FILE or FOLDER), pictures, films, question files
--multi  reads out/512_vlm_sft_multi.pth and dataset/eval_multi_images/SET/*
writes   --report FILE: accuracies as JSON, and every answer beside it (.answers.jsonl)

    python 3-eval_chat.py                                        # describe dataset/eval_images/*
    python 3-eval_chat.py --image_dir my_pictures --prompt "What is this?"
    python 3-eval_chat.py --chat my_pictures/cat.jpg             # ask about one picture, as often as you like
    python 3-eval_chat.py --multi                                # all pictures of a set at once
    python 3-eval_chat.py --video my_film.mp4 --prompt "Where does it go?"
    python 3-eval_chat.py --load_from model/minimind-v-v1        # v1's own weights
    python 3-eval_chat.py @dataset/demo/eval.args --questions dataset/demo/questions_unseen.jsonl \\
        --control real blank
    torchrun --standalone --nproc_per_node 2 3-eval_chat.py      # the same answers, shared out over processes
"""
import argparse
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from model.chat import Chat, load_chat
from model.checkpoint import STAGES, weights_path
from model.dataset import SFT_MULTI
from model.device import choose_dtype
from model.generate import Sampling
from model.LMConfig import LMConfig
from model.prompt import Round, put_marks
from model.video import Frame, find_frames, open_pictures
from trainer.args import Parser, add_model_flags, check_args, clean_exit, true_or_false
from trainer.distributed import Run, start_run
from trainer.scoring import CONTROLS, score_questions

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
MULTI = {"stage": "vlm_sft_multi", "image_dir": Path("dataset/eval_multi_images"),
         "prompt": "Name all the differences between these pictures."}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_model_flags(parser)
    group = parser.add_argument_group("what to load")
    group.add_argument("--stage", default="vlm_sft", choices=STAGES[1:],
                       help="weights of this stage in --out_dir (default: vlm_sft, or vlm_sft_multi with "
                            "--multi or --video)")
    group.add_argument("--load_from", "--load", type=Path, metavar="PATH",
                       help="weight file (also v1's own) or Hugging Face folder, "
                            "instead of --out_dir, --dim, --use_moe and --stage")
    group = parser.add_argument_group("what to do")
    group.add_argument("--image_dir", type=Path, default=Path("dataset/eval_images"),
                       help="describe all pictures in it")
    group.add_argument("--multi", type=true_or_false, nargs="?", const=True, default=False,
                       metavar="True|False",
                       help="--image_dir holds a folder for each set of pictures; all of a set are shown at "
                            f"once, in the order of their names (default: {MULTI['image_dir']})")
    group.add_argument("--video", type=Path, metavar="FILE", help="describe a film")
    group.add_argument("--max_frames", type=int, default=SFT_MULTI.max_frames,
                       help="of a film, at most, one per second; fewer where they would not fit "
                            "(default: %(default)s)")
    group.add_argument("--prompt", default="这个图片描述的是什么内容？",
                       help="what to ask about each (default: %(default)s; with --multi: "
                            f"{MULTI['prompt']})")
    group.add_argument("--chat", type=Path, metavar="PICTURE", nargs="?", const=Path(),
                       help="ask questions, typed line by line, about one picture; without a name, about the "
                            "film of --video")
    group.add_argument("--max_rounds", type=int, default=0,
                       help="rounds of a chat that the model sees, the question included "
                            "(0 = all that fit its context, 1 = each question stands alone)")
    group.add_argument("--questions", type=Path, nargs="+", metavar="FILE",
                       help='score question files: rows of {"image" or "video", "question", "answer", '
                            '"kind"}, the pictures and films beside the file')
    group.add_argument("--control", nargs="+", default=["real"], choices=CONTROLS,
                       help="what the model is shown: the pictures, blank features, another question's "
                            "pictures, its own pictures in reverse order, or its film's frames in another")
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
    args = parser.parse_args(argv)
    if args.multi:
        parser.set_defaults(**MULTI)
    elif args.video:
        parser.set_defaults(stage=MULTI["stage"], prompt="视频里发生了什么？")
    args = check_args(parser.parse_args(argv))
    if args.chat and (args.chat == Path()) != bool(args.video):
        raise ValueError("--chat PICTURE asks about a picture, --video FILE --chat about a film: give one of "
                         "the two")
    return args


def make_sampling(args: argparse.Namespace, position: int = 0) -> Sampling:
    """position: number of the picture or question; each draws from a stream of its own, whatever process
    answers it."""
    return Sampling(args.temperature, args.top_k, args.top_p, args.repetition_penalty, args.max_new_tokens,
                    args.seed + position)


# ---- pictures, sets of pictures and films ------------------------------------------------------------------

def list_shown(args: argparse.Namespace) -> list[tuple[Path, list[Path]]]:
    """What is described one by one: a name, and the files that are shown together."""
    if args.video:
        return [(args.video, [args.video])]
    if not args.multi:
        return [(picture, [picture]) for picture in list_pictures(args.image_dir)]
    check_folder(args.image_dir)
    folders = sorted(path for path in args.image_dir.glob("*") if path.is_dir())
    if not folders:
        raise FileNotFoundError(f"no folders in {args.image_dir}: --multi wants a folder there for each set "
                                "of pictures; or name another place with --image_dir")
    return [(folder, list_pictures(folder)) for folder in folders]


def check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"picture folder not found: {folder} (name it with --image_dir)")


def list_pictures(folder: Path) -> list[Path]:
    check_folder(folder)
    pictures = sorted(path for path in folder.glob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    if not pictures:
        raise FileNotFoundError(f"no pictures in {folder}: put some there, or name a folder with --image_dir")
    return pictures


def compose(args: argparse.Namespace, chat: Chat, text: str,
            files: list[Path]) -> tuple[list[dict], list[Path | Frame]]:
    """A question about pictures, or about the film: its turns, and the pictures and frames that it shows.

    raises  ValueError if there are more pictures than the model's context holds
    """
    marked = put_marks(text, 0, 1) if args.video else put_marks(text, len(files))
    parts, turns = chat.lay_out([{"from": "human", "value": marked}], files, args.max_frames)
    config, num_tokens = chat.decoder.config, len(chat.render(turns).input_ids)
    too_many = math.ceil((num_tokens - config.max_seq_len + 1) / config.num_image_tokens)
    if too_many > 0 and len(files) > 1:
        raise ValueError(f"{files[0].parent} holds {len(files)} pictures of {config.num_image_tokens} tokens "
                         f"each, {num_tokens} with the question, but the model's context holds "
                         f"{config.max_seq_len} with the answer: at most {max(0, len(files) - too_many)} "
                         "pictures fit")
    return turns, [picture for part in parts for picture in part]


def answer(args: argparse.Namespace, chat: Chat, text: str, files: list[Path],
           position: int = 0) -> Iterator[str]:
    """The answer, piece by piece."""
    turns, shown = compose(args, chat, text, files)
    yield from chat.stream(turns, list(open_pictures(shown)), make_sampling(args, position))


# ---- (a) describe them -------------------------------------------------------------------------------------

def describe_all(run: Run, args: argparse.Namespace, chat: Chat) -> None:
    """One answer for each, streamed; with several processes each answers its share and rank 0 prints all in
    order."""
    shown = list_shown(args)
    if args.multi:      # what does not fit is told before the first answer
        for _, files in shown:
            compose(args, chat, args.prompt, files)
    if run.world_size == 1:
        for position, (name, files) in enumerate(shown):
            print(f"\n[{name}] {args.prompt}")
            print_stream(answer(args, chat, args.prompt, files, position))
        return
    mine = {position: "".join(answer(args, chat, args.prompt, shown[position][1], position))
            for position in range(run.rank, len(shown), run.world_size)}
    for (name, _), text in zip(shown, run.gather_in_order(mine), strict=run.is_main):
        print(f"\n[{name}] {args.prompt}\n{text}")


def print_stream(pieces: Iterator[str]) -> str:
    """Print an answer as it is made; returns it."""
    answer = ""
    for text in pieces:
        print(text, end="", flush=True)
        answer += text
    print()
    return answer


# ---- (b) chat in the terminal ------------------------------------------------------------------------------

def chat_about(run: Run, args: argparse.Namespace, chat: Chat) -> None:
    if run.world_size > 1:
        raise ValueError("--chat reads the terminal: start it with plain python, in one process")
    file = args.video or args.chat
    for _ in open_pictures(find_frames(file, args.max_frames) if args.video else [file]):
        pass        # complain before the first question, not after it
    print(f"Ask about {file}; an empty line ends the chat.")
    rounds: list[Round] = []
    while question := read_line():
        shown = [] if rounds else [file]
        if args.video and not rounds:       # its frames, and a mark for each
            turns, shown = compose(args, chat, question, [file])
            question = turns[0]["value"]
        rounds.append(Round(question, shown))
        turns, shown = chat.recall(rounds, args.max_new_tokens, args.max_rounds)
        rounds[-1].answer = print_stream(chat.stream(turns, list(open_pictures(shown)), make_sampling(args)))


def read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def find_weights(args: argparse.Namespace) -> Path:
    """The weights that the flags name. Raises FileNotFoundError that lists what is there instead."""
    weights = weights_path(args.out_dir, LMConfig(dim=args.dim, use_moe=args.use_moe), args.stage)
    others = ", ".join(sorted(path.name for path in weights.parent.glob("*_vlm_*.pth")))
    if not weights.is_file() and others:
        raise FileNotFoundError(f"{weights} not found, but {others}: "
                                "choose by --dim, --use_moe and --stage, or --load_from")
    return weights


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    make_sampling(args)         # wrong settings and names are told before anything is loaded
    for flag, file in (("--chat", args.chat), ("--video", args.video)):
        if file and file != Path() and not file.is_file():
            raise FileNotFoundError(f"{flag}: there is no file {file}")
    with start_run(args.device) as run:
        weights = args.load_from or find_weights(args)
        chat = load_chat(weights, args.tokenizer_path, args.clip_path, run.device,
                         choose_dtype(args.dtype, run.device), args.batch_size if args.questions else 1)
        run.print(str(chat.report))
        if args.questions:
            score_questions(run, args, chat, partial(make_sampling, args))
        elif args.chat:
            chat_about(run, args, chat)
        else:
            describe_all(run, args, chat)


if __name__ == "__main__":
    clean_exit(main)
