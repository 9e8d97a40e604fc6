"""A video as a row of key frames, each of them an image like any other.

A video of D seconds is cut into n equal parts, n = D * frames_per_second, but at least 1 and at most
max_frames, and what is shown in the middle of each part is looked at: its beginning and its end count as much
as the rest, and a video of one frame per second gives exactly its frames.

The packets of a video are read twice, which costs little beside decoding: once to learn when each is shown
(timeline.py), and once to decode those that the wanted frames need.
"""

import contextlib
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path

from PIL import Image
from torch import Tensor

from model.data.timeline import Timeline, demux, read_timeline
from model.image_limits import MAX_FRAME_PIXELS
from model.image_modes import to_rgb
from model.images import check_is_file, explain_damage, open_image
from model.prompt import IMAGE_MARK, VIDEO_MARK, Renderer, expand_marks, find_marks, normalise_turns
from model.vision_utils import ImageProcessor, get_img_process, load_pixels

VERSION = 2  # of the way from a video to its frames; see feature_store.VERSION
MAX_DECODED = 400_000_000_000  # pixels for the frames of one video: two hours of 1080p without an entry
MICRO = 1_000_000  # microseconds per second
SEEK_GAP = 2 * MICRO  # a shorter way to the next moment is decoded, of a longer one the end at most
# What may be found in a video's file, whatever its name: no play lists, which would open other files.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,m4v,h264,hevc,flv,ogg,asf,gif,"
    "nut,ivf,dv,mjpeg,apng,mp3,wav,flac,aac"
)  # the last four, to say that there is nothing to see
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own do not see transparency


@dataclass(frozen=True)
class Frame:
    """What a video shows at one moment, in microseconds from its first frame; stands where an image's path
    may stand."""

    video: Path
    moment: int

    def __str__(self) -> str:
        return f"{self.video} at {self.moment / MICRO:.3f} s"


def file_of(image: Path | Frame) -> Path:
    return image.video if isinstance(image, Frame) else image


def read_frames(path: str | Path, max_frames: int = 8, frames_per_second: float = 1.0) -> list[Image.Image]:
    """The key frames of a video, in RGB and upright. Raises FileNotFoundError or ValueError, naming the file,
    whatever is wrong with it."""
    return list(open_images(find_frames(path, max_frames, frames_per_second)))


def find_frames(path: str | Path, max_frames: int = 8, frames_per_second: float = 1.0) -> list[Frame]:
    """Which frames a video is looked at: the middles of equal parts. Decodes nothing; raises as read_frames()
    does."""
    with open_video(path) as (container, stream):
        timeline = read_timeline(container, stream, path)
    count = max(1, min(max_frames, round(timeline.length * Fraction(frames_per_second))))
    middles = [timeline.length * (2 * number + 1) / (2 * count) for number in range(count)]
    return [Frame(Path(path), int(timeline.settle(middle) * MICRO)) for middle in middles]


def expand_videos(
    turns: list[dict], files: list[Path], renderer: Renderer, max_frames: int, frames_per_second: float
) -> tuple[list[list[Path | Frame]], list[dict]]:
    """What a conversation shows, and how it is rendered.

    files    images and videos, in the order of their marks
    returns  for each mark an image or the frames of a video, and turns with one image mark for each of these;
             videos bring fewer frames where else the prompt would not fit max_seq_len
    raises   FileNotFoundError or ValueError, naming the video, if one cannot be read
    """
    marks = find_marks(normalise_turns(turns))
    num_videos = len(files) - marks.count(IMAGE_MARK)
    if not num_videos:  # "<video>" is then a word like any other
        return [[path] for path in files], turns
    shortest = renderer.render(expand_marks(turns, [1] * num_videos))
    most = renderer.frames_that_fit(shortest, num_videos, max_frames)
    parts = [
        [path] if mark == IMAGE_MARK else find_frames(path, most, frames_per_second)
        for path, mark in zip(files, marks, strict=True)
    ]
    counts = [len(part) for part, mark in zip(parts, marks, strict=True) if mark == VIDEO_MARK]
    return parts, expand_marks(turns, counts)


