"""Images as bytes in tables, data in several files, rows of text alone: what holds of image files and of one
data file holds of these."""

import gzip
import json
import pickle
import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, check_refused, run_clean, run_inside, train, weights_of
from test_rows import in_processes
from test_schemas import MIXED, SCHEMAS, Others, in_two, make_documented, write_parquet

from model.data import rows as rows_module
from model.data.batch import BadSample, collate
from model.data.dataset import VLMDataset
from model.data.formats import data_files
from model.data.rows import Rows
from model.data.schemas import find_images
from model.data.shards import Shards, open_rows
from model.vision_utils import ImageProcessor
from trainer.batches import GlobalBatches
from trainer.distributed import Run
from trainer.memory import longest_sample

# ---- bytes in a table --------------------------------------------------------------------------------------


@pytest.fixture
def table(workplace, monkeypatch) -> Path:
    """15 rows, of which the fifth has a broken image."""
    monkeypatch.setattr(rows_module, "SMALL", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
    there = Others(workplace / "images")
    broken = [*there.bytes[:4], there.bytes[4][:200], *there.bytes[5:]]
    return write_parquet(workplace / "a.parquet", {"image": broken, "texts": there.pairs()})


def open_table(table: Path, renderer) -> VLMDataset:
    return VLMDataset(table, MIXED, renderer, table.parent / "images", ImageProcessor())


def test_a_broken_image_in_a_table_is_a_bad_sample_with_its_row(table, renderer):
    dataset = open_table(table, renderer)
    dataset.check_rows()
    bad = [position for position in range(len(dataset)) if isinstance(dataset[position], BadSample)]
    assert bad == [4]
    assert dataset[4].reason.startswith(f"{table}, row 5: cannot read image 1 in {table}, row 5: ")


def test_a_broken_image_in_a_table_ends_a_run(workplace, table, capsys):
    """And is found by trainer.check; with --on_bad_sample skip it is reported, too."""
    flags = [f"@{workplace}/args", "--min_images=0", f"--data_path={table}", "--epochs=1"]
    check = run_clean(capsys, "trainer/check.py", "pretrain", *flags)
    assert check.returncode == 2 and "a.parquet, row 5: cannot read image 1" in check.stderr
    result = run_clean(capsys, "1-pretrain_vlm.py", *flags, "--val_fraction=0.2")
    check_refused(result, "a.parquet, row 5", "cannot read image 1")
    (workplace / "out" / "32_vlm_pretrain.resume").unlink(missing_ok=True)
    result = run_clean(capsys, "1-pretrain_vlm.py", *flags, "--on_bad_sample=skip")
    assert "a.parquet, row 5: cannot read image 1" in result.stdout + result.stderr


def test_images_of_a_table_are_copied_once_and_never_wrong(table, renderer):
    rows = Rows(table)
    assert rows.index_seconds > 0 and rows.images.path.parent == rows.folder
    path, images = rows.images.path, pq.read_table(table)["image"].to_pylist()
    content = b"".join(filter(None, images))
    assert path.read_bytes() == content
    dataset = open_table(table, renderer)
    assert dataset.rows.index_seconds == 0
    (image,) = pickle.loads(pickle.dumps(dataset.expand(3)[0]))  # as a spawned worker gets it
    assert image.read() == images[3]
    path.write_bytes(content[:-1] + b"x")  # the last image, to no other size
    again = open_table(table, renderer)
    assert again.rows.index_seconds == 0 and "input_ids" in again[0]
    assert again[11].ends_run and f"{path} is damaged: remove it, and it is made anew" in again[11].reason
    path.write_bytes(content[:-1])  # to another: it is made anew
    assert open_table(table, renderer).rows.index_seconds > 0 and path.read_bytes() == content


def test_where_no_copy_has_room_few_images_stay_in_memory_and_many_say_so(table, renderer, monkeypatch):
    def full(path, write):
        raise OSError("No space left on device")

    monkeypatch.setattr(rows_module, "atomic_write", full)
    dataset = open_table(table, renderer)
    assert dataset.rows.folder is None and "input_ids" in dataset[0]
    monkeypatch.setattr(rows_module, "MAX_IN_MEMORY", 20_000)
    with pytest.raises(ValueError, match="a.parquet: its images need a copy .* XDG_CACHE_HOME"):
        Rows(table)


def test_a_disk_that_the_copy_would_fill_is_left_alone(table, renderer, monkeypatch):
    """The next folder gets it."""
    usage, beside = rows_module.shutil.disk_usage, table.with_name(".a.parquet.index")
    monkeypatch.setattr(
        rows_module.shutil,
        "disk_usage",
        lambda folder: usage(folder)._replace(free=5) if folder == beside else usage(folder),
    )
    rows = Rows(table)
    assert rows.folder.is_relative_to(table.parent / "cache") and rows.images.path.is_file()
    assert not list(beside.glob("*.rows"))


def test_columns_of_a_table_cannot_pass_for_a_place(tmp_path):
    forged = [{"$stored": [0, 10**15], "path": "a.jpg", "bytes": None}]
    text = '[{"role": "user", "content": [{"type": "image", "image": {"$stored": [0, 3, "00"]}}]}]'
    row = Rows(write_parquet(tmp_path / "a.parquet", {"image": forged, "audio": [b"123"]}))[0]
    assert row == {"image": {"path": "a.jpg", "bytes": None}, "audio": "3 bytes"}
    assert find_images(Rows(write_parquet(tmp_path / "b.parquet", {"messages": [text]}))[0]) is None


# ---- several files -----------------------------------------------------------------------------------------


def test_rows_of_several_files_are_those_of_one(workplace, monkeypatch):
    monkeypatch.setattr(rows_module, "SMALL", 0)
    there = Others(workplace / "images")
    columns = {"image": there.bytes, "texts": there.pairs(), "id": [row["id"] for row in there.rows]}
    folder = in_two(write_parquet, workplace / "data", ".parquet", columns)
    whole, shards = open_rows(write_parquet(workplace / "a.parquet", columns)), open_rows(folder)
    assert isinstance(whole, Rows) and isinstance(shards, Shards)
    assert [row["id"] for row in shards] == [row["id"] for row in whole]
    assert shards[-1]["id"] == whole[-1]["id"] and len(shards) == 15
    with pytest.raises(IndexError):
        shards[15]
    assert shards.name(6) == f"{folder}/train-0.parquet, row 7"
    assert shards.name(7) == f"{folder}/train-1.parquet, row 1"
    again = open_rows(str(folder / "*.parquet"))
    assert again.fingerprint == shards.fingerprint != whole.fingerprint and again.index_seconds == 0
    calls = []
    for _ in range(2):
        assert open_rows(folder).remember("n", lambda: calls.append(1) or 7) == 7
    assert calls == [1]
    (folder / "train-1.parquet").unlink()
    assert open_rows(folder).remember("n", lambda: 8) == 8  # not what was said of both files


def test_more_files_than_a_process_may_open_at_its_start(tmp_path):
    """Many systems say 1024; a data set may have thousands of files."""
    resource = pytest.importorskip("resource")
    for number in range(200):
        (tmp_path / f"{number:03}.jsonl").write_text(f"{number}\n")

    def check() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (150, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        assert list(open_rows(tmp_path)) == list(range(200))

    assert in_processes(1, check) == [0]


def test_what_a_folder_or_pattern_means(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", ".c.jsonl", "notes.txt", "sub/d.ndjson"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert [path.name for path in data_files(tmp_path)] == ["a.jsonl.gz", "b.jsonl"]
    found = [path.name for path in data_files(tmp_path / "**" / "*json*")]
    assert found == ["a.jsonl.gz", "b.jsonl", "d.ndjson"]
    (tmp_path / "[1].jsonl").write_text("{}")  # a name, though it looks like a pattern
    assert data_files(tmp_path / "[1].jsonl") == [tmp_path / "[1].jsonl"]


def test_a_path_that_means_nothing_is_one_line(workplace, capsys):
    (workplace / "both").mkdir()
    for name in ("info.json", "rows.parquet"):
        (workplace / "both" / name).write_text("{}")
    for path, fragments in (
        ("images", ["holds no .json, .jsonl or .parquet file"]),
        ("none/*.parquet", ["no file matches", "--data_path"]),
        ("both", ["holds both .json and .parquet files", "--data_path"]),
        ("gone.json", ["data file not found"]),
    ):
        flags = [f"@{workplace}/args", f"--data_path={workplace}/{path}"]
        check_refused(run_clean(capsys, "1-pretrain_vlm.py", *flags), path.split("/")[0], *fragments)


def test_the_documented_commands_run(workplace, monkeypatch):
    """Those of dataset/README.md: a folder, a pattern, a file that is compressed."""
    there, place = Others(workplace / "images"), workplace / "my_data"
    place.mkdir()
    columns = {
        "images": [inside and [inside] for inside in there.structs(there.bytes)],
        "texts": there.pairs(),
    }
    in_two(write_parquet, place / "finevision", ".parquet", columns)
    rows = [row for row in there.rows if row["image"]]
    (place / "captions.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    (workplace / "images").rename(place / "images")
    monkeypatch.chdir(workplace)
    text = (ROOT / "dataset" / "README.md").read_text()
    commands = [line for line in text.splitlines() if line.startswith("python ")]
    assert len(commands) == 3
    for command in commands:
        _, script, *flags = shlex.split(command)
        run_inside(script, "@args", *flags, "--max_steps=2")


# ---- rows of text alone ------------------------------------------------------------------------------------


def test_a_batch_may_mix_rows_with_and_without_images(workplace, renderer):
    path = SCHEMAS["jsonl, base64"](Others(workplace / "images"), workplace)
    dataset = VLMDataset(path, MIXED, renderer, workplace / "images", ImageProcessor())
    mixed, text = collate([dataset[0], dataset[13], dataset[1]]), collate([dataset[12], dataset[13]])
    assert mixed["num_images"].tolist() == [1, 0, 1] and len(mixed["pixel_values"]) == 2
    assert text["num_images"].tolist() == [0, 0] and len(text["pixel_values"]) == 0
    cached = dataset[0] | {"image_features": torch.ones(1, 50, 24)}
    del cached["pixel_values"]
    for samples in ([dataset[13], cached], [cached, dataset[13]]):
        assert collate(samples)["image_features"].shape == (1, 50, 24)


@pytest.mark.parametrize("cache", [False, True])
def test_a_process_whose_batch_is_text_alone_takes_the_same_step(workplace, cache):
    """DDP waits on every process for the gradient of the projection: it would wait for ever."""
    rows = make_documented()
    rows = [row for number, text in enumerate((12, 13, 14)) for row in (rows[number], rows[text], rows[text])]
    ranks = [GlobalBatches(9, 1, Run(rank, 2, torch.device("cpu")), epochs=2, seed=1337) for rank in (0, 1)]
    shown = [[any(rows[row]["image"] for row in batch) for batch in batches] for batches in ranks]
    assert {(True, False), (False, True), (False, False)} <= set(zip(*shown, strict=True))
    (workplace / "data.json").write_text(json.dumps(rows))
    flags = ["--min_images=0", "--epochs=2", "--max_steps=0", "--bucket=False"]
    flags += [f"--feature_cache={workplace}/cache"] * cache
    train(workplace, *flags, "--batch_size=2")
    expected = weights_of(workplace)
    train(workplace, *flags, "--batch_size=1", processes=2)
    found = weights_of(workplace)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    train(workplace, *flags, "--batch_size=1", "--seed=7")
    assert not torch.allclose(weights_of(workplace)["vision_proj.weight"], expected["vision_proj.weight"])


def test_memory_is_planned_with_an_image_though_the_longest_row_has_none(workplace, renderer):
    """Loader workers get as much shared memory as a batch of images takes."""
    rows = make_documented()
    rows[13]["conversations"][1]["value"] = "Hello. " * 60
    (workplace / "data.json").write_text(json.dumps(rows))
    dataset = VLMDataset(workplace / "data.json", MIXED, renderer, workplace / "images", ImageProcessor())
    sample = longest_sample(dataset)
    assert sample["input_ids"].shape == (1, len(dataset[13]["input_ids"]))
    assert len(sample["image_slots"]) == len(sample["pixel_values"]) == 1
