"""Videos: which frames are looked at, whatever the file is like."""

import wave
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import GREYS, save_image, save_video
from PIL import Image

from model.data import video
from model.data.video import find_frames, load_images, open_images, read_frames
from model.images import open_image
from model.vision_utils import ImageProcessor, get_img_process


def greys(images: list[Image.Image]) -> list[int]:
    """Of videos from save_video(): which of GREYS each image shows."""
    means = [np.asarray(image.convert("L")).mean() for image in images]
    return [min(GREYS, key=lambda grey: abs(grey - mean)) for mean in means]


@pytest.mark.parametrize(
    ("name", "codec", "more"),
    [
        ("a.mp4", "mpeg4", {}),
        ("a.mkv", "mpeg4", {}),
        ("a.avi", "mpeg4", {}),
        ("a.mov", "mjpeg", {"pix_fmt": "yuvj420p"}),
        ("a.gif", "gif", {"pix_fmt": "rgb8"}),
        ("a.webm", "libvpx", {}),
        ("b.mp4", "libx264", {"options": {"bf": "2"}}),  # frames that are stored out of order
        ("a.ts", "mpeg2video", {}),  # a clock that does not begin at 0
        ("a.h264", "libx264", {}),  # a bare stream: neither times nor length
    ],
)
def test_a_video_of_one_frame_per_second_gives_its_frames(tmp_path, name, codec, more):
    rate = 25 if name == "a.ts" else 1  # MPEG-2 knows no slower ones
    video = save_video(tmp_path / name, np.repeat(GREYS[:4], rate).tolist(), rate, codec, **more)
    images = read_frames(video)
    assert greys(images) == GREYS[:4]
    assert {(image.mode, image.size) for image in images} == {("RGB", (64, 64))}


