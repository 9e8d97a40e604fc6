"""Questions with known answers, under each control (controls.py), by one of three scores:

exact   the model answers; right is what matches to the letter
choice  every choice is judged as the answer, by its log-probability per token; right is the likeliest
loss    the loss per token of the right answer
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from model.chat import Chat
from model.data.video import Frame, file_of
from model.generate import Sampling
from trainer.controls import ImageFeatures, find_stand_ins, show
from trainer.distributed import Run
from trainer.logger import progress_bar
from trainer.questions import Question, QuestionFile, read_questions
from trainer.score_report import report_scores

# Questions, the features of what each shows, and the number of the first -> of each what it is scored by.
Ask = Callable[[list[Question], list[Tensor], int], list]


def score_questions(
    run: Run,
    args: argparse.Namespace,
    chat: Chat,
    files: dict[str, QuestionFile],
    sampling: Callable[[int], Sampling],
) -> None:
    """Scores per file, kind and control: printed as a table, and written to --report.

    sampling  for the questions of a batch, by the number of the first
    """
    ways: dict[str, Ask] = {
        "exact": partial(ask_exact, chat, sampling),
        "choice": partial(ask_choice, chat),
        "loss": partial(ask_loss, chat),
    }
    scores = {split: file.choose_score(args.score) for split, file in files.items()}
    asked = {
        split: read_questions(file, chat, args.max_frames, scores[split]) for split, file in files.items()
    }
    records = []
    for split, questions in asked.items():
        run.print(files[split].describe(len(questions), scores[split]))
        ask = ways[scores[split]]
        records += score_file(run, args, chat, split, questions, ask)
    if run.is_main:
        report_scores(records, files, args.report)


def score_file(
    run: Run, args: argparse.Namespace, chat: Chat, split: str, questions: list[Question], ask: Ask
) -> list[dict]:
    """The records of a file, on rank 0."""
    features = ImageFeatures(
        chat, [image for question in questions for part in question.parts for image in part]
    )
    stand_ins = find_stand_ins(questions, args.seed)
    records = []
    for control in dict.fromkeys(args.control):
        shown = [
            show(question, control, stand_ins, args.seed + number)
            for number, question in enumerate(questions)
        ]
        places = [number for number, given in enumerate(shown) if given]
        if not places:
            run.print(f"{split}: the control {control} says nothing about its questions; left out")
        asked = [(questions[number], shown[number]) for number in places]
        found = ask_all(run, args.batch_size, asked, features, control, ask)
        if run.is_main:
            records += [
                record_of(split, control, number, questions[number], what)
                for number, what in zip(places, found, strict=True)
            ]
    return records


def ask_all(
    run: Run,
    batch_size: int,
    asked: list[tuple[Question, list]],
    features: ImageFeatures,
    control: str,
    ask: Ask,
) -> list:
    """What all questions are scored by, in their order, on rank 0. Whole batches go to one rank each, so that
    everything is computed in the same batch, and comes out the same, whatever the number of processes.

    asked  questions, each with the images that the model is given
    """
    starts = range(0, len(asked), batch_size)
    mine = {}
    for start in progress_bar(starts[run.rank :: run.world_size], desc=control, disable=not run.is_main):
        batch = asked[start : start + batch_size]
        shown = [torch.stack([features[image] for image in given]) for _, given in batch]  # (n, N, V) each
        if control == "blank":
            shown = [torch.zeros_like(part) for part in shown]
        mine[start] = ask([question for question, _ in batch], shown, start)
    return [found for batch in run.gather_in_order(mine) for found in batch]


def ask_exact(
    chat: Chat,
    sampling: Callable[[int], Sampling],
    questions: list[Question],
    shown: list[Tensor],
    start: int,
) -> list[dict]:
    answers = chat.answer_batch([question.turns for question in questions], shown, sampling(start))
    return [
        {"given": answer, "right": answer == question.row["answer"].strip()}
        for question, answer in zip(questions, answers, strict=True)
    ]


def ask_choice(chat: Chat, questions: list[Question], shown: list[Tensor], start: int) -> list[dict]:
    choices = [question.answers for question in questions]
    likely = chat.log_probabilities([question.turns for question in questions], choices, shown)
    found = []
    for question, texts, tokens in zip(questions, choices, likely, strict=True):
        means = [float(values.double().mean()) for values in tokens]
        given = texts[max(range(len(texts)), key=means.__getitem__)]
        found.append(
            {
                "choices": texts,
                "log_probabilities": [round(mean, 5) for mean in means],
                "given": given,
                "right": given == question.row["answer"],
            }
        )
    return found


def ask_loss(chat: Chat, questions: list[Question], shown: list[Tensor], start: int) -> list[dict]:
    answers = [[question.row["answer"]] for question in questions]
    likely = chat.log_probabilities([question.turns for question in questions], answers, shown)
    return [{"loss": -float(values.double().mean()), "tokens": len(values)} for (values,) in likely]


def record_of(split: str, control: str, number: int, question: Question, found: dict) -> dict:
    """What the report keeps of one question under one control; number: of the question in its file."""
    row, files = question.row, [file_of(part[0]) for part in question.parts]
    record = {
        "split": split,
        "kind": row["kind"],
        "control": control,
        "image": [
            str(file)
            for file, part in zip(files, question.parts, strict=True)
            if not isinstance(part[0], Frame)
        ],
        "question": row["question"],
        "answer": row["answer"],
        **found,
    }
    if "loss" in found:  # by which the same question is found under another control
        record["number"] = number
    if "index" in row:
        record["index"] = row["index"]
    if row.get("video"):
        record["video"] = [str(file) for file in files if str(file) not in record["image"]]
    if control == "swapped" and row.get("swapped_answer") and "given" in found:
        follows = found["given"] == row["swapped_answer"].strip()
        record |= {"swapped_answer": row["swapped_answer"], "follows": follows}
    return record
