"""One person's chat with the model, without a face: what was shown and said, and what can be done with it."""

import json
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from model.chat import Round, is_video
from model.data.video import Frame, file_of, find_frames, open_images
from model.files import write_text
from model.generate import Sampling
from model.names import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from serving.answer import Answer
from serving.engine import Engine

WORD = re.compile(r"""\s*("[^"]*"|'[^']*'|(?:\\.|\S)+)""")


class Dialogue:
    """A chat under way.

    rounds          what was asked and answered
    images, videos  what the next question is about, besides what was shown before
    """

    def __init__(self, engine: Engine, sampling: Sampling, max_rounds: int, max_frames: int):
        self.engine, self.chat, self.sampling = engine, engine.chat, sampling
        self.max_rounds, self.max_frames = max_rounds, max_frames
        self.clear()

    def clear(self) -> None:
        self.rounds: list[Round] = []
        self.images: list[Path] = []
        self.videos: list[Path] = []

    def show(self, images: Sequence[Path], videos: Sequence[Path] = ()) -> list[str]:
        """These are for the next question; what they are, in words. Raises FileNotFoundError or ValueError;
        none of them is shown then."""
        opened = [next(iter(open_images([path]))) for path in images]
        told = [
            f"{path} ({image.width} x {image.height})" for path, image in zip(images, opened, strict=True)
        ]
        found = [find_frames(path, self.max_frames) for path in videos]
        for frames in found:
            for _ in open_images(frames):
                pass  # complain now, not after the question
        told += [f"{path} ({len(part)} frames)" for path, part in zip(videos, found, strict=True)]
        self.images += images
        self.videos += videos
        return told

    def ask(self, question: str) -> tuple[Answer, str]:
        """Begin the answer; and, where not all rounds fit any more, a note of that. finish() takes the answer
        in. Raises FileNotFoundError or ValueError, and forgets the question then."""
        asked = self.chat.compose(question, self.images, self.videos, self.max_frames)
        rounds = [*self.rounds, asked]
        turns, shown = self.chat.recall(rounds, self.sampling.max_new_tokens, self.max_rounds)
        if len(shown) > self.chat.most_images:
            raise ValueError(
                f"this model sees at most {self.chat.most_images} images at once: /clear, and show fewer"
            )
        answer = self.engine.submit(turns, list(open_images(shown)), self.sampling)
        self.rounds, self.images, self.videos = rounds, [], []
        seen = sum(turn["from"] == "human" for turn in turns)
        answered = sum(bool(one.answer) for one in rounds[:-1]) + 1
        return answer, f"sees the last {seen} of {answered} rounds" if seen < answered else ""

    def finish(self, answer: Answer) -> None:
        self.rounds[-1].answer = answer.text

    def undo(self) -> str:
        """Take back the last question; what it showed is shown with the next one. Returns the question.
        Raises ValueError if there is none."""
        if not self.rounds:
            raise ValueError("nothing was asked yet")
        last = self.rounds.pop()
        files = list(dict.fromkeys(map(file_of, last.images)))
        is_moving = {file_of(image) for image in last.images if isinstance(image, Frame)}
        self.images = [path for path in files if path not in is_moving] + self.images
        self.videos = [path for path in files if path in is_moving] + self.videos
        return re.sub(r"^(<image>\s*)+", "", last.question)

    def set(self, name: str, value: str) -> None:
        """A setting, of Sampling or max_rounds. Raises ValueError."""
        kinds = {field.name: field.type for field in fields(Sampling)} | {"max_rounds": int}
        if name not in kinds:
            raise ValueError(f"there is no setting {name!r}, only {', '.join(kinds)}")
        try:
            number = kinds[name](value)
        except ValueError:
            raise ValueError(f"{name} is a number, not {value!r}") from None
        if name == "max_rounds":
            if number < 0:
                raise ValueError("max_rounds must be 0 (all that fit) or more")
            self.max_rounds = number
        else:
            self.sampling = replace(self.sampling, **{name: number})

    def settings(self) -> dict[str, float]:
        return vars(self.sampling) | {"max_rounds": self.max_rounds}

    def save(self, path: Path) -> None:
        """As text; as a row of training data, if the file is called .json. Raises ValueError for a file that
        is there already."""
        if path.exists():
            raise ValueError(f"{path} is there already: name another file")
        if path.suffix == ".json":
            turns, images = [], []
            for one in self.rounds:
                images += map(str, one.images)
                turns += [{"from": "human", "value": one.question}, {"from": "gpt", "value": one.answer}]
            write_text(
                path, json.dumps([{"image": images, "conversations": turns}], ensure_ascii=False, indent=1)
            )
            return
        blocks = []
        for one in self.rounds:
            blocks += [*(f"[{image}]" for image in one.images), f"> {one.question}", "", one.answer, ""]
        write_text(path, "\n".join(blocks))


# ---- paths as people type, paste and drop them -------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """Words, and what quotes hold together, with their quotes."""
    return [match[1] for match in WORD.finditer(text)]


def to_path(word: str) -> Path:
    """Of 'a b.png', a\\ b.png, ~/a.png, file:///a%20b.png"""
    if len(word) > 1 and word[0] == word[-1] and word[0] in "\"'":
        word = word[1:-1]
    else:
        word = re.sub(r"\\(.)", r"\1", word)
    if word.lower().startswith("file://"):
        word = unquote(urlsplit(word).path)
    return Path(word).expanduser()


def split_files(text: str) -> tuple[list[Path], str]:
    """Images and videos that a line begins with, as terminals paste what is dropped on them; and the rest."""
    files, position = [], 0
    while match := WORD.match(text, position):
        path = to_path(match[1])
        try:
            is_shown = path.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES) and path.is_file()
        except OSError:  # too long for a name
            is_shown = False
        if not is_shown:
            break
        files.append(path)
        position = match.end()
    return files, text[position:].strip()


def sort_files(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Images, and videos."""
    return [path for path in files if not is_video(path)], [path for path in files if is_video(path)]
