"""What lies in the folder of a run stays whole: beside another run, after a start that failed, when the
record is gone, when a byte flips.

    MINIMIND_FLIPS=50 MINIMIND_CUTS=20    the long form: so many damaged copies of each file
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    PowerCut,
    check_refused,
    check_same,
    cut_after,
    load_script,
    make_rows,
    run_clean,
    run_inside,
    wait_until,
    weights_of,
)

from model.checkpoint import read_state_dict, set_aside
from model.description import describe_beside, read_description
from model.seal import check_seal
from trainer.interrupt import Interruption
from trainer.logger import find_records, read_metrics
from trainer.loop import Trainer
from trainer.saves import RunFiles, claim_outputs, read_resume_file

SCRIPT = "1-pretrain_vlm.py"
NUM_FLIPS = int(os.environ.get("MINIMIND_FLIPS", "6"))  # 50 in the long form
NUM_CUTS = int(os.environ.get("MINIMIND_CUTS", "3"))  # 20


def train_here(workplace: Path, *flags: str) -> None:
    run_inside(SCRIPT, f"@{workplace}/args", "--max_steps=4", *flags)


def interrupt_here(workplace: Path, monkeypatch, *flags: str, steps: int = 3) -> None:
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_after(patch, steps)
        train_here(workplace, *flags)


def set_of(folder: Path, name: str = "32_vlm_pretrain") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob(f"{name}.*"))}


# ---- check sums --------------------------------------------------------------------------------------------


def damaged(content: bytes, seed: int) -> list[bytes]:
    """Copies with one bit flipped, and copies that end too early."""
    chance = random.Random(seed)
    copies = []
    for _ in range(NUM_FLIPS):
        copy = bytearray(content)
        copy[chance.randrange(len(copy))] ^= 1 << chance.randrange(8)
        copies.append(bytes(copy))
    return copies + [content[: chance.randrange(len(content))] for _ in range(NUM_CUTS)]


def test_no_damaged_weights_are_used(workplace):
    """Of 150 flips in saved files 148 were used in silence: PyTorch reads no check sum."""
    path = workplace / "out" / "32_llm.pth"
    assert check_seal(path, "")
    with pytest.raises(ValueError, match="32_llm.pth .*damaged"):  # a byte in the middle of a tensor
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 16
        path.write_bytes(content)
        read_state_dict(path)
    content[len(content) // 2] ^= 16
    for number, copy in enumerate(damaged(bytes(content), seed=0)):
        other = path.with_name(f"{number}.pth")
        other.write_bytes(copy)
        with pytest.raises(
            ValueError, match=rf"{number}.pth .*(damaged|is empty|readable).*: download it again"
        ):
            read_state_dict(other)


def test_no_damaged_resume_file_is_used(workplace, monkeypatch):
    """A NaN that a flipped bit had made of a moment ended in weights of NaN."""
    interrupt_here(workplace, monkeypatch)
    path = workplace / "out" / "32_vlm_pretrain.resume"
    content = path.read_bytes()
    assert read_resume_file(path)["step"] == 3
    for copy in damaged(content, seed=1):
        path.write_bytes(copy)
        with pytest.raises(ValueError, match="pretrain.resume .*: remove it to start over"):
            train_here(workplace, "--resume")
    path.write_bytes(content)
    train_here(workplace, "--resume")


def test_damaged_weights_are_not_taken_for_a_finished_run(workplace):
    train_here(workplace)
    path = workplace / "out" / "32_vlm_pretrain.pth"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="32_vlm_pretrain.pth is damaged .*: remove it"):
        train_here(workplace, "--resume")


def test_weights_that_carry_no_seal_are_held_against_the_zip_format(tmp_path):
    """v1's own files: as torch.save wrote them."""
    path = tmp_path / "v1.pth"
    torch.save({"weight": torch.arange(1000.0)}, path)
    assert not check_seal(path, "") and len(read_state_dict(path)) == 1
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(1000.0).numpy().tobytes()) + 1001] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="v1.pth is damaged .*: download it again"):
        read_state_dict(path)


