"""Runs that went wrong without a word: answers cut away, steps skipped here and there, wrecks saved over good
weights, workers without room, threads that spin in vain, a wandb that waits at the terminal."""

import json
import os
import re
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest
import torch
from conftest import ROOT, check_refused, make_rows, run_clean, run_inside, run_script, weights_of

from model.data.feature_store import FeatureStore
from model.description import read_description
from trainer import loader, logger
from trainer.loader import FILES_PER_WORKER, fitting_workers
from trainer.meter import describe_cut, length_of_most

SCRIPT = "1-pretrain_vlm.py"


# ---- answers cut away --------------------------------------------------------------------------------------


@pytest.fixture
def long_rows(workplace):
    """Rows of about 70 tokens, a quarter of which has an answer of about 300."""
    rows = make_rows(24)
    for row in rows[::4]:
        row["conversations"][1]["value"] = "图片里有一个红色圆形。" * 40
    (workplace / "data.json").write_text(json.dumps(rows, ensure_ascii=False))
    return workplace


def test_answers_that_lose_their_end_are_counted_and_the_cure_named(long_rows, capsys):
    """Their last token is the end of the answer: a model that is never shown one does not learn to stop."""
    flags = [f"@{long_rows}/args", "--max_seq_len=128", "--max_steps=6"]
    result = run_clean(capsys, SCRIPT, *flags)
    assert result.returncode == 0
    found = re.search(
        r"(\d+) of (\d+) rows had the end of their answer cut away at 128 tokens", result.stdout
    )
    assert (int(found[1]), int(found[2])) == (6, 24)
    enough = int(re.search(r"99% of the rows fit into --max_seq_len (\d+)", result.stdout)[1])
    check = run_script("-m", "trainer.check", "pretrain", *flags)
    assert "6 of 24 rows had the end of their answer cut away" in check.stdout
    again = run_clean(capsys, SCRIPT, *flags[:1], f"--max_seq_len={enough}", "--max_steps=6")
    assert again.returncode == 0 and "cut away" not in again.stdout


def test_the_length_that_holds_most_rows():
    lengths = torch.zeros(64, dtype=torch.int64)
    lengths[1], lengths[7] = 990, 10  # 65 to 128 tokens, 449 to 512
    assert length_of_most(lengths) == 128
    lengths[7] += 1
    assert length_of_most(lengths) == 512
    assert "fit into --max_seq_len 512" in describe_cut(11, 1001, 100, 512)


# ---- steps that are skipped --------------------------------------------------------------------------------


def spoil_features(monkeypatch, number: int) -> None:
    """Let the features of one image be such that the loss of its steps is not finite. (In the cache's file
    that would be damage, and refused.)"""
    read = FeatureStore.read
    monkeypatch.setattr(
        FeatureStore, "read", lambda self, place: read(self, place) * (np.nan if place == number else 1)
    )


def test_skipped_steps_end_a_run_by_their_share_too(workplace, capsys, monkeypatch):
    """With 8 % of the cached images spoiled 30 of 40 steps were skipped, and the status was 0."""
    flags = [
        f"@{workplace}/args",
        f"--feature_cache={workplace}/cache",
        "--batch_size=1",
        "--max_bad_steps=3",
    ]
    run_inside(SCRIPT, *flags, "--max_steps=1")
    spoil_features(monkeypatch, 0)
    result = run_clean(capsys, SCRIPT, *flags, "--max_steps=48", "--bucket=False")
    check_refused(result, "3 of ", " steps was not finite; they were skipped", "cached features")
    assert all(tensor.isfinite().all() for tensor in weights_of(workplace).values())


def test_skipped_steps_are_reported_at_the_end_in_any_case(workplace, capsys, monkeypatch):
    flags = [f"@{workplace}/args", f"--feature_cache={workplace}/cache", "--batch_size=1"]
    run_inside(SCRIPT, *flags, "--max_steps=1")
    spoil_features(monkeypatch, 0)
    result = run_clean(capsys, SCRIPT, *flags, "--max_steps=24")
    assert result.returncode == 0 and "; 4 steps were not finite and skipped; metrics" in result.stdout


def test_a_wrecked_state_replaces_no_good_save(workplace, capsys):
    """A step that is finite itself can leave weights that are not."""
    flags = [f"@{workplace}/args", "--max_steps=4", "--save_interval=2"]
    assert run_clean(capsys, SCRIPT, *flags).returncode == 0
    good = weights_of(workplace)
    result = run_clean(capsys, SCRIPT, *flags, "--learning_rate=1e39")
    check_refused(result, "no longer finite", "last good save is as it was", "--learning_rate")
    saved = weights_of(workplace)
    assert all(torch.equal(saved[name], good[name]) for name in good)
    assert read_description(workplace / "out" / "32_vlm_pretrain.pth")["step"] == 4


# ---- room for workers --------------------------------------------------------------------------------------


def test_fewer_workers_are_started_where_shared_memory_is_small(tmp_path, monkeypatch):
    """A container's /dev/shm of 64 MB ended the run in its first batch, while the check was content."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda path: usage(64 << 20, 0, 64 << 20))
    number, reason = fitting_workers(8, 19 << 20, tmp_path)
    assert number == 1 and reason.startswith("1 loader workers instead of 8: ") and "--shm-size" in reason
    assert fitting_workers(8, 1 << 20, tmp_path) == (8, "")
    assert fitting_workers(2, 100 << 20, tmp_path)[0] == 0


def test_a_run_copes_with_few_open_files(workplace):
    command = f"ulimit -n 80; exec {sys.executable} {SCRIPT} @{workplace}/args --max_steps=2 --num_workers=4"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert "0 loader workers instead of 4: this process may open 80 files only (ulimit -n)" in result.stdout
    assert (80 - 64) // FILES_PER_WORKER == 0


# ---- surroundings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [None, "5"])
def test_programs_bound_how_long_threads_spin_unless_the_user_has(own):
    """Beside other work 12 steps took 40 s instead of 6. The library reads it when PyTorch is loaded."""
    code = (
        "import os, sys; from trainer.script import clean_exit; assert 'torch' not in sys.modules;"
        "clean_exit(lambda: print(os.environ['GOMP_SPINCOUNT']))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environment |= {"GOMP_SPINCOUNT": own} if own else {}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.stdout.strip() == (own or "10000"), result.stderr


@pytest.mark.parametrize("has_key", [False, True])
def test_without_a_key_wandb_records_offline_and_asks_nobody(tmp_path, monkeypatch, has_key):
    """On a terminal it asked for a key and waited, although the README says offline."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    if has_key:
        (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {'a' * 40}\n")
        (tmp_path / "netrc").chmod(0o600)
    assert logger.has_wandb_key() == has_key
