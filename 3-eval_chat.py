"""Look at what was learnt: describe images and videos, chat in the terminal, or score questions with known
answers.

reads    out/512_vlm_sft.pth (or --stage, or --load_from FILE or FOLDER), images, videos, question files
--multi  reads out/512_vlm_sft_multi.pth and dataset/eval_multi_images/SET/*
writes   --report FILE: accuracies as JSON, and every answer beside it (.answers.jsonl)
         --explain: a drawing

    python 3-eval_chat.py                                        # describe dataset/eval_images/*
    python 3-eval_chat.py --image_dir my_images --prompt "What is this?"
    python 3-eval_chat.py --chat my_images/cat.jpg             # chat in the terminal; /help says more
    python 3-eval_chat.py --explain my_images/cat.jpg "What is this?" out/why.png    # what mattered in it
    python 3-eval_chat.py --multi                                # all images of a set at once
    python 3-eval_chat.py --video my_video.mp4 --prompt "Where does it go?"
    python 3-eval_chat.py --load_from model/minimind-v-v1        # v1's own weights
    python 3-eval_chat.py @dataset/demo/eval.args --questions dataset/demo/questions_unseen.jsonl \\
        --control real blank
    torchrun --standalone --nproc_per_node 2 3-eval_chat.py      # the same answers, shared out over processes
"""

import argparse
from functools import partial
from pathlib import Path

from model.data.spec import SFT_MULTI
from model.files import check_writable
from model.names import STAGES, find_recorded
from trainer.inputs import check_report, claim_report
from trainer.script import (
    SEED_LIMIT,
    Checked,
    Parser,
    above,
    add_loading_flags,
    at_least,
    choose_weights,
    clean_exit,
    place_in_run,
    true_or_false,
)

CONTROLS = ("real", "blank", "shuffled", "swapped", "shuffled_frames")  # scoring.py says what they show
IMAGE_DIR, PROMPT = Path("dataset/eval_images"), "这个图片描述的是什么内容？"
MULTI = {
    "stage": "vlm_sft_multi",
    "image_dir": Path("dataset/eval_multi_images"),
    "prompt": "Name all the differences between these pictures.",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_loading_flags(parser)
    group = parser.add_argument_group("what to do")
    group.add_argument(
        "--stage",
        default="vlm_sft",
        choices=STAGES[1:],
        help="weights of this stage (default: vlm_sft, or vlm_sft_multi with --multi or --video)",
    )
    group.add_argument(
        "--image_dir",
        type=Path,
        help=f"describe all images in it (default: what the weights say, else {IMAGE_DIR})",
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
    group.add_argument(
        "--questions",
        type=Path,
        nargs="+",
        metavar="FILE",
        help='score question files: rows of {"image" or "video", "question", "answer", '
        '"kind"}, the images and videos beside the file',
    )
    group.add_argument(
        "--control",
        nargs="+",
        default=["real"],
        choices=CONTROLS,
        help="what the model is shown: the images, blank features, another question's "
        "images, its own images in reverse order, or its video's frames in another (default: real)",
    )
    group.add_argument("--report", type=Path, help="write the scores to this JSON file")
    group.add_argument(
        "--batch_size", type=at_least(1), default=64, help="questions answered at once when scoring"
    )
    group = parser.add_argument_group("answers")
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
    args = parser.parse_args(argv)
    if args.multi:
        parser.set_defaults(**MULTI)
    elif args.video or len(args.explain or []) > 3:
        parser.set_defaults(stage=MULTI["stage"], prompt="视频里发生了什么？")
    args = parser.parse_args(argv)
    if args.explain:
        check_explain(args)
    return args


def check_explain(args: argparse.Namespace) -> None:
    others = [name for name in ("chat", "questions", "video", "multi") if getattr(args, name)]
    if others:
        raise ValueError(f"--explain and --{others[0]} are two things to do: give one of them")
    if len(args.explain) < 3 or not args.explain[-1].lower().endswith(".png"):
        raise ValueError(
            '--explain wants an image or several, a question, and a PNG to write: a.jpg "What is it?" out.png'
        )


def check_inputs(args: argparse.Namespace) -> Path:
    """The weights that the flags name. Raises FileNotFoundError for what is missing."""
    for flag, file in (*(("--chat", file) for file in args.chat or []), ("--video", args.video)):
        if file and not file.is_file():
            raise FileNotFoundError(f"{flag}: there is no file {file}")
    for path in map(Path, (args.explain or [])[:-2]):
        if not path.is_file():
            raise FileNotFoundError(f"--explain: there is no image {path}")
    if args.explain:
        check_writable(Path(args.explain[-1]))
    for path in args.questions or []:
        if not path.is_file():
            raise FileNotFoundError(f"question file not found: {path}")
    if args.report and not args.questions:
        raise ValueError("--report keeps the scores of --questions: give both")
    if args.report and place_in_run().rank == 0:
        check_report(args.report)
    return choose_weights(args, [args.stage])


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    weights = check_inputs(args)

    from model.chat import load_chat  # only now: loading PyTorch takes seconds
    from model.device import choose_dtype
    from serving.dialogue import sort_files
    from serving.terminal import chat_in_terminal, is_terminal
    from trainer.describe import describe_all, make_sampling
    from trainer.distributed import start_run
    from trainer.scoring import check_question_files, score_questions

    with start_run(args.device) as run, claim_report(args.report, run.is_main):
        check_question_files(args.questions or [])
        chat = load_chat(
            weights,
            args.tokenizer_path,
            args.clip_path,
            run.device,
            choose_dtype(args.dtype, run.device),
            args.batch_size if args.questions else 1,
            args.allow_other_inputs,
        )
        if args.chat is None or is_terminal():
            run.print(str(chat.report))
        if args.max_rounds is None:  # what no flag says, the weights do
            args.max_rounds = chat.max_rounds
        args.image_dir = args.image_dir or find_recorded(chat.about.get("image_dir", IMAGE_DIR), weights)
        args.prompt = args.prompt or next(iter(chat.about.get("questions", [])), PROMPT)
        if args.questions:
            score_questions(run, args, chat, partial(make_sampling, args))
        elif args.explain:
            from trainer.explanation import explain_files  # matplotlib takes a second

            if run.world_size > 1:
                raise ValueError("--explain draws one sheet: start it with plain python, in one process")
            explain_files(args, chat, make_sampling(args))
        elif args.chat is not None:
            if run.world_size > 1:
                raise ValueError("--chat reads the terminal: start it with plain python, in one process")
            images, videos = sort_files(args.chat)
            chat_in_terminal(
                chat,
                images,
                [*videos, *filter(None, [args.video])],
                args.max_frames,
                args.max_rounds,
                make_sampling(args),
            )
        else:
            describe_all(run, args, chat)


if __name__ == "__main__":
    clean_exit(main)
