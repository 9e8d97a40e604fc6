"""The chat in the terminal, driven in a real pseudo-terminal; and its parts."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence

import pytest
from conftest import LONG, ROOT, run_script, save_image, save_video
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from web_pages import make_folder

from model.chat import Round, load_chat
from model.generate import Sampling
from model.printable import printable
from serving.dialogue import Dialogue, split_files, to_path, words_of
from serving.engine import Engine
from serving.line_editor import CommandCompleter, is_open

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\x1b\][^\x07]*\x07|\r")
STATS = r"(\d+) tokens, the first after [\d.]+ s"
UP, ALT_ENTER, CTRL_C, CTRL_D = "\x1b[A", "\x1b\r", "\x03", "\x04"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, tokenizer_path, clip_path):
    folder = make_folder(tmp_path_factory.mktemp("terminal"), tokenizer, tokenizer_path, clip_path)
    shutil.copy(folder / "second.png", folder / "a b.png")
    save_video(folder / "v.mp4", [20, 90, 160, 240])
    return folder


@pytest.fixture(scope="module")
def chat(folder):
    return load_chat(folder / "32_vlm_sft.pth")


class Terminal:
    """3-eval_chat.py --chat in a pseudo-terminal, and what a person does there."""

    def __init__(self, folder, *flags: str, program: Sequence[str] = (f"{ROOT}/3-eval_chat.py",)):
        pexpect = pytest.importorskip("pexpect", reason="pexpect is missing")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TERM": "xterm"}
        environment["PYTHONPATH"] = str(ROOT)
        environment |= {
            "HOME": str(folder),
            "XDG_STATE_HOME": str(folder / "state"),
            "PROMPT_TOOLKIT_NO_CPR": "1",
        }
        command = [*program, f"--load_from={folder}/32_vlm_sft.pth", "--device=cpu"]
        self.child = pexpect.spawn(
            sys.executable,
            [*command, "--max_new_tokens=20", "--chat", *flags],
            cwd=str(folder),
            env=environment,
            timeout=LONG,
            encoding="utf-8",
            dimensions=(40, 300),
        )
        self.end = pexpect.EOF
        self.wait("Ctrl-D leaves")

    def wait(self, pattern: str) -> str:
        """What was shown until then, without its colours."""
        self.child.expect(pattern)
        return ESCAPES.sub("", self.child.before + self.child.after)

    def type(self, text: str, end: str = "\r") -> None:
        self.child.send(text + end)

    def ask(self, text: str) -> str:
        """The answer."""
        self.type(text)
        shown = self.wait(STATS)
        return shown.rpartition(text)[2].strip().rpartition("\n")[0].strip()

    def leave(self, how: str = CTRL_D) -> None:
        self.child.send(how)
        self.child.expect(self.end)
        self.child.close()
        assert self.child.exitstatus == 0


def shown_as(text: str) -> str:
    """An answer as the terminal shows it, and strips it."""
    return printable(text).replace("\r", "").strip()


def test_a_person_chats(folder, chat):
    terminal = Terminal(folder)
    terminal.type(f"/image {folder}/first.png")
    terminal.wait(r"shown: \S+first.png \(48 x 40\)")
    image = folder / "first.png"
    sampling = Sampling(max_new_tokens=20)
    question = "图形是什么颜色？"
    first = "".join(chat.stream(question, image, sampling))
    assert terminal.ask(question) == shown_as(first)
    turns, images = chat.recall([Round(question, [image], first), Round("and now?")], 20)
    assert terminal.ask("and now?") == shown_as("".join(chat.stream(turns, images, sampling)))

    terminal.type("/undo")
    terminal.wait("taken back: and now")
    terminal.type("/retry")  # of the first question: the same image, nothing sampled
    assert shown_as(first) in terminal.wait(STATS)
    terminal.type("/set temperature 0.7")
    terminal.wait("temperature 0.7")
    terminal.type("/set max_new_tokens 5")
    terminal.wait("max_new_tokens 5")
    terminal.type("/retry")
    terminal.wait(STATS)
    assert terminal.child.match[1] == "5"

    for wrong, line in (
        ("/nothing", "error: there is no /nothing: /help"),
        ("/image none.png", "error: image not found: none.png"),
        ("/image", "error: say it as /image PATH"),
        ("/set heat 1", "error: there is no setting 'heat'"),
        ("/set temperature -1", "error: temperature must be"),
        ("long " * 600, r"error: the prompt has \d+ tokens"),
    ):
        terminal.type(wrong)
        terminal.wait(line)
    terminal.type("/save talk.json")
    terminal.wait("saved: talk.json")
    (row,) = json.loads((folder / "talk.json").read_text())
    assert row["image"] == [str(image)] and [turn["from"] for turn in row["conversations"]] == [
        "human",
        "gpt",
    ]
    terminal.type("/save talk.json")
    terminal.wait("error: talk.json is there already")
    terminal.type("/clear")
    terminal.wait("cleared")
    terminal.type("/set temperature 0")
    terminal.wait("temperature 0")
    words = "".join(chat.stream("Who?", (), max_new_tokens=5))
    assert terminal.ask("Who?") == shown_as(words)  # no image any more
    terminal.type("/help")
    terminal.wait("Ctrl-C stops")
    terminal.leave("/bye\r")


def test_keys(folder, chat):
    """History between sessions, several lines, Tab, a pasted path, Ctrl-C while typing."""
    terminal = Terminal(folder, "first.png")
    one = terminal.ask("什么颜色？")
    assert one == shown_as("".join(chat.stream("什么颜色？", folder / "first.png", max_new_tokens=20)))
    terminal.leave()
    terminal = Terminal(folder, "first.png")
    terminal.type(UP)
    assert one in terminal.wait(STATS), "the up arrow brings back the last session's question"
    terminal.type("/clear")
    terminal.wait("cleared")
    terminal.type("/image a", "\t")  # completed to the one name that fits, its space marked
    terminal.wait(r"a\\ b\.png")
    terminal.type("")
    terminal.wait(r"shown: a b.png \(48 x 40\)")
    terminal.type("typed, and not asked", CTRL_C)
    terminal.type("one", ALT_ENTER)
    terminal.type("two")
    shown = terminal.wait(STATS)
    expected = "".join(chat.stream("one\ntwo", folder / "a b.png", max_new_tokens=20))
    assert shown_as(expected) in shown
    terminal.type("/clear")
    terminal.wait("cleared")
    terminal.type(f"'{folder}/a b.png' what?")  # as a terminal pastes a file that is dropped
    expected = "".join(chat.stream("what?", folder / "a b.png", max_new_tokens=20))
    assert shown_as(expected) in terminal.wait(STATS)
    terminal.leave()


SLOW = """
import runpy, sys, time
from serving import engine
hand = engine.Engine.hand_over
def hand_over(self, *given):
    print("begun", file=sys.stderr)
    time.sleep(0.2)
    hand(self, *given)
