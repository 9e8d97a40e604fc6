"""Golden losses: a refactor that means to change nothing reproduces these numbers.

A change of the mathematics, of the initialisation or of the sample order moves them: then say so in the
commit, and put the new numbers here. The tolerance is for other processors, which round differently.
"""

import pytest
from conftest import run_script

from trainer.logger import read_metrics

GOLDEN = {
    "1-pretrain_vlm.py": [6.348588, 6.263812, 6.278139, 6.181042, 6.111818, 6.132554, 6.133556, 6.088796],
    "2-sft_vlm.py": [6.048173, 5.950112, 6.000181, 5.882310, 5.849264, 5.864872, 5.849957, 5.813116],
}


def test_golden_losses(workplace):
    for script, stage in (("1-pretrain_vlm.py", "vlm_pretrain"), ("2-sft_vlm.py", "vlm_sft")):
        result = run_script(script, f"@{workplace}/args", "--max_steps=8", "--seed=11", "--bucket=False")
        assert result.returncode == 0, result.stderr
        losses = [record["loss"] for record in read_metrics(workplace / "out" / f"32_{stage}.metrics.jsonl")]
        assert losses == pytest.approx(GOLDEN[script], abs=2e-4), " ".join(f"{loss:.6f}" for loss in losses)
