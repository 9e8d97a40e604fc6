"""One training stage, from flags to weights; stages differ only in what their scripts hand to train_stage().

    train_stage    flags -> tokenizer, CLIP, model, data
    train          the loop: batches, steps, logging, saving
    Stepper.step   one optimizer step
"""
import argparse
import contextlib
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model.chat import CLIP_PATH, TOKENIZER_PATH, check_fit
from model.checkpoint import keep_previous, load_weights, read_state_dict, save_weights, weights_path
from model.dataset import DatasetSpec, VLMDataset
from model.device import choose_dtype
from model.LMConfig import LMConfig
from model.model import Transformer
from model.prompt import load_tokenizer
from model.vision_utils import get_img_embedding, get_vision_model, num_image_tokens
from trainer.batches import GlobalBatches, by_step
from trainer.distributed import Run
from trainer.loader import load_batches
from trainer.logger import MetricsLog, progress_bar

WEIGHTS_CURE = {
    "llm": "download it (README, 'Weights'), or make the demo's with python -m dataset.demo_world",
    "vlm_pretrain": "run 1-pretrain_vlm.py first, or download it (README, 'Weights')",
    "vlm_sft": "run 2-sft_vlm.py first, or download it (README, 'Weights')",
}


def train_stage(run: Run, args: argparse.Namespace, spec: DatasetSpec, weights_in: str,
                weights_out: str) -> None:
    """Load what a stage starts from, train, save.

    weights_in, weights_out  names of stages (checkpoint.STAGES); files lie in args.out_dir
    raises                   ValueError or FileNotFoundError, naming the file or flag and the cure
    """
    torch.manual_seed(args.seed)
    tokenizer_path, clip_path = args.tokenizer_path or TOKENIZER_PATH, args.clip_path or CLIP_PATH
    tokenizer = load_tokenizer(tokenizer_path)
    vision_model, image_processor = get_vision_model(clip_path)
    config = LMConfig(
        dim=args.dim, n_layers=args.n_layers, n_heads=args.n_heads, n_kv_heads=args.n_kv_heads,
        vocab_size=args.vocab_size or len(tokenizer), max_seq_len=args.max_seq_len,
        vision_dim=vision_model.config.hidden_size, num_image_tokens=num_image_tokens(vision_model))
    source = weights_path(args.out_dir, config, weights_in)
    cure = WEIGHTS_CURE[weights_in]
    from_llm = weights_in == "llm"      # it has no projection yet; the published one may, and keeps it
    config.vision_proj_bias = not from_llm and "vision_proj.bias" in read_state_dict(source, cure)
    model = Transformer(config)
    check_fit(config, tokenizer, vision_model, source, clip_path)
    run.print(str(load_weights(model, source, may_miss="vision_proj." if from_llm else (),
                               may_ignore="vision_proj.bias" if from_llm else (), cure=cure)))
    dataset = VLMDataset(args.data_path, spec, tokenizer, args.image_dir, image_processor,
                         config.num_image_tokens, args.max_seq_len)
    train(run, args, model, dataset, vision_model, weights_path(args.out_dir, config, weights_out),
          {"stage": weights_out, "tokenizer_path": str(tokenizer_path), "clip_path": str(clip_path)})


