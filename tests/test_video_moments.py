"""Every moment of a video, asked for alone, shows what reading it through shows: in every container, with
every codec, at every rate."""

import re
import struct
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise, product
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from model.data import video
from model.data.video import Frame, decode_frames, find_frames, read_frames
from model.images import to_rgb

RATES = ("1", "5", "24", "30000/1001", "1/5", "uneven")
UNEVEN = [0, 1, 2, 3, 10, 11, 12, 34, 35, 38, 40, 56, 57, 58, 80, 81]  # at 25 frames per second
OPTIONS = {
    "libx264": {"preset": "ultrafast"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:keyint=6:min-keyint=6"},
    "libsvtav1": {"preset": "10"},
    "libvpx": {"auto-alt-ref": "1", "lag-in-frames": "8", "arnr-maxframes": "5", "cpu-used": "8"},
    "libvpx-vp9": {"cpu-used": "8"},
}
REORDERED = ("libx264", "mpeg4", "mpeg2video", "mpeg1video")  # those that may store frames out of order
PIXELS = {
    "mjpeg": "yuvj420p",
    "gif": "rgb8",
    "apng": "rgb24",
    "qtrle": "rgb24",
    "png": "rgb24",
    "prores_ks": "yuv422p10le",
}
# Codec, frames between two key frames that are stored out of order, containers.
STREAMS = [
    ("libx264", 0, "mp4 ts flv"),
    ("libx264", 2, "mp4 mkv ts flv mov avi nut asf mpg h264"),
    ("libx265", 2, "mp4 mkv ts flv hevc"),
    ("mpeg4", 0, "avi ts"),
    ("mpeg4", 2, "mp4 mkv ts avi mov asf 3gp"),
    ("mpeg2video", 2, "ts mpg mkv mov avi vob"),
    ("mpeg1video", 2, "mpg avi"),
    ("libvpx", 0, "webm ivf avi"),
    ("libvpx-vp9", 0, "webm mp4"),
    ("libsvtav1", 0, "mp4 webm"),
    ("mjpeg", 0, "mov avi"),
    ("flv", 0, "flv"),
    ("wmv2", 0, "wmv avi"),
    ("ffv1", 0, "mkv avi"),
    ("prores_ks", 0, "mov"),
    ("qtrle", 0, "mov"),
    ("png", 0, "mov"),
    ("gif", 0, "gif"),
    ("apng", 0, "apng"),
]


def image(number: int) -> Image.Image:
    """One that looks like no other: its number in black and white, and a bar that moves."""
    pixels = np.full((48, 64, 3), 20 + 7 * number % 200, np.uint8)
    for bit in range(8):
        pixels[8:24, 8 * bit : 8 * bit + 8] = 250 if number >> bit & 1 else 5
    pixels[30:40, 3 * number % 50 : 3 * number % 50 + 12] = (250, 40, 40)
    return Image.fromarray(pixels)


def save_stream(
    path: Path,
    codec: str,
    rate: str = "25",
    times: Sequence[int] = range(16),
    b_frames: int = 0,
    sound: int = 0,
    last: int = 0,
    container_options: dict | None = None,
    **more,
) -> Path:
    """A video of frames that are shown at `times`, in ticks of the rate.

    sound  seconds of it
    last   ticks for which the last frame is shown
    more   attributes of the stream
    """
    sizes = {"width": 64, "height": 48, "pix_fmt": PIXELS.get(codec, "yuv420p"), "gop_size": 6}
    options = {"options": OPTIONS.get(codec, {}), "max_b_frames": b_frames, "thread_count": 1}
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=Fraction(rate), **(sizes | options | more))
        names = {".webm": "libopus", ".mpg": "mp2"}
        track = container.add_stream(names.get(path.suffix, "aac"), 48000) if sound else None
        packets = []
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_image(image(number))
            frame.pts, frame.time_base = time, 1 / Fraction(rate)
            packets += stream.encode(frame)
        packets += stream.encode()
        if last:
            packets[-1].duration = int(last / Fraction(rate) / packets[-1].time_base)
        container.mux(packets)
        for number in range(50 * sound):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1920), np.int16), format="s16", layout="stereo")
            silence.sample_rate, silence.pts, silence.time_base = 48000, 960 * number, Fraction(1, 48000)
            container.mux(track.encode(silence))
        if sound:
            container.mux(track.encode())
    return path


