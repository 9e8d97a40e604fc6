"""A video as a row of key frames, each of them an image like any other.

A video of D seconds is cut into n equal parts, n = D * frames_per_second, but at least 1 and at most
max_frames, and what is shown in the middle of each part is looked at: its beginning and its end count as much
as the rest, and a video of one frame per second gives exactly its frames.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from PIL import Image
from torch import Tensor

from model.images import check_is_file, explain_damage, open_image
from model.prompt import IMAGE_MARK, VIDEO_MARK, Renderer, expand_marks, find_marks, normalise_turns
from model.vision_utils import ImageProcessor, get_img_process, load_pixels

VERSION = 1  # of the way from a video to its frames; see feature_store.VERSION
MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # of a frame; 89 millions, where Pillow begins to fear a bomb
MICRO = 1_000_000  # microseconds per second
SEEK_GAP = 2 * MICRO  # a shorter way to the next moment is decoded instead of jumped over
# What may be found in a video's file, whatever its name: no play lists, which would open other files.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,m4v,h264,hevc,flv,ogg,asf,gif,"
    "nut,ivf,dv,mjpeg,mp3,wav,flac,aac"
)  # the last four, to say that there is nothing to see
DEFAULT_RATE = 25  # frames per second of a stream that tells neither times nor rate


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
        length = video_length(container, stream)
        count = max(1, min(max_frames, round(length * Fraction(frames_per_second))))
        return [
            Frame(Path(path), int(length * MICRO * (2 * number + 1) / (2 * count))) for number in range(count)
        ]


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


def open_images(images: Iterable[Path | Frame]) -> Iterator[Image.Image]:
    """Image files and frames of videos as RGB images, one at a time; the successive frames of a video are
    decoded in one pass. Raises FileNotFoundError or ValueError, naming the file."""
    for part in one_pass(images):
        yield from decode_frames(part) if isinstance(part[0], Frame) else [open_image(part[0])]


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
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # the file may say less than it holds
    return stream


def check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"its frames have {width} x {height} pixels; at most {MAX_PIXELS:,} are read")


def video_length(container, stream) -> Fraction:
    """Seconds from the first frame to the end of the last. Where the file does not say, its packets are read
    through, but not decoded."""
    if stream.duration and stream.duration > 0:
        return stream.duration * stream.time_base
    if container.duration and container.duration > 0:
        return Fraction(container.duration, MICRO)
    times, count = [], 0
    for packet in container.demux(stream):
        if packet.size:
            count += 1
            if packet.pts is not None:
                times += [packet.pts, packet.pts + (packet.duration or 0)]
                times = [min(times), max(times)]
    told = (times[1] - times[0]) * stream.time_base if times else Fraction(0)
    return told or count / rate_of(stream)


def rate_of(stream) -> Fraction:
    return Fraction(stream.guessed_rate or stream.average_rate or DEFAULT_RATE)


def decode_frames(wanted: list[Frame]) -> Iterator[Image.Image]:
    """Frames of one video, in the order of time, as RGB images. Holds two decoded frames at a time."""
    moments = [frame.moment for frame in wanted]
    with open_video(wanted[0].video) as (container, stream):
        can_seek = bool(stream.duration or container.duration)  # streams that tell no times cannot
        gap = (moments[-1] - moments[0]) // max(1, len(moments) - 1)
        frames, shown, following = timed_frames(container, stream), None, None
        position = 0
        for moment in moments:
            if can_seek and moment - position > SEEK_GAP:
                start = stream.start_time or 0
                container.seek(start + int(Fraction(moment, MICRO) / stream.time_base), stream=stream)
                frames, shown, following = timed_frames(container, stream), None, None
            if following is None:
                following = next(frames, None)
            while following and (shown is None or following[0] <= moment):
                shown, following = following, next(frames, None)
            if shown is None:
                raise ValueError("no frame of it can be decoded")
            time, frame = shown
            if following is None and moment - time > max(gap, SEEK_GAP):
                raise ValueError(
                    f"it ends after {time / MICRO:.1f} s, though it should last longer than "
                    f"{moment / MICRO:.1f} s; was it cut off?"
                )
            check_size(frame.width, frame.height)
            position = moment
            # The angle is the one that a player turns by, counter-clockwise as Pillow counts it.
            yield frame.to_image().rotate(frame.rotation, expand=True)


def timed_frames(container, stream) -> Iterator[tuple[int, object]]:
    """(microseconds since the video's beginning, frame) of all frames from where the container stands."""
    start = stream.start_time or 0
    for number, frame in enumerate(container.decode(stream)):
        if frame.pts is None:
            yield int(number * MICRO / rate_of(stream)), frame
        else:
            yield int((frame.pts - start) * stream.time_base * MICRO), frame