def train(run: Run, args: argparse.Namespace, model: Transformer, dataset: VLMDataset,
          vision_model: nn.Module | None, weights_out: Path, description: dict) -> None:
    """Train `model` on `dataset` and save it to `weights_out`, every --save_interval steps and at the end."""
    if dataset.rows.index_seconds:
        run.print(f"indexed {args.data_path}: {len(dataset)} rows "
                  f"in {dataset.rows.index_seconds:.1f} s (once)")
    if args.on_bad_sample == "stop":
        dataset.check_rows()
    batches = GlobalBatches(len(dataset), args, run)
    loader = load_batches(dataset, batches, args.num_workers, pin_memory=run.device.type == "cuda")
    stepper = Stepper(run, args, model, vision_model)
    run.print(describe_run(run, args, model, vision_model, dataset, batches, stepper.dtype))
    log, meter = MetricsLog(weights_out, run, args), Meter(run, args, batches)

    step, saved = 0, False

    def save() -> None:
        nonlocal saved
        if run.is_main:
            if not saved and (previous := keep_previous(weights_out)):
                run.print(f"{weights_out} was there before: kept as {previous.name}")
            saved = True
            save_weights(model, weights_out, **description, step=step, total_steps=batches.total_steps)

    bar = progress_bar(total=batches.total_steps, disable=not run.is_main, unit="step", desc=weights_out.stem)
    try:
        for passes in by_step(loader, args.accumulation_steps):
            loss, grad_norm = stepper.step(passes, learning_rate(step, batches.total_steps, args))
            step += 1
            bar.update()
            meter.add(passes, loss)
            if step % args.log_interval == 0 or step == batches.total_steps:
                values = meter.read(step) | {"learning_rate": stepper.learning_rate,
                                             "grad_norm": grad_norm.item()}
                log.write(**values)
                bar.set_postfix_str("loss {loss:.4f}, lr {learning_rate:.2e}, "
                                    "{tokens_per_s:,.0f} tokens/s".format(**values), refresh=False)
            if args.save_interval and step % args.save_interval == 0 and step < batches.total_steps:
                save()
    finally:        # whatever ends the run, what was learnt is kept
        bar.close()
        if step:
            save()
        log.close()
    run.print(f"saved {weights_out} after {step} steps{meter.summary()}; "
              f"metrics {log.path.name}, curve {log.curve.name}")


class Stepper:
    """The model with what one optimizer step needs: optimizer, gradient scaler, DDP wrapper, dtype."""

    def __init__(self, run: Run, args: argparse.Namespace, model: Transformer,
                 vision_model: nn.Module | None):
        self.run, self.grad_clip = run, args.grad_clip or math.inf
        self.model = model.to(run.device).train()
        # CLIP is in no optimizer and no DDP bucket.
        self.vision_model = vision_model.to(run.device) if vision_model else None
        self.trained = self.model if run.world_size == 1 else DistributedDataParallel(
            self.model, gradient_as_bucket_view=True)
        self.optimizer = make_optimizer(self.model, args)
        self.dtype = choose_dtype(args.dtype, run.device)
        # bfloat16 needs no scaler.
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=self.dtype == torch.float16)
        self.learning_rate = 0.0

    def step(self, passes: list[dict], learning_rate: float) -> tuple[Tensor, Tensor]:
        """One optimizer step over the batches of all accumulation passes.

        The loss is the sum over the learnt tokens of the whole global batch (all ranks, all passes) divided
        by their number: one process with batch 8, two with batch 4, one with 4 x batch 2 take the same step.

        returns  this rank's part of that loss, and the gradient norm before clipping; both stay on the device
        """
        self.learning_rate = learning_rate
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        num_learnt = torch.tensor(float(sum(batch["num_learnt"] for batch in passes)), device=self.run.device)
        num_learnt = self.run.sum(num_learnt).clamp(min=1)
        total = torch.zeros((), device=self.run.device)
        for batch in passes:
            last = batch is passes[-1]      # ranks exchange gradients only once
            with contextlib.nullcontext() if last or self.trained is self.model else self.trained.no_sync():
                loss = self.forward(to_device(batch, self.run.device)) * batch["num_learnt"] / num_learnt
                # Times world_size: DDP averages over ranks.
                self.scaler.scale(loss * self.run.world_size).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip, foreach=True)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total, grad_norm

    def forward(self, batch: dict) -> Tensor:
        """The mean loss over the learnt tokens of one batch."""
        with torch.autocast(self.run.device.type, self.dtype, enabled=self.dtype != torch.float32):
            features = None
            if self.vision_model:
                features = get_img_embedding(batch["pixel_values"], self.vision_model)             # (M, N, V)
            return self.trained(batch["input_ids"], features, batch["image_slots"], batch["labels"])[1]


