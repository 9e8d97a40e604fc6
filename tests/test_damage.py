"""Caches whose files were damaged: nothing that is not what was written is ever used. A flipped byte in an
index, a verdict or cached features once was, in silence."""

import gzip
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_image

from model.data import rows as rows_module
from model.data.feature_store import FeatureStore, features_of, image_keys
from model.data.rows import Rows
from model.data.steady import LostFile

NUM_FLIPS, NUM_CUTS = 12, 5  # of each file
ROWS = [{"id": number, "value": "行" * (number % 7)} for number in range(200)]


def damages(content: bytes, draw: random.Random) -> Iterator[bytes]:
    """A file with a bit flipped somewhere, or cut somewhere, and an empty one."""
    for _ in range(NUM_FLIPS):
        place = draw.randrange(len(content))
        flipped = content[place] ^ 1 << draw.randrange(8)
        yield content[:place] + bytes([flipped]) + content[place + 1 :]
    for _ in range(NUM_CUTS):
        yield content[: draw.randrange(len(content))]
    yield b""


# ---- the index of a data file ------------------------------------------------------------------------------


@pytest.fixture(params=["a.json", "a.jsonl.gz"])
def data(request, tmp_path, monkeypatch) -> Path:
    """A data file that counts as large; the rows of the second lie rewritten in the index."""
    monkeypatch.setattr(rows_module, "SMALL", 0)
    path = tmp_path / request.param
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    else:
        path.write_text(json.dumps(ROWS))
    return path


def test_nothing_of_a_damaged_index_is_used(data):
    rows = Rows(data)
    verdict = rows.remember("verdict", lambda: [7, "why"])
    files = sorted(rows.folder.glob(f"{rows.key}.*"))
    assert len(files) == (4 if data.suffix == ".gz" else 3)
    draw = random.Random(0)
    for file in files:
        good = file.read_bytes()
        for bad in damages(good, draw):
            file.write_bytes(bad)
            again = Rows(data)
            assert list(again) == ROWS and again.fingerprint == rows.fingerprint, file
            assert again.remember("verdict", lambda: [7, "why"]) == verdict
            assert file.read_bytes() == good  # made anew


def test_files_of_another_index_are_not_used(data, tmp_path):
    """Under the right names, whole, and of a data file of the same size and time."""
    other = tmp_path / "other" / data.name
    other.parent.mkdir()
    others = [row | {"id": 199 - row["id"]} for row in ROWS]
    text = "\n".join(map(json.dumps, others)) if data.suffix == ".gz" else json.dumps(others)
    other.write_bytes(gzip.compress(text.encode()) if data.suffix == ".gz" else text.encode())
    rows, theirs = Rows(data), Rows(other)
    for one, verdict in ((rows, "mine"), (theirs, "theirs")):
        one.remember("verdict", lambda verdict=verdict: verdict)
    for file in theirs.folder.glob(f"{theirs.key}.*"):
        shutil.copy(file, rows.folder / file.name.replace(theirs.key, rows.key))
        again = Rows(data)
        assert list(again) == ROWS and again.remember("verdict", lambda: "mine") == "mine"


def test_rows_that_were_damaged_after_the_start_are_refused(data):
    """Other rows stay right: each is held against its own digest."""
    rows = Rows(data)
    file = rows.data.path
    place = rows.spans[5][0] + 8
    content, status = bytearray(file.read_bytes()), file.stat()
    content[place] ^= 1
    with open(file, "r+b") as opened:
        opened.write(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # so that only the digest can tell
    assert rows[4] == ROWS[4] and rows[6] == ROWS[6]
    with pytest.raises(LostFile, match=f"{file.name} (was changed while|is damaged: remove it)"):
        rows[5]


def test_spans_that_make_no_sense_give_no_row(data):
    rows = Rows(data)
    for start, end in ((-5, 3), (3, 2), (0, 2**62), (2**62, 2**63 - 1)):
        rows.spans[0, :2] = start, end
        with pytest.raises(LostFile):
            rows[0]


# ---- the feature cache -------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path) -> tuple[FeatureStore, list[Path], torch.Tensor]:
    """A store of eight images in two segments, the images, and their features."""
    images = [tmp_path / f"{number}.png" for number in range(8)]
    for number, image in enumerate(images):
        save_image(image, number)
    features = torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(0))
    store = FeatureStore(tmp_path / "cache" / "clip-float32", "float32")
    keys = np.stack(image_keys(images))
    store.add(keys[:4], features[:4].numpy())
    store.add(keys[4:], features[4:].numpy())
    store.reload()
    return store, images, features


