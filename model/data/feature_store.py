"""Image features on disk: encoded once, read by every epoch, stage and run that shows the same images.

A folder holds segments, each of them two files of numpy's own format:

    NAME.features.npy   (R, N, V) float16 or float32, memory-mapped when read
    NAME.keys.npy       (R, 2) uint64, which images they are of; written last, so a segment without it does
                        not count

An image's key is a hash of its file's BYTES, so an image that was replaced is a new one, and one that was
moved, renamed or is named twice is not. The key of a video's frame is made of its file's and of the moment.
Everything else that decides the features (CLIP's weights, size, normalisation, the way of reading) is in the
name of the folder: see store_name().

Letters: R images of a segment, N tokens per image, V CLIP width.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.data.sources import Embedded
from model.data.video import VERSION as VIDEO_VERSION
from model.data.video import Frame, file_of
from model.files import atomic_write, remove_leftovers
from model.images import check_is_file
from model.vision_utils import ImageProcessor

VERSION = 2  # of the way from a file to pixels; raise it when that changes, and no old feature is served


def image_key(image: str | Path | Frame) -> np.ndarray:
    """128 bits that identify an image, (2,) uint64. Raises FileNotFoundError or ValueError with its name."""
    return image_keys([image])[0]


def image_keys(images: Sequence[str | Path | Frame]) -> list[np.ndarray]:
    """The keys of several images; each file is read once, however many frames of it there are."""
    digests = {path: file_digest(path) for path in dict.fromkeys(map(file_of, images))}
    return [
        np.frombuffer(
            frame_digest(digests[image.video], image.moment) if isinstance(image, Frame) else digests[image],
            np.uint64,
        )
        for image in images
    ]


def file_digest(path: str | Path | Embedded) -> bytes:
    """128 bits of a file's content; an image that stands in a row counts as the file that it was."""
    if isinstance(path, Embedded):
        try:
            return hashlib.blake2b(path.read(), digest_size=16).digest()
        except ValueError as error:
            raise ValueError(f"cannot read image {path}: {error}") from None
    check_is_file(path)
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
    except OSError as error:
        raise ValueError(f"cannot read image {path}: {error.strerror}") from None


def frame_digest(video: bytes, moment: int) -> bytes:
    return hashlib.blake2b(video + repr((VIDEO_VERSION, moment)).encode(), digest_size=16).digest()


@torch.no_grad()
def store_name(vision_model: torch.nn.Module, image_processor: ImageProcessor, dtype: str) -> str:
    """The folder of features that this CLIP, this preprocessing and this dtype make, and no others."""
    config = {
        name: value
        for name, value in vision_model.config.to_dict().items()
        if name != "transformers_version" and not name.startswith("_")
    }  # "_name_or_path" is a place
    digest = hashlib.blake2b(repr((VERSION, image_processor, config)).encode(), digest_size=8)
    for name, tensor in sorted(vision_model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy())
    return f"{digest.hexdigest()}-{dtype}"


class FeatureStore:
    """Features of one CLIP, by image; read-only but for add(), and cheap to hand to worker processes."""

    def __init__(self, folder: str | Path, dtype: str = "float16"):
        self.folder, self.dtype = Path(folder), np.dtype(dtype)
        self.segments: list[np.ndarray] = []  # memory-mapped, (R, N, V) each
        self.keys = np.zeros((0, 2), np.uint64)  # of all images, sorted
        self.places = np.zeros((0, 2), np.int64)  # (segment, row) of each
        self.reload()

    def reload(self) -> None:
        """Take in the segments that are on disk now."""
        keys, places, self.segments = [self.keys[:0]], [self.places[:0]], []
        for path in sorted(self.folder.glob("[0-9a-f]*.keys.npy")):
            keys.append(np.load(path))
            number, count = len(self.segments), len(keys[-1])
            places.append(np.stack([np.full(count, number), np.arange(count)], axis=1))
            self.segments.append(
                np.load(path.with_name(path.name.replace(".keys.", ".features.")), mmap_mode="r")
            )
        every = np.concatenate(keys)
        order = np.lexsort(every.T[::-1])  # by the first half, then by the second
        self.keys, self.places = every[order], np.concatenate(places)[order]

    def __reduce__(self):
        # To a worker that is spawned, not forked: memory-mapped arrays would be copied.
        return FeatureStore, (self.folder, self.dtype.name)

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, key: np.ndarray) -> tuple[int, int] | None:
        """(segment, row) of an image, or None if it is not here."""
        place = int(np.searchsorted(self.keys[:, 0], key[0]))
        while place < len(self.keys) and self.keys[place, 0] == key[0]:
            if self.keys[place, 1] == key[1]:
                return tuple(self.places[place].tolist())
            place += 1
        return None

    def __contains__(self, key: np.ndarray) -> bool:
        return self.find(key) is not None

    def read_all(self, images: Sequence[str | Path | Frame]) -> list[Tensor | None]:
        """The features (N, V) of each image, None where they are not here.

        Raises FileNotFoundError or ValueError, naming the file, if there is none to look at.
        """
        places = [self.find(key) for key in image_keys(images)]
        return [
            None if place is None else torch.from_numpy(np.array(self.segments[place[0]][place[1]]))
            for place in places
        ]

    def add(self, keys: np.ndarray, features: np.ndarray) -> None:
        """Write a segment, keys (R, 2) and features (R, N, V): after any accident it is there whole, or not
        at all. reload() shows it. Raises OSError if the disk is full."""
        # The same images make the same name: what a killed run left half-written is found again.
        name = hashlib.blake2b(keys.tobytes(), digest_size=8).hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        for what, array in (("features", features.astype(self.dtype)), ("keys", keys)):
            path = self.folder / f"{name}.{what}.npy"
            remove_leftovers(path)
            atomic_write(path, lambda file, array=array: np.save(file, array))
