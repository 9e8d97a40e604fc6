"""Videos: which frames are looked at, whatever the file is like; rows, batches and the feature cache."""

import contextlib
import json
import wave
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import (
    PowerCut,
    check_same,
    cut_after,
    run_inside,
    run_script,
    save_image,
    save_video,
    weights_of,
)
from PIL import Image

from model.checkpoint import save_weights
from model.data import video
from model.data.batch import BadSample, collate
from model.data.dataset import VLMDataset, check_row
from model.data.feature_store import FeatureStore, image_key
from model.data.spec import SFT, SFT_MULTI, DatasetSpec
from model.data.video import Frame, find_frames, load_images, open_images, read_frames
from model.images import open_image
from model.prompt import Renderer
from model.transformer import Transformer
from model.vision_utils import ImageProcessor, get_img_process
from trainer import check
from trainer.logger import read_metrics

GREYS = [20, 80, 140, 200, 250]


def greys(images: list[Image.Image]) -> list[int]:
    """Of videos from save_video(): which of GREYS each image shows."""
    means = [np.asarray(image.convert("L")).mean() for image in images]
    return [min(GREYS, key=lambda grey: abs(grey - mean)) for mean in means]


# ---- from a file to frames ----


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
    monkeypatch.setattr(video, "MAX_PIXELS", 64 * 63)
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


# ---- rows ----


def row(question="<video>\n它往哪里去？", answer="它向左走。", **files) -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]} | files


@pytest.fixture
def make(tmp_path, tokenizer):
    """Rows to a dataset with two videos, a.mp4 of 5 s and b.mp4 of 2 s, and two images."""
    save_video(tmp_path / "a.mp4", GREYS)
    save_video(tmp_path / "b.mp4", GREYS[3:])
    for number in range(2):
        save_image(tmp_path / f"{number}.png", number)

    def build(rows, spec=SFT_MULTI, max_seq_len=512) -> VLMDataset:
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        renderer = Renderer(tokenizer, max_seq_len=max_seq_len)
        return VLMDataset(tmp_path / "rows.json", spec, renderer, tmp_path, ImageProcessor())

    return build


def expected_pixels(folder: Path, *names: str) -> torch.Tensor:
    images = []
    for name in names:
        images += read_frames(folder / name) if name.endswith("mp4") else [open_image(folder / name)]
    return torch.stack([get_img_process(image, ImageProcessor()) for image in images])


def test_a_video_is_rendered_as_its_frames(make, tmp_path):
    video, images = make(
        [row(video="a.mp4"), row("<image>" * 5 + "\n它往哪里去？", image=[f"{n % 2}.png" for n in range(5)])],
        DatasetSpec(max_images=5, max_frames=8),
    )
    assert torch.equal(video["input_ids"], images["input_ids"])
    assert torch.equal(video["image_slots"], images["image_slots"])
    assert torch.equal(video["pixel_values"], expected_pixels(tmp_path, "a.mp4"))


def test_marks_decide_the_order_of_images_and_videos(make, tmp_path):
    (sample,) = make(
        [
            row(
                "先 <image> 再 <video> 和 <image> 然后 <video>？",
                image="1.png, 0.png",
                video=["b.mp4", "a.mp4"],
            )
        ],
        max_seq_len=1000,
    )
    assert torch.equal(sample["pixel_values"], expected_pixels(tmp_path, "1.png", "b.mp4", "0.png", "a.mp4"))
    assert len(sample["image_slots"]) == 1 + 2 + 1 + 5


@pytest.mark.parametrize(("max_seq_len", "frames"), [(512, 5), (300, 5), (260, 4), (170, 2), (120, 1)])
def test_a_video_brings_no_more_frames_than_fit(make, tokenizer, max_seq_len, frames):
    sample = make([row(video="a.mp4")], max_seq_len=max_seq_len)[0]
    assert len(sample["image_slots"]) == len(sample["pixel_values"]) == frames
    assert len(sample["labels"]) < max_seq_len and sample["labels"][-1] == tokenizer.eos_token_id


def test_videos_of_a_row_share_the_room_and_the_last_token_counts(make):
    """One token less, and every video of the row gives up a frame."""
    rows = [row("<video>比<video>", video="a.mp4, a.mp4")]
    need = len(make(rows, max_seq_len=1000)[0]["input_ids"]) + 1
    for max_seq_len, frames in ((need, 10), (need - 1, 8), (need - 100, 8), (need - 101, 6), (need - 400, 2)):
        assert len(make(rows, max_seq_len=max_seq_len)[0]["pixel_values"]) == frames
    bad = make(rows, max_seq_len=need - 410)[0]
    assert isinstance(bad, BadSample) and "--max_seq_len" in bad.reason


