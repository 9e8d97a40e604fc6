"""Files that are changed, cut or removed while a run reads them: one line, what is done is saved, status 2,
and a run that goes on from there ends with the same bits. A data file or a feature cache that was cut once
ended the run with SIGBUS: no line, no save."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, check_refused, check_same, run_clean, run_script, weights_of

from model.data import rows as rows_module
from model.data import steady
from model.data.steady import LostFile, SteadyFile
from model.description import read_description
from trainer.loader import Loader, WorkerDied
from trainer.loop import Trainer

SCRIPT = "1-pretrain_vlm.py"
STEPS = 20  # the loader's workers are up to four batches ahead
HARMED = """
import os, runpy, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from model.data import rows
from trainer.loader import Loader, WorkerDied
from trainer.loop import Trainer
rows.SMALL, step, taken = 0, Trainer.step, []
def harmed(self, *arguments):
    taken.append(1)
    if len(taken) == 3 and os.environ.get("RANK", "0") == "0":
        {harm}
    return step(self, *arguments)
Trainer.step = harmed
sys.argv[0] = {script!r}
runpy.run_path({root!r} + "/" + sys.argv[0], run_name="__main__")
"""


def run_harmed(workplace: Path, harm: str, *flags: str, processes: int = 1):
    """A run as a process, to which something happens in its third step."""
    script = workplace / "harmed.py"
    script.write_text(HARMED.format(root=str(ROOT), script=SCRIPT, harm=harm))
    return run_script(script, f"@{workplace}/args", f"--max_steps={STEPS}", *flags, processes=processes)


def check_resumes(workplace: Path, capsys, *flags: str) -> None:
    """Something was saved, and the run that goes on from it equals one to which nothing happened."""
    assert (workplace / "out" / "32_vlm_pretrain.resume").is_file()
    flags = [f"@{workplace}/args", f"--max_steps={STEPS}", *flags]
    resumed = run_clean(capsys, SCRIPT, *flags, "--resume")
    assert resumed.returncode == 0 and "resuming from step " in resumed.stdout, resumed
    shutil.copytree(workplace / "out", workplace / "undisturbed", ignore=shutil.ignore_patterns("*vlm*"))
    assert run_clean(capsys, SCRIPT, *flags, f"--out_dir={workplace}/undisturbed").returncode == 0
    check_same(weights_of(workplace), weights_of(workplace, folder="undisturbed"))


def test_a_data_file_that_is_cut_ends_the_run_after_a_save(workplace, capsys):
    data = workplace / "data.json"
    good = data.read_bytes()
    flags = ["--num_workers=2", "--on_bad_sample=skip"]
    result = run_harmed(workplace, f"os.truncate({str(data)!r}, 100)", *flags)
    check_refused(result, f"{data} was changed while it was in use", "all steps done are saved, --resume")
    data.write_bytes(good)
    check_resumes(workplace, capsys, *flags)


def test_a_feature_cache_that_is_cut_ends_the_run_after_a_save(workplace, capsys):
    flags = ["--on_bad_sample=skip", f"--feature_cache={workplace}/cache"]
    path = f"next(Path({str(workplace / 'cache')!r}).glob('*/*.features.npy'))"
    result = run_harmed(workplace, f"os.truncate({path}, 500)", *flags)
    check_refused(result, ".features.npy", "start again without this file", "--resume continues from there")
    next((workplace / "cache").glob("*/*.features.npy")).unlink()
    check_resumes(workplace, capsys, *flags)


def test_all_ranks_end_alike(workplace):
    data = workplace / "data.json"
    harm = f"os.truncate({str(data)!r}, 100)"
    result = run_harmed(workplace, harm, "--batch_size=2", "--num_workers=1", processes=2)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode and len(lines) == 1 and "was changed while it was in use" in lines[0], result
    assert (workplace / "out" / "32_vlm_pretrain.resume").is_file()


def happen(monkeypatch, harm) -> None:
    """In this process, before the third step of a run."""
    step, taken = Trainer.step, []

    def harmed(self, *arguments):
        taken.append(1)
        if len(taken) == 3:
            harm()
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "step", harmed)


@pytest.mark.parametrize("small", [0, 4 << 20])
def test_a_data_file_with_other_content_of_the_same_length(workplace, capsys, monkeypatch, small):
    """Whether it was read with an index or without; also where its time says nothing."""
    monkeypatch.setattr(rows_module, "SMALL", small)
    data = workplace / "data.json"
    status = data.stat()

    def harm():
        content = data.read_text(encoding="utf-8").replace("圆", "方")
        with open(data, "r+", encoding="utf-8") as file:
            file.write(content)
        os.utime(data, ns=(status.st_atime_ns, status.st_mtime_ns))

    happen(monkeypatch, harm)
    flags = [f"@{workplace}/args", f"--max_steps={STEPS}", "--on_bad_sample=skip"]
    check_refused(run_clean(capsys, SCRIPT, *flags), f"{data} was changed while it was in use")
    assert (workplace / "out" / "32_vlm_pretrain.resume").is_file()


@pytest.mark.parametrize(("workers", "name"), [(0, "data.json"), (2, "cache/*/*.features.npy")])
def test_with_and_without_workers(workplace, capsys, monkeypatch, workers, name):
    happen(monkeypatch, lambda: os.truncate(next(workplace.glob(name)), 100))
    flags = [f"@{workplace}/args", f"--max_steps={STEPS}", f"--num_workers={workers}"]
    result = run_clean(capsys, SCRIPT, *flags, f"--feature_cache={workplace}/cache")
    check_refused(result, "was changed while it was in use", "all steps done are saved")


def test_validation_rows_that_are_lost_cost_no_weights(workplace, capsys, monkeypatch):
    """They are read last of all; what was wrong with them once ended the run before its last save."""
    shutil.copy(workplace / "data.json", workplace / "val.json")
    happen(monkeypatch, lambda: os.truncate(workplace / "val.json", 100))
    flags = [f"@{workplace}/args", f"--val_data_path={workplace}/val.json", "--max_steps=3"]
    check_refused(run_clean(capsys, SCRIPT, *flags), "val.json was changed while it was in use")
    assert read_description(workplace / "out" / "32_vlm_pretrain.pth")["step"] == 3


def test_a_data_file_that_is_replaced_by_another_is_read_on_as_it_was(workplace, capsys, monkeypatch):
    """As editors and downloads do it: the open file is the old one."""
    flags = [f"@{workplace}/args", "--max_steps=6"]
    assert run_clean(capsys, SCRIPT, *flags).returncode == 0
    expected = weights_of(workplace)
    other = workplace / "other.json"
    other.write_text("[]")
    shutil.copytree(workplace / "out", workplace / "again", ignore=shutil.ignore_patterns("*vlm*"))
    happen(monkeypatch, lambda: os.replace(other, workplace / "data.json"))
    assert run_clean(capsys, SCRIPT, *flags, f"--out_dir={workplace}/again").returncode == 0
    check_same(weights_of(workplace, folder="again"), expected)


def test_an_image_that_is_removed_is_a_bad_sample(workplace, capsys, monkeypatch):
    happen(monkeypatch, lambda: (workplace / "images" / "3.png").unlink())
    result = run_clean(capsys, SCRIPT, f"@{workplace}/args", f"--max_steps={STEPS}")
    check_refused(result, "image not found", "3.png", "--on_bad_sample skip")
    assert (workplace / "out" / "32_vlm_pretrain.resume").is_file()


# ---- one file ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["pread", "seek"])
def opened(request, tmp_path, monkeypatch) -> SteadyFile:
    if request.param == "seek":  # Windows
        monkeypatch.delattr(steady.os, "pread")
    (tmp_path / "a").write_bytes(bytes(range(256)))
    return SteadyFile(tmp_path / "a")


def test_a_steady_file_reads_like_bytes(opened):
    content = bytes(range(256))
    assert len(opened) == 256 and opened[:] == content
    for part in (slice(3), slice(5, 9), slice(250, 999), slice(9, 5), slice(300, 400), slice(-4, None)):
        assert opened[part] == content[part]


@pytest.mark.parametrize("harm", [lambda path: os.truncate(path, 9), lambda path: os.utime(path, ns=(5, 5))])
def test_a_steady_file_that_was_changed_gives_nothing(opened, harm):
    harm(opened.path)
    for _ in range(2):
        with pytest.raises(LostFile, match="a was changed while it was in use"):
            opened[3:5]


def test_a_steady_file_that_cannot_be_read_says_why(opened, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(opened, "read_piece", fail)
    with pytest.raises(LostFile, match="a cannot be read any more: Input/output error"):
        opened[3:5]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_batch_that_does_not_fit_into_memory_is_one_line(workers, error):
    def collate(*_, **__):
        raise error

    loader = Loader([1, 2], [[0], [1]], workers)
    loader.loader.collate_fn = collate
    with pytest.raises(WorkerDied, match="^there is no memory left to load a batch: lower --num_workers or"):
        next(iter(loader))
