"""A chat in the terminal; where it is none, questions from standard input, and answers alone."""

import math
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from model.chat import Chat
from model.generate import Sampling
from model.printable import one_line, printable
from serving.answer import Answer
from serving.dialogue import Dialogue, sort_files, split_files, to_path, words_of
from serving.engine import Engine

HELP = """\
/image PATH ...     show images with the next question (so does a path in front of it)
/video PATH ...     show videos
/clear              forget what was said and shown
/undo               take back the last question; its images stay
/retry              ask it again; where answers are sampled, with another seed
/set [NAME VALUE]   temperature, top_k, top_p, repetition_penalty, max_new_tokens, seed, max_rounds
/save FILE          write the chat into a new file (.json: as a row of training data)
/help, /bye         this; leave, as Ctrl-D does
Enter asks; Alt+Enter begins a new line, and so does Enter between \""" and \""".
Tab completes, the up arrow recalls, Ctrl-C stops an answer."""
ERRORS = (ValueError, OSError, RuntimeError, MemoryError)  # that leave the chat as it was


class Leave(Exception):
    """The person wants to."""


class TerminalChat:
    def __init__(self, dialogue: Dialogue, console: Console):
        self.dialogue, self.chat, self.console = dialogue, dialogue.chat, console
        self.commands: dict[str, Callable[[str], None]] = {
            "/image": self.image,
            "/video": self.video,
            "/clear": self.clear,
            "/undo": self.undo,
            "/retry": self.retry,
            "/set": self.set,
            "/save": self.save,
            "/help": lambda rest: self.say(HELP),
            "/bye": self.leave,
        }

    def run(self, files: list[Path], videos: list[Path]) -> None:
        from serving.line_editor import make_editor, read_question

        self.welcome()
        self.attempt(lambda: self.show(files, videos))
        names = self.dialogue.settings()
        editor = make_editor(self.commands, names, self.chat.questions)
        while True:
            try:
                line = read_question(editor)
                self.attempt(lambda line=line: self.handle(line))
            except KeyboardInterrupt:  # empties the line
                continue
            except (EOFError, Leave):
                return

    def welcome(self) -> None:
        """What the model knows, its report has said."""
        for question in self.chat.questions[:4]:
            self.say(f"  {question}")
        self.say("/image PATH shows an image, /help says more, Ctrl-D leaves.")

    def attempt(self, work: Callable[[], None]) -> None:
        """What goes wrong is one line."""
        try:
            work()
        except ERRORS as error:
            message = one_line(str(error) or type(error).__name__)
            self.say(f"error: {message}", style="red")

    def say(self, text: str, style: str = "dim") -> None:
        self.console.print(
            printable(text), style=style, markup=False, highlight=False, emoji=False, soft_wrap=True
        )

    # ---- a line --------------------------------------------------------------------------------------------

    def handle(self, line: str) -> None:
        files, question = split_files(line)
        if files:
            self.show(*sort_files(files))
        elif line.startswith("/"):
            command, _, rest = line.partition(" ")
            if command not in self.commands:
                raise ValueError(f"there is no {command}: /help lists what there is")
            self.commands[command](rest.strip())
            return
        if question:
            self.ask(question)

    def ask(self, question: str) -> None:
        """The answer as it is made, then how long it took. Ctrl-C stops it; what it has said stays."""
        answer, note = self.dialogue.ask(question)
        try:
            for piece in answer:
                self.console.file.write(printable(piece))
                self.console.file.flush()
        except KeyboardInterrupt:
            answer.stop()
        self.console.file.write("\n")
        self.dialogue.finish(answer)
        self.say(describe(answer, note))

    def show(self, images: list[Path], videos: list[Path]) -> None:
        for line in self.dialogue.show(images, videos):
            self.say(f"shown: {line}")

    # ---- commands ------------------------------------------------------------------------------------------

    def image(self, rest: str) -> None:
        self.show([to_path(word) for word in words_of(rest)] or missing("/image PATH ..."), [])

    def video(self, rest: str) -> None:
        self.show([], [to_path(word) for word in words_of(rest)] or missing("/video PATH ..."))

    def clear(self, rest: str) -> None:
        self.dialogue.clear()
        self.say("cleared")

    def undo(self, rest: str) -> None:
        self.say(f"taken back: {self.dialogue.undo()}")

    def retry(self, rest: str) -> None:
        question = self.dialogue.undo()
        if self.dialogue.sampling.temperature:
            self.dialogue.set("seed", str(self.dialogue.sampling.seed + 1))
        self.ask(question)

    def set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if value:
            self.dialogue.set(name, value.strip())
        elif name:
            missing("/set NAME VALUE")
        for name, value in self.dialogue.settings().items():
            self.say(f"  {name} {value}")

    def save(self, rest: str) -> None:
        words = words_of(rest)
        path = to_path(words[0]) if len(words) == 1 else missing("/save FILE")
        self.dialogue.save(path)
        self.say(f"saved: {path}")

    def leave(self, rest: str) -> None:
        raise Leave


def missing(usage: str):
    raise ValueError(f"say it as {usage}")


def describe(answer: Answer, note: str = "") -> str:
    """How long an answer took, and why it is no longer."""
    reasons = {"stopped": "stopped", "length": "cut at max_new_tokens, or the context is full"}
    facts = [f"{answer.num_tokens} tokens"]
    if not math.isnan(answer.seconds_to_first):
        facts.append(f"the first after {answer.seconds_to_first:.2f} s")
    if not math.isnan(answer.tokens_per_second):
        facts.append(f"then {answer.tokens_per_second:.0f} tokens/s")
    return ", ".join([*facts, *filter(None, [reasons.get(answer.finish_reason), note])])


# ---- the two ways to chat ----------------------------------------------------------------------------------


def is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def chat_in_terminal(
    chat: Chat,
    images: list[Path],
    videos: list[Path],
    max_frames: int,
    max_rounds: int,
    sampling: Sampling,
) -> None:
    """Ask until Ctrl-D or /bye. Where the input is no terminal, its lines are the questions, answers alone
    are printed, and what goes wrong is raised."""
    with Engine(chat, together=1) as engine:
        dialogue = Dialogue(engine, sampling, max_rounds, max_frames)
        terminal = TerminalChat(dialogue, Console())
        if is_terminal():
            terminal.run(images, videos)
            return
        dialogue.show(images, videos)
        for line in sys.stdin:
            if (word := line.strip().partition(" ")[0]) in terminal.commands:
                raise ValueError(
                    f"{word} wants a terminal: here every line is a question, and files follow --chat"
                )
            if line.strip():
                answer_alone(dialogue, line.strip())


def answer_alone(dialogue: Dialogue, question: str) -> None:
    answer, _ = dialogue.ask(question)
    for piece in answer:
        print(printable(piece), end="", flush=True)
    print()
    dialogue.finish(answer)
