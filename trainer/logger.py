"""The record of a run: a JSONL file beside the weights, a loss curve at the end, and a mirror in wandb if
asked for."""
import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

from trainer.distributed import Run


class MetricsLog:
    """Writes on rank 0 only; other ranks may call everything too."""

    def __init__(self, weights_out: Path, run: Run, args: argparse.Namespace):
        self.path = weights_out.with_suffix(".metrics.jsonl")
        self.curve = weights_out.with_suffix(".png")
        self.file = self.wandb = None
        if run.is_main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Stays open as long as the run: line-buffered, so every step is on disk at once.
            self.file = open(self.path, "w", encoding="utf-8", buffering=1)     # noqa: SIM115
            if args.use_wandb:
                self.wandb = start_wandb(weights_out, run, args)

    def write(self, **values) -> None:
        if self.file:
            self.file.write(json.dumps(values) + "\n")
        if self.wandb:
            self.wandb.log(values, step=values["step"])

    def close(self) -> None:
        if self.file:
            self.file.close()
            draw_loss_curve(self.path, self.curve)
        if self.wandb:
            self.wandb.finish()


def start_wandb(weights_out: Path, run: Run, args: argparse.Namespace):
    """A wandb run; offline where the network or the key is missing, because a record must never cost a
    training run."""
    import wandb  # only for those who ask: the import takes seconds

    name = args.wandb_run_name or f"{weights_out.stem}-batch{args.batch_size}-lr{args.learning_rate:g}"
    settings = {"project": args.wandb_project, "name": name, "config": vars(args), "dir": weights_out.parent}
    try:
        return wandb.init(**settings, settings=wandb.Settings(init_timeout=20))
    except Exception as error:      # wandb raises its own types, and those of its transport
        run.print(f"wandb is not reachable ({str(error).splitlines()[0]}); "
                  "recording offline, `wandb sync` sends it later")
        return wandb.init(**settings, mode="offline")


def progress_bar(*arguments, **settings) -> tqdm:
    """tqdm, which shows the time left; into a file instead of a terminal it writes every ten seconds only."""
    return tqdm(*arguments, **settings, dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 10)


def read_metrics(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line]


def draw_loss_curve(metrics_path: Path, picture_path: Path) -> None:
    """Loss over optimizer steps, as a PNG."""
    from matplotlib.figure import Figure  # half a second, needed once; Figure alone needs no display

    records = [record for record in read_metrics(metrics_path) if "loss" in record]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([record["step"] for record in records], [record["loss"] for record in records], color="#2a6fbb")
    axes.set(xlabel="optimizer step", ylabel="loss per learnt token",
             title=metrics_path.name.removesuffix(".metrics.jsonl"))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.savefig(picture_path, dpi=120)
