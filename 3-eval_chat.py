"""Look at what was learnt: describe images and videos, chat in the terminal, or score questions with known
answers.

reads    out/512_vlm_sft.pth (or --stage, or --load_from FILE or FOLDER), images, videos, question files
--multi  reads out/512_vlm_sft_multi.pth and dataset/eval_multi_images/SET/*
writes   --report FILE: descriptions as .jsonl or .csv; or scores as JSON, and beside it every answer
         (.answers.jsonl) and the scores with their intervals (.scores.csv)
         --explain: a drawing

    python 3-eval_chat.py                                        # describe dataset/eval_images/*
    python 3-eval_chat.py --image_dir my_images --prompt "What is this?"
    python 3-eval_chat.py --image_dir my_images --report out/report.csv         # in batches
    python 3-eval_chat.py --image my_image.jpg --prompt "What is this?"   # the answer alone, for scripts
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
import contextlib
import sys
from functools import partial
from pathlib import Path

from model.description import read_description
from model.files import check_writable
from model.names import find_recorded
from trainer.eval_flags import IMAGE_DIR, MULTI, PROMPT
from trainer.eval_flags import parse_args as read_flags
from trainer.inputs import answers_path, check_report, claim_report, table_path
from trainer.script import choose_weights, clean_exit, place_in_run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    return read_flags(__doc__, argv)


def check_inputs(args: argparse.Namespace) -> Path:
    """The weights that the flags name. Raises FileNotFoundError for what is missing."""
    named = [
        ("--video", args.video),
        *(("--chat", path) for path in args.chat or []),
        *(("--image", path) for path in args.image or []),
        *(("--explain", Path(path)) for path in (args.explain or [])[:-2]),
    ]
    for flag, file in named:
        if file and not file.is_file():
            raise FileNotFoundError(f"{flag}: there is no file {file}")
    for path in args.questions or []:
        if not path.is_file():
            raise FileNotFoundError(f"question file not found: {path}")
    if args.report and place_in_run().rank == 0:
        beside = (answers_path(args.report), table_path(args.report)) if args.questions else ()
        check_report(args.report, *beside)
    if args.explain:
        check_writable(Path(args.explain[-1]))
    weights = choose_weights(args, [args.stage])
    if args.image and len(args.image) > 1:
        check_sees_several(weights)
    return weights


def check_sees_several(weights: Path) -> None:
    stage = read_description(weights).get("stage", "")
    if stage and stage != MULTI["stage"]:
        raise ValueError(
            f"{weights} ({stage}) never saw several images at once: give one --image, or weights of "
            f"{MULTI['stage']}"
        )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    weights = check_inputs(args)
    if args.image:  # for scripts: standard output is the answer's alone
        with contextlib.redirect_stdout(sys.stderr):
            answer = evaluate(args, weights)
        print(answer)
    else:
        evaluate(args, weights)


def evaluate(args: argparse.Namespace, weights: Path) -> str | None:
    """Do what the flags say; returns the answer about --image."""
    from model.chat import load_chat  # only now: loading PyTorch takes seconds
    from model.device import choose_dtype
    from serving.dialogue import sort_files
    from serving.terminal import chat_in_terminal, is_terminal
    from trainer.describe import answer_one, describe_all, make_sampling
    from trainer.description_report import describe_to_report
    from trainer.distributed import start_run
    from trainer.question_files import open_question_files
    from trainer.scoring import score_questions

    with start_run(args.device) as run, claim_report(args.report, run.is_main):
        alone = [flag for flag in ("chat", "image", "explain") if getattr(args, flag) is not None]
        if run.world_size > 1 and alone:
            raise ValueError(
                f"--{alone[0]} asks one question at a time: start it with plain python, in one process"
            )
        questions = open_question_files(args.questions or [], args.image_dir, args.score)
        chat = load_chat(
            weights,
            args.tokenizer_path,
            args.clip_path,
            run.device,
            choose_dtype(args.dtype, run.device),
            args.batch_size if args.questions or args.report else 1,
            args.allow_other_inputs,
        )
        if args.chat is None or is_terminal():
            run.print(str(chat.report))
        if args.max_rounds is None:  # what no flag says, the weights do
            args.max_rounds = chat.max_rounds
        args.image_dir = args.image_dir or find_recorded(chat.about.get("image_dir", IMAGE_DIR), weights)
        args.prompt = args.prompt or next(iter(chat.about.get("questions", [])), PROMPT)
        if args.questions:
            score_questions(run, args, chat, questions, partial(make_sampling, args))
        elif args.chat is not None:
            images, videos = sort_files(args.chat)
            videos += [args.video] if args.video else []
            chat_in_terminal(chat, images, videos, args.max_frames, args.max_rounds, make_sampling(args))
        elif args.image:
            return answer_one(args, chat)
        elif args.explain:
            from trainer.explanation import explain_files  # matplotlib takes a second

            explain_files(args, chat, make_sampling(args))
        elif args.report:
            describe_to_report(run, args, chat, weights)
        else:
            describe_all(run, args, chat)
    return None


if __name__ == "__main__":
    clean_exit(main)
