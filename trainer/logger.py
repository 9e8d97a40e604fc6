"""The record of a run: a JSONL file beside the weights, a loss curve at the end, and a mirror in wandb if
asked for."""
import argparse
import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from trainer.batches import GlobalBatches
from trainer.distributed import AgreedError, Run


class MetricsLog:
    """Writes on rank 0 only; other ranks may call everything too."""

    def __init__(self, weights_out: Path, run: Run, args: argparse.Namespace, resumed: dict | None = None):
        """resumed: what state_dict() said at the save that the run goes on from; what was recorded after it
        is dropped, since those steps come again."""
        self.run, self.path = run, weights_out.with_suffix(".metrics.jsonl")
        self.curve = weights_out.with_suffix(".png")
        self.file = self.wandb = self.wandb_id = None
        if run.is_main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Stays open as long as the run: line-buffered, so every step is on disk at once.
            self.file = open(self.path, "a", encoding="utf-8", buffering=1)     # noqa: SIM115
            self.file.truncate(min(resumed["length"], self.path.stat().st_size) if resumed else 0)
            if args.use_wandb:
                self.wandb_id = resumed["wandb_id"] if resumed else None
                self.wandb = start_wandb(weights_out, run, args, self.wandb_id)
                self.wandb_id = self.wandb.id if self.wandb else self.wandb_id

    def write(self, **values) -> None:
        """Record the values of one step. A full disk or a lost connection costs the record, not the run."""
        if self.file:
            try:
                self.file.write(json.dumps(values) + "\n")
            except OSError as error:
                self.run.print(f"cannot write {self.path}: {error.strerror}")
        if self.wandb:
            try:
                self.wandb.log(values, step=values["step"])
            except Exception as error:      # wandb raises its own types, and those of its transport
                self.run.print(f"wandb records no more: {first_line(error)}")
                self.wandb = None

    def state_dict(self) -> dict:
        """What the record holds now, all of it on disk."""
        if not self.file:
            return {}
        with contextlib.suppress(OSError):
            os.fsync(self.file.fileno())
        return {"length": self.path.stat().st_size, "wandb_id": self.wandb_id}

    def close(self) -> None:
        if self.file:
            with contextlib.suppress(OSError):
                self.file.close()
                draw_loss_curve(self.path, self.curve)
        if self.wandb:
            try:
                self.wandb.finish()
            except Exception as error:
                self.run.print(f"wandb did not finish: {first_line(error)}")


def start_wandb(weights_out: Path, run: Run, args: argparse.Namespace, run_id: str | None):
    """A wandb run; offline where the network or the key is missing, None where even that fails, because a
    record must never cost a training run."""
    import wandb  # only for those who ask: the import takes seconds

    name = args.wandb_run_name or f"{weights_out.stem}-batch{args.batch_size}-lr{args.learning_rate:g}"
    # The limits keep a lost network from holding the run up, at its start and at its end.
    settings = {"project": args.wandb_project, "name": name, "config": vars(args), "dir": weights_out.parent,
                "id": run_id, "resume": "allow" if run_id else None,
                "settings": wandb.Settings(init_timeout=20, login_timeout=10, finish_timeout=60)}
    for mode in (None, "offline"):
        try:
            return wandb.init(**settings, mode=mode)
        except Exception as error:      # wandb raises its own types, and those of its transport
            run.print(f"no wandb record: {first_line(error)}" if mode else
                      f"wandb is not reachable ({first_line(error)}); "
                      "recording offline, `wandb sync` sends it later")
    return None


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class StepSize(NamedTuple):
    """What the global batch of one step holds: all ranks, all accumulation passes."""

    num_learnt: int
    num_rows: int


