"""Questions with known answers, wherever they come from: as a file has them, and as a model is asked them."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from model.chat import Chat
from model.data.sources import Embedded
from model.data.video import Frame


@dataclass
class Entry:
    """A row of a question file, checked, and not yet rendered."""

    name: str  # in messages
    row: dict  # question, answer, kind, and what else it says
    files: list[Path | Embedded]
    turns: list[dict]
    short_turns: list[dict] | None = None  # without its hint, should that not fit


@dataclass
class Question:
    """A row of a question file, and what it shows: for each of its marks an image, or a video's frames."""

    row: dict
    parts: list[list[Path | Frame]]
    turns: list[dict]

    @property
    def answers(self) -> list[str]:
        """What may be answered: the choices, or else the right answer."""
        return self.row.get("choices") or [self.row["answer"]]


@dataclass
class QuestionFile:
    path: Path
    schema: str  # in words
    entries: list[Entry]
    yes: str = ""  # of questions to be answered yes or no: which of the choices says yes
    is_benchmark: bool = False  # what cannot be asked of it is left out and counted; of our own, refused
    left_out: Counter = field(default_factory=Counter)  # reason -> rows
    num_without_hint: int = 0  # asked without their hint, which did not fit

    def choose_score(self, wanted: str | None) -> str:
        """The score that is asked for, or else the one that its rows are made for. Raises ValueError for
        choices that are not there."""
        without = next((entry.name for entry in self.entries if "choices" not in entry.row), None)
        if wanted == "choice" and without:
            raise ValueError(f'{without}: it has no "choices": score it with --score exact or loss')
        return wanted or ("exact" if without else "choice")

    def describe(self, num_asked: int, score: str) -> str:
        text = f"{self.path}, read as {self.schema}: {num_asked:,} questions, score {score}"
        if self.num_without_hint:
            text += f"; {self.num_without_hint:,} without their hint, which does not fit the context"
        return f"{text}; left out: {self.count_left_out()}" if self.left_out else text

    def count_left_out(self) -> str:
        return "; ".join(f"{count:,} {reason}" for reason, count in self.left_out.items())


def read_questions(file: QuestionFile, chat: Chat, max_frames: int, score: str = "exact") -> list[Question]:
    """The questions of a file, with room in the model's context for what is asked of it. Raises
    FileNotFoundError or ValueError naming file and row; of a benchmark, what does not fit is left out."""
    questions = []
    for entry in file.entries:
        try:
            questions.append(fit_entry(file, entry, chat, max_frames, score))
        except TooLong as error:
            if not file.is_benchmark:
                raise ValueError(f"{entry.name}: {error}") from None
            file.left_out["that do not fit the context"] += 1
        except ValueError as error:
            raise ValueError(f"{entry.name}: {error}") from None
    if not questions:
        raise ValueError(
            f"{file.path}: none of its questions fits the model's context, which holds "
            f"{chat.decoder.config.max_seq_len} tokens"
        )
    return questions


class TooLong(ValueError):
    pass


def fit_entry(file: QuestionFile, entry: Entry, chat: Chat, max_frames: int, score: str) -> Question:
    """With its hint if that fits, else without. Raises TooLong as fit() does."""
    try:
        return fit(entry, entry.turns, chat, max_frames, score)
    except TooLong:
        if not entry.short_turns:
            raise
    question = fit(entry, entry.short_turns, chat, max_frames, score)
    file.num_without_hint += 1
    return question


def fit(entry: Entry, turns: list[dict], chat: Chat, max_frames: int, score: str) -> Question:
    """Raises TooLong for what the context does not hold with the first token of an answer (exact), or with
    every answer that is scored."""
    parts, turns = chat.prepare(turns, entry.files, max_frames)
    question = Question(entry.row, parts, turns)
    num_tokens, context = len(chat.render(turns).input_ids), chat.decoder.config.max_seq_len
    scored = {"exact": [], "choice": question.answers, "loss": [entry.row["answer"]]}[score]
    needed = num_tokens + max((len(chat.encode_answer(answer)) for answer in scored), default=1)
    if needed > context:
        with_it = f" and {needed - num_tokens} in its longest answer" if scored else ""
        raise TooLong(
            f"the question has {num_tokens} tokens with what it shows{with_it}, but the model's context "
            f"holds {context} with the answer"
        )
    return question
