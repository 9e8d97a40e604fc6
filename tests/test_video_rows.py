"""Videos in rows, batches, training and the feature cache."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    GREYS,
    PowerCut,
    check_same,
    cut_after,
    run_inside,
    run_script,
    save_image,
    save_video,
    weights_of,
)

from model.checkpoint import save_weights
from model.data import video
from model.data.batch import BadSample, collate
from model.data.dataset import VLMDataset, check_row
from model.data.feature_store import FeatureStore, image_key
from model.data.spec import SFT, SFT_MULTI, DatasetSpec
from model.data.video import Frame, find_frames, read_frames
from model.images import open_image
from model.prompt import Renderer
from model.transformer import Transformer
from model.vision_utils import ImageProcessor, get_img_process
from trainer import check
from trainer.logger import read_metrics


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