class Meter:
    """Counts over all ranks: what a step holds, and loss and speed since the last line of the log."""

    NUM_SHOWN = 5       # bad samples printed one by one; the rest is only counted

    def __init__(self, run: Run, args: argparse.Namespace, batches: GlobalBatches):
        self.run, self.args, self.batches = run, args, batches
        self.loss, self.num_steps, self.num_tokens = 0.0, 0, 0
        self.num_bad, self.num_shown, self.seconds = 0, 0, 0.0
        self.started = self.since = time.perf_counter()

    def count(self, passes: list[dict], wants_stop: bool) -> tuple[StepSize, bool]:
        """Agree with the other ranks on the step to come: what its whole global batch holds, and whether any
        rank was told to stop.

        Exchanged on the CPU, so no rank waits for its GPU. Raises AgreedError at a bad sample if
        --on_bad_sample is stop.
        """
        reasons = [reason for batch in passes for reason in batch["bad_samples"]]
        mine = [*(sum(batch[name] for batch in passes) for name in ("num_learnt", "num_rows", "num_tokens")),
                len(reasons), wants_stop]
        learnt, rows, tokens, bad, stop = self.run.sum(torch.tensor(mine, dtype=torch.int64)).tolist()
        if bad and self.args.on_bad_sample == "stop":
            reasons = [reason for part in self.run.share(reasons) for reason in part]
            raise AgreedError(f"{reasons[0]} (--on_bad_sample skip would leave it out)")
        if stop:
            return StepSize(learnt, rows), True
        for reason in reasons[:max(0, self.NUM_SHOWN - self.num_shown)]:
            tqdm.write(f"skipped {reason}")
            self.num_shown += 1
        self.num_bad += bad
        self.num_tokens += tokens
        return StepSize(learnt, rows), False

    def add(self, loss: Tensor, bad_step: Tensor) -> None:
        """The global loss of one step; a skipped one does not count. Nothing is read off the device."""
        self.loss, self.num_steps = self.loss + torch.where(bad_step, 0, loss), self.num_steps + ~bad_step

    def read(self, step: int) -> dict:
        """The values of one line of the log; starts the next interval.

        Raises AgreedError once more than 1 % of the rows seen are bad.
        """
        now, num_steps = time.perf_counter(), int(self.num_steps)
        values = {"step": step, "epoch": round(step / self.batches.steps_per_epoch, 4),
                  "loss": float(self.loss) / num_steps if num_steps else None,
                  "tokens_per_s": self.num_tokens / (now - self.since),
                  "seconds": round(self.seconds + now - self.started, 3)}
        self.loss, self.num_steps, self.num_tokens, self.since = 0.0, 0, 0, now
        num_rows = self.batches.num_samples * math.ceil(step / self.batches.steps_per_epoch)   # in all epochs
        if self.num_bad > 0.01 * num_rows:
            raise AgreedError(f"{self.num_bad} of {num_rows} rows could not be used, "
                              f"more than 1 %: mend {self.args.data_path}")
        return values

    def state_dict(self) -> dict:
        return {"loss": torch.as_tensor(self.loss).cpu(), "num_steps": int(self.num_steps),
                "num_tokens": self.num_tokens, "num_bad": self.num_bad,
                "seconds": self.seconds + time.perf_counter() - self.started}

    def load_state_dict(self, state: dict) -> None:
        self.loss = state["loss"].to(self.run.device)
        self.num_steps, self.num_tokens, self.num_bad, self.seconds = (
            state["num_steps"], state["num_tokens"], state["num_bad"], state["seconds"])

    def summary(self) -> str:
        return f"; {self.num_bad} bad samples left out" if self.num_bad else ""


def progress_bar(*arguments, **settings) -> tqdm:
    """tqdm, which shows the time left; into a file instead of a terminal it writes every ten seconds only."""
    return tqdm(*arguments, **settings, dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 10)


def read_metrics(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line]


def draw_loss_curve(metrics_path: Path, picture_path: Path) -> None:
    """Loss over optimizer steps, of training and, where there was one, of validation, as a PNG."""
    from matplotlib.figure import Figure  # half a second, needed once; Figure alone needs no display

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    records = read_metrics(metrics_path)
    for name, label, style in (("loss", "training", {"color": "#2a6fbb"}),
                               ("val_loss", "validation", {"color": "#d1701f", "marker": "o"})):
        points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="optimizer step", ylabel="loss per learnt token",
             title=metrics_path.name.removesuffix(".metrics.jsonl"))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(picture_path, dpi=120)
