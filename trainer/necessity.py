"""What trainer.gain does: the losses of each row with its own image, a blank one and another's, and what they
say of the row."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from model.files import write_text
from model.printable import one_line
from model.prompt import IMAGE_MARK, normalise_turns
from trainer.batches import split_off
from trainer.distributed import Run
from trainer.inputs import Stage
from trainer.loop import Trainer
from trainer.script import AgreedError
from trainer.stage import comparable, load_parts, settle_val_fraction
from trainer.validation import RowLoss, Validation, describe_worth, mean_losses, sum_up

NEEDS, WITHOUT, BETTER = "needs its image", "does without it", "is better without it"
MARGIN = 0.05  # nats per token: smaller differences are none
NUM_SHOWN = 3  # rows of each kind that are printed
WIDTH = 60  # letters of a question or an answer there


def measure_file(
    run: Run, args: argparse.Namespace, stage: Stage, weights: Path, out: Path | None, only_validation: bool
) -> None:
    """Print a summary, and write a line for each row to `out`. Raises ValueError or FileNotFoundError."""
    run.check_agreement(comparable(run, args))
    loaded = load_parts(run, args, replace(stage, weights_in=stage.weights_out), weights)
    rows = loaded.dataset
    if only_validation:
        settle_val_fraction(args, len(rows))
        _, rows = split_off(rows, loaded.val_dataset, args.val_fraction, args.seed)
        if not rows:
            raise ValueError("--validation: a run of these flags validates on no rows")
    alone = replace(run, world_size=1)  # nothing is exchanged before the end
    trainer = Trainer(alone, args, loaded.model, loaded.vision_model)
    validation = Validation(run, rows, args.batch_size, args.num_workers, args.on_bad_sample, args.seed)
    losses = validation.row_losses(trainer, progress=weights.stem)
    found = run.gather_in_order({loss.place: loss for loss in losses})
    if not run.is_main:
        return
    seen = [loss for loss in found if loss.blank is not None]
    if not seen:
        raise AgreedError(f"{validation.rows.dataset.rows.path}: no row shows an image")
    records = sorted((describe(loss, validation) for loss in seen), key=lambda record: record["gain"])
    if out:
        write_text(out, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    run.print(summary(records, len(found) - len(seen), describe_worth(mean_losses(sum_up(found)))))
    if out:
        run.print(f"every row: {out}")


def describe(loss: RowLoss, validation: Validation) -> dict:
    """A line of the report. Losses are nats per token."""
    rows = validation.rows
    dataset, position = rows.dataset, rows.row(loss.place)
    row = dataset.rows[position]
    names, turns = dataset.check(row)
    texts = normalise_turns(turns)
    real, blank = loss.real / loss.num_targets, loss.blank / loss.num_targets
    another = None if loss.another is None else loss.another / loss.num_targets
    stand_in = validation.stand_ins.get(loss.place)
    return {
        "row": position + 1,
        **({"id": one_line(str(row["id"]), 80)} if "id" in row else {}),
        "verdict": verdict_of(real, blank, another),
        "gain": blank - real,
        "real": real,
        "blank": blank,
        "another": another,
        "num_targets": loss.num_targets,
        "image": [one_line(name, 200) for name in names],
        "another_row": None if stand_in is None else rows.row(stand_in) + 1,
        "question": next(text for role, text in texts if role == "user"),
        "answer": next(text for role, text in texts if role == "assistant"),
    }


def verdict_of(real: float, blank: float, another: float | None) -> str:
    """What a row's losses say of it."""
    others = [blank] if another is None else [blank, another]
    if real - min(others) > MARGIN:
        return BETTER
    return NEEDS if blank - real > MARGIN else WITHOUT


def summary(records: Sequence[dict], num_without: int, worth: str) -> str:
    """Counts, and the rows that show each kind best; records: sorted by gain."""
    kinds = {
        NEEDS: [record for record in reversed(records) if record["verdict"] == NEEDS],
        WITHOUT: sorted(
            (record for record in records if record["verdict"] == WITHOUT), key=lambda record: record["blank"]
        ),
        BETTER: [record for record in records if record["verdict"] == BETTER],
    }
    lines = [worth, f"{len(records)} rows with images" + (f", {num_without} without" if num_without else "")]
    for kind, chosen in kinds.items():
        lines.append(f"{kind:<21}{len(chosen):>7} rows {len(chosen) / len(records):>6.1%}")
        lines += [f"    {example(record)}" for record in chosen[:NUM_SHOWN]]
    return "\n".join(lines)


def example(record: dict) -> str:
    question, answer = (
        one_line(record[name].replace(IMAGE_MARK, " ").strip(), WIDTH) for name in ("question", "answer")
    )
    another = "" if record["another"] is None else f", another's {record['another']:.2f}"
    return (
        f"row {record['row']}: own {record['real']:.2f}, blank {record['blank']:.2f}{another} | "
        f"{question} | {answer}"
    )
