"""How the data of one stage differs from another's: three values, not three classes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetSpec:
    """What a row of a stage may hold."""

    min_images: int = 1  # images and videos per row, at least
    max_images: int = 1  # images per row, at most
    max_frames: int = 0  # of each video, at most; 0 = no videos, and <video> is a word like others
    frames_per_second: float = 1.0  # of a video that is short enough for it
    max_rounds: int = 0  # question-answer rounds to keep; 0 = all
    image_prefix: str = ""  # tried in front of a file name that is not found as it stands


PRETRAIN = DatasetSpec()
# v1 keeps the first round only, lest long texts drag a small model down. Its rows name 000000334872.jpg,
# while the files of sft_images.zip are called COCO_train2014_000000334872.jpg.
SFT = DatasetSpec(max_rounds=1, image_prefix="COCO_train2014_")
SFT_MULTI = DatasetSpec(max_images=2, max_frames=8)
TEXT = DatasetSpec(min_images=0, max_images=0)  # a language model's conversations
