"""The files of a training run, what is kept when, and how a run resumes after an interruption.

    512_vlm_sft.pth, .json      the weights, and in words what they are
    512_vlm_sft.best.pth        those of the lowest validation loss (--keep_best)
    512_vlm_sft.resume          all that an unfinished run needs to resume to the same bits; gone at its end
    512_vlm_sft.resume.1, ...   those of the saves before (--keep)
    512_vlm_sft.samples.*       what it answered at each save (--samples, see answers.py)
    512_vlm_sft.previous.*      weights, record and curve of the run before, once this one has done a step

All files of a save are written before the first is moved into place, the .resume first: where it is, the run
goes on from it, and whenever a run is killed, each file that is there is whole and says of which step it is.
"""

import argparse
import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn

from model.checkpoint import (
    check_state_dict,
    read_state_dict,
    save_weights,
    set_aside,
    weight_files_of,
)
from model.description import read_description
from model.files import check_weight_file, link_or_copy, remove_leftovers, write_together
from model.locks import claimed
from model.seal import check_seal, seal_archive
from trainer.distributed import Run, versions

RESUME_FORMAT = 4


@contextlib.contextmanager
def claim_outputs(weights_out: Path) -> Iterator[None]:
    """Keep other runs from the files that this one writes. Raises ValueError, naming the run that has them,
    and OSError for a folder that cannot be written."""
    check_folder(weights_out.parent)
    with claimed(weights_out, "wait for its end, or name another folder with --out_dir"):
        remove_leftovers(weights_out.parent, weights_out.stem)
        yield


def check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise OSError(
            f"cannot write to {folder}: {error.strerror or error}; name another folder with --out_dir"
        ) from None