def to_device(batch: dict, device: torch.device) -> dict:
    return {name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()}


def make_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW; decay, if any, on matrices only. Without decay this is Adam, v1's optimizer."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.learning_rate, fused=matrices[0].device.type in ("cpu", "cuda"))


def learning_rate(step: int, total_steps: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine from the peak to a tenth of it."""
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, total_steps - args.warmup_steps)
    return args.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


class Meter:
    """Loss and speed since the last line of the log, and the samples that could not be used."""

    NUM_SHOWN = 5       # bad samples printed one by one; the rest is only counted

    def __init__(self, run: Run, args: argparse.Namespace, batches: GlobalBatches):
        self.run, self.args, self.batches = run, args, batches
        self.loss, self.num_steps, self.num_tokens, self.since = 0.0, 0, 0, time.perf_counter()
        self.started, self.num_bad, self.total_bad = self.since, 0, 0

    def add(self, passes: list[dict], loss: Tensor) -> None:
        """Raises ValueError at a bad sample if --on_bad_sample is stop."""
        self.loss, self.num_steps = self.loss + loss, self.num_steps + 1
        self.num_tokens += sum(batch["num_tokens"] for batch in passes)
        for reason in (reason for batch in passes for reason in batch["bad_samples"]):
            if self.args.on_bad_sample == "stop":
                raise ValueError(f"{reason} (--on_bad_sample skip would leave it out)")
            if self.num_bad < self.NUM_SHOWN:
                tqdm.write(f"skipped {reason}")
            self.num_bad += 1

    def read(self, step: int) -> dict:
        """The values of one line of the log, over all ranks; starts the next interval.

        Raises ValueError, on every rank, once more than 1 % of the rows seen are bad.
        """
        sums = torch.tensor([float(self.loss), self.num_tokens, self.num_bad],
                            dtype=torch.float64).to(self.run.device)
        loss, num_tokens, self.total_bad = self.run.sum(sums).tolist()
        now = time.perf_counter()
        values = {"step": step, "epoch": round(step / self.batches.steps_per_epoch, 4),
                  "loss": loss / self.num_steps, "tokens_per_s": num_tokens / (now - self.since),
                  "seconds": round(now - self.started, 3)}
        self.loss, self.num_steps, self.num_tokens, self.since = 0.0, 0, 0, now
        num_rows = self.batches.num_samples * math.ceil(step / self.batches.steps_per_epoch)   # in all epochs
        if self.total_bad > 0.01 * num_rows:
            raise ValueError(f"{self.total_bad:.0f} of {num_rows} rows could not be used, "
                             f"more than 1 %: mend {self.args.data_path}")
        return values

    def summary(self) -> str:
        return f"; {self.total_bad:.0f} bad samples left out" if self.total_bad else ""


def describe_run(run: Run, args: argparse.Namespace, model: Transformer, vision_model: nn.Module | None,
                 dataset: VLMDataset, batches: GlobalBatches, dtype: torch.dtype) -> str:
    """What is about to happen, in two lines."""
    frozen = sum(parameter.numel() for parameter in vision_model.parameters()) if vision_model else 0
    projection = sum(parameter.numel() for name, parameter in model.named_parameters()
                     if name.startswith("vision_proj"))
    threads = f", {torch.get_num_threads()} threads" if run.device.type == "cpu" else ""
    return (f"trained: {model.num_parameters() / 1e6:.2f} M parameters, "
            f"{projection / 1e6:.2f} M of them the projection; "
            f"frozen: {frozen / 1e6:.2f} M (CLIP)\n"
            f"{len(dataset)} samples, {batches.samples_per_step} per step "
            f"({run.world_size} process(es) x batch {args.batch_size} x accumulation "
            f"{args.accumulation_steps}), {batches.total_steps} steps, "
            f"{str(dtype).removeprefix('torch.')} on {run.device}{threads}")
