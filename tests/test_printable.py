"""What comes from files, data and models reaches a terminal as text, never as a command to it."""

import json

import pytest
from conftest import make_row, run_clean

from model.data.dataset import VLMDataset
from model.data.spec import SFT
from model.printable import one_line, printable
from model.vision_utils import ImageProcessor
from trainer.script import clean_exit, print_stream

EVIL = "a\x1b]0;owned\x07b\x1b[2Jc\u202etxt.exe\x9b31m\r\x00"


def is_harmless(text: str) -> bool:
    return not any(sign in text for sign in "\x1b\x07\u202e\x9b\r\x00\u2066\x7f")


def test_what_a_terminal_obeys_is_spelled_out():
    assert printable(EVIL) == r"a\x1b]0;owned\x07b\x1b[2Jc\u202etxt.exe\x9b31m\r\x00"
    text = "第一行\n\tsecond\u3000line 👨\u200d👩 é\u0301"
    assert printable(text) == text
    assert one_line("a\nb\u2028c\tüd\ud83d") == r"a\nb\u2028c\tüd\ud83d"
    assert one_line("a" * 400) == "a" * 300 + "..."


def test_an_answer_keeps_its_lines_and_gives_no_commands(capsys):
    """Each piece of it was printed as the model made it."""
    answer = print_stream(iter(["one\ntwo", EVIL, "三"]))
    assert answer == "one\ntwo" + EVIL + "三"  # so the chat goes on
    shown = capsys.readouterr().out
    assert shown.startswith("one\ntwo") and shown.endswith("三\n") and is_harmless(shown)


@pytest.mark.parametrize("kind", [ValueError, OSError, FileNotFoundError])
def test_an_error_is_one_line_whatever_a_file_is_called(capsys, kind):
    def main():
        raise kind(f"there is no file {EVIL}\nor folder")

    with pytest.raises(SystemExit) as end:
        clean_exit(main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and is_harmless(error) and error.count("\n") == 1 and r"\nor folder" in error


def test_flags_and_names_of_files_are_harmless(workplace, capsys):
    for flags in ((f"--load_from=/no/{EVIL[:-1]}",), (f"--{EVIL}=1",), (f"@/no/{EVIL[:-1]}",)):
        result = run_clean(capsys, "3-eval_chat.py", *flags)
        assert result.returncode == 2 and is_harmless(result.stderr + result.stdout), result.stderr


def test_names_of_images_and_questions_are_harmless(seeing, workplace, capsys):
    (workplace / "images" / f"{EVIL[:-1]}.png").write_bytes(b"no image")
    result = run_clean(
        capsys, "3-eval_chat.py", *seeing, f"--image_dir={workplace}/images", f"--prompt=what {EVIL}"
    )
    assert "owned" in result.stdout and is_harmless(result.stdout + result.stderr)


def test_reasons_of_bad_rows_are_harmless(tmp_path, renderer):
    rows = [make_row(image=f"{EVIL[:-1]}.png", id=EVIL), make_row(question=EVIL, image="")]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    dataset = VLMDataset(tmp_path / "data.json", SFT, renderer, tmp_path, ImageProcessor())
    for position in range(2):
        reason = dataset[position].reason
        assert is_harmless(reason) and "\n" not in reason
