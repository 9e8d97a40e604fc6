"""When a video's frames are shown: what its packets say, read from the file before any is decoded.

A container's own jumps are not trusted: without an index, or with one of decoding times, they end at a later
frame than the one that was asked for. Nor is its duration, which is often that of the sound.

Times are counted in ticks of the stream's clock.
"""

import contextlib
import re
import struct
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

MILLISECOND = Fraction(1, 1000)
MAX_PACKETS = 3_000_000  # of all streams: ten hours of images and sound; 3 microseconds and 200 bytes each
DEFAULT_RATE = 25  # frames per second of a stream that tells neither times nor rate
# Containers, by FFmpeg's names. Those whose header says how long they last:
MP4, MATROSKA, AVI, ASF = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "asf"
HEADED = (MP4, MATROSKA, AVI, ASF, "flv", "ivf")
RECORDED = ("mpegts", "mpeg")  # may begin anywhere in a stream
TIMED = (MP4, MATROSKA, "gif", "apng")  # say how long each frame is shown
UNORDERED = (AVI, ASF)  # keep times of decoding only
ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
# Codecs that can be entered at a key frame; others are decoded from the beginning.
ENTERED = ["h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg1video", "mpeg2video", "mjpeg", "prores"]


@dataclass(frozen=True)
class Timeline:
    """What the packets of a video say.

    tick     seconds
    times    when frames are shown, in ticks, rising
    length   seconds from the first frame to the end of the last
    first    number of the packet to begin with
    entries  (time, number) of packets from which every frame of that time or later can be decoded; rising
    counted  packets do not say when they are shown: the n-th decoded frame is shown at times[n]
    """

    tick: Fraction
    times: list[int]
    length: Fraction
    first: int
    entries: list[tuple[int, int]]
    counted: bool

    def settle(self, moment: Fraction) -> Fraction:
        """A moment in seconds, or the beginning of a frame if that is so near that the clock cannot tell them
        apart: the same stream then shows the same frame in a container with another clock."""
        slack = min(self.tick, MILLISECOND)
        place = bisect_right(self.times, self.times[0] + (moment + slack) / self.tick) - 1
        begins = (self.times[place] - self.times[0]) * self.tick
        return begins if abs(begins - moment) <= slack else moment


class Packet(NamedTuple):
    pts: int | None
    dts: int | None
    duration: int  # 0: unknown
    is_key: bool
    is_shown: bool  # an edit list may hide it


def read_timeline(container, stream, path: str | Path) -> Timeline:
    """From PyAV's container and video stream, which are then at their end. Raises ValueError if the file was
    cut off."""
    packets, latest = read_packets(container, stream)
    first = 0
    if container.format.name in RECORDED:
        first = next((number for number, packet in enumerate(packets) if packet.is_key), 0)
    times, counted = find_times(container, stream, packets[first:])
    if not times:
        raise ValueError("no frame of it can be decoded")
    own, is_sure = last_duration(container, stream, packets, times)
    declared = declared_end(container, stream)
    latest = max(latest, (times[-1] + own) * stream.time_base)
    check_is_whole(path, container, stream, times, latest, declared)
    length = find_length(container, stream, times, own, is_sure, declared)
    entries = [] if counted else find_entries(stream, packets, first)
    return Timeline(stream.time_base, times, length, first, entries, counted)


def demux(container, *streams) -> Iterator:
    """PyAV's packets, without those that are empty."""
    with contextlib.suppress(IndexError):  # at the end, PyAV stumbles over streams that appear late
        for number, packet in enumerate(container.demux(*streams)):
            if number > MAX_PACKETS:
                raise ValueError(f"it holds more than {MAX_PACKETS:,} packets: cut it into parts")
            if packet.size:
                yield packet


def read_packets(container, stream) -> tuple[list[Packet], Fraction]:
    """Of the stream; and the second at which the last packet of any stream ends."""
    packets, ends = [], {}
    for packet in demux(container):
        duration = packet.duration or 0
        if packet.stream is stream:
            packets.append(
                Packet(packet.pts, packet.dts, duration, packet.is_keyframe, not packet.is_discard)
            )
        time = packet.dts if packet.pts is None else packet.pts
        if time is not None:
            ends[packet.stream] = max(ends.get(packet.stream, 0), time + duration)
    return packets, max((end * one.time_base for one, end in ends.items()), default=Fraction(0))


def rate_of(stream) -> Fraction:
    return Fraction(stream.guessed_rate or stream.average_rate or DEFAULT_RATE)


def find_times(container, stream, packets: list[Packet]) -> tuple[list[int], bool]:
    """times and counted of the Timeline."""
    from av.codec.codec import Properties

    reorders = bool(stream.codec_context.codec.properties & Properties.REORDER.value)
    packets = [packet for packet in packets if packet.is_shown]
    if not (reorders and container.format.name in UNORDERED):
        times = [packet.pts for packet in packets]
        if None not in times:
            return sorted(times), False
    times = [packet.pts if packet.dts is None else packet.dts for packet in packets]
    if None in times:
        times = [int(number / rate_of(stream) / stream.time_base) for number in range(len(times))]
    return sorted(times), True


