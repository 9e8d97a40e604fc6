"""Counts that all ranks agree on: what a step holds, and loss and speed since the last line of the log."""

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from trainer.batches import GlobalBatches
from trainer.distributed import Run
from trainer.script import AgreedError

MAX_BAD_SHARE = 0.01  # of the rows seen; beyond it --on_bad_sample skip gives up


class StepSize(NamedTuple):
    """What the global batch of one step holds: all ranks, all micro-batches."""

    num_targets: int
    num_rows: int


class Meter:
    """on_bad_sample  "stop" or "skip", the flag"""

    NUM_SHOWN = 5  # bad samples printed one by one; the rest is only counted

    def __init__(
        self, run: Run, batches: GlobalBatches, on_bad_sample: str = "stop", data_path: str = "the data"
    ):
        self.run, self.batches, self.on_bad_sample, self.data_path = run, batches, on_bad_sample, data_path
        self.loss, self.num_steps, self.num_tokens = 0.0, 0, 0
        self.num_bad, self.num_shown, self.seconds = 0, 0, 0.0
        self.started = self.since = time.perf_counter()

    def agree(self, micro_batches: list[dict], wants_stop: bool) -> tuple[StepSize, bool]:
        """Agree with the other ranks on the step to come: what its whole global batch holds, and whether any
        rank was asked to stop.

        Exchanged on the CPU, so no rank waits for its GPU. Raises AgreedError at a bad sample if
        --on_bad_sample is stop.
        """
        reasons = [reason for batch in micro_batches for reason in batch["bad_samples"]]
        mine = [
            *(
                sum(batch[name] for batch in micro_batches)
                for name in ("num_targets", "num_rows", "num_tokens")
            ),
            len(reasons),
            wants_stop,
        ]
        counts = self.run.sum(torch.tensor(mine, dtype=torch.int64)).tolist()
        num_targets, num_rows, num_tokens, num_bad, stop = counts
        if num_bad and self.on_bad_sample == "stop":
            reasons = [reason for part in self.run.share(reasons) for reason in part]
            raise AgreedError(f"{reasons[0]} (--on_bad_sample skip would leave it out)")
        if stop:
            return StepSize(num_targets, num_rows), True
        for reason in reasons[: max(0, self.NUM_SHOWN - self.num_shown)]:
            tqdm.write(f"skipped {reason}")
            self.num_shown += 1
        self.num_bad += num_bad
        self.num_tokens += num_tokens
        return StepSize(num_targets, num_rows), False

    def add(self, loss: Tensor, skipped: Tensor) -> None:
        """The global loss of one step; a skipped one does not count. Nothing is read off the device."""
        self.loss, self.num_steps = self.loss + torch.where(skipped, 0, loss), self.num_steps + ~skipped

    def read(self, step: int) -> dict:
        """The values of one line of the log; starts the next interval.

        Raises AgreedError once more than MAX_BAD_SHARE of the rows seen are bad.
        """
        now, num_steps = time.perf_counter(), int(self.num_steps)
        values = {
            "step": step,
            "epoch": round(step / self.batches.steps_per_epoch, 4),
            "loss": float(self.loss) / num_steps if num_steps else None,
            "tokens_per_s": self.num_tokens / (now - self.since),
            "seconds": round(self.seconds + now - self.started, 3),
        }
        self.loss, self.num_steps, self.num_tokens, self.since = 0.0, 0, 0, now
        num_rows = self.batches.num_samples * math.ceil(step / self.batches.steps_per_epoch)  # in all epochs
        if self.num_bad > MAX_BAD_SHARE * num_rows:
            raise AgreedError(
                f"{self.num_bad} of {num_rows} rows could not be used, "
                f"more than {MAX_BAD_SHARE:.0%}: mend {self.data_path}"
            )
        return values

    def state_dict(self) -> dict:
        return {
            "loss": torch.as_tensor(self.loss).cpu(),
            "num_steps": int(self.num_steps),
            "num_tokens": self.num_tokens,
            "num_bad": self.num_bad,
            "seconds": self.seconds + time.perf_counter() - self.started,
        }

    def load_state_dict(self, state: dict) -> None:
        self.loss = state["loss"].to(self.run.device)
        self.num_steps, self.num_tokens, self.num_bad, self.seconds = (
            state["num_steps"],
            state["num_tokens"],
            state["num_bad"],
            state["seconds"],
        )

    def summary(self) -> str:
        return f"; {self.num_bad} bad samples left out" if self.num_bad else ""