def test_what_the_json_beside_weights_says_otherwise_is_never_used_in_silence(workplace):
    train_here(workplace)
    path = workplace / "out" / "32_vlm_pretrain.pth"
    beside, truth = path.with_suffix(".json"), read_description(path)
    content = beside.read_bytes()
    assert not describe_beside(path)
    for copy in damaged(content, seed=2):
        beside.write_bytes(copy)
        try:
            described = read_description(path)
        except ValueError as error:
            assert "32_vlm_pretrain.json" in str(error)
            continue
        is_same = json.loads(copy) == json.loads(content)  # a space that became another sign of that kind
        assert (described == truth) if is_same else "32_vlm_pretrain.json" in describe_beside(path)
    beside.write_text(json.dumps(json.loads(content) | {"clip_path": "elsewhere", "step": 99}))
    assert read_description(path) == truth | {"clip_path": "elsewhere"}
    assert describe_beside(path).startswith("taken from 32_vlm_pretrain.json: clip_path elsewhere; ")
    assert "what it says about step is passed over" in describe_beside(path)


# ---- two runs, and runs that fail --------------------------------------------------------------------------


def test_a_second_run_with_the_same_outputs_is_refused_and_told_of_the_first(workplace, capsys):
    """Both ended with status 0; the first one's weights were gone, and files were seen half-written."""
    command = [sys.executable, SCRIPT, f"@{workplace}/args", "--max_steps=100000", "--save_interval=0"]
    first = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ
    )
    try:
        wait_until((workplace / "out" / "32_vlm_pretrain.metrics.jsonl").exists)
        before = set_of(workplace / "out")
        result = run_clean(capsys, SCRIPT, f"@{workplace}/args", "--max_steps=1")
        check_refused(result, "32_vlm_pretrain.pth is being written by process", str(first.pid), SCRIPT)
        assert set_of(workplace / "out").keys() == before.keys()
    finally:
        first.kill()
        first.wait()
    train_here(workplace)  # a dead run holds nothing
    assert not list((workplace / "out").glob(".*"))


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    path = tmp_path / "32_vlm_sft.pth"
    path.write_bytes(b"whole")
    (tmp_path / ".32_vlm_sft.pth.0123abcd.tmp").write_bytes(b"half")
    (tmp_path / ".32_vlm_sft.resume.4567cdef.tmp").write_bytes(b"half of the first one")
    (tmp_path / ".32_vlm_sft_multi.pth.0123abcd.tmp").write_bytes(b"another's")
    (tmp_path / ".32_llm.pth.0123abcd.tmp").write_bytes(b"another's")
    with claim_outputs(path):
        assert sorted(file.name for file in tmp_path.iterdir()) == [
            ".32_llm.pth.0123abcd.tmp",
            ".32_vlm_sft.pth.lock",
            ".32_vlm_sft_multi.pth.0123abcd.tmp",
            "32_vlm_sft.pth",
        ]


def test_a_start_that_fails_leaves_an_earlier_run_alone(workplace, monkeypatch):
    """Record and curve of a finished run were emptied before the first step."""
    train_here(workplace)
    before = set_of(workplace / "out")
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_after(patch, 0)
        train_here(workplace, "--learning_rate=1e-2")
    assert set_of(workplace / "out") == before
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        train_here(workplace)
    assert set_of(workplace / "out") == before


def test_weights_description_record_and_curve_of_a_run_are_kept_together(workplace, monkeypatch):
    """... also when the next run ends before its first save, and the one after it begins."""
    train_here(workplace, "--val_fraction=0.1", "--keep_best")
    first = set_of(workplace / "out")
    assert len(first) == 6
    expected = {name.replace(".", ".previous.", 1): content for name, content in first.items()}
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(RunFiles, "write", lambda *_: (_ for _ in ()).throw(OSError("No space")))
        train_here(workplace, "--learning_rate=1e-2")
    for learning_rate in (1e-2, 1e-3):
        assert expected.items() <= set_of(workplace / "out").items()
        if learning_rate == 1e-2:
            train_here(workplace, f"--learning_rate={learning_rate}")  # has no best.pth
    assert set_of(workplace / "out")["32_vlm_pretrain.pth"] != first["32_vlm_pretrain.pth"]
    second = set_of(workplace / "out")
    assert not [name for name in second if ".best." in name and "previous" not in name]
    train_here(workplace)
    third = set_of(workplace / "out")
    assert not [name for name in third if ".best." in name]  # those of the first run are of no use now
    for ending in ("pth", "json", "metrics.jsonl", "png"):
        assert third[f"32_vlm_pretrain.previous.{ending}"] == second[f"32_vlm_pretrain.{ending}"]