def remux(source: Path, target: Path) -> Path:
    """The same packets in another container."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0], opaque=True)
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    return target


def read_through(path: Path, in_order: bool = True) -> tuple[list[int], list[bytes]]:
    """The slow way, with nothing of ours: when each frame is shown, in microseconds from the first, and its
    pixels.

    in_order  False where the container keeps times of decoding only: those are then the frames', in turn
    """
    with av.open(str(path)) as container:
        stream, stored, frames = container.streams.video[0], [], []
        for packet in container.demux(stream):
            frames += packet.decode()
            if packet.size:
                stored.append(packet.pts if packet.dts is None else packet.dts)
        tick, rate = stream.time_base, stream.guessed_rate
    times = [frame.pts for frame in frames]
    if None in times or not in_order:
        times = sorted(stored) if None not in stored else [n / rate / tick for n in range(len(frames))]
    shown = sorted(zip(times, range(len(frames)), strict=True))
    return (
        [int((time - shown[0][0]) * tick * 1_000_000) for time, _ in shown],
        [frames[number].to_image().tobytes() for _, number in shown],
    )


def check_moments(path: Path, in_order: bool = True, alone: int = 3, torn: bool = False) -> None:
    """Beginnings and middles of frames: all together, and so many asked for alone.

    torn  the last frame is not whole, and looks otherwise whenever it is decoded
    """
    times, pixels = read_through(path, in_order)
    moments = sorted({*times, *((a + b) // 2 for a, b in pairwise(times)), times[-1] + 1000})
    moments = [moment for moment in moments if moment < times[-1] or not torn]
    expected = [pixels[bisect_right(times, moment) - 1] for moment in moments]
    frames = [Frame(path, moment) for moment in moments]
    seen = [image.tobytes() for image in decode_frames(frames)]
    assert [m for m, a, b in zip(moments, seen, expected, strict=True) if a != b] == [], path.name
    for place in range(len(moments) // alone - 1, len(moments), len(moments) // alone):
        (image,) = decode_frames([frames[place]])
        assert image.tobytes() == expected[place], f"{path.name} at {moments[place]}"


@pytest.fixture(autouse=True)
def short_videos_are_jumped_through_as_long_ones_are(monkeypatch):
    monkeypatch.setattr(video, "SEEK_GAP", 0)
    monkeypatch.setenv("SVT_LOG", "0")


@pytest.mark.parametrize(("codec", "b_frames", "suffixes"), STREAMS)
def test_every_moment_alone_is_that_of_reading_through(tmp_path, codec, b_frames, suffixes):
    """A jump ended up to 7.6 s late where a container has no index (MPEG-TS, MPEG-PS, flv) or one of decoding
    times (B-frames in mp4), and the first frame behind it was taken."""
    for suffix, rate in product(suffixes.split(), RATES):
        path = tmp_path / f"{rate.replace('/', '_')}.{suffix}"
        timing = {"times": UNEVEN} if rate == "uneven" else {"rate": rate}
        try:
            save_stream(path, codec, b_frames=b_frames, **timing)
        except av.error.FFmpegError:  # MPEG-1 and -2 know no slow rates
            assert codec.startswith("mpeg") and rate in ("1", "5", "1/5")
            continue
        check_moments(path, in_order=codec not in REORDERED or suffix not in ("avi", "asf"))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "flv", "mpg", "nut"])
def test_a_late_start_and_a_longer_sound_change_nothing(tmp_path, suffix):
    codec = {"mpg": "mpeg2video", "nut": "mpeg4"}.get(suffix, "libx264")
    plain = save_stream(tmp_path / f"plain.{suffix}", codec, b_frames=2, times=range(30))
    for name, more in {
        "late": {"times": range(70, 100)},
        "early": {"times": range(-7, 23), "container_options": {"avoid_negative_ts": "make_zero"}},
        "sound": {"times": range(30), "sound": 4},
        "late with sound": {"times": range(70, 100), "sound": 6},
    }.items():
        path = save_stream(tmp_path / f"{name}.{suffix}", codec, b_frames=2, **more)
        check_moments(path)
        assert [frame.moment for frame in find_frames(path, 8, 5)] == [
            frame.moment for frame in find_frames(plain, 8, 5)
        ], name


@pytest.mark.parametrize(
    ("codec", "parameters"),
    [
        ("libx264", "open-gop=1:bframes=3:keyint=8:min-keyint=8:scenecut=0:b-adapt=0"),
        ("libx264", "intra-refresh=1:keyint=8"),  # no key frame is whole but the first
        ("libx264", "bframes=5:b-pyramid=normal:keyint=10:b-adapt=0:ref=4"),
        ("libx265", "open-gop=1:bframes=3:keyint=8:min-keyint=8:scenecut=0:b-adapt=0"),
        ("libx265", "radl=2:open-gop=0:bframes=3:keyint=8:min-keyint=8:b-adapt=0"),
    ],
)
def test_frames_that_lean_on_those_before_a_key_frame(tmp_path, codec, parameters):
    """Behind a jump they are broken, or missing."""
    options = {codec[3:] + "-params": parameters + ":log-level=none" * (codec == "libx265")}
    for suffix in ("mp4", "ts"):
        path = tmp_path / f"a.{suffix}"
        save_stream(path, codec, times=range(40), b_frames=3, options=options)
        check_moments(path, alone=8)


def test_a_recording_begins_and_ends_anywhere(tmp_path):
    """Frames before the first key frame cannot be decoded, and count for nothing."""
    data = save_stream(tmp_path / "a.ts", "libx264", times=range(60), b_frames=2).read_bytes()
    packets = len(data) // 188
    for first, last in ((packets // 3, packets), (0, packets // 2), (packets // 4, 3 * packets // 4)):
        (tmp_path / "b.ts").write_bytes(data[188 * first : 188 * last])
        check_moments(tmp_path / "b.ts", torn=last < packets)


def test_an_edit_list_hides_frames(tmp_path):
    """Of 40 frames it hides the first 10, and all behind the 30th."""
    path = save_stream(tmp_path / "a.mp4", "libx264", times=range(40), b_frames=2)
    data = bytearray(path.read_bytes())
    place = data.index(b"elst") + 12
    duration, begin = struct.unpack(">Ii", data[place : place + 8])
    data[place : place + 8] = struct.pack(">Ii", duration // 2, begin + 10 * 512)
    path.write_bytes(data)
    assert len(read_through(path)[0]) == 20
    check_moments(path)
    assert [frame.moment for frame in find_frames(path, 8, 5)] == [100_000, 300_000, 500_000, 700_000]


@pytest.mark.parametrize(
    ("codec", "suffixes"),
    [
        ("libx264", "ts mkv flv mov nut"),
        ("libx265", "ts mkv flv mov"),
        ("mpeg2video", "ts mkv avi vob mov"),
        ("mpeg4", "mkv avi asf mov"),
        ("libvpx-vp9", "mkv webm flv ivf"),
    ],
)
def test_one_stream_shows_the_same_in_every_container(tmp_path, codec, suffixes):
    """Even where the clock is coarser and a middle is a frame's beginning, as it often is."""
    for rate in ("24", "30000/1001", "24000/1001") + ("1", "5", "1/5") * (codec != "mpeg2video"):
        count = 16 if rate in ("1", "5", "1/5") else 60
        b_frames = 0 if codec == "libvpx-vp9" else 2
        source = save_stream(tmp_path / "a.mp4", codec, rate, range(count), b_frames)
        frames, images = find_frames(source), read_frames(source)
        assert len(frames) == max(1, min(8, round(count / Fraction(rate))))
        for suffix in suffixes.split():
            path = remux(source, tmp_path / f"b.{suffix}")
            found = find_frames(path)
            error = {"ts": 12, "vob": 50, "mov": 0, "nut": 0}.get(suffix, 1000)
            assert [frame.moment for frame in found] == pytest.approx(
                [frame.moment for frame in frames], abs=error
            ), (suffix, rate)
            same = [one == other for one, other in zip(images, read_frames(path), strict=True)]
            assert all(same), (suffix, rate, same)


