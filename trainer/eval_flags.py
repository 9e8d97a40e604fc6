"""The flags of 3-eval_chat.py, and which of them go together. Imports nothing heavy."""

import argparse
from pathlib import Path

from model.data.spec import SFT_MULTI
from model.names import STAGES, is_video_name
from trainer.script import (
    SEED_LIMIT,
    Checked,
    Parser,
    above,
    add_loading_flags,
    at_least,
    true_or_false,
)

CONTROLS = ("real", "blank", "shuffled", "swapped", "shuffled_frames")  # controls.py says what they show
SCORES = ("exact", "choice", "loss")  # scoring.py says what they are
TABLES = (".jsonl", ".csv")  # what a --report of descriptions may be
IMAGE_DIR, PROMPT = Path("dataset/eval_images"), "这个图片描述的是什么内容？"
MULTI = {
    "stage": "vlm_sft_multi",
    "image_dir": Path("dataset/eval_multi_images"),
    "prompt": "Name all the differences between these pictures.",
}
VIDEO = {"stage": MULTI["stage"], "prompt": "视频里发生了什么？"}


def parse_args(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Raises ValueError for flags that do not go together."""
    parser = Parser(description)
    add_loading_flags(parser)
    add_task_flags(parser.add_argument_group("what to do"))
    add_scoring_flags(parser.add_argument_group("scoring, and reports"))
    add_answer_flags(parser.add_argument_group("answers"))
    args = parser.parse_args(argv)
    if args.multi:
        parser.set_defaults(**MULTI)
    elif args.video or len(args.chat or []) > 1 or any(map(is_video_name, args.chat or [])):
        parser.set_defaults(**VIDEO)
    elif len(args.image or []) > 1 or len(args.explain or []) > 3:  # behind --explain: a question, a PNG
        parser.set_defaults(stage=MULTI["stage"], prompt=MULTI["prompt"])
    args = parser.parse_args(argv)
    check_together(args)
    return args


def add_task_flags(group) -> None:
    group.add_argument(
        "--stage",
        default="vlm_sft",
        choices=STAGES[1:],
        help="weights of this stage (default: vlm_sft, or vlm_sft_multi with --multi, --video or several "
        "--image)",
    )
    group.add_argument(
        "--image",
        type=Path,
        nargs="+",
        action="extend",
        metavar="FILE",
        help="answer --prompt about an image, or about several at once: the answer alone on standard output, "
        "for scripts",
    )
    group.add_argument(
        "--image_dir",
        type=Path,
        help=f"describe all images in it (default: what the weights say, else {IMAGE_DIR}); of a benchmark "
        "in --questions, where its images are (default: beside it)",
    )
    group.add_argument(
        "--multi",
        type=true_or_false,
        nargs="?",
        const=True,
        default=False,
        metavar="True|False",
        help="--image_dir holds a folder for each set of images; all of a set are shown at "
        f"once, in the order of their names (default: {MULTI['image_dir']})",
    )
    group.add_argument("--video", type=Path, metavar="FILE", help="describe a video")
    group.add_argument(
        "--max_frames",
        type=at_least(1),
        default=SFT_MULTI.max_frames,
        help="of a video, at most, one per second; fewer where they would not fit (default: %(default)s)",
    )
    group.add_argument(
        "--prompt",
        help=f"what to ask about each (default: the weights' own example, else {PROMPT}; "
        f"with --multi: {MULTI['prompt']})",
    )
    group.add_argument(
        "--chat",
        type=Path,
        metavar="FILE",
        nargs="*",
        help="chat in the terminal, about these images and videos if there are any; /help there says more. "
        "Where standard input is no terminal, its lines are the questions, and answers alone are printed",
    )
    group.add_argument(
        "--explain",
        nargs="+",
        metavar=("IMAGE", "IMAGE ... QUESTION OUT.png"),
        help="answer, and draw what in each image the answer and each of its words rests on",
    )
    group.add_argument(
        "--max_rounds",
        type=at_least(0),
        help="rounds of a chat that the model sees, the question included (0 = all that fit its context, "
        "1 = each question stands alone; default: 1 for weights that learned single rounds, else 0)",
    )


def add_scoring_flags(group) -> None:
    group.add_argument(
        "--questions",
        type=Path,
        nargs="+",
        metavar="FILE",
        help='score question files: rows of {"image" or "video", "question", "answer", "kind"}, perhaps '
        '"choices", the images and videos beside the file; or benchmarks as they are downloaded: POPE, or a '
        ".tsv of VLMEvalKit",
    )
    group.add_argument(
        "--score",
        choices=SCORES,
        help="exact: right to the letter; choice: the likeliest choice is the right one; loss: of the right "
        "answer, per token (default: choice for files of choices, else exact)",
    )
    group.add_argument(
        "--control",
        nargs="+",
        default=["real", "blank", "shuffled"],
        choices=CONTROLS,
        help="what the model is shown: the images, blank features, another question's images, its own images "
        "in reverse order, or its video's frames in another (default: real blank shuffled)",
    )
    group.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="write the scores of --questions to this JSON file, answers and intervals beside it; without "
        "--questions, the descriptions to this .jsonl or .csv, and go on where it ends",
    )
    group.add_argument(
        "--batch_size",
        type=at_least(1),
        default=64,
        help="questions, or images of a --report, that are answered at once",
    )


def add_answer_flags(group) -> None:
    group.add_argument(
        "--seed", type=at_least(0, below=SEED_LIMIT), default=1337, help="of sampling, and of controls"
    )
    group.add_argument(
        "--temperature", type=at_least(0, float), default=0.0, help="0 = always the likeliest token"
    )
    group.add_argument(
        "--top_k", type=at_least(0), default=0, help="choose among the k likeliest tokens (0 = all)"
    )
    group.add_argument(
        "--top_p",
        type=Checked(float, lambda value: 0 < value <= 1, "above 0 and at most 1"),
        default=1.0,
        help="choose among the likeliest tokens of this total probability",
    )
    group.add_argument(
        "--repetition_penalty", type=above(0), default=1.0, help="above 1, seen tokens become less likely"
    )
    group.add_argument("--max_new_tokens", type=at_least(1), default=200, help="longest answer, in tokens")


def check_explain(args: argparse.Namespace) -> None:
    others = [name for name in ("questions", "video", "multi", "image") if getattr(args, name)]
    others += ["chat"] if args.chat is not None else []
    if others:
        raise ValueError(f"--explain and --{others[0]} are two things to do: give one of them")
    if len(args.explain) < 3 or not args.explain[-1].lower().endswith(".png"):
        raise ValueError(
            '--explain wants an image or several, a question, and a PNG to write: a.jpg "What is it?" out.png'
        )


def check_together(args: argparse.Namespace) -> None:
    if args.explain:
        check_explain(args)
    others = {
        "--questions": args.questions,
        "--chat": args.chat is not None,
        "--video": args.video,
        "--multi": args.multi,
    }
    for flag in [flag for flag, given in others.items() if given] if args.image else []:
        raise ValueError(f"--image answers one question about images of its own: leave out {flag}")
    if args.score and not args.questions:
        raise ValueError("--score says how --questions are scored: give both")
    if args.report and not args.questions:
        if args.image or args.chat is not None:
            raise ValueError("--report keeps the scores of --questions, or descriptions of --image_dir")
        if args.report.suffix.lower() not in TABLES:
            raise ValueError(
                f"--report {args.report}: descriptions go to a .jsonl or a .csv file (scores of --questions "
                "to any)"
            )
