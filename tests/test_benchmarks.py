"""The benchmarks run: what they measure is looked at by people, in benchmarks/RESULTS.md."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_row, run_script

from benchmarks import gain
from benchmarks.step import pad_batch
from benchmarks.synthetic import save_tokenizer
from benchmarks.variants import ABLATION, LLAVA, OURS, Variant, make_network
from model.data.batch import IGNORE_INDEX
from model.fast import FastAttention, FastFeedForward, FastRMSNorm, use_fast_kernels
from model.prompt import load_tokenizer
from model.transformer import Attention, FeedForward, RMSNorm, Transformer


def run_benchmark(name: str, *flags: str) -> subprocess.CompletedProcess:
    result = run_script("-m", f"benchmarks.{name}", *flags, timeout=1800)
    assert result.returncode == 0, result.stderr
    return result


def results_of(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_the_training_benchmark_runs():
    """It also asserts that LLaVA and every variant of our step compute the same loss."""
    result = run_benchmark("train_step", "--quick", "--repetitions=2")
    assert "one gain left out" in result.stdout
    results = results_of("train_step_quick")
    assert {"SFT", "two images", "peak_gb", "matmul_gflops"} <= results.keys()
    assert results["pretrain"].keys() == {*OURS, *LLAVA, *ABLATION}


def test_the_benchmark_of_answers_runs():
    """Tokens in float32 are those of transformers."""
    run_benchmark("generate", "--quick")
    results = results_of("generate_quick")
    assert results["same_tokens"] == {"64x2": True}
    assert len(results["speed"]) == 2 and len(results["memory"]) == 1


def test_the_benchmark_of_starts_runs():
    """It asserts exit statuses, and waits until a step is recorded, an answer printed and the page there."""
    run_benchmark("start", "--quick")
    assert all(len(taken) == 1 for taken in results_of("start_quick")["seconds"].values())


def test_the_benchmark_of_visitors_runs():
    """It asserts that the answers together are those one by one."""
    run_benchmark("visitors", "--quick")
    assert [one["together"] for one in results_of("visitors_quick")["engine"]][0] == 1
    run_benchmark("visitors", "--quick", "--requests=20")
    assert [one["requests"] for one in results_of("visitors_server_quick")["server"]][-1] == 20


def test_the_benchmark_of_data_runs(tmp_path):
    run_benchmark("data_scale", "--rows=4000", "--workers=1", f"--folder={tmp_path}")
    report = json.loads((tmp_path / "data_scale.json").read_text())
    assert [one["kind"] for one in report["results"]] == ["rows", "list"]
    assert all(len(one["at_work"]["rss_mb"]) == 2 for one in report["results"])  # trainer and worker


def test_captions_are_spoilt_and_found_as_the_benchmark_of_gains_says():
    rows = [make_row(answer=f"answer {n}", image=f"{n}.png") for n in range(50)]
    spoilt = gain.spoil(rows, seed=1)
    changed = [row for row, before in zip(spoilt, rows, strict=True) if row["image"] != before["image"]]
    told = [row for row in spoilt if row["conversations"][1]["value"] in row["conversations"][0]["value"]]
    assert len(changed) == len(told) == 10 and sorted(row["image"] for row in spoilt) == sorted(
        row["image"] for row in rows
    )
    assert {row[gain.SPOILT] for row in changed} == {gain.OTHERS_IMAGE}
    assert {row[gain.SPOILT] for row in told} == {gain.TOLD}
    found = np.array([True, False, True, False])
    assert gain.area(np.array([4.0, 1, 3, 2]), found) == 1
    assert gain.area(np.array([1.0, 2, 3, 4]), found) == 0.25


def test_the_benchmark_of_embedded_images_runs(tmp_path):
    """It asserts that just the broken image is a bad sample, named by its row."""
    run_benchmark("embedded_images", "--gb=0.02", "--workers=1", "--remove", f"--folder={tmp_path}")
    report = json.loads((tmp_path / "embedded_images.json").read_text())
    assert report["index"]["rows"] == 200 and len(report["epoch"]["looks"]) == 8
    assert not list(tmp_path.glob("*.parquet")) and not list(tmp_path.glob(".*.index"))


def test_no_benchmark_reaches_around_the_imports():
    """They once put the repository on sys.path and patched slow forms into the model."""
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        text = path.read_text()
        assert not [word for word in ("sys.path", "noqa", "mock") if word in text], path


# ---- what is compared --------------------------------------------------------------------------------------


def forms_of(network: Transformer) -> dict[type, set[type]]:
    """Of each kind of module, the classes that are in use."""
    return {
        kind: {type(module) for module in network.modules() if isinstance(module, kind)}
        for kind in (RMSNorm, FeedForward, Attention)
    }


@pytest.mark.parametrize(
    ("forms", "norm", "feed_forward", "attention"),
    [
        ("plain", RMSNorm, FeedForward, Attention),
        ("fast attention", RMSNorm, FeedForward, FastAttention),
        ("fast norms and SwiGLU", FastRMSNorm, FastFeedForward, Attention),
    ],
)
def test_a_gain_is_left_out_by_not_putting_it_on(model, forms, norm, feed_forward, attention):
    network = make_network(model, Variant(forms=forms))
    assert forms_of(network) == {RMSNorm: {norm}, FeedForward: {feed_forward}, Attention: {attention}}


def test_the_whole_step_has_the_forms_that_training_puts_on(model):
    ours = forms_of(make_network(model, Variant("bfloat16")))
    assert forms_of(model) == {RMSNorm: {RMSNorm}, FeedForward: {FeedForward}, Attention: {Attention}}
    use_fast_kernels(model, torch.device("cpu"), torch.bfloat16)
    assert ours == forms_of(model)


def test_all_forms_train_the_same_parameters(model):
    network = make_network(model, Variant())
    mine, theirs = dict(model.named_parameters()), dict(network.named_parameters())
    assert mine.keys() == theirs.keys() and all(theirs[name] is mine[name] for name in mine)
    assert network.output.weight is network.tok_embeddings.weight


def test_a_padded_batch_keeps_its_targets():
    """They once stayed where they stood in shorter rows: the padded step took its time, but its loss was that
    of other tokens."""
    labels = torch.tensor([[IGNORE_INDEX, 7, 8], [IGNORE_INDEX, IGNORE_INDEX, 9]])
    batch = {
        "input_ids": torch.ones(2, 3, dtype=torch.long),
        "labels": labels,
        "image_slots": torch.tensor([[0, 1], [3, 4]]),
        "target_positions": torch.tensor([1, 2, 5]),
    }
    padded = pad_batch(batch, 5)
    assert padded["labels"].flatten()[padded["target_positions"]].tolist() == [7, 8, 9]
    assert padded["image_slots"].tolist() == [[0, 1], [5, 6]]


def test_the_tokenizer_of_the_benchmarks_is_as_large_as_the_real_one(tmp_path: Path):
    save_tokenizer(tmp_path)
    assert len(load_tokenizer(tmp_path)) == 6400