# ---- how long it lasts ----


@pytest.mark.parametrize(
    ("codec", "suffix"),
    [
        ("mpeg4", "mp4"),
        ("mjpeg", "mov"),
        ("libx264", "mkv"),
        ("libvpx-vp9", "webm"),
        ("flv", "flv"),
        ("mpeg4", "avi"),
        ("wmv2", "wmv"),
        ("gif", "gif"),
    ],
)
def test_a_last_frame_that_stays_is_not_taken_for_a_cut(tmp_path, codec, suffix):
    path = save_stream(tmp_path / f"a.{suffix}", codec, times=[0, 25, 50], last=500)
    assert [round(frame.moment / 1e6, 2) for frame in find_frames(path, 4)] == [2.75, 8.25, 13.75, 19.25]
    through = read_through(path)[1]
    assert [image.tobytes() for image in read_frames(path, 4)] == [through[2]] * 4


@pytest.mark.parametrize(
    ("codec", "suffix"), [("libx264", "mp4"), ("libx264", "mkv"), ("libvpx", "webm"), ("libx264", "flv")]
)
def test_the_end_of_the_video_is_not_that_of_the_sound(tmp_path, codec, suffix):
    path = save_stream(tmp_path / f"a.{suffix}", codec, sound=9, times=range(50))
    assert [round(frame.moment / 1e6, 2) for frame in find_frames(path)] == [0.5, 1.5]