engine.Engine.hand_over = hand_over
sys.argv[0] = "ROOT/3-eval_chat.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_ctrl_c_stops_the_answer_alone(folder):
    """Here each token takes a fifth of a second."""
    terminal = Terminal(folder, program=["-c", SLOW.replace("ROOT", str(ROOT))])
    terminal.type("/set max_new_tokens 400")
    terminal.wait("max_rounds")
    terminal.type("speak at length")
    terminal.wait("begun")
    terminal.type("", CTRL_C)
    assert "stopped" in terminal.wait("tokens.*\n")
    terminal.type("/set max_new_tokens 2")
    terminal.wait("max_rounds")
    terminal.type("go on")
    terminal.wait("(1|2) tokens.*\n")
    terminal.leave()


def test_without_a_terminal_lines_are_questions_and_answers_alone_are_printed(folder, chat):
    """And what is wrong is one line, as everywhere."""
    command = [sys.executable, "3-eval_chat.py", f"--load_from={folder}/32_vlm_sft.pth", "--device=cpu"]
    result = subprocess.run(
        [*command, "--max_new_tokens=9", "--chat", str(folder / "v.mp4"), str(folder / "first.png")],
        cwd=ROOT,
        input="where?\n\nand now?\n",
        capture_output=True,
        text=True,
        timeout=LONG,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    asked = chat.compose("where?", [folder / "first.png"], [folder / "v.mp4"])
    turns, images = chat.recall([asked], 9)
    asked.answer = "".join(chat.stream(turns, images, max_new_tokens=9))
    turns, images = chat.recall([asked, Round("and now?")], 9)
    second = "".join(chat.stream(turns, images, max_new_tokens=9))
    assert result.stdout == f"{printable(asked.answer)}\n{printable(second)}\n", result.stderr
    wrong = run_script(
        "3-eval_chat.py", f"--load_from={folder}/32_vlm_sft.pth", "--chat", str(folder / "broken.png")
    )
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "broken.png" in wrong.stderr


def test_without_a_terminal_a_command_is_refused(folder):
    """It was answered as a question."""
    command = [sys.executable, "3-eval_chat.py", f"--load_from={folder}/32_vlm_sft.pth", "--device=cpu"]
    result = subprocess.run(
        [*command, "--chat"], cwd=ROOT, input="/help\n", capture_output=True, text=True, timeout=LONG
    )
    assert result.returncode == 2 and not result.stdout
    assert "/help wants a terminal" in result.stderr and "Traceback" not in result.stderr


# ---- parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "path"),
    [
        ("a.png", "a.png"),
        ("'a b.png'", "a b.png"),
        ('"a b.png"', "a b.png"),
        (r"a\ b.png", "a b.png"),
        ("file:///tmp/a%20b.png", "/tmp/a b.png"),
        ("~/a.png", os.path.expanduser("~/a.png")),
        ("it's.png", "it's.png"),
    ],
)
def test_paths_as_people_type_paste_and_drop_them(word, path):
    assert words_of(f"{word} 'x y'") == [word, "'x y'"] and str(to_path(word)) == path


