"""The record of a run (a JSONL file beside the weights, a loss curve at the end, a mirror in wandb if asked
for), and what is printed of it."""

import argparse
import contextlib
import json
import netrc
import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import nn
from tqdm import tqdm

from model.transformer import Transformer
from trainer.batches import GlobalBatches
from trainer.distributed import Run
from trainer.drawing import draw_loss_curve
from trainer.record import Record

ABSURD = 1.0  # a learning rate from which on nothing has ever been learnt


class MetricsLog:
    """Writes on rank 0 only; other ranks may call everything too. Whatever fails here costs the record, never
    the run."""

    def __init__(self, weights_out: Path, run: Run, args: argparse.Namespace, resumed: dict | None = None):
        """resumed: what state_dict() said at the save that the run resumes from"""
        self.run, self.path = run, weights_out.with_suffix(".metrics.jsonl")
        self.curve = weights_out.with_suffix(".png")
        self.record = Record(self.path, run, resumed["length"] if resumed else 0)
        self.wandb = self.wandb_id = None
        if run.is_main and args.use_wandb:
            self.wandb_id = resumed["wandb_id"] if resumed else None
            self.wandb = start_wandb(weights_out, run, args, self.wandb_id)
            self.wandb_id = self.wandb.id if self.wandb else self.wandb_id

    def write(self, **values) -> None:
        """Record the values of one step."""
        self.record.write(values)
        self.mirror(values["step"], values)

    def mirror(self, step: int, values: dict) -> None:
        """Send values to wandb, if it was asked for."""
        if self.wandb:
            try:
                self.wandb.log(values, step=step)
            except Exception as error:  # wandb raises its own types, and those of its transport
                self.run.print(f"wandb records no more: {first_line(error)}")
                self.wandb = None

    def state_dict(self) -> dict:
        """What the record holds now, all of it on disk."""
        return {"length": self.record.sync(), "wandb_id": self.wandb_id}

    def close(self) -> None:
        try:
            if self.record.close():
                records, bad_lines = find_records(self.path)
                draw_loss_curve(records, self.path.name.removesuffix(".metrics.jsonl"), self.curve)
                if bad_lines:
                    self.run.print(f"{self.path}: {bad_lines} of its lines are damaged and not in the curve")
        except Exception as error:  # matplotlib's own, a full disk, a record that somebody changed
            self.run.print(f"cannot draw {self.curve}: {first_line(error)}")
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
    settings = {
        "project": args.wandb_project,
        "name": name,
        "config": vars(args),
        "dir": weights_out.parent,
        "id": run_id,
        "resume": "allow" if run_id else None,
        "settings": wandb.Settings(init_timeout=20, login_timeout=10, finish_timeout=60),
    }
    modes = [None, "offline"]
    if not (has_wandb_key() or os.environ.get("WANDB_MODE")):  # wandb would ask at the terminal, and wait
        run.print("no wandb key: recording offline; `wandb login`, then `wandb sync` sends it later")
        modes = ["offline"]
    for mode in modes:
        try:
            return wandb.init(**settings, mode=mode)
        except Exception as error:  # wandb raises its own types, and those of its transport
            run.print(
                f"no wandb record: {first_line(error)}"
                if mode
                else f"wandb is not reachable ({first_line(error)}); "
                "recording offline, `wandb sync` sends it later"
            )
    return None


def has_wandb_key() -> bool:
    """Is there a key where wandb looks for one: in the environment, or in the user's netrc file?"""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for path in filter(None, (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(os.path.expanduser(path)).authenticators(host):
                return True
    return False


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def progress_bar(*arguments, **settings) -> tqdm:
    """tqdm, which shows the time left; into a file instead of a terminal it writes every ten seconds only."""
    return tqdm(*arguments, **settings, dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 10)


def read_metrics(path: str | Path) -> list[dict]:
    """The records of a run. Raises ValueError for lines that are none."""
    records, bad_lines = find_records(path)
    if bad_lines:
        raise ValueError(f"{path}: {bad_lines} of its lines are damaged")
    return records


def find_records(path: str | Path) -> tuple[list[dict], int]:
    """The records of a run, and how many lines are none."""
    records, bad_lines = [], 0
    for line in filter(bytes.strip, Path(path).read_bytes().splitlines()):
        record = None
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        else:
            bad_lines += 1
    return records, bad_lines


# ---- what is printed --------------------------------------------------------------------------------------


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe_step(values: dict) -> str:
    loss = "not finite" if values["loss"] is None else f"{values['loss']:.4f}"
    experts = (
        f", experts {values['expert_load_least']:.2f}-{values['expert_load_most']:.2f}"
        if "expert_load" in values
        else ""
    )
    return f"loss {loss}, lr {values['learning_rate']:.2e}, {values['tokens_per_s']:,.0f} tokens/s{experts}"


def describe_run(
    run: Run,
    args: argparse.Namespace,
    model: Transformer,
    vision_model: nn.Module | None,
    train_set,
    val_set,
    batches: GlobalBatches,
    dtype: torch.dtype,
) -> str:
    """What is about to happen, in two or three lines."""

    def millions(parameters) -> str:
        return f"{sum(parameter.numel() for parameter in parameters) / 1e6:.2f} M"

    named = list(model.named_parameters())
    trained = [parameter for _, parameter in named if parameter.requires_grad]
    still = [parameter for _, parameter in named if not parameter.requires_grad]
    projection = [parameter for name, parameter in named if name.startswith("vision_proj")]
    clip = "CLIP, whose features are cached" if args.feature_cache else "nothing"
    if vision_model:
        clip = f"{millions(vision_model.parameters())} (CLIP)"
    threads = f", {torch.get_num_threads()} threads" if run.device.type == "cpu" else ""
    active = f" ({model.num_active_parameters() / 1e6:.2f} M of all active per token)"
    text = (
        f"trained ({args.train}): {millions(trained)} parameters"
        f"{active if model.config.use_moe else ''}, {millions(projection)} of them the projection; "
        f"frozen: {clip}"
        f"{f' and {millions(still)} (language model)' if still else ''}\n"
        f"{len(train_set)} samples, {batches.samples_per_step} per step "
        f"({run.world_size} process(es) x batch {args.batch_size} x accumulation "
        f"{args.accumulation_steps}), {batches.total_steps} steps, "
        f"{name_of(dtype)} on {run.device}{threads}"
    )
    if val_set:
        text += f"\n{len(val_set)} samples for the validation loss, at every save"
    if args.learning_rate >= ABSURD:
        text += f"\n--learning_rate {args.learning_rate:g} destroys what weights know; 1e-3 is much"
    return text
