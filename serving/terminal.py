"""A chat in the terminal, about one image or one video."""

from pathlib import Path

from model.chat import Chat, Round
from model.data.video import find_frames, open_images
from model.generate import Sampling
from model.printable import one_line
from model.prompt import put_marks
from trainer.script import print_stream


def chat_about(
    chat: Chat, file: Path, is_video: bool, max_frames: int, max_rounds: int, sampling: Sampling
) -> None:
    """Ask line by line, until an empty line. Raises ValueError before the first question if the file cannot
    be read."""
    for _ in open_images(find_frames(file, max_frames) if is_video else [file]):
        pass  # complain before the first question, not after it
    print(f"Ask about {one_line(str(file))}; an empty line ends the chat.")
    rounds: list[Round] = []
    while question := read_line():
        shown = [] if rounds else [file]
        if is_video and not rounds:  # its frames, and a mark for each
            turns = [{"from": "human", "value": put_marks(question, 0, 1)}]
            parts, turns = chat.prepare(turns, [file], max_frames)
            shown, question = parts[0], turns[0]["value"]
        rounds.append(Round(question, shown))
        turns, shown = chat.recall(rounds, sampling.max_new_tokens, max_rounds)
        rounds[-1].answer = print_stream(chat.stream(turns, list(open_images(shown)), sampling))


def read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
