"""Rows to batches: file formats, checks that name the row, shifting, padding, dealing out to ranks."""

import json

import numpy as np
import pandas
import pytest
import torch
from conftest import make_row, make_rows, save_image

from model.data.batch import IGNORE_INDEX, BadSample, collate
from model.data.dataset import VLMDataset, check_row
from model.data.rows import Rows
from model.data.spec import PRETRAIN, SFT, SFT_MULTI
from model.vision_utils import ImageProcessor
from trainer.batches import GlobalBatches
from trainer.distributed import Run


@pytest.fixture
def make(tmp_path, renderer):
    """Rows to a dataset with six images."""
    for number in range(6):
        save_image(tmp_path / f"{number}.png", number)

    def build(rows, spec=PRETRAIN) -> VLMDataset:
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        return VLMDataset(tmp_path / "rows.json", spec, renderer, tmp_path, ImageProcessor())

    return build


def test_json_jsonl_and_parquet_hold_the_same_rows(tmp_path, make):
    rows = make_rows(5)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(one) for one in rows) + "\n")
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    for name in ("a.json", "a.jsonl", "a.parquet"):
        read = [check_row(one, PRETRAIN) for one in Rows(tmp_path / name)]
        assert read == [check_row(one, PRETRAIN) for one in rows]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '[{"id": 1},\n {"id": }]', "a.json is not valid JSON: line 2"),
        ("a.jsonl", '{"id": 1}\n{"id": \n', "a.jsonl is not valid JSON: line 2"),
        ("a.json", "[]", "holds no rows"),
        ("a.json", '{"id": 1}', "must hold a list of rows"),
        ("a.parquet", "no parquet", "cannot read .*a.parquet"),
    ],
)
def test_a_data_file_that_cannot_be_read_says_where(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        Rows(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="--data_path"):
        Rows(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("text", "not an object"),
        ({"image": "0.png"}, 'no "conversations"'),
        ({"image": "0.png", "conversations": []}, 'no "conversations"'),
        (make_row(image=None), 'no "image"'),
        (make_row(image=""), 'no "image"'),
        (make_row("no mark"), r"0 <image> mark\(s\) for 1 image"),
        (make_row("<image><image>"), r"2 <image> mark\(s\) for 1 image"),
        (make_row("<image><image>", image="0.png, 1.png"), "2 images, but this stage takes 1"),
        (
            make_row() | {"conversations": [{"from": "human", "value": "<image>"}]},
            "lack a question or an answer",
        ),
        (make_row() | {"conversations": [{"from": "robot", "value": "x"}]}, "a turn must look like"),
        (make_row(answer=None), "a turn must look like"),
        (make_row(image="gone.png"), "image not found: .*gone.png"),
        (make_row(image="rows.json"), "cannot read image .*rows.json"),
        (make_row(question="<image>" + "什么" * 600), "answer begins at token"),
        (make_row(question="什么" * 600 + "<image>"), "image 1 would be cut"),
    ],
)
def test_a_bad_row_is_named_with_file_row_and_reason(make, bad, message):
    dataset = make([make_row(), bad])
    sample = dataset[1]
    assert isinstance(sample, BadSample)
    assert "rows.json, row 2" in sample.reason
    with pytest.raises(ValueError, match=message):
        raise ValueError(sample.reason)
    assert not isinstance(dataset[0], BadSample)


def test_malformed_rows_are_found_before_training(make):
    with pytest.raises(ValueError, match=r"row 2 \(id 7\): it has no \"image\""):
        make([make_row(), make_row(image=None, id="7")]).check_rows()


def test_labels_are_shifted_once_and_hold_the_answer(make, tokenizer):
    sample = make([make_row(answer="它是蓝色。")])[0]
    targets = sample["labels"][sample["labels"] != IGNORE_INDEX]
    assert tokenizer.decode(targets) == "它是蓝色。</s>"
    position = int((sample["labels"] != IGNORE_INDEX).nonzero()[0])
    assert tokenizer.decode(sample["input_ids"][: position + 1]).endswith("<s>assistant\n")
    assert torch.equal(sample["labels"][position:-1], sample["input_ids"][position + 1 :])
    # Nothing after the last target is computed.
    assert sample["labels"][-1] == tokenizer.eos_token_id


def test_sft_keeps_the_first_round_as_v1_and_finds_coco_names(make, tmp_path, tokenizer):
    def answers(rows, spec) -> str:
        return tokenizer.decode(make(rows, spec)[0]["labels"].clamp(min=0), skip_special_tokens=True)

    rounds = make_row()["conversations"] + [
        {"from": "human", "value": "再说？"},
        {"from": "gpt", "value": "它是红色。"},
    ]
    save_image(tmp_path / "COCO_train2014_9.png", 9)
    rows = [make_row(image="9.png") | {"conversations": rounds}]
    assert answers(rows, SFT) == "它是蓝色。"
    # The prefix belongs to the SFT data alone.
    assert "image not found" in make(rows, PRETRAIN)[0].reason
    rows[0]["image"] = "0.png"
    assert "它是红色。" in answers(rows, PRETRAIN)


