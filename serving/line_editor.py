"""The line in which a question is typed: arrow keys, wide characters, history, Tab, several lines."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from model.names import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from serving.dialogue import WORD, to_path

QUOTES = '"""'  # around a question of several lines
PROMPT = FormattedText([("ansicyan bold", "> ")])


class CommandCompleter(Completer):
    """Commands, the files that they take, and the model's own example questions."""

    def __init__(self, commands: Iterable[str], settings: Iterable[str], questions: Iterable[str]):
        self.commands, self.settings, self.questions = list(commands), list(settings), list(questions)
        self.paths = {
            "/image": PathCompleter(expanduser=True, file_filter=ends_with(IMAGE_SUFFIXES)),
            "/video": PathCompleter(expanduser=True, file_filter=ends_with((*VIDEO_SUFFIXES, ".gif"))),
            "/save": PathCompleter(expanduser=True),
        }

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        text = document.text_before_cursor
        command, space, rest = text.partition(" ")
        if space and command in self.paths:
            yield from self.complete_path(self.paths[command], rest, complete_event)
            return
        choices = [*self.commands, *self.questions]
        if space and command == "/set":
            choices, text = self.settings, rest
        yield from (Completion(one, -len(text)) for one in choices if one.startswith(text))

    def complete_path(self, paths: PathCompleter, rest: str, event: CompleteEvent) -> Iterator[Completion]:
        """Of the last word; a space in a name gets a backslash."""
        words = [match for match in WORD.finditer(rest)]
        word = words[-1][1] if words and words[-1].end() == len(rest) else ""
        typed = str(to_path(word)) if word else ""
        if word.endswith("/") and typed != "/":
            typed += "/"
        for found in paths.get_completions(Document(typed), event):
            end = "/" if Path(typed + found.text).is_dir() else ""
            yield Completion(found.text.replace(" ", "\\ ") + end, 0, display=found.display)


def ends_with(suffixes: tuple[str, ...]):
    """Folders too: the file may lie in one."""
    return lambda name: name.lower().endswith(suffixes) or os.path.isdir(name)


def make_history() -> History:
    """Kept between sessions, for this user alone; in memory where nothing can be written."""
    state = os.environ.get("XDG_STATE_HOME")
    path = (Path(state) if state else Path.home() / ".local/state") / "minimind-v" / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(0o600)
        if not os.access(path, os.R_OK | os.W_OK):
            return InMemoryHistory()
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))


def make_keys() -> KeyBindings:
    """Enter asks; Alt+Enter, and Enter between triple quotes, begins a new line."""
    keys = KeyBindings()

    @keys.add("enter")
    def enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def is_open(text: str) -> bool:
    text = text.strip()
    return text.startswith(QUOTES) and (len(text) < 2 * len(QUOTES) or not text.endswith(QUOTES))


def make_editor(commands: Iterable[str], settings: Iterable[str], questions: Iterable[str]) -> PromptSession:
    return PromptSession(
        PROMPT,
        multiline=True,
        key_bindings=make_keys(),
        history=make_history(),
        completer=CommandCompleter(commands, settings, questions),
        complete_while_typing=False,
        prompt_continuation="  ",
        enable_open_in_editor=False,
    )


def read_question(editor: PromptSession) -> str:
    """Raises KeyboardInterrupt (Ctrl-C) and EOFError (Ctrl-D)."""
    text = editor.prompt().strip()
    return text[3:-3].strip() if text.startswith(QUOTES) and text.endswith(QUOTES) else text
