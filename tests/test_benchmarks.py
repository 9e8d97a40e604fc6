"""The benchmarks run: what they measure is looked at by people, in benchmarks/RESULTS.md."""

import json

from conftest import ROOT, run_script


def test_the_training_benchmark_runs():
    """It also asserts that LLaVA and every variant of our step compute the same loss."""
    result = run_script("benchmarks/train_step.py", "--quick", "--repetitions=2", timeout=600)
    assert result.returncode == 0, result.stderr
    assert "one gain switched off" in result.stdout
    results = json.loads((ROOT / "benchmarks" / "results" / "train_step_quick.json").read_text())
    assert {"pretrain", "SFT", "two images", "peak_gb", "matmul_gflops"} <= results.keys()