def test_a_batch_of_rows_with_different_numbers_of_images(make):
    """No padding images: slots are flat indices into the padded batch."""
    rows = [
        make_row(),
        make_row("<image>比<image>？", image="1.png, 2.png"),
        make_row("长" * 40 + "<image>", image=["3.png"]),
    ]
    dataset = make(rows, SFT_MULTI)
    batch = collate([dataset[n] for n in range(3)])
    T = batch["input_ids"].shape[1]
    assert batch["pixel_values"].shape == (4, 3, 224, 224) and batch["num_images"].tolist() == [1, 2, 1]
    ids = batch["input_ids"].flatten()[batch["image_slots"]]
    assert ids.tolist() == [[30] * 25 + [32] * 25] * 4
    assert (batch["image_slots"][:, 0] // T).tolist() == [0, 1, 1, 2]
    assert batch["num_targets"] == int((batch["labels"] != IGNORE_INDEX).sum())
    assert batch["num_tokens"] == sum(len(dataset[n]["input_ids"]) for n in range(3))


def test_a_batch_without_a_usable_sample_keeps_its_shape():
    batch = collate([BadSample("why")])
    assert batch["bad_samples"] == ["why"] and batch["num_targets"] == 0
    assert batch["input_ids"].shape == (1, 1) and batch["pixel_values"].shape[:2] == (0, 3)


def batches_of(num_samples, rank=0, world_size=1, batch_size=4, **more) -> GlobalBatches:
    run = Run(rank, world_size, torch.device("cpu"))
    return GlobalBatches(num_samples, batch_size, run, **{"epochs": 2, "seed": 3} | more)


def order_of(num_samples, world_size=1, accumulation_steps=1, **more) -> list[list[list[int]]]:
    """Per global step, the samples of every (micro-batch, rank)."""
    more["accumulation_steps"] = accumulation_steps
    ranks = [list(batches_of(num_samples, rank, world_size, **more)) for rank in range(world_size)]
    micro_batches = list(zip(*ranks, strict=True))
    return [
        [part for one in micro_batches[n : n + accumulation_steps] for part in one]
        for n in range(0, len(micro_batches), accumulation_steps)
    ]


LENGTHS = np.random.default_rng(0).integers(50, 400, 2000)


@pytest.mark.parametrize("lengths", [None, LENGTHS[:22]])
def test_every_epoch_deals_out_every_sample_once_in_a_new_order(lengths):
    """v1 never reshuffled under DDP: every epoch had one order."""
    steps = order_of(22, world_size=2, lengths=lengths)
    epochs = [
        [sample for step in half for part in step for sample in part] for half in (steps[:3], steps[3:])
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(22)) and epochs[0] != epochs[1]
    assert order_of(22, world_size=2, lengths=lengths) == steps
    assert order_of(22, world_size=2, lengths=lengths, seed=4) != steps


@pytest.mark.parametrize("lengths", [None, LENGTHS[:30]])
def test_the_order_does_not_depend_on_how_the_batch_is_split(lengths):
    """1 x 8 = 2 x 4 = 4 accumulated x 2, step by step."""
    flat = [
        [[sample for part in step for sample in part] for step in order_of(30, **split, lengths=lengths)]
        for split in (
            {"batch_size": 8},
            {"batch_size": 4, "world_size": 2},
            {"batch_size": 2, "accumulation_steps": 4},
        )
    ]
    assert flat[0] == flat[1] == flat[2]


def test_buckets_hold_samples_of_like_length_in_a_shuffled_order():
    """Hardly any padding, no rank with much more to do than another; but no order from short to long, which
    would be learned too."""

    def padding(steps) -> float:
        parts = [LENGTHS[part] for step in steps for part in step if part]
        return sum(part.max() * len(part) for part in parts) / sum(part.sum() for part in parts)

    bucketed, shuffled = (order_of(2000, world_size=2, lengths=lengths) for lengths in (LENGTHS, None))
    assert padding(bucketed) < 1.03 and padding(shuffled) > 1.3
    full = [step for step in bucketed if all(len(part) == 4 for part in step)]
    longest = np.array([[LENGTHS[part].max() for part in step] for step in full])
    assert (longest.max(1) / longest.min(1)).mean() < 1.05
    assert abs(np.corrcoef(np.arange(len(full)), longest[:, 0])[0, 1]) < 0.1


def test_an_order_goes_on_in_the_middle():
    whole, rest = (batches_of(2000, batch_size=8, lengths=LENGTHS) for _ in range(2))
    rest.start_step = 300
    assert list(whole)[300:] == list(rest)


def test_rough_lengths_sort_rows_as_their_tokens_do(make):
    dataset = make([make_row(answer="它是蓝色。" * n) for n in (3, 1, 8, 5)] + [make_row(image=None)])
    true = [len(dataset[n]["input_ids"]) for n in range(4)]
    assert np.argsort(dataset.lengths()[:4]).tolist() == np.argsort(true).tolist()
    assert dataset.lengths()[4] == 0


def test_rows_of_parquet_without_an_image_are_named(tmp_path):
    pandas.DataFrame([make_row(), make_row(image=None)]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match='no "image"'):
        check_row(Rows(tmp_path / "a.parquet")[1], PRETRAIN)
    assert check_row(Rows(tmp_path / "a.parquet")[0], PRETRAIN)[0] == ["0.png"]