@pytest.mark.parametrize(
    ("codec", "suffix"),
    [
        ("libx264", "mp4"),
        ("libx264", "mkv"),
        ("libvpx", "webm"),
        ("libx264", "flv"),
        ("mjpeg", "avi"),
        ("wmv2", "wmv"),
        ("libvpx", "ivf"),
    ],
)
@pytest.mark.parametrize("sound", [0, 4])
def test_a_file_that_was_cut_off_says_so(tmp_path, codec, suffix, sound):
    if sound and suffix == "ivf":
        return
    options = {"movflags": "faststart"} if suffix == "mp4" else {}
    path = tmp_path / f"a.{suffix}"
    save_stream(path, codec, times=range(100), sound=sound, container_options=options)
    data = path.read_bytes()
    assert len(find_frames(path)) == 4
    for share in (0.5, 0.7):
        path.write_bytes(data[: int(share * len(data))])
        for read in (find_frames, read_frames):
            with pytest.raises(ValueError, match=f"{re.escape(str(path))}: it ends after .* was it cut off"):
                read(path)


# ---- what is transparent ----


@pytest.mark.parametrize(
    ("codec", "pixels", "suffix"),
    [
        ("libvpx-vp9", "yuva420p", "webm"),
        ("libvpx", "yuva420p", "webm"),
        ("qtrle", "argb", "mov"),
        ("png", "rgba", "mov"),
        ("prores_ks", "yuva444p10le", "mov"),
        ("apng", "rgba", "apng"),
        ("ffv1", "yuva420p", "mkv"),
        ("rawvideo", "rgba", "nut"),
    ],
)
def test_what_is_transparent_lies_on_white_as_in_an_image(tmp_path, codec, pixels, suffix):
    """It came out black, or in whatever colour lay under it."""
    drawing = np.zeros((48, 64, 4), np.uint8)
    drawing[:, :24] = (200, 30, 30, 255)
    drawing[:, 24:44] = (0, 0, 250, 128)
    path, options = tmp_path / f"a.{suffix}", {"auto-alt-ref": "0"} if codec == "libvpx" else {}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            codec, rate=5, width=64, height=48, pix_fmt=pixels, options=options, gop_size=4
        )
        for _ in range(12):
            frame = av.VideoFrame.from_ndarray(drawing, format="rgba").reformat(format=pixels)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    expected = np.asarray(to_rgb(Image.fromarray(drawing)), float)
    for image in read_frames(path, 8, 4):
        shown = np.asarray(image, float)
        for column in (10, 34, 56):
            assert np.abs(shown[:, column] - expected[:, column]).mean() < 6, column


def test_a_gif_lies_on_white(tmp_path):
    frames = [Image.new("RGBA", (40, 40), (0, 0, 0, 0)) for _ in range(3)]
    for number, frame in enumerate(frames):
        frame.paste((200, 30, 30, 255), (10 * number, 0, 10 * number + 10, 40))
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=1000, disposal=2)
    for number, image in enumerate(read_frames(tmp_path / "a.gif")):
        assert image.getpixel((10 * number + 5, 20)) == (200, 30, 30)
        assert image.getpixel((39, 20)) == (255, 255, 255)
