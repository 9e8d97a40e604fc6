"""A data file as large as LLaVA's first stage: how long until the first batch, and how much memory do the
loader's workers take? Rows from the file and its index against a plain list of dicts.

reads    nothing
writes   --folder: the data file (595 k rows), eight images that all rows share,
         data_scale.json with the numbers

    python -m benchmarks.data_scale
    python -m benchmarks.data_scale --rows 20000 --workers 0 2      # in half a minute

Every line of the table is a fresh process with the data side of training alone: no CLIP, no language model.
"first batch" counts from the start of the process; "at work" is after 80 batches of 32 samples with images,
"after an epoch" when every row has been read by one of the workers. Linux only (/proc).
"""

import argparse
import json
import multiprocessing
import random
import shutil
import time
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.machine import run_module, save_results
from model.data.dataset import VLMDataset
from model.data.rows import Rows
from model.data.spec import PRETRAIN
from model.prompt import Renderer, load_tokenizer
from model.vision_utils import ImageProcessor
from trainer.batches import GlobalBatches
from trainer.distributed import Run
from trainer.loader import Loader

QUESTIONS = (
    "写一篇简短但有益的图片摘要.\n<image>",
    "<image>\n请描述这张图片的内容.",
    "提供给定图像的简要描述.\n<image>",
)
CHARACTERS = "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下"
NUM_BATCHES = 80


class PlainList(list):
    """What Rows is compared with: everything in memory, as json.load gives it."""

    def __init__(self, path: Path):
        super().__init__(json.loads(path.read_text(encoding="utf-8")))
        self.path = path

    def remember(self, name: str, make):
        return make()

    def place(self, position: int) -> tuple["PlainList", int]:
        return self, position


class RowsAlone(Dataset):
    """Reads rows and no images: an epoch in seconds."""

    def __init__(self, rows: Rows | PlainList):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> int:
        return len(self.rows[position]["conversations"])


def make_data(folder: Path, num_rows: int) -> Path:
    """A JSON list in LLaVA's format, with captions of 10 to 60 Chinese characters, and its images."""
    path = folder / f"captions_{num_rows}.json"
    if path.is_file():
        return path
    from dataset.demo_world.tokenizer import train_tokenizer  # the measured processes do without

    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer(folder / "tokenizer")
    for number in range(8):
        Image.effect_noise((256, 256), 60).convert("RGB").save(folder / f"{number}.jpg", quality=90)
    draw = random.Random(0)
    with open(path.with_suffix(".tmp"), "w", encoding="utf-8") as file:
        for number in range(num_rows):
            caption = "".join(draw.choices(CHARACTERS, k=draw.randint(10, 60)))
            row = {
                "id": f"GCC_train_{number:09d}",
                "image": f"{number % 8}.jpg",
                "conversations": [
                    {"from": "human", "value": draw.choice(QUESTIONS)},
                    {"from": "gpt", "value": caption},
                ],
            }
            file.write(("[\n" if number == 0 else ",\n") + json.dumps(row, ensure_ascii=False, indent=2))
        file.write("\n]\n")
    return path.with_suffix(".tmp").rename(path)


# ---- one measurement, in a process of its own --------------------------------------------------------------


def memory_of(pid: int) -> dict[str, float]:
    """MB of a process. PSS counts a page that n processes share as 1/n in each, so a sum counts it once."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    values = {line.split(":")[0]: int(line.split()[1]) / 1000 for line in lines}
    return {"pss": values["Pss"], "rss": values["Rss"]}


def measure_memory() -> dict:
    """Of this process and its workers, while they are at work."""
    processes = [memory_of("self"), *(memory_of(child.pid) for child in multiprocessing.active_children())]
    return {
        "total_mb": sum(process["pss"] for process in processes),
        "rss_mb": [round(process["rss"]) for process in processes],
        "pss_mb": [round(process["pss"]) for process in processes],
    }


def measure(path: Path, kind: str, num_workers: int, born: float) -> dict:
    """Open the file as training does, load some batches with images, then one epoch of rows without."""
    renderer = Renderer(load_tokenizer(path.parent / "tokenizer"))  # an import of its own
    imported = time.time()
    dataset = VLMDataset(path, PRETRAIN, renderer, path.parent, ImageProcessor())
    if kind == "list":
        dataset.rows = PlainList(path)  # in the place of the file and its index, which cost 10 ms to open
    opened = time.time()
    dataset.check_rows()
    checked = time.time()
    batches = GlobalBatches(len(dataset), 32, Run(0, 1, torch.device("cpu")))
    loader = iter(Loader(dataset, batches, num_workers))
    assert not next(loader)["bad_samples"]
    result = {
        "kind": kind,
        "workers": num_workers,
        "import_s": imported - born,
        "open_s": opened - imported,
        "check_s": checked - opened,
        "first_batch_s": time.time() - born,
    }
    for _ in islice(loader, NUM_BATCHES):
        pass
    result["at_work"] = measure_memory()
    loader.close()
    epoch = DataLoader(RowsAlone(dataset.rows), batch_size=1024, shuffle=True, num_workers=num_workers)
    loader = iter(epoch)
    for _ in islice(loader, len(epoch) - 1):  # after the last one the workers leave
        pass
    result["after_epoch"] = measure_memory()
    return result


def measure_apart(path: Path, kind: str, num_workers: int) -> dict:
    return json.loads(run_module("data_scale", "--measure", path.resolve(), kind, num_workers, time.time()))


def print_table(results: list[dict]) -> None:
    """One line per measured process; memory in MB."""
    import pandas  # the measured processes do without

    print(
        pandas.DataFrame(
            [
                {
                    "rows": result["kind"],
                    "workers": result["workers"],
                    "import s": result["import_s"],
                    "open s": result["open_s"],
                    "check s": result["check_s"],
                    "first batch s": result["first_batch_s"],
                    "PSS of all, at work": round(result["at_work"]["total_mb"]),
                    "after an epoch": round(result["after_epoch"]["total_mb"]),
                    "RSS of trainer": result["after_epoch"]["rss_mb"][0],
                    "of a worker": max(result["after_epoch"]["rss_mb"][1:], default=0),
                }
                for result in results
            ]
        ).to_string(index=False, float_format="{:.2f}".format)
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=595_375)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 8])
    parser.add_argument("--folder", type=Path, default=Path("out/benchmarks/data_scale"))
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        path, kind, num_workers, born = args.measure
        print(json.dumps(measure(Path(path), kind, int(num_workers), float(born))))
        return
    path = make_data(args.folder, args.rows)
    shutil.rmtree(path.with_name(f".{path.name}.index"), ignore_errors=True)
    print(f"{path}: {args.rows} rows, {path.stat().st_size / 1e6:.0f} MB")
    first = measure_apart(path, "rows", 0)
    print(f"once: index {first['open_s']:.1f} s, check of all rows {first['check_s']:.1f} s")
    results = [measure_apart(path, kind, workers) for workers in args.workers for kind in ("rows", "list")]
    print_table(results)
    report = {"rows": args.rows, "bytes": path.stat().st_size, "once": first, "results": results}
    save_results("data_scale", report, args.folder)


if __name__ == "__main__":
    main()
