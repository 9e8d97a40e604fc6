"""The files of a training run, what is kept when, and how a run resumes after an interruption.

    512_vlm_sft.pth, .json      the weights, and in words what they are
    512_vlm_sft.best.pth        those of the lowest validation loss (--keep_best)
    512_vlm_sft.resume          all that an unfinished run needs to resume to the same bits; gone at its end

Every file is replaced in one move by a complete one: whenever a run is killed, each that is there is whole.
"""

import argparse
import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from model.checkpoint import (
    check_state_dict,
    read_state_dict,
    save_weights,
    set_aside,
)
from model.description import read_description
from model.files import atomic_write, check_weight_file
from trainer.distributed import Run, versions
from trainer.health import check_finite
from trainer.interrupt import Interruption
from trainer.loader import WorkerDied
from trainer.logger import MetricsLog, describe_step, progress_bar
from trainer.meter import Meter
from trainer.validation import Validation

RESUME_FORMAT = 2


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
        self.fresh, self.last_step, self.best_loss = True, 0, float("inf")

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
        self.fresh, self.last_step, self.best_loss = False, state["step"], state["best_loss"]
        return state

    def read_start(self, model: nn.Module) -> dict | None:
        unfinished = self.resume_path.is_file()
        if self.args.resume_weights_only:
            source = self.resume_path if unfinished else self.path
            cure = "there is no earlier run to take weights from, leave out --resume_weights_only"
            state = read_resume_file(source)["model"] if unfinished else read_state_dict(source, cure)
            check_state_dict(model, source, state)
            self.run.print(f"new schedule from the weights in {source}")
            return {"model": state}
        if unfinished and not self.args.resume:
            raise ValueError(
                f"{self.resume_path} is an unfinished run: continue it with --resume, start a new "
                "schedule from its weights with --resume_weights_only, "
                "or remove that file to start over"
            )
        if not unfinished:
            return None
        return self.check_settings(read_resume_file(self.resume_path), self.resume_path)

    def finished_before(self) -> bool:
        """With --resume: is the whole run there already? Raises ValueError if it is another one."""

        def ask() -> bool:
            described = read_description(self.path) if self.path.is_file() else {}
            finished = described.get("step", 0) >= described.get("total_steps", 1)
            if self.args.resume and finished and "settings" in described and not self.resume_path.is_file():
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
                if path == self.resume_path
                else "without --resume a new run keeps it as *.previous.pth"
            )
            raise ValueError(
                f"{path} was made with other settings ({'; '.join(differences)}): "
                f"give the same again, or {cure}"
            )
        return found

    def check_room(self, model: nn.Module) -> None:
        """Complain now about a folder that cannot be written, or a disk that the first save would fill."""
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"x")
        except OSError as error:
            raise OSError(
                f"cannot write to {folder}: {error.strerror or error}; name another folder with --out_dir"
            ) from None
        needed, free = self.room_needed(model), shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(
                f"{folder} has {free / 1e6:,.0f} MB free, but the saves of this run need "
                f"{needed / 1e6:,.0f} MB: make room, or name another folder with --out_dir"
            )

    def room_needed(self, model: nn.Module) -> int:
        """Bytes that the saves will take beyond what lies there: every new file, and one more copy while the
        largest is replaced."""
        weights = sum(tensor.nbytes for tensor in model.parameters())
        trained = sum(tensor.nbytes for tensor in model.parameters() if tensor.requires_grad)
        sizes = {self.path: weights, self.resume_path: weights + 2 * trained}  # Adam keeps two moments
        if self.args.keep_best:
            sizes[self.path.with_suffix(".best.pth")] = weights
        new = sum(size for path, size in sizes.items() if not path.is_file())
        return new + max(sizes.values())

    # ---- saving --------------------------------------------------------------------------------------------

    def save(self, model: nn.Module, step: int, total_steps: int, state: dict, **description) -> None:
        """Write the resume file, then the weights. Raises OSError if the disk is full; the last good files
        are then as they were."""
        if self.run.is_main:
            self.write(model, step, total_steps, state, description)
        self.last_step = step

    def write(self, model: nn.Module, step: int, total_steps: int, state: dict, description: dict) -> None:
        if self.fresh and (previous := set_aside(self.path)):
            self.run.print(f"{self.path} was there before: kept as {previous.name}")
        self.fresh = False
        state = state | {
            "format": RESUME_FORMAT,
            "step": step,
            "settings": self.settings,
            "best_loss": self.best_loss,
            "model": model.state_dict(),
        }
        if step < total_steps:
            atomic_write(self.resume_path, lambda file: torch.save(state, file))
        save_weights(model, self.path, **self.description, **description, step=step, total_steps=total_steps)
        if step == total_steps:
            self.resume_path.unlink(missing_ok=True)

    def save_if_best(self, model: nn.Module, step: int, val_loss: float) -> None:
        """Save these weights as the best if none had a lower validation loss."""
        if val_loss < self.best_loss:
            self.best_loss = val_loss
            if self.args.keep_best and self.run.is_main:
                save_weights(
                    model,
                    self.path.with_suffix(".best.pth"),
                    **self.description,
                    step=step,
                    val_loss=val_loss,
                )