def open_images(images: Iterable[str | Path | Frame | Image.Image]) -> Iterator[Image.Image]:
    """Image files and frames of videos as RGB images, one at a time, and PIL images as they are; the
    successive frames of a video are decoded in one pass. Raises FileNotFoundError or ValueError, naming the
    file."""
    for part in one_pass(images):
        if isinstance(part[0], Frame):
            yield from decode_frames(part)
        else:
            yield part[0] if isinstance(part[0], Image.Image) else open_image(part[0])


def one_pass(images: Iterable[Path | Frame]) -> list[list[Path | Frame]]:
    """Cut into parts that are read in one pass: one image, or frames of one video in the order of time."""
    parts: list[list[Path | Frame]] = []
    for image in images:
        last = parts[-1][-1] if parts else None
        if (
            isinstance(image, Frame)
            and isinstance(last, Frame)
            and image.video == last.video
            and image.moment >= last.moment
        ):
            parts[-1].append(image)
        else:
            parts.append([image])
    return parts


def load_images(images: Iterable[Path | Frame], image_processor: ImageProcessor) -> list[Tensor]:
    """The same as CLIP's input, (3, S, S) each."""
    pixels = []
    for part in one_pass(images):
        if isinstance(part[0], Frame):
            pixels += [get_img_process(image, image_processor) for image in decode_frames(part)]
        else:
            pixels.append(load_pixels(part[0], image_processor))
    return pixels


@contextlib.contextmanager
def open_video(path: str | Path) -> Iterator[tuple]:
    """PyAV's container and video stream of a video, checked. Raises FileNotFoundError or ValueError, naming
    the file; what goes wrong inside the `with` becomes such a ValueError too."""
    import av  # here, because images need not wait for it

    check_is_file(path, "video")
    try:
        # "file:", or a name with a colon would be taken for an address.
        with av.open(
            f"file:{os.fspath(path)}",
            metadata_errors="replace",
            options={"format_whitelist": FORMATS, "protocol_whitelist": "file"},
        ) as container:
            yield container, find_stream(container)
    except Exception as error:  # damaged videos raise any of FFmpeg's types, and some of Python's
        reason = explain_damage(path, getattr(error, "strerror", None) or error)
        raise ValueError(f"cannot read video {path}: {reason}") from None


def find_stream(container):
    """The video stream of a file. Raises ValueError if it has none, or too large ones."""
    cover = "attached_pic"  # of a record; no video
    streams = [stream for stream in container.streams.video if cover not in str(stream.disposition)]
    if not streams:
        raise ValueError(
            "it holds sound, but no video stream" if container.streams.audio else "it holds no video stream"
        )
    stream = streams[0]
    check_size(stream.codec_context.width, stream.codec_context.height)
    stream.codec_context.options = {
        "max_pixels": str(MAX_FRAME_PIXELS)
    }  # the file may say less than it holds
    return stream


def check_size(width: int, height: int) -> None:
    if width * height > MAX_FRAME_PIXELS:
        raise ValueError(f"its frames have {width} x {height} pixels; at most {MAX_FRAME_PIXELS:,} are read")


def decode_frames(wanted: list[Frame]) -> Iterator[Image.Image]:
    """Frames of one video, in the order of time, as RGB images. Holds few decoded frames at a time."""
    path = wanted[0].video
    with open_video(path) as (container, stream):
        timeline = read_timeline(container, stream, path)
    done, back, budget = 0, 0, Budget(MAX_DECODED)
    while done < len(wanted):
        with open_video(path) as (container, stream):
            reader = Reader(container, stream, timeline, budget)
            for moment in [frame.moment for frame in wanted[done:]]:
                frame = reader.show(moment, back)
                if frame is None:
                    back = max(1, 2 * back)
                    break
                yield to_image(frame)
                done += 1


class Budget:
    """How many pixels may still be decoded: a small file can hold hours of large frames that are alike."""

    def __init__(self, num_pixels: int):
        self.most = self.left = num_pixels

    def take(self, num_pixels: int) -> None:
        self.left -= num_pixels
        if self.left < 0:
            raise ValueError(
                f"more than {self.most:,} pixels would have to be decoded: cut it, scale it down, or save it "
                "with more key frames"
            )


