"""A film as a row of key frames, each of them a picture like any other.

A film of D seconds is cut into n equal parts, n = D * frames_per_second, but at least 1 and at most
max_frames, and what is shown in the middle of each part is looked at: its beginning and its end count as much
as the rest, and a film of one frame per second gives exactly its frames.
"""
import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from PIL import Image
from torch import Tensor

from model.prompt import (
    IMAGE_MARK,
    VIDEO_MARK,
    expand_films,
    find_marks,
    frames_that_fit,
    normalise_turns,
    render_conversation,
)
from model.vision_utils import (
    ImageProcessor,
    check_is_file,
    explain_damage,
    get_img_process,
    load_pixels,
    open_image,
)

VERSION = 1                             # of the way from a film to its frames; see feature_store.VERSION
MAX_PIXELS = Image.MAX_IMAGE_PIXELS     # of a frame; 89 millions, where Pillow begins to fear a bomb
MICRO = 1_000_000                       # microseconds per second
SEEK_GAP = 2 * MICRO                    # a shorter way to the next moment is decoded instead of jumped over
# What may be found in a film's file, whatever its name: no play lists, which would open other files.
FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,m4v,h264,hevc,flv,ogg,asf,gif,"
           "nut,ivf,dv,mjpeg,mp3,wav,flac,aac")      # the last four, to say that there is nothing to see
DEFAULT_RATE = 25                       # frames per second of a stream that tells neither times nor rate


@dataclass(frozen=True)
class Frame:
    """What a film shows at one moment, in microseconds from its first frame; stands where a picture's path
    may stand."""

    film: Path
    moment: int

    def __str__(self) -> str:
        return f"{self.film} at {self.moment / MICRO:.3f} s"


def file_of(picture: Path | Frame) -> Path:
    return picture.film if isinstance(picture, Frame) else picture


def read_frames(path: str | Path, max_frames: int = 8, frames_per_second: float = 1.0) -> list[Image.Image]:
    """The key frames of a film, in RGB and upright. Raises FileNotFoundError or ValueError, naming the file,
    whatever is wrong with it."""
    return list(open_pictures(find_frames(path, max_frames, frames_per_second)))


def find_frames(path: str | Path, max_frames: int = 8, frames_per_second: float = 1.0) -> list[Frame]:
    """Which frames a film is looked at: the middles of equal parts. Decodes nothing; raises as read_frames()
    does."""
    with open_film(path) as (container, stream):
        length = film_length(container, stream)
        count = max(1, min(max_frames, round(length * Fraction(frames_per_second))))
        return [Frame(Path(path), int(length * MICRO * (2 * number + 1) / (2 * count)))
                for number in range(count)]


def lay_out(turns: list[dict], files: list[Path], tokenizer, num_image_tokens: int, max_seq_len: int,
            max_frames: int, frames_per_second: float) -> tuple[list[list[Path | Frame]], list[dict]]:
    """What a conversation shows, and how it is rendered.

    files    pictures and films, in the order of their marks
    returns  for each mark a picture or the frames of a film, and turns with one image mark for each of these;
             films bring fewer frames where else the prompt would not fit max_seq_len
    raises   FileNotFoundError or ValueError, naming the film, if one cannot be read
    """
    marks = find_marks(normalise_turns(turns))
    num_films = len(files) - marks.count(IMAGE_MARK)
    if not num_films:       # "<video>" is then a word like any other
        return [[path] for path in files], turns
    shortest = render_conversation(expand_films(turns, [1] * num_films), tokenizer, num_image_tokens)
    most = frames_that_fit(shortest, num_films, max_seq_len, max_frames)
    parts = [[path] if mark == IMAGE_MARK else find_frames(path, most, frames_per_second)
             for path, mark in zip(files, marks, strict=True)]
    counts = [len(part) for part, mark in zip(parts, marks, strict=True) if mark == VIDEO_MARK]
    return parts, expand_films(turns, counts)