class RunFiles:
    """Reads and writes the files of one run, on rank 0 only.

    settings     what decides the bits of the run; a run resumes only under the same
    description  what the .json beside the weights says besides
    """

    def __init__(
        self, run: Run, args: argparse.Namespace, weights_out: Path, settings: dict, description: dict
    ):
        self.run, self.args, self.path = run, args, weights_out
        self.resume_path = weights_out.with_suffix(".resume")
        self.settings = settings
        self.description = description | {"settings": settings, "versions": versions()}
        self.is_first, self.last_step = True, 0
        self.best_loss, self.best_step = float("inf"), 0

    # ---- the start -----------------------------------------------------------------------------------------

    def start(self, model: nn.Module) -> dict | None:
        """What an earlier, unfinished run left, the same on all ranks; None for a run that begins.

        Its weights (with --resume_weights_only nothing else) are copied into `model`.
        Raises ValueError where a file of an earlier run would be lost or does not fit.
        """
        self.run.from_main(lambda: self.check_room(model))
        state = self.run.from_main(lambda: self.read_start(model))
        if not state:
            return None
        model.load_state_dict(state.pop("model"))
        if self.args.resume_weights_only:
            return None
        self.is_first, self.last_step = False, state["step"]
        self.best_loss, self.best_step = state["best_loss"], state["best_step"]
        if self.args.keep_best and self.run.is_main:
            self.mend_best(model)
        return state

    def read_start(self, model: nn.Module) -> dict | None:
        unfinished = self.newest_resume_file()
        if self.args.resume_weights_only:
            source = unfinished or self.path
            cure = "there is no earlier run to take weights from, leave out --resume_weights_only"
            state = read_resume_file(source)["model"] if unfinished else read_state_dict(source, cure)
            check_state_dict(model, source, state)
            self.run.print(f"new schedule from the weights in {source}")
            return {"model": state}
        if unfinished and not self.args.resume:
            raise ValueError(
                f"{unfinished} is an unfinished run: continue it with --resume, start a new "
                "schedule from its weights with --resume_weights_only, "
                "or remove that file to start over"
            )
        if not unfinished:
            return None
        return self.check_settings(read_resume_file(unfinished), unfinished)

    def mend_best(self, model: nn.Module) -> None:
        """The best weights are saved last: a run killed just before is resumed with them."""
        path = self.path.with_suffix(".best.pth")
        if read_description(path).get("step", 0) == self.best_step:
            return
        if self.best_step == self.last_step:
            self.save_best(model, self.best_step, self.best_loss)
        else:
            self.run.print(f"{path} is not there any more: the best weights are searched for anew")
            self.best_loss, self.best_step = float("inf"), 0

    def newest_resume_file(self) -> Path | None:
        return next((path for path in self.resume_files() if path.is_file()), None)

    def resume_files(self) -> list[Path]:
        """Those that are there may be, the newest first."""
        older = self.path.parent.glob(f"{self.resume_path.name}.*")
        numbers = sorted(int(path.suffix[1:]) for path in older if path.suffix[1:].isdecimal())
        return [self.resume_path, *(self.older(number) for number in numbers)]

    def older(self, number: int) -> Path:
        return self.resume_path.with_name(f"{self.resume_path.name}.{number}")

    def finished_before(self) -> bool:
        """With --resume: is the whole run there already? Raises ValueError if it is another one."""

        def ask() -> bool:
            described = {}
            if self.path.is_file():
                check_seal(self.path, "remove it, and the run begins anew")
                described = read_description(self.path)
            finished = described.get("step", 0) >= described.get("total_steps", 1)
            if self.args.resume and finished and "settings" in described and not self.newest_resume_file():
                self.check_settings(described, self.path)
                return True
            return False

        return self.run.from_main(ask)

    def check_settings(self, found: dict, path: Path) -> dict:
        names = [*self.settings, *(name for name in found["settings"] if name not in self.settings)]
        differences = [
            f"{name} {found['settings'].get(name)} then, {self.settings.get(name)} now"
            for name in names
            if found["settings"].get(name) != self.settings.get(name)
        ]
        if differences:
            cure = (
                "--resume_weights_only starts a new schedule from its weights"
                if path != self.path
                else "without --resume a new run keeps it as *.previous.pth"
            )
            raise ValueError(
                f"{path} was made with other settings ({'; '.join(differences)}): "
                f"give the same again, or {cure}"
            )
        return found

    def check_room(self, model: nn.Module) -> None:
        """Complain now about a folder that cannot be written, or a disk that the first saves would fill."""
        folder = self.path.parent
        check_folder(folder)
        needed, free = self.room_needed(model), shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(
                f"{folder} has {free / 1e6:,.0f} MB free, but the saves of this run need "
                f"{needed / 1e6:,.0f} MB: make room, or name another folder with --out_dir"
            )

    def room_needed(self, model: nn.Module) -> int:
        """Bytes that the saves will take beyond what lies there: every new file, and once more those that are
        written before the first is replaced."""
        weights = sum(tensor.nbytes for tensor in model.parameters())
        trained = sum(tensor.nbytes for tensor in model.parameters() if tensor.requires_grad)
        resume = weights + 2 * trained  # Adam keeps two moments
        sizes = {self.path: weights, self.resume_path: resume}
        sizes |= {self.older(number): resume for number in range(1, self.args.keep)}
        if self.args.keep_best:
            sizes[self.path.with_suffix(".best.pth")] = weights
        return sum(size for path, size in sizes.items() if not path.is_file()) + weights + resume

    # ---- saving --------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """After the first step of a new run, not before: keep what an earlier one left."""
        if self.is_first and self.run.is_main:
            try:
                kept = set_aside(self.path)
            except ValueError as error:
                kept = self.run.print(f"{error}: it will be replaced")
            if kept:
                self.run.print(f"{self.path} was there before: kept as {kept.name}")
        self.is_first = False

    def save(self, model: nn.Module, step: int, total_steps: int, state: dict, **description) -> None:
        """Write the resume file and the weights. Raises OSError if the disk is full; the last good files
        are then as they were."""
        if self.run.is_main:
            self.write(model, step, total_steps, state, description)
        self.last_step = step

    def write(self, model: nn.Module, step: int, total_steps: int, state: dict, description: dict) -> None:
        state = state | {
            "format": RESUME_FORMAT,
            "step": step,
            "settings": self.settings,
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "model": model.state_dict(),
        }

        is_last = step == total_steps
        writes = {} if is_last else {self.resume_path: lambda file: save_sealed(state, file)}
        about = self.description | description | {"step": step, "total_steps": total_steps}
        write_together(writes | weight_files_of(model, self.path, **about), self.keep_older)
        if is_last:
            for path in self.resume_files():
                path.unlink(missing_ok=True)

    def keep_older(self) -> None:
        """--keep: the resume file that is about to be replaced becomes number 1, and so on."""
        for number in range(self.args.keep - 1, 0, -1):
            source = self.older(number - 1) if number > 1 else self.resume_path
            if source.is_file():
                link_or_copy(source, self.older(number))

    def is_best(self, val_loss: float, step: int) -> bool:
        """Had no save before a loss as low? Notes it."""
        if val_loss >= self.best_loss:
            return False
        self.best_loss, self.best_step = val_loss, step
        return True

    def save_best(self, model: nn.Module, step: int, val_loss: float) -> None:
        if self.args.keep_best and self.run.is_main:
            path = self.path.with_suffix(".best.pth")
            save_weights(model, path, **self.description, step=step, val_loss=val_loss)


def save_sealed(state: dict, file: IO[bytes]) -> None:
    torch.save(state, file)
    seal_archive(file)


def read_resume_file(path: Path) -> dict[str, Tensor | dict | int]:
    """Raises ValueError for one that is damaged, or of another version."""
    cure = "remove it to start over"
    older = path.with_name(f"{path.name}.1")
    if older.is_file():
        cure = f"remove it, and the run goes on from the save before, {older.name}"
    check_weight_file(path, cure)
    try:
        is_sealed = check_seal(path, cure)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except ValueError:
        raise
    except Exception as error:  # torch raises a dozen different types here, all meaning the same to the user
        raise ValueError(f"{path} is not a readable resume file ({type(error).__name__}): {cure}") from None
    if not isinstance(state, dict) or state.get("format") != RESUME_FORMAT:
        raise ValueError(f"{path} is of another version of this program: {cure}")
    if not is_sealed:
        raise ValueError(f"{path} is damaged (its end is not what was written): {cure}")
    return state
