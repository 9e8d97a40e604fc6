"""The feature cache: never a wrong feature, never half of one, nothing encoded twice, the same training."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    LONG,
    ROOT,
    check_same,
    make_rows,
    run_script,
    save_clip,
    save_image,
    train,
    wait_until,
    weights_of,
)

from model import files
from model.data.batch import BadSample, collate
from model.data.dataset import VLMDataset
from model.data.feature_store import FeatureStore, features_of, image_key, store_name
from model.data.spec import PRETRAIN, SFT_MULTI
from model.data.steady import LostFile
from model.vision_utils import ImageProcessor, get_img_embedding, get_vision_model, load_pixels
from trainer import features
from trainer.args import training_parser
from trainer.distributed import Run
from trainer.logger import read_metrics
from trainer.script import AgreedError

ALONE = Run(0, 1, torch.device("cpu"))


@pytest.fixture
def place(tmp_path, renderer, clip_path):
    """Six images and 24 rows that name them, as a data set, and a CLIP."""
    for number in range(6):
        save_image(tmp_path / f"{number}.png", number)
    (tmp_path / "rows.json").write_text(json.dumps(make_rows(24)))
    vision_model, processor = get_vision_model(clip_path)
    dataset = VLMDataset(tmp_path / "rows.json", PRETRAIN, renderer, tmp_path, processor)
    return SimpleNamespace(
        path=tmp_path,
        dataset=dataset,
        vision_model=vision_model,
        processor=processor,
        args=read_flags(tmp_path, "float32"),
    )


def read_flags(folder: Path, dtype: str) -> Namespace:
    """A cache in this folder, as the flags of a stage name it."""
    parser = training_parser("", data_path="", image_dir="", learning_rate=1.0)
    return parser.parse_args(
        [f"--feature_cache={folder}/cache", f"--feature_dtype={dtype}", "--num_workers=0"]
    )


def fill(place) -> FeatureStore:
    store = features.fill_feature_cache(
        ALONE, place.args, [place.dataset], place.vision_model, place.processor
    )
    place.dataset.feature_store = store
    return store


def read(store: FeatureStore, image: Path) -> torch.Tensor | None:
    return store.read_all([image])[0]


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many images each call of CLIP was given."""
    counts = []

    def count(pixels, vision_model):
        counts.append(len(pixels))
        return get_img_embedding(pixels, vision_model)

    monkeypatch.setattr(features, "get_img_embedding", count)
    return counts


def test_every_distinct_image_is_encoded_once_and_read_back_exactly(place, encoded):
    shutil.copy(place.path / "0.png", place.path / "copy.png")  # another name, the same image
    rows = make_rows(24) + [make_rows(1)[0] | {"image": "copy.png"}]
    (place.path / "rows.json").write_text(json.dumps(rows))
    place.dataset = VLMDataset(
        place.path / "rows.json", PRETRAIN, place.dataset.renderer, place.path, place.processor
    )
    store = fill(place)
    assert len(store) == 6 and sum(encoded) == 6
    for number in range(6):
        path = place.path / f"{number}.png"
        expected = get_img_embedding(load_pixels(path, place.processor)[None], place.vision_model)[0]
        assert torch.equal(read(store, path), expected)
    assert len(fill(place)) == 6 and sum(encoded) == 6  # another run, nothing to do


