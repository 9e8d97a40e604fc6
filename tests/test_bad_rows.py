"""Every kind of bad row and image found in people's data: named by file, row, id and reason; left out and
counted, down to the last one, by training with --on_bad_sample skip."""

import io
import json
import os
import signal
import struct
import zlib
from contextlib import nullcontext

import pytest
import torch
from conftest import check_refused, make_row, make_rows, run_script, save_image
from PIL import Image
from torch.utils.data import Subset

from model.data import dataset as dataset_module
from model.data.batch import BadSample
from model.data.dataset import VLMDataset
from model.data.spec import PRETRAIN, SFT
from model.prompt import Renderer
from model.vision_utils import ImageProcessor
from trainer.loader import Loader

MAX_SEQ_LEN = 256
MARK = "<image>\n什么？"


def turns(*conversation: tuple) -> dict:
    return {"image": "0.png", "conversations": [{"from": role, "value": text} for role, text in conversation]}


def png(width: int, height: int) -> bytes:
    """A PNG whose header promises a size, and nothing behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def whole(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


IMAGES = {  # file name -> what is in it
    "empty.jpg": b"",
    "half.jpg": whole("JPEG")[:900],
    "half.png": whole("PNG")[:2000],
    "text.jpg": "这不是图片。".encode(),
    "pointer.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "page.jpg": b"<!DOCTYPE html><html>404</html>",
    "bomb.png": png(50_000, 50_000),
    "nothing.png": png(0, 5),
    "jp2.jp2": whole("JPEG2000")[:60],
    "webp.webp": whole("WEBP")[:40],
    "dds.dds": b"DDS " + struct.pack("<I", 124) + bytes(120),  # Pillow raises NotImplementedError
}

BAD = {  # what is wrong -> the row, and what its name says
    "no object": ("text", "it is a str, not an object"),
    "null": (None, "it is a NoneType, not an object"),
    "a list": ([1, [2]], "it is a list, not an object"),
    "no conversations": ({"image": "0.png"}, 'it has no "conversations"'),
    "empty conversations": ({"image": "0.png", "conversations": []}, 'it has no "conversations"'),
    "conversations as text": ({"image": "0.png", "conversations": "a"}, 'it has no "conversations"'),
    "nested conversations": (
        {"image": "0.png", "conversations": [[{"from": "human", "value": "a"}]]},
        "a turn must look like",
    ),
    "a turn without a text": (
        {"image": "0.png", "conversations": [{"from": "human"}]},
        "a turn must look like",
    ),
    "unknown role": (turns(("human", MARK), ("robot", "x")), "a turn must look like"),
    "a role that is a list": (turns((["human"], MARK), ("gpt", "x")), "a turn must look like"),
    "an answer that is a number": (make_row(answer=5), "a turn must look like"),
    "an answer that is null": (make_row(answer=None), "a turn must look like"),
    "no answer": (turns(("human", MARK)), "lack a question or an answer"),
    "no question": (turns(("gpt", "x")), "lack a question or an answer"),
    "empty answer": (make_row(answer=""), "it has an empty answer"),
    "blank answer": (make_row(answer=" \n\u3000"), "it has an empty answer"),
    "half a surrogate pair": (make_row(answer="\ud83d"), "half a surrogate pair"),
    "half a surrogate pair in the id": (
        make_row(answer="", id="\ud83d\n\x1b[31m"),
        r"(id \ud83d\n\x1b[31m): it has",
    ),
    "no image": (make_row(image=None), 'it has no "image"'),
    "empty image": (make_row(image=" , "), 'it has no "image"'),
    "a number as image": (make_row(image=7), 'its "image" must be a file name or a list of them, not 7'),
    "a nested list as image": (make_row(image=[["0.png"]]), 'its "image" must be a file name'),
    "null in the list of images": (make_row(image=[None]), 'its "image" must be a file name'),
    "too many images": (make_row(MARK * 2, image="0.png, 1.png"), "2 images, but this stage takes 1"),
    "no mark": (make_row("什么？"), "0 <image> mark(s) for 1 image(s)"),
    "two marks": (make_row(MARK * 2), "2 <image> mark(s) for 1 image(s)"),
    "a mark in the answer only": (turns(("human", "什么？"), ("gpt", "<image>")), "0 <image> mark(s)"),
    "missing file": (make_row(image="gone.jpg"), "image not found: "),
    "missing folder": (make_row(image="gone/0.png"), "image not found: "),
    "a file as folder": (make_row(image="0.png/0.png"), "image not found: "),
    "directory": (make_row(image="."), ": not a file"),
    "pipe": (make_row(image="pipe.jpg"), "pipe.jpg: not a file"),  # reading it would wait for ever
    "NUL in the name": (make_row(image="a\0b.jpg"), r"a\x00b.jpg"),
    "name too long": (make_row(image="a" * 300 + ".jpg"), "image not found: "),
    "half a surrogate pair in the name": (make_row(image="\ud83d.jpg"), r"\ud83d.jpg"),
    "empty file": (make_row(image="empty.jpg"), "empty.jpg: it is empty"),
    "truncated JPEG": (make_row(image="half.jpg"), "cannot read image "),
    "truncated PNG": (make_row(image="half.png"), "cannot read image "),
    "truncated JPEG 2000": (make_row(image="jp2.jp2"), "cannot read image "),
    "truncated WebP": (make_row(image="webp.webp"), "cannot read image "),
    "a format Pillow does not know all of": (make_row(image="dds.dds"), "cannot read image "),
    "text": (make_row(image="text.jpg"), "text.jpg: it is damaged, or in none of the formats that are read"),
    "git-lfs pointer": (make_row(image="pointer.jpg"), "pointer.jpg: it is a git-lfs pointer"),
    "web page": (make_row(image="page.jpg"), "page.jpg: it is a web page"),
    "decompression bomb": (
        make_row(image="bomb.png"),
        "bomb.png: 50000 x 50000 = 2,500,000,000 pixels: at most 128,000,000",
    ),
    "no width": (make_row(image="nothing.png"), "nothing.png: "),
    "answer beyond max_seq_len": (make_row(MARK + "什么" * 300), "the answer begins at token"),
    "image cut at max_seq_len": (make_row("什么" * 300 + MARK), "image 1 would be cut at max_seq_len"),
}

GOOD = {
    "a list of one": make_row(image=["0.png"]),
    "no id": make_row(),
    "names with spaces": make_row(image=" 0.png "),
    "a very thin image": make_row(image="thin.png"),
    "an image with damaged EXIF": make_row(image="exif.jpg"),
    "outside the folder": make_row(image="../outside.png"),
    "a blank question": make_row("<image>"),
    "control characters": make_row(answer="\0\x1b[31m"),
    "an answer cut at its end": make_row(answer="长" * 600),
}


@pytest.fixture
def images(tmp_path):
    """A folder with good images and all bad ones."""
    folder = tmp_path / "images"
    folder.mkdir(exist_ok=True)
    for number in range(6):
        save_image(folder / f"{number}.png", number)
    save_image(tmp_path / "outside.png", 7)
    for name, content in IMAGES.items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe.jpg")
    Image.new("RGB", (1, 60_000)).save(folder / "thin.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 8)).save(folder / "exif.jpg", exif=exif)
    damaged = (folder / "exif.jpg").read_bytes().replace(b"Exif\0\0MM\0*", b"Exif\0\0MM\0\xfb")
    assert b"MM\0\xfb" in damaged
    (folder / "exif.jpg").write_bytes(damaged)
    return folder


@pytest.fixture
def make(images, tokenizer):
    """Rows to a dataset with these images."""

    def build(rows: list, spec=PRETRAIN) -> VLMDataset:
        path = images.parent / "rows.json"
        path.write_text(json.dumps(rows))
        return VLMDataset(path, spec, Renderer(tokenizer, max_seq_len=MAX_SEQ_LEN), images, ImageProcessor())

    return build


def test_every_kind_of_bad_row_is_named(make):
    assert len(BAD) >= 30
    rows = [
        bad | {"id": f"no {n}"} if isinstance(bad, dict) and "id" not in bad else bad
        for n, (bad, _) in enumerate(BAD.values())
    ]
    dataset = make(rows)
    for position, (kind, (_, reason)) in enumerate(BAD.items()):
        sample = dataset[position]
        assert isinstance(sample, BadSample), kind
        assert f"rows.json, row {position + 1}" in sample.reason, (kind, sample.reason)
        assert reason in sample.reason, (kind, sample.reason)
        assert not isinstance(rows[position], dict) or "(id " in sample.reason, kind
        assert sample.reason.isprintable() and len(sample.reason) < 500, kind  # safe to show, on one line


def test_what_is_merely_unusual_is_good(make):
    dataset = make(list(GOOD.values()))
    dataset.check_rows()
    for position, kind in enumerate(GOOD):
        assert not isinstance(dataset[position], BadSample), (kind, dataset[position])


def test_a_mistake_in_the_program_is_no_bad_sample(make, monkeypatch):
    dataset = make([make_row()])
    for mistake in (TypeError, AttributeError, KeyError, RuntimeError, AssertionError):

        def fail(*_, mistake=mistake):
            raise mistake("a mistake")

        for function in ("load_images", "tokenize", "check_row"):
            with monkeypatch.context() as patch, pytest.raises(mistake):
                patch.setattr(dataset_module, function, fail)
                dataset[0]


def test_the_verdict_on_a_large_file_is_kept_with_its_index(make, monkeypatch):
    monkeypatch.setattr("model.data.rows.SMALL", 0)
    for rows, is_bad in (([make_row(), make_row(answer="")], True), ([make_row()], False)):
        dataset = make(rows)

        def check(spec=PRETRAIN, dataset=dataset, is_bad=is_bad):
            again = VLMDataset(dataset.rows.path, spec, dataset.renderer, dataset.image_dir)
            with (
                pytest.raises(ValueError, match="row 2: it has an empty answer") if is_bad else nullcontext()
            ):
                again.check_rows()

        check()
        with monkeypatch.context() as patch:
            patch.setattr(VLMDataset, "first_problem", lambda self: 1 / 0)
            check()
            with pytest.raises(ZeroDivisionError):  # another stage asks for something else
                check(SFT)


# ---- training ----


@pytest.mark.parametrize("processes", [1, 2])
def test_training_leaves_out_every_bad_row_and_counts_it(workplace, images, processes):
    """1 % of the rows is bad, which is just tolerated; one process meets half of the kinds, two the rest."""
    kinds = list(BAD.values())[processes - 1 :: 2]
    rows = make_rows(100 * len(kinds))
    for number, (bad, _) in enumerate(kinds):
        rows[100 * number + 37] = bad
    (workplace / "data.json").write_text(json.dumps(rows))
    result = run_script(
        "1-pretrain_vlm.py",
        f"@{workplace}/args",
        "--epochs=1",
        "--batch_size=48",
        "--num_workers=2",
        "--on_bad_sample=skip",
        "--log_interval=20",
        processes=processes,
    )
    assert result.returncode == 0, result.stderr
    assert f"; {len(kinds)} bad samples left out" in result.stdout
    lines = [line for line in result.stdout.splitlines() if line.startswith("skipped ")]
    assert 5 <= len(lines) <= 5 * processes and all("data.json, row " in line for line in lines)
    assert "Traceback" not in result.stderr


def test_a_worker_that_dies_is_reported_with_the_sample_it_held(workplace):
    """As when the kernel kills a process for its memory, on the one image that takes so much."""
    code = (
        "import os, sys, runpy, model.data.dataset as d; whole = d.load_images; "
        "d.load_images = lambda p, *more: "
        "os.kill(os.getpid(), 9) if str(p[0]).endswith('huge.png') else whole(p, *more); "
        "script, *sys.argv[1:] = sys.argv[1:]; sys.argv[0] = script; "
        "runpy.run_path(script, run_name='__main__')"
    )
    rows = make_rows(60)
    rows[40] |= {"image": "huge.png", "id": "the big one"}
    (workplace / "data.json").write_text(json.dumps(rows))
    flags = ["1-pretrain_vlm.py", f"@{workplace}/args", "--epochs=1", "--num_workers=2"]
    check_refused(
        run_script("-c", code, *flags),
        "loader worker",
        "died (SIGKILL) while it held",
        "data.json, row 41 (id the big one) with huge.png",
        "--num_workers",
    )


def test_only_the_worker_that_died_is_reported(make, monkeypatch):
    dataset = make([make_row(id=str(n)) for n in range(8)])
    sample = dataset.sample

    def deadly_sample(position):
        return os.kill(os.getpid(), signal.SIGTERM) if position == 5 else sample(position)

    monkeypatch.setattr(dataset, "sample", deadly_sample)
    with pytest.raises(ValueError, match=r"loader worker 0 died \(SIGTERM\) .*row 6 \(id 5\) with 0.png"):
        list(Loader(dataset, [[0, 1], [2, 3], [4, 5], [6, 7]], num_workers=2))
    # Of a share of the rows too, it is the number in the file that is named.
    with pytest.raises(ValueError, match=r"loader worker 0 died \(SIGTERM\) .*row 6 \(id 5\) with 0.png"):
        list(Loader(Subset(dataset, [7, 5]), [[0, 1]], num_workers=1))


def test_an_error_in_a_worker_is_no_death(make, monkeypatch):
    dataset = make([make_row()])
    monkeypatch.setattr(dataset, "sample", lambda position: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        list(Loader(dataset, [[0]], num_workers=1))


def test_workers_load_what_this_process_loads_and_hold_nothing_at_the_end(make):
    dataset = make([make_row(), make_row(image="1.png"), make_row(answer="")])
    here, there = (Loader(dataset, [[0, 1], [2, 0], [2]], num_workers) for num_workers in (0, 2))
    batches = list(there)
    for one, other in zip(here, batches, strict=True):
        assert one.keys() == other.keys() and one["bad_samples"] == other["bad_samples"]
        for name in ("input_ids", "labels", "image_slots", "pixel_values", "num_images"):
            assert torch.equal(one[name], other[name])
    assert [len(batch["pixel_values"]) for batch in batches] == [2, 1, 0]
    assert there.watched.held.tolist() == [-1, -1]
