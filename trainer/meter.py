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

LENGTH_STEP, NUM_LENGTHS = 64, 64  # tokens: how finely the lengths of rows are counted, and up to where
COUNTS = ("num_steps", "num_tokens", "num_bad", "num_cut", "lengths")  # kept in the resume file
ENOUGH = 0.99  # of the rows that a longer --max_seq_len should hold
MAX_BAD_SHARE = 0.01  # of the rows seen; beyond it --on_bad_sample skip gives up


class StepSize(NamedTuple):
    """What the global batch of one step holds: all ranks, all micro-batches."""

    num_targets: int
    num_rows: int


class Meter:
    """What is counted from step to step.

    on_bad_sample  "stop" or "skip", the flag
    """

    NUM_SHOWN = 5  # bad samples printed one by one; the rest is only counted

    def __init__(
        self,
        run: Run,
        batches: GlobalBatches,
        max_seq_len: int,
        on_bad_sample: str = "stop",
        data_path: str = "the data",
    ):
        self.run, self.batches, self.max_seq_len = run, batches, max_seq_len
        self.on_bad_sample, self.data_path = on_bad_sample, data_path
        self.loss, self.num_steps, self.num_tokens = 0.0, 0, 0
        self.num_bad, self.num_shown, self.seconds = 0, 0, 0.0
        self.num_cut, self.lengths = 0, torch.zeros(NUM_LENGTHS, dtype=torch.int64)
        self.start()

    def start(self) -> None:
        """The clock starts with the first batch: what came before is no training time."""
        self.started = self.since = time.perf_counter()

    def agree(self, micro_batches: list[dict], wants_stop: bool) -> tuple[StepSize, bool]:
        """Agree with the other ranks on the step to come: what its whole global batch holds, and whether any
        rank was asked to stop.

        Exchanged on the CPU, so no rank waits for its GPU. Raises AgreedError at a bad sample if
        --on_bad_sample is stop, and in any case where a file was changed while it was in use.
        """
        reasons = [reason for batch in micro_batches for reason in batch["bad_samples"]]
        lost_files = [reason for batch in micro_batches for reason in batch["lost_files"]]
        lengths = torch.tensor(
            [n for batch in micro_batches for n in batch["full_lengths"]], dtype=torch.int64
        )
        num_cut = int((lengths > self.max_seq_len).sum())
        mine = [
            sum(batch[name] for batch in micro_batches) for name in ("num_targets", "num_rows", "num_tokens")
        ]
        counts = self.run.sum(
            torch.cat(
                [
                    torch.tensor([*mine, len(reasons), len(lost_files), num_cut, wants_stop]),
                    torch.bincount(
                        ((lengths - 1) // LENGTH_STEP).clamp(max=NUM_LENGTHS - 1), minlength=NUM_LENGTHS
                    ),
                ]
            )
        )
        num_targets, num_rows, num_tokens, num_bad, num_lost, num_cut, stop = counts[:7].tolist()
        if num_lost:
            lost_files = [reason for part in self.run.share(lost_files) for reason in part]
            raise AgreedError(f"{lost_files[0]}; all steps done are saved, --resume continues from there")
        if num_bad and self.on_bad_sample == "stop":
            reasons = [reason for part in self.run.share(reasons) for reason in part]
            raise AgreedError(f"{reasons[0]} (--on_bad_sample skip would leave it out)")
        if stop:
            return StepSize(num_targets, num_rows), True
        for reason in reasons[: max(0, self.NUM_SHOWN - self.num_shown)]:
            tqdm.write(f"skipped {reason}")
            self.num_shown += 1
        self.num_bad, self.num_tokens = self.num_bad + num_bad, self.num_tokens + num_tokens
        self.num_cut, self.lengths = self.num_cut + num_cut, self.lengths + counts[7:]
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
                f"more than {MAX_BAD_SHARE:.0%}: fix {self.data_path}"
            )
        return values

    def state_dict(self) -> dict:
        return {
            "loss": torch.as_tensor(self.loss).cpu(),
            "seconds": self.seconds + time.perf_counter() - self.started,
            **{name: getattr(self, name) for name in COUNTS},
            "num_steps": int(self.num_steps),
        }

    def load_state_dict(self, state: dict) -> None:
        self.loss, self.seconds = state["loss"].to(self.run.device), state["seconds"]
        for name in COUNTS:
            setattr(self, name, state[name])

    def summary(self) -> str:
        """What a person should know at the end; "" if all went well."""
        text = f"; {self.num_bad} bad samples left out" if self.num_bad else ""
        if self.num_cut:
            text += "; " + describe_cut(
                self.num_cut, int(self.lengths.sum()), self.max_seq_len, length_of_most(self.lengths)
            )
        return text


def length_of_most(lengths: Tensor, share: float = ENOUGH) -> int:
    """How many tokens that share of the rows fits into; lengths: how many rows there are per LENGTH_STEP."""
    reached = lengths.cumsum(0) >= share * lengths.sum()
    return LENGTH_STEP * (1 + int(reached.int().argmax()))


def describe_cut(num_cut: int, num_rows: int, max_seq_len: int, enough: int) -> str:
    """In words that the model is not taught to end the longest answers."""
    cure = (
        f"{ENOUGH:.0%} of the rows fit into --max_seq_len {enough}"
        if enough > max_seq_len
        else "few enough to ignore"
    )
    return (
        f"{num_cut} of {num_rows} rows had the end of their answer cut away at {max_seq_len} tokens, so it "
        f"was not learned where such answers end ({cure})"
    )