@pytest.mark.parametrize(
    ("bad", "spec", "message"),
    [
        (row(video="a.mp4"), SFT, r"1 video\(s\), but this stage takes none"),
        (row("什么？", video="a.mp4"), SFT_MULTI, r"0 <video> mark\(s\) for 1 video\(s\)"),
        (row("<video><video>", video="a.mp4"), SFT_MULTI, r"2 <video> mark\(s\) for 1 video\(s\)"),
        (row("<image>", video="a.mp4"), SFT_MULTI, r"1 <image> mark\(s\) for 0 image\(s\)"),
        (row(), SFT_MULTI, 'no "image"'),
        (row(video=7), SFT_MULTI, 'its "video" must be a file name or a list'),
    ],
)
def test_a_bad_row_with_a_video_is_found_before_training(make, bad, spec, message):
    with pytest.raises(ValueError, match=f"row 1: .*{message}"):
        make([bad], spec).check_rows()


def test_checks_and_lengths_open_no_video(make, monkeypatch):
    dataset = make(
        [
            row(video="gone.mp4"),
            row("<image>？", image="0.png"),
            row(video="gone.mp4, gone.mp4", question="<video>" * 2),
        ]
    )
    monkeypatch.setattr(video, "open_video", lambda path: 1 / 0)
    dataset.check_rows()
    assert np.argsort(dataset.lengths()).tolist() == [1, 0, 2]


def test_a_word_in_angle_brackets_is_a_word_where_no_videos_are_taken(make, tokenizer):
    (sample,) = make([row("<image> <video>？", image="0.png")], SFT)
    assert "<video>" in tokenizer.decode(sample["input_ids"])
    assert check_row(row("<image> <video>？", image="0.png"), SFT)[0] == ["0.png"]


# ---- the feature cache ----


def flags_of(workplace: Path, model: Transformer) -> list[str]:
    """To train on rows of one to three images and videos, from untrained weights of the stage before."""
    save_weights(model, workplace / "out" / "32_vlm_sft.pth")
    save_video(workplace / "images" / "a.mp4", GREYS[:4])
    save_video(workplace / "images" / "b.avi", GREYS[2:4])
    shapes = [
        row(video="a.mp4"),
        row("<image>\n什么？", image="0.png"),
        row("<image>\n<image>\n不同？", "It is red. " * 3, image="1.png, 2.png"),
        row("Image 1: <image> Image 2: <image> Image 3: <image>", image=["3.png", "4.png", "5.png"]),
        row("<image> <video>", video=["b.avi"], image="3.png"),
    ]
    (workplace / "rows.json").write_text(json.dumps([shapes[number % 5] for number in range(13)]))
    return [
        f"@{workplace}/args",
        "--multi",
        "--max_images=3",
        "--max_steps=6",
        f"--data_path={workplace}/rows.json",
    ]