def test_where_files_cannot_have_two_names_they_are_copied(workplace, monkeypatch):
    train_here(workplace)
    path = workplace / "out" / "32_vlm_pretrain.pth"
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("not here")))
    before = set_of(path.parent)
    assert set_aside(path) == path.with_name("32_vlm_pretrain.previous.pth")
    for ending in ("pth", "json", "metrics.jsonl", "png"):
        kept = path.with_name(f"32_vlm_pretrain.previous.{ending}")
        assert kept.read_bytes() == before[f"32_vlm_pretrain.{ending}"]
    assert set_aside(path) is None  # they lie there already


def test_weights_without_their_json_are_known_for_unfinished(workplace, monkeypatch):
    """A .pth whose .json had not been written counted as finished: weights of two steps took the place of
    the good ones kept."""
    train_here(workplace)
    interrupt_here(workplace, monkeypatch, "--learning_rate=1e-2", steps=2)
    good = weights_of(workplace, "vlm_pretrain.previous")
    (workplace / "out" / "32_vlm_pretrain.json").unlink()
    (workplace / "out" / "32_vlm_pretrain.resume").unlink()
    train_here(workplace)
    check_same(weights_of(workplace, "vlm_pretrain.previous"), good)


# ---- one save ----------------------------------------------------------------------------------------------


def test_a_save_that_fails_changes_no_file(workplace, monkeypatch):
    """All files of a save are written before the first takes its place."""
    interrupt_here(workplace, monkeypatch, steps=2)
    before = set_of(workplace / "out")
    replaced = []
    with monkeypatch.context() as patch:
        save = torch.save

        def fail_at_the_weights(state, file):
            if "model" not in state:
                raise OSError(28, "No space left on device")
            replaced.append(file.name)
            save(state, file)

        patch.setattr(torch, "save", fail_at_the_weights)
        with pytest.raises(OSError, match="cannot write .*32_vlm_pretrain.pth: No space left"):
            interrupt_here(workplace, monkeypatch, "--resume", steps=1)
    after = set_of(workplace / "out")
    record = "32_vlm_pretrain.metrics.jsonl"
    assert replaced and after.pop(record).startswith(before.pop(record))
    assert {name: after[name] for name in before if name[-3:] != "png"} == {
        name: content for name, content in before.items() if name[-3:] != "png"
    }