def last_duration(container, stream, packets: list[Packet], times: list[int]) -> tuple[int, bool]:
    """How many ticks the frame is shown that is shown last, and whether there is reason to believe it."""
    own = next((one.duration for one in reversed(packets) if times[-1] in (one.pts, one.dts)), 0)
    gaps = [b - a for a, b in pairwise(times)]
    if gaps and container.format.name not in TIMED and max(gaps) - min(gaps) <= 1:
        return gaps[-1], True  # as all others; its packet may say what was made up from the codec's clock
    return own or (gaps[-1] if gaps else round(1 / rate_of(stream) / stream.time_base)), own > 0


def find_length(
    container, stream, times: list[int], own: int, is_sure: bool, declared: Fraction | None
) -> Fraction:
    """Seconds from the first frame to the end of the last, which lasts `own` ticks, if the header's declared
    end does not know better."""
    tick = stream.time_base
    length = (times[-1] + own - times[0]) * tick
    if declared and (len(container.streams) == 1 or container.format.name == AVI):  # not that of the sound
        last = declared - times[-1] * tick
        if last > 0 and (container.format.name == AVI or not is_sure or last > 4 * own * tick):
            length = declared - times[0] * tick
    exact = len(times) / rate_of(stream)  # ticks are rounded
    return exact if abs(length - exact) <= 2 * min(tick, MILLISECOND) else length


def find_entries(stream, packets: list[Packet], first: int) -> list[tuple[int, int]]:
    """Key frames that are shown later than all that is decoded before them."""
    if stream.codec_context.codec.canonical_name not in ENTERED:
        return []
    entries, latest = [], None
    for number, packet in enumerate(packets[first:], first):
        if latest is None or packet.pts > latest:
            if packet.is_key and packet.is_shown:
                entries.append((packet.pts, number))
            latest = packet.pts
    return entries


# ---- was it cut off? ----


def declared_end(container, stream) -> Fraction | None:
    """The second at which the video ends by the file's header, or whatever in the file ends last."""
    if container.format.name not in HEADED:
        return None
    whole = Fraction(container.duration, 1_000_000) if container.duration else None
    if tag := re.match(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", "")):  # of Matroska
        hours, minutes, seconds = map(Fraction, tag.groups())
        own = hours * 3600 + minutes * 60 + seconds
        return min(own, whole or own)  # it may be of another file, from which this one was made
    length = (stream.duration or 0) * stream.time_base
    if container.format.name == MP4:
        length += (stream.start_time or 0) * stream.time_base
    elif container.format.name in (AVI, "ivf"):  # their number of frames is one of ticks
        length = max(length, stream.frames * stream.time_base)
    return length or whole


def check_is_whole(
    path: str | Path, container, stream, times: list[int], latest: Fraction, declared: Fraction | None
) -> None:
    """Raise ValueError if a file is shorter than it says, and frames are missing.

    times     when the frames are shown, in ticks
    latest    the second at which the last packet of any stream ends
    declared  the second at which it should
    """
    size = declared_size(path, container, stream)
    if size is not None and size <= container.size:
        return
    if container.format.name == "ivf" and stream.frames <= len(times):
        return
    # Without a size, the end alone must tell, and headers are wrong by a little.
    slack = max((b - a for a, b in pairwise(times)), default=0) * stream.time_base
    slack = max(slack, Fraction(1, 5) if size or container.format.name == "ivf" else Fraction(2))
    if declared is None and size:
        raise ValueError(f"it ends after {float(latest):.1f} s, in the middle of its file; was it cut off?")
    if declared is not None and declared - latest > slack:
        raise ValueError(
            f"it ends after {float(latest):.1f} s, though it should last {float(declared):.1f} s; "
            "was it cut off?"
        )


def declared_size(path: str | Path, container, stream) -> int | None:
    """How many bytes a file should have by its own header; None where that does not say."""
    if container.format.name == MP4:
        if not stream.frames:  # one in fragments, which follow as they were recorded
            return None
        return max((entry.pos + entry.size for entry in stream.index_entries), default=None)
    with open(path, "rb") as file:
        head = file.read(1 << 14)
        if container.format.name == AVI:  # of chunks, one after the other
            size, chunk = 0, head[:8]
            while chunk.startswith(b"RIFF"):
                size += 8 + int.from_bytes(chunk[4:], "little")
                file.seek(size)
                chunk = file.read(8)
            return size
    marks = {MATROSKA: b"\x18\x53\x80\x67", "flv": b"filesize\0", ASF: ASF_PROPERTIES}
    mark = marks.get(container.format.name)
    if mark is None or mark not in head:
        return None
    place = head.index(mark) + len(mark)
    if container.format.name == "flv":
        return int(*struct.unpack(">d", head[place : place + 8])) or None
    if container.format.name == ASF:  # behind the object's own size and an identity
        return int.from_bytes(head[place + 24 : place + 32], "little") or None
    width = 9 - head[place].bit_length()  # of a segment's size: the first bit that is set tells
    size = int.from_bytes(head[place : place + width]) - (1 << 7 * width)
    return None if size == (1 << 7 * width) - 1 else place + width + size  # all ones: a live recording