@pytest.mark.parametrize(
    ("count", "rate", "most", "expected"),
    [
        (4, 2, 8, [80, 200]),  # two seconds, two halves
        (1, 1, 8, [20]),
        (2, 10, 8, [80]),  # shorter than a second: its middle
        (5, 1, 1, [140]),  # one frame: the middle again
        (5, 1, 2, [80, 200]),  # the middles of halves
        (50, 10, 5, GREYS),
    ],
)
def test_the_middles_of_equal_parts_are_looked_at(tmp_path, count, rate, most, expected):
    shown = [GREYS[number * 5 // count if count >= 5 else number] for number in range(count)]
    assert greys(read_frames(save_video(tmp_path / "a.mp4", shown, rate), most)) == expected


def test_a_long_video_is_jumped_through_and_shows_what_reading_it_all_would(tmp_path, monkeypatch):
    path = save_video(tmp_path / "a.mp4", [3 * number % 250 for number in range(400)], 5, gop_size=10)
    decoded = []
    original = video.timed_frames

    def count(*arguments):
        for pair in original(*arguments):
            decoded.append(pair[0])
            yield pair

    monkeypatch.setattr(video, "timed_frames", count)
    jumped, num_decoded = read_frames(path), len(decoded)
    assert len(jumped) == 8 and num_decoded < 150 < 400
    monkeypatch.setattr(video, "SEEK_GAP", 10**12)
    decoded.clear()
    assert [image.tobytes() for image in read_frames(path)] == [image.tobytes() for image in jumped]
    assert len(decoded) > 350
    frames = find_frames(path)
    assert frames[0].moment == 5_000_000 and frames[-1].moment == 75_000_000
    means = [np.asarray(image.convert("L")).mean() for image in jumped]
    assert means == pytest.approx([3 * frame.moment * 5 / 1e6 % 250 for frame in frames], abs=8)


def test_frames_that_are_shown_for_different_times(tmp_path):
    """0.0 s, 0.5 s and then one still until 4 s: what a player shows counts, not which frame it is."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10, width=64, height=64, pix_fmt="yuv420p")
        for grey, tick in ((20, 0), (80, 5), (140, 10), (200, 39)):
            image = av.VideoFrame.from_image(Image.new("RGB", (64, 64), (grey,) * 3))
            image.pts, image.time_base = tick, Fraction(1, 10)
            container.mux(stream.encode(image))
        container.mux(stream.encode())
    assert greys(read_frames(path, 4)) == [80, 140, 140, 140]


def test_a_video_from_a_telephone_is_turned_upright(tmp_path):
    left = Image.new("RGB", (64, 32), "white")
    left.paste((0, 0, 0), (0, 0, 16, 32))
    for angle in (0, 90, 180, -90):
        video = save_video(tmp_path / f"{angle}.mp4", [left], size=(64, 32), rotation=angle)
        (seen,) = read_frames(video)
        expected = left.rotate(angle, expand=True)
        assert seen.size == expected.size
        assert np.abs(np.asarray(seen, float) - np.asarray(expected, float)).mean() < 8


def save_sound(path: Path) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(8000)
        file.writeframes(bytes(16000))
    return path


def test_what_is_no_video_says_why(tmp_path, monkeypatch):
    good = save_video(tmp_path / "good.mp4", GREYS)
    videos = {
        "gone.mp4": "video not found",
        "folder": "not a file",
        "empty.mp4": "it is empty",
        "text.mp4": "cannot read video",
        "cut.mp4": "cannot read video",
        "sound.wav": "no video stream",
        "list.m3u8": "cannot read video",
        "list.mp4": "cannot read video",
        "pointer.mp4": "git-lfs pointer",
        "half.mkv": "was it cut off",
    }
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video, but " + "words " * 1000)
    (tmp_path / "cut.mp4").write_bytes(good.read_bytes()[:-200])
    save_sound(tmp_path / "sound.wav")
    for name in ("list.m3u8", "list.mp4"):  # a play list names other files, or addresses
        (tmp_path / name).write_text(
            f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{good}\n#EXT-X-ENDLIST\n"
        )
    (tmp_path / "pointer.mp4").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    whole = save_video(tmp_path / "whole.mkv", [Image.fromarray(frame) for frame in noise])
    (tmp_path / "half.mkv").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    for name, message in videos.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            read_frames(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value), name
    monkeypatch.setattr(video, "MAX_FRAME_PIXELS", 64 * 63)
    with pytest.raises(ValueError, match="good.mp4: its frames have 64 x 64 pixels; at most 4,032"):
        read_frames(good)


def test_damage_in_the_middle_is_one_line_or_none(tmp_path):
    """Whatever bytes are overwritten, frames come out or a ValueError, and no crash."""
    noise = np.random.default_rng(1).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    data = save_video(tmp_path / "a.mp4", [Image.fromarray(frame) for frame in noise]).read_bytes()
    generator, failures = np.random.default_rng(2), 0
    for _ in range(40):
        damaged = bytearray(data)
        start = int(generator.integers(0, len(data) - 64))
        damaged[start : start + 64] = generator.bytes(64)
        (tmp_path / "b.mp4").write_bytes(damaged)
        try:
            assert read_frames(tmp_path / "b.mp4")
        except ValueError as error:
            failures += 1
            assert str(error).startswith(f"cannot read video {tmp_path}/b.mp4: ")
    assert failures < 40


def test_a_name_with_a_colon_is_a_name(tmp_path, monkeypatch):
    save_video(tmp_path / "a.mp4", GREYS[:1]).rename(tmp_path / "http:a.mp4")
    monkeypatch.chdir(tmp_path)
    assert greys(read_frames("http:a.mp4")) == GREYS[:1]


def test_images_and_frames_come_in_the_order_asked_for(tmp_path):
    """Even if time goes back, one video follows another, or the same frame is wanted twice."""
    one, two = save_video(tmp_path / "1.mp4", GREYS), save_video(tmp_path / "2.mp4", GREYS[::-1])
    save_image(tmp_path / "0.png", 0)
    first, second = find_frames(one), find_frames(two)
    wanted = [first[3], first[1], first[1], first[2], tmp_path / "0.png", second[0], first[0], second[4]]
    images = list(open_images(wanted))
    assert greys(images[:4] + images[5:]) == [200, 80, 80, 140, 250, 20, 20]
    assert images[4].tobytes() == open_image(tmp_path / "0.png").tobytes()
    for pixels, image in zip(load_images(wanted, ImageProcessor()), images, strict=True):
        assert torch.equal(pixels, get_img_process(image, ImageProcessor()))


def test_moments_rise_and_stay_within_the_video(tmp_path):
    for count, rate in ((3, 7), (10, 3), (61, 30)):
        video = save_video(tmp_path / f"{count}.mp4", [100] * count, rate)
        for most in (1, 3, 64):
            moments = [frame.moment for frame in find_frames(video, most)]
            assert 1 <= len(moments) <= most and len(moments) <= max(1, round(count / rate))
            assert all(a < b for a, b in pairwise(moments))
            assert moments[0] > 0 and moments[-1] < count / rate * 1e6