def test_a_replaced_image_is_never_served_its_old_features(place, encoded):
    """Same name, same size, same time: only the content tells."""
    old, new, other = place.path / "0.png", place.path / "1.png", place.path / "other.png"
    store = fill(place)
    before, status = read(store, old), os.stat(old)
    save_image(other, 77)
    shutil.copy(other, old)
    os.utime(old, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert read(store, old) is None
    bad = place.dataset[0]
    assert isinstance(bad, BadSample) and "0.png was replaced" in bad.reason
    store = fill(place)
    assert sum(encoded) == 7 and not torch.equal(read(store, old), before)
    shutil.copy(new, old)  # one that is known by another name
    assert torch.equal(read(store, old), read(store, new))


def test_another_clip_preprocessing_or_dtype_has_another_store(place, tmp_path):
    names = {
        store_name(place.vision_model, place.processor, "float32"),
        store_name(place.vision_model, place.processor, "float16"),
        store_name(place.vision_model, ImageProcessor(mean=(0.5, 0.5, 0.5)), "float32"),
        store_name(place.vision_model, ImageProcessor(jpeg_draft=True), "float32"),
    }
    other, _ = get_vision_model(save_clip(tmp_path / "wider", num_attention_heads=4))
    names.add(store_name(other, place.processor, "float32"))
    with torch.no_grad():
        place.vision_model.encoder.layers[0].mlp.fc1.bias[3] += 1e-6
    names.add(store_name(place.vision_model, place.processor, "float32"))
    assert len(names) == 6


def test_a_clip_in_another_folder_has_the_same_store(place, clip_path, tmp_path):
    moved, _ = get_vision_model(shutil.copytree(clip_path, tmp_path / "moved"))
    assert store_name(moved, place.processor, "float32") == store_name(
        place.vision_model, place.processor, "float32"
    )


def test_half_written_segments_do_not_count(place, encoded, monkeypatch):
    monkeypatch.setattr(features, "SEGMENT", 2)
    monkeypatch.setattr(features, "BATCH", 2)
    store = fill(place)
    assert len(store.segments) == 3
    victim = sorted(store.folder.glob("*.keys.npy"))[0]
    victim.unlink()  # what a run killed between the two files of a segment leaves
    (store.folder / f".{victim.name}.0123abcd.tmp").write_bytes(b"half")
    assert len(FeatureStore(store.folder, "float32")) == 4
    again = fill(place)
    assert len(again) == 6 and sum(encoded) == 8 and not list(store.folder.glob(".*.tmp"))


def test_a_full_disk_is_reported_in_one_line_and_what_was_written_stays(place, encoded, monkeypatch):
    monkeypatch.setattr(features, "SEGMENT", 2)
    monkeypatch.setattr(features, "BATCH", 2)
    usage = shutil.disk_usage(place.path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ValueError, match="needs 0.0 MB for 6 images, .*--feature_cache"):
        fill(place)
    assert not encoded  # reported before anything is computed
    monkeypatch.undo()
    monkeypatch.setattr(features, "SEGMENT", 2)
    written = []

    def full(file_descriptor):
        if len(written) == 5:  # features and keys of two segments, and the third's features
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(file_descriptor)

    monkeypatch.setattr(files, "sync_folder", lambda folder: None)
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(AgreedError, match="No space left on device.*4 of 6 images are encoded"):
        fill(place)
    monkeypatch.undo()
    assert len(fill(place)) == 6
    assert all(not isinstance(place.dataset[n], BadSample) for n in range(24))


def test_a_second_run_waits_and_takes_what_the_first_has_encoded(place, monkeypatch, capsys):
    begun, go_on, encoded = threading.Event(), threading.Event(), []

    def slowly(pixels, vision_model):
        encoded.append(len(pixels))
        begun.set()
        assert go_on.wait(LONG)
        return get_img_embedding(pixels, vision_model)

    monkeypatch.setattr(features, "get_img_embedding", slowly)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(fill, place)
        assert begun.wait(LONG)
        second = pool.submit(fill, place)
        wait_until(lambda: "waiting for it" in capsys.readouterr().out)
        go_on.set()
        assert len(first.result()) == len(second.result()) == 6
    assert sum(encoded) == 6


def test_what_is_damaged_is_encoded_anew(place, encoded, monkeypatch, capsys):
    """Reported by name, removed, and not even looked at again."""
    monkeypatch.setattr(features, "SEGMENT", 2)
    store = fill(place)
    expected = [read(store, place.path / f"{number}.png") for number in range(6)]
    victim, other, third = sorted(store.folder.glob("*.keys.npy"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    features_of(other).unlink()
    with open(features_of(third), "ab") as file:
        file.write(b"x")
    again = fill(place)
    told = capsys.readouterr().out
    assert all(f"{path} is not what was written" in told for path in (victim, other, third))
    assert sum(encoded) == 12 and not again.damaged
    for number in range(6):
        assert torch.equal(read(again, place.path / f"{number}.png"), expected[number])
    assert fill(place) and "not what was written" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            7e4,
            "CLIP's features of .*png reach 7e.04, but float16 ends at 65504: give --feature_dtype float32",
        ),
        (float("nan"), "CLIP's features of .*png are not finite"),
    ],
)
def test_features_that_the_cache_cannot_hold_are_refused_by_name(place, monkeypatch, value, message):
    """7e4 became infinity in a float16 cache, in silence."""
    place.args = read_flags(place.path, "float16")
    encode = get_img_embedding

    def spoiled(pixels, vision_model):
        return torch.cat([encode(pixels, vision_model)[:-1], torch.full((1, 50, 24), value)])

    monkeypatch.setattr(features, "get_img_embedding", spoiled)
    with pytest.raises(AgreedError, match=message):
        fill(place)
    if value == 7e4:
        place.args = read_flags(place.path, "float32")
        assert len(fill(place)) == 6


def test_a_worker_that_finds_a_cache_changed_says_so(place):
    """Spawned workers open it themselves."""
    sent = pickle.dumps(fill(place))
    next((place.path / "cache").glob("*/*.keys.npy")).unlink()
    with pytest.raises(LostFile, match="cache.* was changed while it was in use"):
        read(pickle.loads(sent), place.path / "3.png")