@pytest.fixture
def one_thread():
    """Several threads divide a product by its number of rows, and with the cache CLIP is given images in
    other numbers than without."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_videos_train_the_same_with_the_cache_two_processes_and_resumed(workplace, model, monkeypatch):
    flags, runs, path = flags_of(workplace, model), [], workplace / "out" / "32_vlm_sft_multi.pth"
    cache = [f"--feature_cache={workplace}/cache", "--feature_dtype=float32"]

    def keep():
        records = read_metrics(path.with_suffix(".metrics.jsonl"))
        runs.append((weights_of(workplace, "vlm_sft_multi"), [record["loss"] for record in records]))

    for more in ([], cache):
        run_inside("2-sft_vlm.py", *flags, *more)
        keep()
    assert runs[0][1] == runs[1][1]
    check_same(runs[1][0], runs[0][0])
    (folder,) = (workplace / "cache").iterdir()
    assert len(FeatureStore(folder, "float32")) == 6 + 4 + 2  # each image and each frame once
    result = run_script("2-sft_vlm.py", *flags, *cache, "--batch_size=2", "--num_workers=1", processes=2)
    assert result.returncode == 0, result.stderr
    keep()
    assert runs[2][1] == pytest.approx(runs[0][1], abs=1e-4)
    # Half a run, then the rest: the same bits; with other numbers of frames or images, a refusal.
    resumed = [*flags, "--save_interval=3", "--resume"]
    path.unlink()
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_after(patch, 3)
        run_inside("2-sft_vlm.py", *resumed)
    for other, words in (
        ("--max_frames=3", "rows.max_frames 8 then, 3 now"),
        ("--max_images=4", "rows.max_images 3 then, 4 now"),
    ):
        with pytest.raises(ValueError, match=words):
            run_inside("2-sft_vlm.py", *resumed, other)
    run_inside("2-sft_vlm.py", *resumed)
    check_same(weights_of(workplace, "vlm_sft_multi"), runs[0][0])


def test_the_check_before_a_run_looks_at_videos_too(workplace, model, capsys):
    flags = flags_of(workplace, model)

    def look() -> tuple[str, list[str]]:
        with contextlib.suppress(SystemExit):
            check.main(["sft", *flags])
        printed = capsys.readouterr()
        return printed.out, printed.err.splitlines()

    report, problems = look()
    assert not problems and "13 of 13 rows loaded" in report and "<image x50>" * 4 in report
    (workplace / "images" / "a.mp4").write_bytes(b"no video")
    assert [line for line in look()[1] if "row 1: cannot read video" in line]


def test_a_video_that_is_replaced_or_broken_is_never_served_old_features(make, tmp_path):
    dataset = make([row(video="a.mp4")])
    store = dataset.feature_store = FeatureStore(tmp_path / "cache", "float32")
    frames = find_frames(tmp_path / "a.mp4")
    keys = np.stack([image_key(frame) for frame in frames])
    assert len({key.tobytes() for key in [*keys, image_key(tmp_path / "a.mp4")]}) == 6
    store.add(keys, np.random.default_rng(0).normal(size=(5, 50, 24)).astype(np.float32))
    store.reload()
    assert dataset[0]["image_features"].shape == (5, 50, 24)
    assert dataset[0]["image_features"][3].equal(store.read_all([Frame(tmp_path / "a.mp4", 3_500_000)])[0])
    (tmp_path / "a.mp4").rename(tmp_path / "c.mp4")
    (moved,) = store.read_all([Frame(tmp_path / "c.mp4", 500_000)])
    assert moved.equal(store.read_all(find_frames(tmp_path / "c.mp4"))[0])
    save_video(tmp_path / "a.mp4", GREYS[::-1])
    assert "a.mp4 at 0.500 s was replaced" in dataset[0].reason
    (tmp_path / "a.mp4").write_bytes(b"")
    assert "cannot read video" in dataset[0].reason


def test_batches_that_mix_rows_of_several_images_and_videos_cost_nothing(make, model):
    """A batch has the losses and gradients of its rows one by one; a batch of one does too."""
    rows = [
        row("<image>\n什么？", image="0.png"),
        row(video="b.mp4", answer="它向左走，然后停下。"),
        row("<image><image>", image="0.png, 1.png"),
        row("<image> a <image> b <image>", image=["0.png"] * 3),
        row(
            "context: Source Image: <image> Target Image: <image> Instruction: what?",
            "remove it",
            image="1.png, 0.png",
        ),
    ]
    dataset = make(rows, DatasetSpec(max_images=3, max_frames=8))
    samples = [dataset[position] for position in range(5)]
    generator = torch.Generator().manual_seed(0)
    for sample in samples:  # any features: what CLIP would give is not the question
        pixels = sample.pop("pixel_values")
        sample["image_features"] = torch.randn(len(pixels), 50, 24, generator=generator)

    def run(group: list[dict], share: float) -> float:
        batch = collate(group)
        assert len(batch["image_features"]) == batch["num_images"].sum()  # no padding images
        loss = model(
            batch["input_ids"],
            batch["image_features"],
            batch["image_slots"],
            batch["labels"],
            target_positions=batch["target_positions"],
        )[1] * (batch["num_targets"] / share)
        loss.backward()
        return loss.item()

    def total(*groups: list[dict]) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        targets = sum(collate(group)["num_targets"] for group in groups)
        loss = sum(run(group, targets) for group in groups)
        return loss, [parameter.grad.clone() for parameter in model.parameters()]

    expected_loss, expected = total(*([sample] for sample in samples))
    assert all(gradient.any() for gradient in expected)
    for groups in ([samples], [samples[:4], samples[4:]], [samples[:2], samples[2:]]):
        loss, gradients = total(*groups)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        for one, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_moments_rise_and_stay_within_the_video(tmp_path):
    for count, rate in ((3, 7), (10, 3), (61, 30)):
        video = save_video(tmp_path / f"{count}.mp4", [100] * count, rate)
        for most in (1, 3, 64):
            moments = [frame.moment for frame in find_frames(video, most)]
            assert 1 <= len(moments) <= most and len(moments) <= max(1, round(count / rate))
            assert all(a < b for a, b in pairwise(moments))
            assert moments[0] > 0 and moments[-1] < count / rate * 1e6