class Checkpointer:
    """Records, validates and saves a run while it trains.

    trainer    the loop's Trainer
    plan       the run's Plan (stage.py)
    saved_run  what RunFiles.start() returned: an interrupted run's state is loaded into all parts
    """

    def __init__(
        self, args: argparse.Namespace, files: RunFiles, trainer, meter: Meter, plan, saved_run: dict | None
    ):
        self.run, self.args, self.files, self.trainer, self.meter = files.run, args, files, trainer, meter
        self.step, self.total_steps = 0, plan.batches.total_steps
        if saved_run:
            trainer.load_state_dict(saved_run["trainer"])
            meter.load_state_dict(saved_run["meter"])
            self.step = plan.batches.start_step = saved_run["step"]
            self.run.print(f"resuming from step {self.step} of {self.total_steps}")
        self.log = MetricsLog(files.path, self.run, args, saved_run and saved_run["log"])
        self.validation = Validation(
            self.run, plan.val_set, args.batch_size, args.num_workers, args.on_bad_sample
        )
        self.bar = progress_bar(
            total=self.total_steps,
            initial=self.step,
            disable=not self.run.is_main,
            unit="step",
            desc=files.path.stem,
        )

    def after(self, step: int, grad_norm: Tensor) -> None:
        """Record and save what is due after a step."""
        self.step, is_last = step, step == self.total_steps
        self.bar.update()
        if step % self.args.log_interval == 0 or is_last:
            values = self.meter.read(step) | self.trainer.read(grad_norm)
            self.log.write(**values)
            self.bar.set_postfix_str(describe_step(values), refresh=False)
            self.trainer.skipped_steps.check(step)
        if self.args.save_interval and step % self.args.save_interval == 0 and not is_last:
            try:
                self.save()
            except OSError as error:  # a disk that is full now may have room later
                self.run.print(f"{error}; training continues and will save again later")

    def save(self, validate: bool = True) -> None:
        """Measure the validation loss, and save everything. Raises AgreedError rather than save a wreck."""
        check_finite(self.trainer.model, self.trainer.optimizer)
        measured = self.validation.measure(self.trainer) if validate else {}
        if measured:
            self.log.write(step=self.step, **measured)
            self.files.save_if_best(self.trainer.model, self.step, measured["val_loss"])
        state = {
            "trainer": self.trainer.state_dict(),
            "meter": self.meter.state_dict(),
            "log": self.log.state_dict(),
        }
        self.files.save(self.trainer.model, self.step, self.total_steps, state, **measured)

    @contextlib.contextmanager
    def finishing(self, interruption: Interruption) -> Iterator[None]:
        """Around the loop: whatever ends it, what is not saved yet is saved, and the record is closed. A run
        that was asked to stop then ends the process."""
        self.meter.start()
        try:
            yield
        except WorkerDied:
            if not interruption.requested:  # else a signal to all processes reached the loader's first
                raise
        finally:
            self.bar.close()
            try:
                if self.step > self.files.last_step:
                    # Before the end of the run nothing is validated: the other ranks may be gone.
                    self.save(validate=self.step == self.total_steps)
            finally:
                self.log.close()
        if self.step < self.total_steps:
            self.run.print(
                f"stopped and saved at step {self.step} of {self.total_steps}: --resume continues from there"
            )
            interruption.leave()

    def summary(self) -> str:
        return (
            f"saved {self.files.path} after {self.step} steps{self.meter.summary()}"
            f"{self.trainer.summary()}; metrics {self.log.path.name}, curve {self.log.curve.name}"
        )


def read_resume_file(path: Path) -> dict[str, Tensor | dict | int]:
    cure = "remove it to start over"
    check_weight_file(path, cure)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen different types here, all meaning the same to the user
        raise ValueError(f"{path} is not a readable resume file ({type(error).__name__}): {cure}") from None
    if state.get("format") != RESUME_FORMAT:
        raise ValueError(f"{path} is of another version of this program: {cure}")
    return state
