"""What a model is shown in place of what a question is about, and the features of it.

A control shows the model something else than the question is about; what it still gets right is guessed.

    real             the images and videos
    blank            features that are all zero
    shuffled         another question's: every image another image, every video another video
    swapped          the question's own images in the reverse order, where it has several and no video
    shuffled_frames  the frames of its videos in another order, where each has several

A control that says nothing about a question leaves it out.
"""

from pathlib import Path

import torch
from torch import Tensor

from model.chat import Chat
from model.data.video import Frame, file_of, open_images
from trainer.questions import Question


class ImageFeatures:
    """Features of all images of a question file, encoded once, whatever asks for them.

    They are encoded in fixed groups, so the same bits come out however the questions are shared out.
    """

    GROUP = 64

    def __init__(self, chat: Chat, images: list[Path | Frame]):
        self.chat, self.images = chat, list(dict.fromkeys(images))
        self.place = {image: number for number, image in enumerate(self.images)}
        self.groups: dict[int, Tensor] = {}

    def __getitem__(self, image: Path | Frame) -> Tensor:
        """(N, vision_dim)"""
        group, member = divmod(self.place[image], self.GROUP)
        if group not in self.groups:
            members = self.images[group * self.GROUP :][: self.GROUP]
            self.groups[group] = self.chat.encode(open_images(members))
        return self.groups[group][member]


def successors(count: int, seed: int) -> list[int]:
    """For each of `count` places another one, at random; alone, a place follows itself."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    after = dict(zip(order, order[1:] + order[:1], strict=True))
    return [after[place] for place in range(count)]


def find_stand_ins(questions: list[Question], seed: int) -> dict[Path, list[Path | Frame]]:
    """For every image another image of the file, and for every video another video's frames."""
    stand_ins = {}
    for is_video in (False, True):
        found = {
            file_of(part[0]): part
            for question in questions
            for part in question.parts
            if isinstance(part[0], Frame) == is_video
        }
        others = successors(len(found), seed)
        stand_ins |= {path: list(found.values())[other] for path, other in zip(found, others, strict=True)}
    return stand_ins


def resample(frames: list, count: int) -> list:
    """So many of them, at the middles of equal parts: a video of another length, frame by frame."""
    return [frames[(2 * number + 1) * len(frames) // (2 * count)] for number in range(count)]


def show(
    question: Question, control: str, stand_ins: dict[Path, list[Path | Frame]], seed: int
) -> list[Path | Frame] | None:
    """The images and frames that the model is given, in reading order; None if the control says nothing
    about this question."""
    parts = question.parts
    if control == "shuffled":
        others = [stand_ins[file_of(part[0])] for part in parts]
        if any(file_of(other[0]) == file_of(part[0]) for other, part in zip(others, parts, strict=True)):
            return None
        parts = [resample(other, len(part)) for other, part in zip(others, parts, strict=True)]
    videos = [part for part in parts if isinstance(part[0], Frame)]
    if control == "swapped":
        if videos or len(parts) < 2:
            return None
        parts = parts[::-1]
    if control == "shuffled_frames":
        if not videos or any(len(video) < 2 for video in videos):
            return None
        parts = [[part[place] for place in successors(len(part), seed)] for part in parts]
    return [image for part in parts for image in part]
