"""Golden losses: a refactor that means to change nothing reproduces these numbers.

A change of the mathematics, of the initialisation or of the sample order moves them: then say so in the commit, and put
the new numbers here. The tolerance is for other processors, whose matrix products round differently.
"""
import pytest
from conftest import run_script

from trainer.logger import read_metrics

GOLDEN = {"1-pretrain_vlm.py": [], "2-sft_vlm.py": []}


def test_golden_losses(workplace):
    for script, stage in (("1-pretrain_vlm.py", "vlm_pretrain"), ("2-sft_vlm.py", "vlm_sft")):
        result = run_script(script, f"@{workplace}/args", "--max_steps=8", "--seed=11")
        assert result.returncode == 0, result.stderr
        losses = [record["loss"] for record in read_metrics(workplace / "out" / f"32_{stage}.metrics.jsonl")]
        assert losses == pytest.approx(GOLDEN[script], abs=2e-4), [round(loss, 6) for loss in losses]