def test_older_resume_files_are_kept_on_request_and_lead_to_the_same_bits(workplace, monkeypatch):
    train_here(workplace, "--max_steps=8")
    expected = weights_of(workplace)
    interrupt_here(workplace, monkeypatch, "--max_steps=8", "--save_interval=1", "--keep=3", steps=6)
    out = workplace / "out"
    names = ["32_vlm_pretrain.resume", "32_vlm_pretrain.resume.1", "32_vlm_pretrain.resume.2"]
    assert sorted(path.name for path in out.glob("*.resume*")) == names
    assert [read_resume_file(out / name)["step"] for name in names] == [6, 5, 4]
    newest = bytearray((out / names[0]).read_bytes())
    newest[len(newest) // 2] ^= 1
    (out / names[0]).write_bytes(newest)
    with pytest.raises(
        ValueError, match="resume is damaged.*goes on from the save before, 32_vlm_pretrain.resume.1"
    ):
        train_here(workplace, "--max_steps=8", "--resume")
    (out / names[0]).unlink()
    with pytest.raises(ValueError, match="resume.1 is an unfinished run"):
        train_here(workplace, "--max_steps=8")
    train_here(workplace, "--max_steps=8", "--resume")
    check_same(weights_of(workplace), expected)
    assert not list(out.glob("*.resume*"))
    assert [record["step"] for record in read_metrics(out / "32_vlm_pretrain.metrics.jsonl")] == [
        *range(1, 9)
    ]


# ---- the record is the minor thing -------------------------------------------------------------------------


def test_a_record_that_is_removed_in_mid_run_costs_the_record_alone(workplace, monkeypatch, capsys):
    """Every later save failed, and the final weights were lost."""
    record = workplace / "out" / "32_vlm_pretrain.metrics.jsonl"
    original, taken = Trainer.step, []

    def step(self, *arguments):
        taken.append(1)
        if len(taken) == 3:
            record.unlink()
        return original(self, *arguments)

    monkeypatch.setattr(Trainer, "step", step)
    train_here(workplace, "--save_interval=1")
    assert read_description(workplace / "out" / "32_vlm_pretrain.pth")["step"] == 4
    assert [found["step"] for found in read_metrics(record)] == [3, 4]
    assert "metrics.jsonl was removed: the record begins anew at step 3" in capsys.readouterr().out


def test_half_a_line_in_the_record_costs_no_curve(workplace, monkeypatch, capsys):
    """It ended a finished run with status 2."""
    interrupt_here(workplace, monkeypatch, steps=2)
    record = workplace / "out" / "32_vlm_pretrain.metrics.jsonl"
    content = record.read_bytes()
    record.write_bytes(content[:5] + b"\n" + content[6:])
    (workplace / "out" / "32_vlm_pretrain.png").unlink()
    train_here(workplace, "--resume")
    assert (workplace / "out" / "32_vlm_pretrain.png").read_bytes().startswith(b"\x89PNG")
    assert len(find_records(record)[0]) == 3 and find_records(record)[1] == 2
    assert "2 of its lines are damaged" in capsys.readouterr().out


def test_a_curve_that_cannot_be_drawn_costs_one_line(workplace, monkeypatch, capsys):
    monkeypatch.setattr("trainer.logger.draw_loss_curve", lambda *_: 1 / 0)
    train_here(workplace)
    assert "32_vlm_pretrain.png: division by zero" in capsys.readouterr().out
    assert read_description(workplace / "out" / "32_vlm_pretrain.pth")["step"] == 4


def test_the_weights_are_saved_before_the_best_ones(workplace, monkeypatch, capsys):
    """A disk that has room for the weights alone."""
    script, flags = load_script("1-pretrain_vlm.py"), ["--val_fraction=0.1", "--keep_best"]

    def full(model, path, **description):
        raise OSError(f"cannot write {path}: full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="best.pth: full"):
        patch.setattr("trainer.saves.save_weights", full)
        script.main([f"@{workplace}/args", "--max_steps=4", *flags])
    assert read_description(workplace / "out" / "32_vlm_pretrain.pth")["step"] == 4


def test_the_best_weights_are_there_after_a_kill_between_the_two(workplace, monkeypatch):
    """The weights are saved, those of the lowest loss, the same ones, not yet."""
    flags = ["--val_fraction=0.1", "--keep_best", "--save_interval=1", "--max_steps=6"]
    train_here(workplace, *flags)
    path = workplace / "out" / "32_vlm_pretrain.best.pth"
    expected, described = read_state_dict(path), read_description(path)
    for file in path.parent.glob("32_vlm_pretrain.*"):
        file.unlink()
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(RunFiles, "save_best", lambda *_: (_ for _ in ()).throw(PowerCut))
        train_here(workplace, *flags)
    assert not path.exists()
    train_here(workplace, *flags, "--resume")
    check_same(read_state_dict(path), expected)
    assert read_description(path)["val_loss"] == described["val_loss"]


# ---- signals and names -------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
def test_a_closed_terminal_asks_to_stop_but_not_under_nohup():
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interruption.requested
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interruption.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_name_that_is_not_utf8_is_trained_on_and_saved(workplace):
    """The first save failed, long after the check had passed: the description holds names of files."""
    strange = workplace / os.fsdecode(b"caf\xe9")
    strange.mkdir()
    for name in ("images", "out"):
        (workplace / name).rename(strange / name)
    (strange / "data.json").write_text(json.dumps(make_rows(24)))
    clip = next(flag for flag in (workplace / "args").read_text().splitlines() if "clip_path" in flag)
    shutil.copytree(clip.partition("=")[2], strange / "clip")
    places = {"out_dir": "out", "image_dir": "images", "data_path": "data.json", "clip_path": "clip"}
    flags = [f"--{flag}={strange}/{name}" for flag, name in places.items()]
    train_here(workplace, *flags, "--save_interval=1", "--val_fraction=0.1", "--keep_best")
    described = read_description(strange / "out" / "32_vlm_pretrain.pth")
    assert described["step"] == 4 and os.fsencode(described["clip_path"]) == os.fsencode(strange / "clip")
