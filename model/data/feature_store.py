"""Image features on disk: encoded once, read by every epoch, stage and run that shows the same images.

A folder holds segments, each of them two files of numpy's own format:

    NAME.features.npy   (R, N, V) float16 or float32
    NAME.keys.npy       (R, 4) uint64: which image each is of, two numbers, and a digest of its features, two
                        more; behind them, where numpy does not look, the header of the other file and a seal
                        (sealed.py). Written last: a segment without it does not count

The keys are verified when a store is opened, and an image's features whenever they are read: what is damaged
is never served, and to open 40 GB takes no minutes.

An image's key is a hash of its file's BYTES, so an image that was replaced is a new one, and one that was
moved, renamed or is named twice is not. The key of a video's frame is made of its file's and of the moment.
Everything else that decides the features (CLIP's weights, size, normalisation, the way of reading) is in the
name of the folder: see store_name().

Letters: R images of a segment, N tokens per image, V CLIP width.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.data.sealed import seal, unseal
from model.data.sources import Embedded
from model.data.steady import LostFile, SteadyFile
from model.data.video import VERSION as VIDEO_VERSION
from model.data.video import Frame, file_of
from model.files import write_together
from model.images import check_is_file
from model.vision_utils import ImageProcessor

VERSION = 2  # of the way from a file to pixels; raise it when that changes, and no old feature is served
FORMAT = 2  # of the files; another one's are not found
MAX_OPEN = 256  # files of features that a process holds open


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
            return path.digest()
        except ValueError as error:
            raise ValueError(f"cannot read image {path}: {error}") from None
    check_is_file(path)
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()  # image_digest
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
    digest = hashlib.blake2b(repr((VERSION, FORMAT, image_processor, config)).encode(), digest_size=8)
    for name, tensor in sorted(vision_model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy())
    return f"{digest.hexdigest()}-{dtype}"


@dataclass
class Segment:
    """One pair of files: where the features of its images lie."""

    path: Path  # of the features
    offset: int  # of the first image's, in bytes
    shape: tuple[int, int]  # (N, V)


class FeatureStore:
    """Features of one CLIP, by image; read-only but for add(), and cheap to hand to worker processes.

    damaged  keys files of segments that are not as they were written, and what is wrong with each; their
             images are not here
    """

    def __init__(self, folder: str | Path, dtype: str = "float16"):
        self.folder, self.dtype = Path(folder), np.dtype(dtype)
        self.keys = np.zeros((0, 2), np.uint64)  # of all images, sorted
        self.digests = np.zeros((0, 2), np.uint64)  # of the features of each
        self.places = np.zeros((0, 2), np.int64)  # (segment, row) of each
        self.num_expected = 0  # images that were here when the store was handed to this process
        self.reload()

    def reload(self) -> None:
        """Take in the segments that are on disk now."""
        self.segments: list[Segment] = []
        self.damaged: dict[Path, str] = {}
        self.files: dict[int, SteadyFile] = {}
        tables, places = [np.zeros((0, 4), np.uint64)], [self.places[:0]]
        for path in sorted(self.folder.glob("[0-9a-f]*.keys.npy")):
            try:
                segment, table = self.open_segment(path)
            except (OSError, ValueError) as error:
                self.damaged[path] = getattr(error, "strerror", None) or str(error)
                continue
            places.append(np.stack([np.full(len(table), len(self.segments)), np.arange(len(table))], axis=1))
            tables.append(table)
            self.segments.append(segment)
        table = np.concatenate(tables)
        order = np.lexsort((table[:, 1], table[:, 0]))
        self.keys, self.digests = table[order, :2], table[order, 2:]
        self.places = np.concatenate(places)[order]

    def open_segment(self, path: Path) -> tuple[Segment, np.ndarray]:
        """A segment and its table (R, 4), by its keys file. Raises OSError or ValueError if one of its two
        files is not as it was written."""
        content = io.BytesIO(unseal(path.read_bytes(), self.owner(path)))
        table, header = np.load(content), content.read()
        content.seek(-len(header), io.SEEK_END)
        np.lib.format.read_magic(content)
        (count, *shape), _, dtype = np.lib.format.read_array_header_1_0(content)
        features = features_of(path)
        with open(features, "rb") as file:
            if file.read(len(header)) != header or dtype != self.dtype:
                raise ValueError(f"the header of {features.name} is another")
            if file.seek(0, io.SEEK_END) != len(header) + dtype.itemsize * count * shape[0] * shape[1]:
                raise ValueError(f"the size of {features.name} is another")
        return Segment(features, len(header), tuple(shape)), table

    def owner(self, path: Path) -> str:
        """What a keys file belongs to."""
        return f"{self.folder.name} {path.name}"

    def __reduce__(self):
        # To a worker that is spawned, not forked: the keys would be copied.
        return reopen, (self.folder, self.dtype.name, len(self))

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, key: np.ndarray) -> int | None:
        """The place of an image among all keys, or None if it is not here."""
        place = int(np.searchsorted(self.keys[:, 0], key[0]))
        while place < len(self.keys) and self.keys[place, 0] == key[0]:
            if self.keys[place, 1] == key[1]:
                return place
            place += 1
        return None

    def __contains__(self, key: np.ndarray) -> bool:
        return self.find(key) is not None

    def read_all(self, images: Sequence[str | Path | Frame]) -> list[Tensor | None]:
        """The features (N, V) of each image, None where they are not here.

        Raises FileNotFoundError or ValueError, naming the file, if there is none to look at, and LostFile if
        its features are not what was written.
        """
        places = [self.find(key) for key in image_keys(images)]
        if None in places and len(self) < self.num_expected:
            raise LostFile(f"{self.folder} was changed while it was in use")
        return [None if place is None else self.read(place) for place in places]

    def read(self, place: int) -> Tensor:
        """(N, V)"""
        number, row = self.places[place].tolist()
        segment = self.segments[number]
        num_bytes = self.dtype.itemsize * segment.shape[0] * segment.shape[1]
        cure = "start again without this file, and its images are encoded anew"
        try:
            content = self.file(number).read(segment.offset + row * num_bytes, num_bytes)
        except OSError as error:
            reason = error.strerror or "it was changed while it was in use"
            raise LostFile(f"cannot read {segment.path} ({reason}): {cure}") from None
        if (digest_of(content) != self.digests[place]).any():
            raise LostFile(f"{segment.path} is damaged in row {row}: {cure}")
        return torch.from_numpy(np.frombuffer(bytearray(content), self.dtype).reshape(segment.shape))

    def file(self, number: int) -> SteadyFile:
        """The features of a segment, open."""
        if number not in self.files:
            if len(self.files) >= MAX_OPEN:
                self.files.pop(next(iter(self.files)))
            self.files[number] = SteadyFile(self.segments[number].path)
        return self.files[number]

    def add(self, keys: np.ndarray, features: np.ndarray) -> None:
        """Write a segment, keys (R, 2) and features (R, N, V): after any accident it is there whole, or not
        at all. reload() shows it. Raises OSError if the disk is full, ValueError for features that are not
        finite in the store's dtype."""
        with np.errstate(over="ignore"):
            features = np.ascontiguousarray(features, self.dtype)
        if not np.isfinite(features).all():
            raise ValueError(f"features that are not finite in {self.dtype.name} are not kept")
        table = np.concatenate([keys, np.stack([digest_of(row) for row in features])], axis=1)
        header, content = io.BytesIO(), io.BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(features))
        np.save(content, table)
        content.write(header.getvalue())
        # The same content makes the same name: two runs that write one segment write the same files.
        path = self.folder / f"{hashlib.blake2b(table.tobytes(), digest_size=8).hexdigest()}.keys.npy"
        sealed = seal(content.getvalue(), self.owner(path))
        self.folder.mkdir(parents=True, exist_ok=True)
        write_together(
            {
                features_of(path): lambda file: file.write(header.getvalue()) + file.write(features),
                path: lambda file: file.write(sealed),
            }
        )


def features_of(keys: Path) -> Path:
    return keys.with_name(keys.name.replace(".keys.", ".features."))


def digest_of(features: np.ndarray | bytes) -> np.ndarray:
    """128 bits of one image's features, (2,) uint64; 0.1 ms."""
    return np.frombuffer(hashlib.sha256(features).digest()[:16], np.uint64)


def reopen(folder: Path, dtype: str, num_expected: int) -> FeatureStore:
    store = FeatureStore(folder, dtype)
    store.num_expected = num_expected
    return store
