"""A parquet file with its images inside, read in any order: how long until the first batch, how much memory
do the loader's workers take while an epoch goes by, and what does one image cost?

reads    nothing
writes   --folder: the parquet file (--gb), its index with a copy of the images, and embedded_images.json with
         the numbers; --remove removes file and index again

    python -m benchmarks.embedded_images --remove
    python -m benchmarks.embedded_images --gb 0.05 --workers 2 --remove      # in half a minute

The file is as Hugging Face's datasets write one: images [{"bytes", "path"}], texts [{"user", "assistant"}],
100 rows to a group. No two images are equal, and one is broken. Every part is a fresh process with the data
side of training alone. Linux only (/proc).
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.data_scale import measure_memory
from benchmarks.machine import peak_memory, run_module, save_results
from benchmarks.synthetic import save_tokenizer
from model.data.dataset import VLMDataset
from model.data.spec import PRETRAIN
from model.prompt import Renderer, load_tokenizer
from model.vision_utils import ImageProcessor
from trainer.batches import GlobalBatches
from trainer.distributed import Run
from trainer.loader import Loader

GROUP = 100  # rows
BATCH = 32
NUM_LOOKS = 8  # at the memory, during an epoch
NUM_READS, NUM_CACHED = 200, 4  # single images; row groups that the comparison holds


def make_images(count: int = 64) -> list[bytes]:
    """JPEGs of about 100 kB."""
    draw, found = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (120, 160, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
        found.append(buffer.getvalue())
    return found


def make_table(folder: Path, gigabytes: float) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / f"images_{gigabytes:g}.parquet"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder)
    images, draw = make_images(), random.Random(0)
    num_groups = max(1, round(gigabytes * 1e9 / (GROUP * np.mean([len(image) for image in images]))))
    broken, writer = num_groups * GROUP // 2, None
    for group in range(num_groups):
        rows = []
        for number in range(group * GROUP, (group + 1) * GROUP):
            content = draw.choice(images) + draw.randbytes(16)  # behind the end of a JPEG anything may stand
            content = content[:2000] if number == broken else content
            pair = {"user": f"What is image {number}?", "assistant": "Noise of many colours."}
            rows.append({"images": [{"bytes": content, "path": f"{number}.jpg"}], "texts": [pair]})
        table = pa.Table.from_pylist(rows)
        writer = writer or pq.ParquetWriter(path.with_suffix(".tmp"), table.schema)
        writer.write_table(table, row_group_size=GROUP)
    writer.close()
    return path.with_suffix(".tmp").rename(path)


def open_table(path: Path) -> VLMDataset:
    renderer = Renderer(load_tokenizer(path.parent))
    return VLMDataset(path, PRETRAIN, renderer, path.parent, ImageProcessor())


# ---- one measurement, in a process of its own --------------------------------------------------------------


def measure_index(path: Path) -> dict:
    """The first opening: how long, and the largest memory of this process and of the one that reads."""
    before, peaks, done = peak_memory(), [0], threading.Event()

    def watch(children: Path) -> None:
        while not done.wait(0.02):
            with contextlib.suppress(OSError, TypeError):  # it has ended
                peaks.extend(peak_memory(int(child)) for child in children.read_text().split())

    watcher = threading.Thread(target=watch, args=[Path(f"/proc/self/task/{os.getpid()}/children")])
    watcher.start()
    started = time.perf_counter()
    dataset = open_table(path)
    opened = time.perf_counter()
    done.set()
    watcher.join()
    dataset.check_rows()
    return {
        "rows": len(dataset),
        "index_s": opened - started,
        "check_s": time.perf_counter() - opened,
        "reader_mb": max(peaks) / 1e6,
        "before_mb": before / 1e6,
        "peak_mb": peak_memory() / 1e6,
        "index_bytes": sum(file.stat().st_size for file in dataset.rows.folder.iterdir()),
    }


def measure_epoch(path: Path, num_workers: int) -> dict:
    """An epoch of shuffled batches, with a look at the memory NUM_LOOKS times."""
    started = time.perf_counter()
    dataset = open_table(path)
    opened = time.perf_counter() - started
    batches = GlobalBatches(len(dataset), BATCH, Run(0, 1, torch.device("cpu")))
    loader, bad, looks = iter(Loader(dataset, batches, num_workers)), [], []
    bad += next(loader)["bad_samples"]
    first = time.perf_counter() - started
    each = max(1, (batches.total_steps - 2) // NUM_LOOKS)
    started = time.perf_counter()
    for _ in range(NUM_LOOKS):
        for batch in islice(loader, each):
            bad += batch["bad_samples"]
        looks.append(measure_memory())
    seconds = time.perf_counter() - started
    bad += [reason for batch in loader for reason in batch["bad_samples"]]
    assert len(bad) == 1 and f"row {len(dataset) // 2 + 1}: cannot read image 1" in bad[0], bad
    return {
        "workers": num_workers,
        "open_s": opened,
        "first_batch_s": first,
        "images_per_s": NUM_LOOKS * each * BATCH / seconds,
        "looks": looks,
        "bad_sample": bad[0],
    }


def measure_reads(path: Path) -> dict:
    """Milliseconds for the bytes of one image in any order: from the index, and from parquet with NUM_CACHED
    row groups held."""
    import pyarrow.parquet as pq

    dataset, table = open_table(path), pq.ParquetFile(path)
    groups: OrderedDict[int, list] = OrderedDict()

    def from_index(position: int) -> bytes:
        return dataset.expand(position)[0][0].read()

    def from_group(position: int) -> bytes:
        number, row = divmod(position, GROUP)
        if number not in groups:
            groups[number] = table.read_row_group(number, columns=["images"])["images"]
            while len(groups) > NUM_CACHED:
                groups.popitem(last=False)
        groups.move_to_end(number)
        return groups[number][row].as_py()[0]["bytes"]

    positions = random.Random(1).sample(range(len(dataset)), min(NUM_READS, len(dataset)))
    assert from_index(positions[0]) == from_group(positions[0])
    return {"index_ms": duration(from_index, positions), "groups_ms": duration(from_group, positions)}


def duration(read: Callable[[int], bytes], positions: list[int]) -> float:
    started = time.perf_counter()
    for position in positions:
        read(position)
    return 1000 * (time.perf_counter() - started) / len(positions)


MEASURES = {"index": measure_index, "epoch": measure_epoch, "reads": measure_reads}


def measure_apart(name: str, path: Path, *numbers: int) -> dict:
    return json.loads(run_module("embedded_images", "--measure", name, path.resolve(), *numbers))


def print_report(path: Path, index: dict, epoch: dict, reads: dict) -> None:
    totals = [round(look["total_mb"]) for look in epoch["looks"]]
    workers = [max(look["pss_mb"][1:], default=0) for look in epoch["looks"]]
    print(f"{path}: {path.stat().st_size / 1e6:,.0f} MB, {index['rows']:,} rows")
    print(
        f"once: index {index['index_s']:.1f} s, {index['index_bytes'] / 1e6:,.0f} MB on disk; at most "
        f"{index['reader_mb']:.0f} MB the process that reads, {index['before_mb']:.0f} -> "
        f"{index['peak_mb']:.0f} MB this one; check of all rows {index['check_s']:.1f} s"
    )
    print(
        f"later: open {epoch['open_s']:.2f} s, first batch {epoch['first_batch_s']:.2f} s, "
        f"{epoch['images_per_s']:.0f} images/s with {epoch['workers']} workers"
    )
    print(f"MB of all processes (PSS) as an epoch goes by: {totals}; of the largest worker: {workers}")
    print(
        f"one image, any order: {reads['index_ms']:.2f} ms from the index, {reads['groups_ms']:.1f} ms from "
        f"parquet with {NUM_CACHED} row groups held"
    )
    print(f"bad sample: {epoch['bad_sample']}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=2.0, help="size of the parquet file (twice that on disk)")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path("out/benchmarks/embedded_images"))
    parser.add_argument("--remove", action="store_true", help="remove the file and its index at the end")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        name, path, *numbers = args.measure
        print(json.dumps(MEASURES[name](Path(path), *map(int, numbers))))
        return
    path = make_table(args.folder, args.gb)
    index_folder = path.with_name(f".{path.name}.index")
    shutil.rmtree(index_folder, ignore_errors=True)
    index = measure_apart("index", path)
    epoch = measure_apart("epoch", path, args.workers)
    reads = measure_apart("reads", path)
    print_report(path, index, epoch, reads)
    report = {"bytes": path.stat().st_size, "index": index, "epoch": epoch, "reads": reads}
    save_results("embedded_images", report, args.folder)
    if args.remove:
        path.unlink()
        shutil.rmtree(index_folder)


if __name__ == "__main__":
    main()
