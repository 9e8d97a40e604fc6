"""The training loop, and the one optimizer step that it takes again and again.

    train      micro-batches in, steps, a record and saves out
    Trainer    the model with what a step needs: optimizer, gradient scaler, DDP wrapper, dtype

What the loop starts from is loaded in stage.py; files and resuming are saves.py; who loads which sample when,
batches.py.
"""

import argparse
import contextlib
import math

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.device import choose_dtype
from model.fast import use_fast_kernels
from model.transformer import Transformer
from model.vision_utils import get_img_embedding
from trainer.batches import group_micro_batches
from trainer.checkpointer import Checkpointer
from trainer.distributed import Run
from trainer.experts import Experts
from trainer.health import SkippedSteps
from trainer.interrupt import Interruption
from trainer.loader import prefetch, to_device
from trainer.meter import Meter, StepSize
from trainer.optimizer import learning_rate_at, make_optimizer, trained_parameters
from trainer.saves import RunFiles
from trainer.stage import LoadedStage, make_plan


def train(run: Run, args: argparse.Namespace, stage: LoadedStage) -> None:
    """Train stage.model. Whatever ends it (the last step, Ctrl-C, an error), the steps done are saved."""
    plan = make_plan(run, args, stage)  # which rows when, and what a resumed run must share
    files = RunFiles(run, args, stage.weights_out, plan.settings, stage.description)
    if files.finished_before():
        run.print(f"{stage.weights_out} is finished: nothing to do")
        return
    saved_run = files.start(stage.model)  # None, or what an interrupted run left
    trainer = Trainer(run, args, stage.model, stage.vision_model)
    meter = Meter(run, plan.batches, args.max_seq_len, args.on_bad_sample, args.data_path)
    run.print(plan.describe(trainer.dtype))
    checkpointer = Checkpointer(args, files, trainer, meter, plan, saved_run)
    step, total_steps = plan.batches.start_step, plan.batches.total_steps
    with Interruption() as interruption, checkpointer.finishing(interruption):
        for micro_batches in group_micro_batches(prefetch(plan.loader, run.device), args.accumulation_steps):
            size, stop = meter.agree(micro_batches, interruption.requested)  # all ranks, before the step
            if stop:
                break

            # ---- one optimizer step ------------------------------------------------------------------------
            run.seed(args.seed, step)  # a resumed run draws the same numbers
            learning_rate = learning_rate_at(step, total_steps, args.learning_rate, args.warmup_steps)
            loss, grad_norm, skipped = trainer.step(micro_batches, size, learning_rate)
            step += 1
            # ------------------------------------------------------------------------------------------------

            meter.add(loss, skipped)  # stays on the device: no step waits for the host
            checkpointer.after(step, grad_norm)
    run.print(checkpointer.summary())


class Trainer:
    """The model with what one optimizer step needs."""

    def __init__(
        self, run: Run, args: argparse.Namespace, model: Transformer, vision_model: nn.Module | None
    ):
        self.run, self.grad_clip = run, args.grad_clip or math.inf
        self.model = model.to(run.device).train()
        self.dtype = choose_dtype(args.dtype, run.device)
        use_fast_kernels(self.model, run.device, self.dtype, args.compile)
        if args.tf32:
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        # CLIP is in no optimizer and no DDP bucket; frozen, it needs no fp32 copy of its weights.
        self.vision_model = vision_model.to(run.device, self.dtype) if vision_model else None
        self.ddp_model = (
            self.model
            if run.world_size == 1
            else DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        )
        self.parameters = trained_parameters(self.model)
        self.optimizer = make_optimizer(self.model, args.learning_rate, args.weight_decay)
        # bfloat16 needs no scaler.
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=self.dtype == torch.float16)
        self.experts = Experts(run, self.model)
        self.skipped_steps = SkippedSteps(run.device, args.max_bad_steps)

    def step(
        self, micro_batches: list[dict], size: StepSize, learning_rate: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One optimizer step.

        The loss is a sum over the target tokens of the whole global batch (all ranks, all micro-batches)
        divided by their number: 1 x 8, 2 x 4 and 4 accumulated x 2 samples take the same step. A step whose
        loss or gradient is not finite changes nothing.

        size     what the global batch holds
        returns  that loss, the gradient norm before clipping, whether the step was skipped; all on the device
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        total_loss = torch.zeros((), device=self.run.device)
        for number, batch in enumerate(micro_batches, 1):
            is_last = number == len(micro_batches)
            with self.exchanging_gradients(is_last):
                # This batch's share of the global mean; times world_size, because DDP averages over ranks.
                loss = self.loss(batch) * batch["num_targets"] / max(1, size.num_targets)
                balance = self.experts.balance_loss(batch, size.num_rows)  # 0 without experts
                self.scaler.scale((loss + balance) * self.run.world_size).backward()
            total_loss += loss.detach()
        total_loss = self.run.sum(total_loss)
        self.experts.end_step()

        self.scaler.unscale_(self.optimizer)  # does nothing except in float16
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.grad_clip, foreach=True)
        skipped = self.skip_unless_finite(total_loss, grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total_loss, grad_norm, skipped

    def loss(self, batch: dict) -> Tensor:
        """The mean loss over the targets of one batch."""
        inputs = self.inputs(batch)
        with self.autocast():
            _, loss = self.ddp_model(**inputs)
        return loss

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.run.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def inputs(self, batch: dict) -> dict[str, Tensor | None]:
        """What the model is given of a batch: Transformer.forward's arguments, on the device."""
        batch = to_device(batch, self.run.device)
        given = {name: batch[name] for name in ("input_ids", "image_slots", "labels", "target_positions")}
        return given | {"image_features": self.image_features(batch)}

    def image_features(self, batch: dict) -> Tensor | None:
        """(M, N, V) from the feature cache, or from CLIP; None for a language model's conversations."""
        config = self.model.config
        if "image_features" in batch:
            return batch["image_features"].to(self.dtype)
        if self.vision_model and len(batch["pixel_values"]):
            return get_img_embedding(batch["pixel_values"], self.vision_model)
        # A batch of text alone brings no features; zero of them still take part in the step, for DDP waits
        # for the gradient of the projection on every rank.
        empty = torch.zeros(0, config.num_image_tokens, config.vision_dim, device=self.run.device)
        return empty if config.vision_dim else None

    def exchanging_gradients(self, is_last: bool) -> contextlib.AbstractContextManager:
        """DDP exchanges gradients once per step, after its last micro-batch."""
        return (
            contextlib.nullcontext() if is_last or self.ddp_model is self.model else self.ddp_model.no_sync()
        )

    def skip_unless_finite(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Have the optimizer skip a step that is not finite, decided and counted on the device."""
        is_bad = ~(loss.isfinite() & grad_norm.isfinite())
        if not self.scaler.is_enabled():  # an enabled scaler tells the optimizer itself
            self.optimizer.found_inf = is_bad.float()
        self.skipped_steps.add(is_bad)
        return is_bad

    def summary(self) -> str:
        return self.skipped_steps.summary() + self.experts.summary()

    def read(self, grad_norm: Tensor) -> dict:
        """What the log records of the last step; waits for the device."""
        norm, bad_steps = grad_norm.item(), int(self.skipped_steps)
        return {
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "grad_norm": norm if math.isfinite(norm) else None,
            **({"bad_steps": bad_steps} if bad_steps else {}),
            **self.experts.read(),
        }

    def state_dict(self) -> dict:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "bad_steps": self.skipped_steps.counts.cpu(),
            "experts": self.experts.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.skipped_steps.counts = state["bad_steps"].to(self.run.device)
        self.experts.load_state_dict(state["experts"])