def test_a_line_that_begins_with_files_is_about_them(folder):
    first, spaced = folder / "first.png", folder / "a b.png"
    assert split_files(f"{first} '{spaced}' what's this?") == ([first, spaced], "what's this?")
    assert split_files(f"file://{first}") == ([first], "")
    for line in ("what is a.png?", "/image x.png", "x" * 9999, "", "'open"):
        assert split_files(line) == ([], line)


def test_what_is_taken_back_is_shown_again(folder, chat):
    with Engine(chat, together=1) as engine:
        dialogue = Dialogue(engine, Sampling(max_new_tokens=4), 0, 3)
        assert dialogue.show([folder / "first.png"], [folder / "v.mp4"])[1].endswith("v.mp4 (3 frames)")
        with pytest.raises(ValueError, match=r"broken\.png"):
            dialogue.show([folder / "second.png", folder / "broken.png"])
        assert dialogue.images == [folder / "first.png"]
        answer, note = dialogue.ask("what?")
        said = "".join(answer)
        dialogue.finish(answer)
        assert not dialogue.images and not note
        assert dialogue.undo() == "what?"
        assert (dialogue.images, dialogue.videos) == ([folder / "first.png"], [folder / "v.mp4"])
        answer, _ = dialogue.ask("what?")
        assert "".join(answer) == said
        dialogue.finish(answer)
        dialogue.save(folder / "talk.txt")
        assert "> " in (folder / "talk.txt").read_text() and said in (folder / "talk.txt").read_text()
        notes = [ask_all(dialogue, "and " * 30) for _ in range(12)]
        assert notes[0] == "" and re.fullmatch(r"sees the last \d+ of \d+ rounds", notes[-1])
        dialogue.clear()
        with pytest.raises(ValueError, match="nothing was asked"):
            dialogue.undo()
        with pytest.raises(ValueError, match="max_rounds"):
            dialogue.set("max_rounds", "-1")


def ask_all(dialogue: Dialogue, question: str) -> str:
    answer, note = dialogue.ask(question)
    list(answer)
    answer.pieces.append("!")  # an empty answer would be no round
    dialogue.finish(answer)
    return note


def test_tab_completes_commands_settings_questions_and_paths(folder, monkeypatch):
    monkeypatch.chdir(folder)
    save_image(folder / "third one.png", 1)
    completer = CommandCompleter(["/image", "/save", "/set"], ["temperature", "top_k"], ["What colour?"])

    def complete(text: str) -> list[str]:
        return [
            text[: len(text) + found.start_position] + found.text
            for found in completer.get_completions(Document(text), CompleteEvent())
        ]

    assert complete("/s") == ["/save", "/set"] and complete("/set te") == ["/set temperature"]
    assert complete("Wh") == ["What colour?"] and complete("no") == []
    assert complete("/image th") == ["/image third\\ one.png"]
    assert complete("/image first.png a") == ["/image first.png a\\ b.png"]
    assert complete("/image ex") == ["/image examples/"]
    assert complete("/image examples/") == ["/image examples/a.png"]
    assert "/image talk.json" not in complete("/image t")


def test_triple_quotes_hold_lines_together():
    assert is_open('"""one') and is_open('"""') and not is_open('"""one\ntwo"""') and not is_open("one")
