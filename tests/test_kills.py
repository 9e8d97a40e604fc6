"""SIGKILL at any moment while an index, a feature cache or a demo world is made: what is there afterwards is
used and right, and what is made in the end is the same to the bit as if nothing had happened."""

import json
import multiprocessing
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LONG, save_image

from dataset.demo_world.build import World
from model.data import rows as rows_module
from model.data.feature_store import FeatureStore, image_keys
from model.data.rows import Rows
from model.locks import claimed

NUM_KILLS = 6


def killed(target: Callable[[], None], seconds: float) -> None:
    """Do something in a process of its own that is killed after so many seconds."""
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    time.sleep(seconds)
    process.kill()
    process.join(LONG)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("lock", ".lock")
    }


def duration(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet"])
def test_an_index_whose_builder_is_killed(tmp_path, monkeypatch, name):
    import pandas

    monkeypatch.setattr(rows_module, "SMALL", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    rows, path = [{"id": number, "text": "行" * (number % 50)} for number in range(1500)], tmp_path / name
    if name.endswith(".parquet"):
        pandas.DataFrame(rows).to_parquet(path)
    elif name.endswith(".jsonl"):
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        path.write_text(json.dumps(rows))
    folder, draw = path.with_name(f".{name}.index"), random.Random(0)
    long = duration(lambda: Rows(path).remember("sum", lambda: 7))
    expected = contents(folder)

    def build() -> None:
        Rows(path).remember("sum", lambda: 7)

    for _ in range(NUM_KILLS):
        for file in folder.iterdir():
            file.unlink()
        killed(build, draw.uniform(0, 1.2 * long))
        again = Rows(path)
        assert again.remember("sum", lambda: 7) == 7 and list(again)[::97] == rows[::97]
        assert {name: part for name, part in contents(folder).items() if ".tmp" not in name} == expected


def test_a_feature_cache_whose_filling_is_killed(tmp_path):
    images = [tmp_path / f"{number}.png" for number in range(40)]
    for number, image in enumerate(images):
        save_image(image, number)
    keys, features = np.stack(image_keys(images)), torch.randn(40, 5, 6).numpy()

    def fill(folder: Path = tmp_path / "killed") -> None:
        store = FeatureStore(folder, "float32")
        missing = [number for number, key in enumerate(keys) if key not in store]
        for start in range(0, len(missing), 4):
            part = missing[start : start + 4]
            store.add(keys[part], features[part])

    long, draw = duration(lambda: fill(tmp_path / "whole" / "killed")), random.Random(1)
    for _ in range(NUM_KILLS):
        killed(fill, draw.uniform(0, long))
        store = FeatureStore(tmp_path / "killed", "float32")
        assert not store.damaged
        for number, image in enumerate(images):
            (found,) = store.read_all([image])
            assert found is None or np.array_equal(found.numpy(), features[number])
    fill()
    found = {name: part for name, part in contents(tmp_path / "killed").items() if ".tmp" not in name}
    assert found == contents(tmp_path / "whole" / "killed")


class SmallWorld(World):
    """What is made within a second."""

    def images(self, split: str) -> dict:
        return dict(list(super().images(split).items())[:10])

    def parts(self) -> dict[str, Callable[[], None]]:
        return {name: part for name, part in super().parts().items() if name in ("images", "tokenizer")}


def test_a_demo_world_whose_builder_is_killed(tmp_path):
    def world(name: str) -> SmallWorld:
        return SmallWorld(tmp_path / name, "tiny", seed=3)

    long, draw = duration(world("whole").build), random.Random(2)
    for _ in range(NUM_KILLS):
        killed(world("killed").build, draw.uniform(0, long))
    world("killed").build()
    one, other = (contents(tmp_path / name) for name in ("whole", "killed"))
    del one["world.json"], other["world.json"]  # how long its parts took
    assert one == other and not (tmp_path / "killed.building").exists()


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"[" * 100_000, b"\xff\xfe"])
def test_a_demo_world_whose_notes_are_damaged(tmp_path, damage):
    """Half-made, it is begun anew; ready-made, it is refused by name."""
    world = SmallWorld(tmp_path / "demo", "tiny", seed=3)
    world.work.mkdir()
    (world.work / "world.json").write_bytes(damage)
    (world.work / "old").write_text("")
    world.build()
    assert not (tmp_path / "demo" / "old").exists()
    (tmp_path / "demo" / "world.json").write_bytes(damage)
    with pytest.raises(ValueError, match="demo holds something else; choose another --out"):
        world.build()


def test_two_builders_of_one_demo_world(tmp_path):
    """They wrote into each other's files."""

    def hold() -> None:
        with claimed(tmp_path / "demo", "x"):
            time.sleep(LONG)

    holder = multiprocessing.get_context("fork").Process(target=hold)
    holder.start()
    lock = tmp_path / ".demo.lock"
    while not (lock.is_file() and lock.read_bytes()):
        assert holder.is_alive()
    with pytest.raises(
        ValueError, match=rf"demo is being written by process {holder.pid} on .*another --out"
    ):
        SmallWorld(tmp_path / "demo", "tiny", seed=3).build()
    holder.kill()
    holder.join(LONG)
    SmallWorld(tmp_path / "demo", "tiny", seed=3).build()
    assert (tmp_path / "demo" / "world.json").is_file()