def open_pictures(pictures: Iterable[Path | Frame]) -> Iterator[Image.Image]:
    """Picture files and frames of films as RGB images, one at a time; the successive frames of a film are
    decoded in one pass. Raises FileNotFoundError or ValueError, naming the file."""
    for part in one_pass(pictures):
        yield from decode_frames(part) if isinstance(part[0], Frame) else [open_image(part[0])]


def one_pass(pictures: Iterable[Path | Frame]) -> list[list[Path | Frame]]:
    """Cut into parts that are read in one pass: one picture, or frames of one film in the order of time."""
    parts: list[list[Path | Frame]] = []
    for picture in pictures:
        last = parts[-1][-1] if parts else None
        if (isinstance(picture, Frame) and isinstance(last, Frame)
                and picture.film == last.film and picture.moment >= last.moment):
            parts[-1].append(picture)
        else:
            parts.append([picture])
    return parts


def load_pictures(pictures: Iterable[Path | Frame], image_processor: ImageProcessor) -> list[Tensor]:
    """The same as CLIP's input, (3, S, S) each."""
    pixels = []
    for part in one_pass(pictures):
        if isinstance(part[0], Frame):
            pixels += [get_img_process(image, image_processor) for image in decode_frames(part)]
        else:
            pixels.append(load_pixels(part[0], image_processor))
    return pixels


@contextlib.contextmanager
def open_film(path: str | Path) -> Iterator[tuple]:
    """PyAV's container and video stream of a film, checked. Raises FileNotFoundError or ValueError, naming
    the file; what goes wrong inside the `with` becomes such a ValueError too."""
    import av  # here, because pictures need not wait for it

    check_is_file(path, "film")
    try:
        # "file:", or a name with a colon would be taken for an address.
        with av.open(f"file:{os.fspath(path)}", metadata_errors="replace",
                     options={"format_whitelist": FORMATS, "protocol_whitelist": "file"}) as container:
            yield container, find_stream(container)
    except Exception as error:      # damaged films raise any of FFmpeg's types, and some of Python's
        reason = explain_damage(path, getattr(error, "strerror", None) or error)
        raise ValueError(f"cannot read film {path}: {reason}") from None


def find_stream(container):
    """The moving pictures of a file. Raises ValueError if it has none, or too large ones."""
    cover = "attached_pic"      # of a record; no film
    streams = [stream for stream in container.streams.video if cover not in str(stream.disposition)]
    if not streams:
        raise ValueError("it holds sound, but no moving pictures" if container.streams.audio
                         else "it holds no moving pictures")
    stream = streams[0]
    check_size(stream.codec_context.width, stream.codec_context.height)
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}      # the file may say less than it holds
    return stream


def check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"its frames have {width} x {height} pixels; at most {MAX_PIXELS:,} are read")


def film_length(container, stream) -> Fraction:
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
    """Frames of one film, in the order of time, as RGB images. Holds two decoded frames at a time."""
    moments = [frame.moment for frame in wanted]
    with open_film(wanted[0].film) as (container, stream):
        can_seek = bool(stream.duration or container.duration)      # streams that tell no times cannot
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
                raise ValueError(f"it ends after {time / MICRO:.1f} s, though it should last longer than "
                                 f"{moment / MICRO:.1f} s; was it cut off?")
            check_size(frame.width, frame.height)
            position = moment
            # The angle is the one that a player turns by, counter-clockwise as Pillow counts it.
            yield frame.to_image().rotate(frame.rotation, expand=True)


def timed_frames(container, stream) -> Iterator[tuple[int, object]]:
    """(microseconds since the film's beginning, frame) of all frames from where the container stands."""
    start = stream.start_time or 0
    for number, frame in enumerate(container.decode(stream)):
        if frame.pts is None:
            yield int(number * MICRO / rate_of(stream)), frame
        else:
            yield int((frame.pts - start) * stream.time_base * MICRO), frame