def test_half_precision_is_close(place):
    exact = read(fill(place), place.path / "0.png")
    place.args = read_flags(place.path, "float16")
    half = read(fill(place), place.path / "0.png")
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), exact, rtol=1e-3, atol=1e-3)


def test_batches_hold_features_instead_of_pixels(place, renderer):
    fill(place)
    batch = collate([place.dataset[n] for n in range(3)])
    assert batch["image_features"].shape == (3, 50, 24) and "pixel_values" not in batch
    rows = [
        {
            "image": "1.png, 0.png",
            "conversations": [
                {"from": "human", "value": "<image>\n<image>\n什么？"},
                {"from": "gpt", "value": "圆形。"},
            ],
        }
    ]
    (place.path / "two.json").write_text(json.dumps(rows))
    two = VLMDataset(place.path / "two.json", SFT_MULTI, renderer, place.path, place.processor)
    two.feature_store = place.dataset.feature_store
    expected = [read(two.feature_store, place.path / name) for name in ("1.png", "0.png")]
    assert torch.equal(two[0]["image_features"], torch.stack(expected))


def test_images_that_cannot_be_read_are_bad_samples_as_without_a_cache(place):
    (place.path / "0.png").write_bytes(b"not an image")
    (place.path / "1.png").unlink()
    (place.path / "2.png").write_bytes(b"")
    without = [place.dataset[n] for n in range(6)]
    store = fill(place)
    with_cache = [place.dataset[n] for n in range(6)]
    assert len(store) == 3
    for number in range(3):
        assert isinstance(without[number], BadSample) and with_cache[number] == without[number]
    assert all(not isinstance(sample, BadSample) for sample in with_cache[3:])


def test_a_store_is_handed_to_workers_without_copying_the_features(place):
    store = fill(place)
    sent = pickle.dumps(store)
    assert len(sent) < 1000
    key = image_key(place.path / "3.png")
    assert pickle.loads(sent).find(key) == store.find(key) is not None
    assert np.array([1, 2], np.uint64) not in store


CACHE = "--feature_cache={}/cache"


def losses(workplace) -> list[float]:
    return [record["loss"] for record in read_metrics(workplace / "out" / "32_vlm_pretrain.metrics.jsonl")]


def test_training_with_the_cache_gives_the_same_losses(workplace):
    """Exact where the cache is float32: on a CPU an image's features do not depend on its neighbours."""
    train(workplace)
    without, weights = losses(workplace), weights_of(workplace)
    first = train(workplace, CACHE.format(workplace), "--feature_dtype=float32")
    assert "0 images are there, 6 to encode, 0.0 MB to write" in first.stdout
    assert losses(workplace) == without
    check_same(weights_of(workplace), weights)
    second = train(workplace, CACHE.format(workplace), "--feature_dtype=float32", "--num_workers=2")
    assert "to encode" not in second.stdout and losses(workplace) == without
    train(workplace, CACHE.format(workplace))
    assert losses(workplace) == pytest.approx(without, abs=1e-3) and losses(workplace) != without


def test_two_processes_build_the_cache_that_one_builds(workplace):
    caches = []
    for processes in (1, 2):
        shutil.rmtree(workplace / "cache", ignore_errors=True)
        train(
            workplace,
            CACHE.format(workplace),
            "--feature_dtype=float32",
            f"--batch_size={4 // processes}",
            processes=processes,
        )
        (folder,) = (workplace / "cache").iterdir()
        store = FeatureStore(folder, "float32")
        assert len(store.segments) == processes and len(store) == 6
        caches.append([read(store, workplace / "images" / f"{number}.png") for number in range(6)])
    assert all(torch.equal(one, two) for one, two in zip(*caches, strict=True))


def test_a_killed_build_goes_on_where_it_was(workplace):
    """A real SIGKILL in the middle; what was encoded before is not encoded again."""
    for number in range(6, 160):
        save_image(workplace / "images" / f"{number}.png", number)
    rows = [make_rows(1)[0] | {"image": f"{number}.png"} for number in range(160)]
    (workplace / "data.json").write_text(json.dumps(rows))
    code = (
        "import runpy, sys; from trainer import features; features.SEGMENT = features.BATCH = 8; "
        "sys.argv[0] = '1-pretrain_vlm.py'; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    flags = [f"@{workplace}/args", "--max_steps=1", CACHE.format(workplace)]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *flags],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    wait_until(lambda: len(list((workplace / "cache").glob("*/*.keys.npy"))) >= 3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (folder,) = (workplace / "cache").iterdir()
    there = len(FeatureStore(folder))
    assert 24 <= there < 160
    result = run_script("1-pretrain_vlm.py", *flags)
    assert result.returncode == 0, result.stderr
    assert f"{there} images are there, {160 - there} to encode" in result.stdout
    assert len(FeatureStore(folder)) == 160