def check_nothing_wrong(folder: Path, images: list[Path], features: torch.Tensor) -> int:
    """Every image has its own features, none, or is refused with the file's name; returns how many have."""
    store, num_right = FeatureStore(folder, "float32"), 0
    for image, expected in zip(images, features, strict=True):
        try:
            (found,) = store.read_all([image])
        except LostFile as error:
            assert ".features.npy" in str(error) and "encoded anew" in str(error)
            continue
        assert found is None or torch.equal(found, expected)
        num_right += found is not None
    return num_right


def test_no_damaged_feature_is_served(cache):
    store, images, features = cache
    draw = random.Random(1)
    for file in store.folder.glob("*.npy"):
        good = file.read_bytes()
        for bad in damages(good, draw):
            file.write_bytes(bad)
            # A flip in the features costs the image that it is in; anything else the segment.
            is_flip = ".features." in file.name and len(bad) == len(good) and bad[:128] == good[:128]
            assert check_nothing_wrong(store.folder, images, features) == (7 if is_flip else 4)
        file.unlink()
        assert check_nothing_wrong(store.folder, images, features) == 4
        file.write_bytes(good)
    assert check_nothing_wrong(store.folder, images, features) == 8


def test_features_that_are_damaged_after_the_store_was_opened_are_refused(cache):
    store, images, features = cache
    number, row = store.places[store.find(image_keys(images[:1])[0])].tolist()
    path = store.segments[number].path
    assert torch.equal(store.read_all(images[:1])[0], features[0])
    content = bytearray(path.read_bytes())
    content[128 + row * 5 * 6 * 4 + 17] ^= 64
    path.write_bytes(content)
    with pytest.raises(LostFile, match="features.npy .*encoded anew"):
        store.read_all(images[:1])
    path.write_bytes(content[:200])  # a mapping would end the process here
    for _ in range(2):
        with pytest.raises(LostFile, match="features.npy .*encoded anew"):
            store.read_all(images[:1])


def test_segments_of_another_cache_are_not_used(cache, tmp_path):
    """Of another CLIP, under names that are right here."""
    store, images, features = cache
    other = FeatureStore(tmp_path / "cache" / "other-float32", "float32")
    other.add(np.stack(image_keys(images)), features.numpy() + 1)
    for file in other.folder.glob("*.npy"):
        shutil.copy(file, store.folder)
    assert check_nothing_wrong(store.folder, images, features) == 8
    mine = sorted(path for path in store.folder.glob("*.keys.npy") if not (other.folder / path.name).exists())
    (theirs,) = other.folder.glob("*.keys.npy")
    shutil.copy(features_of(theirs), features_of(mine[0]))
    assert check_nothing_wrong(store.folder, images, features) == 4
    shutil.copy(theirs, mine[0])
    assert check_nothing_wrong(store.folder, images, features) == 4


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 7e4])
def test_features_that_float16_cannot_hold_are_not_kept(tmp_path, value):
    """7e4 became infinity in a float16 cache, without a word."""
    save_image(tmp_path / "0.png", 0)
    store = FeatureStore(tmp_path / "cache", "float16")
    features = np.zeros((1, 5, 6), np.float32)
    features[0, 3, 2] = value
    with pytest.raises(ValueError, match="not finite in float16"):
        store.add(np.stack(image_keys([tmp_path / "0.png"])), features)
    assert not (tmp_path / "cache").exists()
