"""One optimizer step, taken in any of the ways of variants.py and timed part by part."""

import time
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.llava import to_llava, to_llava_ids
from benchmarks.roofline import row_lengths
from benchmarks.synthetic import SMALL_CLIP
from benchmarks.variants import ABLATION, LLAVA, OURS, Variant, make_network
from model.data.batch import IGNORE_INDEX
from model.LMConfig import LMConfig
from model.transformer import Transformer
from model.vision_utils import get_img_embedding
from trainer.optimizer import make_optimizer, trained_parameters

PARTS = ("clip", "forward", "backward", "optimizer")


def sizes(quick: bool) -> tuple[dict, LMConfig, int]:
    """CLIP's sizes, the language model's, rows of a batch."""
    if quick:
        return SMALL_CLIP, LMConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vision_dim=32), 4
    return {}, LMConfig(), 32


class Steps:
    """Takes the step of any variant. All of ours train one set of parameters; LLaVA has a copy of it."""

    def __init__(self, plain: Transformer, towers: dict[str, nn.Module]):
        """towers: CLIP by dtype; cached features need none, LLaVA takes a copy of the float32 one"""
        self.plain, self.towers = plain.train(), towers
        self.models: dict[tuple, nn.Module] = {}
        self.optimizers: dict[tuple, torch.optim.Optimizer] = {}

    def model(self, variant: Variant) -> nn.Module:
        key = ("llava",) if variant.llava else (variant.forms, variant.dtype)
        if key not in self.models:
            self.models[key] = self.make_llava() if variant.llava else make_network(self.plain, variant)
        return self.models[key]

    def make_llava(self) -> nn.Module:
        llava = to_llava(self.plain, self.towers["float32"]).train()
        llava.model.language_model.requires_grad_(True)
        llava.model.multi_modal_projector.linear_1.requires_grad_(True)
        return llava

    def optimizer(self, variant: Variant) -> torch.optim.Optimizer:
        key = variant.llava, variant.fused
        if key not in self.optimizers:
            model = self.model(variant)
            self.optimizers[key] = (
                make_optimizer(model, 1e-5)
                if variant.fused
                else torch.optim.AdamW(
                    trained_parameters(model), lr=1e-5, weight_decay=0.0, fused=False, foreach=False
                )
            )
        return self.optimizers[key]

    def take(self, batch: dict, variant: Variant) -> dict[str, float]:
        """One step: its seconds, in all and by part."""
        model, optimizer = self.model(variant), self.optimizer(variant)
        padded = pad_batch(batch, variant.pad_to) if variant.pad_to else batch
        times = [time.perf_counter()]
        features = self.image_features(batch, variant)
        times.append(time.perf_counter())
        loss = self.loss(padded, features, variant)
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        nn.utils.clip_grad_norm_(trained_parameters(model), 1.0, foreach=variant.fused)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter())
        seconds = [after - before for before, after in pairwise(times)]
        return dict(zip(PARTS, seconds, strict=True)) | {"step": sum(seconds)}

    def image_features(self, batch: dict, variant: Variant) -> Tensor | None:
        if variant.llava:
            return None  # it calls CLIP itself
        if variant.cached:
            return batch["image_features"].to(variant.torch_dtype)
        tower, pixels = self.towers[variant.dtype], batch["pixel_values"]
        if variant.clip_one_by_one:
            return torch.cat([get_img_embedding(pixels[n : n + 1], tower) for n in range(len(pixels))])
        return get_img_embedding(pixels, tower)

    def loss(self, batch: dict, features: Tensor | None, variant: Variant) -> Tensor:
        model, ids, labels = self.model(variant), batch["input_ids"], batch["labels"]
        with torch.autocast("cpu", variant.torch_dtype, enabled=variant.dtype != "float32"):
            if variant.llava:
                ids, mask, labels = to_llava_batch(batch)
                pixels = batch["pixel_values"]
                return model(input_ids=ids, attention_mask=mask, labels=labels, pixel_values=pixels).loss
            if variant.logits_everywhere:
                logits, _ = model(ids, features, batch["image_slots"])
                logits = logits.float().flatten(0, 1)
                return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX)
            return model(ids, features, batch["image_slots"], labels, batch["target_positions"])[1]

    @torch.no_grad()
    def check(self, batch: dict) -> None:
        """Every way of taking the step computes the same loss: else comparing times would mean nothing.

        batch  with pixel_values: they stand in for cached features, too
        """
        expected = None
        for name, variant in (OURS | ABLATION | LLAVA).items():
            tower = self.towers[variant.dtype]
            features = None if variant.llava else get_img_embedding(batch["pixel_values"], tower)
            padded = pad_batch(batch, variant.pad_to) if variant.pad_to else batch
            loss = self.loss(padded, features, variant).item()
            expected = expected or loss
            tolerance = 1e-3 if variant.dtype == "float32" else 0.05
            assert abs(loss - expected) < tolerance, f"{name}: a loss of {loss}, not {expected}"


def pad_batch(batch: dict, T: int) -> dict:
    """The batch padded to T tokens instead of its longest row."""
    old = batch["input_ids"].shape[1]
    labels = F.pad(batch["labels"], (0, T - old), value=IGNORE_INDEX)
    return batch | {
        "input_ids": F.pad(batch["input_ids"], (0, T - old)),
        "labels": labels,
        "image_slots": batch["image_slots"] % old + batch["image_slots"] // old * T,
        "target_positions": (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1),
    }


def to_llava_batch(batch: dict) -> tuple[Tensor, Tensor, Tensor]:
    """ids, attention mask and labels (B, T + 1) of LLaVA, which shifts the labels itself and wants the last
    token too."""
    lengths = row_lengths(batch).unsqueeze(1)
    ids = F.pad(to_llava_ids(batch["input_ids"], batch["image_slots"]), (0, 1))
    ids.scatter_(1, lengths, batch["labels"].gather(1, lengths - 1))
    mask = torch.arange(ids.shape[1]) <= lengths
    return ids.where(mask, 2), mask.long(), F.pad(batch["labels"], (1, 0), value=IGNORE_INDEX)
