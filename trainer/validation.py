"""The loss on rows that are never trained on."""
import argparse
import sys

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from model.dataset import VLMDataset, collate, tokenize
from model.prompt import MARK, normalise_turns
from trainer.distributed import AgreedError, Run
from trainer.loader import Loader


def split_off(dataset: VLMDataset, val_dataset: VLMDataset | None,
              args: argparse.Namespace) -> tuple[Dataset, Dataset | None]:
    """The rows to train on, and those for validation: a file of their own, a share of the same, or none.

    Raises ValueError if a share leaves one of the two without rows.
    """
    if not args.val_fraction:
        return dataset, val_dataset
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(args.seed)).numpy()
    count = round(args.val_fraction * len(dataset))
    if not 0 < count < len(dataset):
        raise ValueError(f"--val_fraction {args.val_fraction} of {len(dataset)} rows leaves "
                         f"{'no row' if count else 'nothing'} to {'train' if count else 'validate'} on")
    return Subset(dataset, order[count:]), Subset(dataset, order[:count])


def lengths_of(data: Dataset) -> np.ndarray:
    """The rough lengths of a data set, or of a part of one."""
    return lengths_of(data.dataset)[data.indices] if isinstance(data, Subset) else data.lengths()


class Validation:
    """Measures the loss per learnt token over all validation rows, shared out over the ranks."""

    def __init__(self, run: Run, args: argparse.Namespace, val_set: Dataset | None):
        self.run, self.loader = run, None
        if val_set:
            starts = range(0, len(val_set), args.batch_size)
            batches = [range(start, min(start + args.batch_size, len(val_set))) for start in starts]
            self.loader = Loader(val_set, batches[run.rank::run.world_size], args.num_workers)
        self.stop_at_bad = args.on_bad_sample == "stop"

    @torch.no_grad()
    def measure(self, stepper) -> dict:
        """{"val_loss": ...}, the same on every rank; empty without validation rows.

        Raises AgreedError at a bad sample if --on_bad_sample is stop; else it is left out, every time.
        """
        if not self.loader:
            return {}
        sums, reasons = torch.zeros(2, dtype=torch.float64), []
        stepper.model.eval()
        for batch in self.loader:
            reasons += batch["bad_samples"]
            loss = stepper.forward(batch, stepper.model)     # the bare model: no DDP exchange
            sums += torch.tensor([loss.item() * batch["num_learnt"], batch["num_learnt"]])
        stepper.model.train()
        reasons = [reason for part in self.run.share(reasons) for reason in part]
        if reasons and self.stop_at_bad:
            raise AgreedError(f"{reasons[0]} (--on_bad_sample skip would leave it out)")
        loss, num_learnt = self.run.sum(sums).tolist()
        return {"val_loss": loss / max(1, num_learnt)}


@torch.no_grad()
def answer_loss(stepper, tokenizer, conversations: list[list[dict]]) -> float:
    """The loss per token of the answers when no picture is shown: what the language model knows by
    itself."""
    config, samples = stepper.model.config, []
    for turns in conversations:
        blind = [{"from": role, "value": MARK.sub("", text)}
                 for role, text in normalise_turns(turns)]
        samples.append(tokenize(blind, tokenizer, config.num_image_tokens, max_seq_len=sys.maxsize)
                       | {"pixel_values": torch.zeros(0, 3, 1, 1)})
    return stepper.forward(collate(samples), stepper.model).item()
