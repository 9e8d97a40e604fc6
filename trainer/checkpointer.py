"""What happens between the steps: records, the validation loss, saves, and the end of a run."""

import argparse
import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from trainer.answers import SampleAnswers
from trainer.health import check_finite
from trainer.interrupt import Interruption
from trainer.loader import WorkerDied
from trainer.logger import MetricsLog, describe_step, progress_bar
from trainer.meter import Meter
from trainer.saves import RunFiles
from trainer.validation import Validation


class Measured(NamedTuple):
    """What is looked at at a save: losses of the validation rows, and answers."""

    step: int
    losses: dict
    answers: list[dict]


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
            self.run, plan.val_set, args.batch_size, args.num_workers, args.on_bad_sample, args.seed
        )
        self.answers = SampleAnswers(
            self.run, args, files.path, trainer, plan, self.log, saved_run and saved_run["answers"]
        )
        # Kept until the first step is done: before it, the record may still be an earlier run's.
        self.at_start = None if self.step else self.measure()
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
        self.files.begin()
        if self.at_start:
            self.record(self.at_start)
            self.at_start = None
        with contextlib.suppress(OSError):  # a terminal that is gone
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
        """Measure the validation loss, and save everything. What is wrong with the validation rows is raised
        after that; AgreedError rather than save a wreck."""
        model = self.trainer.model
        check_finite(model, self.trainer.optimizer)
        losses, problem = {}, None
        try:
            if validate:
                measured = self.measure()
                losses = measured.losses
                self.record(measured)
        except Exception as error:
            problem = error
        is_best = bool(losses) and self.files.is_best(losses["val_loss"], self.step)
        state = {
            "trainer": self.trainer.state_dict(),
            "meter": self.meter.state_dict(),
            "log": self.log.state_dict(),
            "answers": self.answers.state_dict(),
        }
        self.files.save(model, self.step, self.total_steps, state, **losses)
        if is_best:
            self.files.save_best(model, self.step, losses["val_loss"])
        if problem:
            raise problem

    def measure(self) -> Measured:
        """What is measured at a save, and once before the first step. It draws no random number that a step
        would, and counts in no statistics of the experts: the run's bits are the same without."""
        losses = self.validation.measure(self.trainer)
        return Measured(self.step, losses, self.answers.ask(self.trainer, self.step))

    def record(self, measured: Measured) -> None:
        if measured.losses:
            self.log.write(step=measured.step, **measured.losses)
        self.answers.write(measured.answers)

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
            with contextlib.suppress(OSError):
                self.bar.close()
            try:
                if self.step > self.files.last_step:
                    # Before the end of the run nothing is validated: the other ranks may be gone.
                    self.save(validate=self.step == self.total_steps)
            finally:
                self.answers.close()
                self.log.close()
        if self.step < self.total_steps:
            self.run.print(
                f"stopped and saved at step {self.step} of {self.total_steps}: --resume continues from there"
            )
            interruption.leave()

    def summary(self) -> str:
        worth = self.validation.summary()
        sheet = f", answers {self.answers.sheet.name}" if self.answers.samples else ""
        return (
            (f"{worth}\n" if worth else "")
            + f"saved {self.files.path} after {self.step} steps{self.meter.summary()}"
            f"{self.trainer.summary()}; metrics {self.log.path.name}, curve {self.log.curve.name}{sheet}"
        )