class Reader:
    """Decodes a video forwards, and passes over what is not needed."""

    def __init__(self, container, stream, timeline: Timeline, budget: Budget):
        self.timeline, self.decoder, self.budget = timeline, find_decoder(stream), budget
        self.packets = demux(container, stream)
        self.taken = 0  # packets that were decoded or passed over
        self.pass_over(timeline.first)
        self.start = None  # when the first frame is shown, in ticks
        self.position = 0  # the last moment that was asked for
        self.trusted = None  # after a jump: the moment from which on all must be right
        self.begin()
        if self.following is None:
            raise ValueError("no frame of it can be decoded")

    def begin(self) -> None:
        self.frames, self.shown, self.spoiled = timed_frames(self), None, False
        self.following = next(self.frames, None)

    def show(self, moment: int, back: int):
        """The frame that is shown at a moment; None if what was passed over would have been needed.

        back  begin so many entries earlier than should be necessary
        """
        try:
            if moment - self.position > SEEK_GAP:
                self.jump(moment, back)
            while self.following and (self.shown is None or self.following[0] <= moment):
                self.shown, self.following = self.following, next(self.frames, None)
                # What is made up for missing parts depends on all that was decoded before.
                self.spoiled |= self.shown[1].is_corrupt
        except Exception:  # a decoder that lacks something raises any of FFmpeg's types
            if self.trusted is None:
                raise
            return None
        self.position = moment
        time, frame = self.shown
        if self.trusted is not None and (self.spoiled or time < self.trusted):
            return None
        return frame

    def jump(self, moment: int, back: int) -> None:
        """To the last entry before a moment, if that is ahead."""
        entries = self.timeline.entries
        time = self.start + moment / self.timeline.tick / MICRO
        place = bisect_right(entries, time, key=lambda entry: entry[0]) - 1
        if place - back < 0 or entries[place - back][1] <= self.taken:
            return
        self.trusted = self.moment(entries[place][0])
        self.decoder.flush_buffers()
        self.pass_over(entries[place - back][1])
        self.begin()
        if self.following is None or self.following[0] > self.trusted:
            raise ValueError("it cannot be entered there")

    def pass_over(self, number: int) -> None:
        """Go on with the packet of that number."""
        self.taken += sum(1 for _ in islice(self.packets, number - self.taken))

    def decode(self) -> Iterator:
        for packet in chain(self.packets, [None]):  # None: what it still holds
            self.taken += packet is not None
            for frame in self.decoder.decode(packet):
                self.budget.take(frame.width * frame.height)
                yield frame

    def moment(self, time: int) -> int:
        """Microseconds from the first frame."""
        return int((time - self.start) * self.timeline.tick * MICRO)


def find_decoder(stream):
    """The stream's own, or one that sees transparency."""
    codec = stream.codec_context
    if stream.metadata.get("alpha_mode") == "1" and codec.name in ALPHA_DECODERS:
        import av

        codec, options = av.CodecContext.create(ALPHA_DECODERS[codec.name], "r"), codec.options
        codec.options = options
    return codec


def timed_frames(reader: Reader) -> Iterator[tuple[int, object]]:
    """(microseconds from the video's first frame, frame) of all frames from where the reader stands."""
    timeline = reader.timeline
    for number, frame in enumerate(reader.decode()):
        time = frame.pts
        if timeline.counted or time is None:
            if reader.trusted is not None:
                raise ValueError("its frames cannot be counted")
            time = timeline.times[min(number, len(timeline.times) - 1)]
        if reader.start is None:
            reader.start = time
        yield reader.moment(time), frame


def to_image(frame) -> Image.Image:
    """Of a decoded frame: in RGB, upright, on white paper."""
    check_size(frame.width, frame.height)
    shape = frame.format
    if shape.has_palette or any(component.is_alpha for component in shape.components):
        image = to_rgb(Image.fromarray(frame.to_ndarray(format="rgba")))
    else:
        image = frame.to_image()
    # The angle is the one that a player turns by, counter-clockwise as Pillow counts it.
    return image.rotate(frame.rotation, expand=True)
