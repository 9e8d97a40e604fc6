"""One training stage, from flags to weights; stages differ only in what their scripts hand to train_stage().

    train_stage    flags -> tokenizer, CLIP, model, data
    train          the loop: batches, steps, logging, validation, saving
    Stepper.step   one optimizer step
"""
import argparse
import contextlib
import math
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from model.chat import CLIP_PATH, TOKENIZER_PATH, check_fit
from model.checkpoint import LoadReport, load_weights, read_state_dict, weights_path
from model.dataset import DatasetSpec, VLMDataset, collate
from model.device import choose_dtype
from model.LMConfig import EXPERT_FIELDS, LMConfig
from model.model import Transformer
from model.moe import Routing
from model.prompt import load_tokenizer
from model.vision_utils import get_img_embedding, get_vision_model, num_image_tokens
from trainer.args import AUTO
from trainer.batches import GlobalBatches, by_step
from trainer.distributed import AgreedError, Run
from trainer.experts import ExpertRecord
from trainer.features import fill_feature_cache
from trainer.interrupt import Interruption
from trainer.loader import Loader, WorkerDied, prefetch, to_device
from trainer.logger import Meter, MetricsLog, StepSize, progress_bar
from trainer.memory import StepMemory, in_words, plan_step
from trainer.optimizer import choose_trained, learning_rate, make_optimizer, trained_parameters
from trainer.saves import Saves
from trainer.validation import Validation, lengths_of, split_off

COMPILED_MULTIPLE = 64      # tokens; every length is compiled by itself, so there had better be few
TRAINED_BY = {"vlm_pretrain": "1-pretrain_vlm.py", "vlm_sft": "2-sft_vlm.py"}


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
    image_processor = replace(image_processor, jpeg_draft=args.jpeg_draft)
    config = make_config(args, len(tokenizer), vision_model.config.hidden_size,
                         num_image_tokens(vision_model))
    source = weights_path(args.out_dir, config, weights_in)
    check_fit(config, tokenizer, vision_model, source, clip_path)
    model, report = load_model(config, source, weights_in)
    run.print(str(report))

    def read_data(path: str) -> VLMDataset:
        return VLMDataset(path, spec, tokenizer, args.image_dir, image_processor, config.num_image_tokens,
                          args.max_seq_len)
    datasets = [read_data(path) for path in (args.data_path, args.val_data_path) if path]
    if args.feature_cache:
        store = fill_feature_cache(run, args, datasets, vision_model, image_processor)
        for dataset in datasets:
            dataset.feature_store = store
        vision_model = None     # has done its work
    train(run, args, model, datasets[0], vision_model, weights_path(args.out_dir, config, weights_out),
          {"stage": weights_out, "tokenizer_path": str(tokenizer_path), "clip_path": str(clip_path)},
          datasets[1] if args.val_data_path else None)


def make_config(args: argparse.Namespace, num_tokens: int, vision_dim: int,
                num_image_tokens: int) -> LMConfig:
    """The sizes that the flags, the tokenizer and CLIP give together."""
    return LMConfig(dim=args.dim, n_layers=args.n_layers, n_heads=args.n_heads, n_kv_heads=args.n_kv_heads,
                    vocab_size=args.vocab_size or num_tokens, max_seq_len=args.max_seq_len,
                    vision_dim=vision_dim, num_image_tokens=num_image_tokens,
                    **{name: getattr(args, name) for name in EXPERT_FIELDS})


def weights_cure(weights_in: str, use_moe: bool) -> str:
    """What to do where the weights of a stage are missing or wrong."""
    cure = "make a demo world with python -m dataset.demo_world"
    if use_moe:
        cure += " --out dataset/demo_moe --use_moe"
    if weights_in != "llm":
        cure = f"run {TRAINED_BY[weights_in]}{' --use_moe' if use_moe else ''} first"
    section = "Train on the real data" if weights_in == "llm" else "Weights"
    download = "" if use_moe else f"download it (README, '{section}'), "
    return f"{cure}, {download}or name the folder where it lies with --out_dir"


def load_model(config: LMConfig, source: Path, weights_in: str) -> tuple[Transformer, LoadReport]:
    """A model with the weights of an earlier stage. Raises FileNotFoundError or ValueError with the cure."""
    cure = weights_cure(weights_in, config.use_moe)
    from_llm = weights_in == "llm"      # it has no projection yet; the published one may, and keeps it
    config.vision_proj_bias = not from_llm and "vision_proj.bias" in read_state_dict(source, cure)
    model = Transformer(config)
    return model, load_weights(model, source, may_miss="vision_proj." if from_llm else (),
                               may_ignore="vision_proj.bias" if from_llm else (), cure=cure)


def train(run: Run, args: argparse.Namespace, model: Transformer, dataset: VLMDataset,
          vision_model: nn.Module | None, weights_out: Path, description: dict,
          val_dataset: VLMDataset | None = None) -> None:
    """Train `model` on `dataset` and save it to `weights_out`, every --save_interval steps, when the run is
    told to stop, and at the end."""
    for data in (dataset, val_dataset):
        if data and data.rows.index_seconds:
            run.print(f"indexed {data.rows.path}: {len(data)} rows in {data.rows.index_seconds:.1f} s (once)")
        if data and args.on_bad_sample == "stop":
            data.check_rows()
    train_set, val_set = split_off(dataset, val_dataset, args)
    choose_trained(model, args.train)
    memory = plan_memory(run, args, model, vision_model, train_set)
    batches = GlobalBatches(len(train_set), args, run, lengths_of(train_set) if args.bucket else None)
    settings = settings_of(run, args, model, dataset, batches)
    saves = Saves(run, args, weights_out, settings, description | {"data_path": str(args.data_path)})
    if saves.finished_before():
        run.print(f"{weights_out} is finished: nothing to do")
        return
    resumed = saves.start(model)
    stepper, meter = Stepper(run, args, model, vision_model), Meter(run, args, batches)
    run.print(describe_run(run, args, model, vision_model, train_set, val_set, batches, stepper.dtype))
    run.print(describe_memory(memory, args.batch_size, run.device))
    if resumed:
        stepper.load_state_dict(resumed["stepper"])
        meter.load_state_dict(resumed["meter"])
        batches.start_step = resumed["step"]
        run.print(f"going on from step {resumed['step']} of {batches.total_steps}")
    log = MetricsLog(weights_out, run, args, resumed and resumed["log"])
    loader = Loader(train_set, batches, args.num_workers, pin_memory=run.device.type == "cuda",
                    multiple=COMPILED_MULTIPLE if args.compile else 1)
    keeper = Keeper(saves, stepper, meter, log, Validation(run, args, val_set), batches.total_steps)
    with Interruption() as interruption:
        step = run_steps(run, args, loader, batches, keeper, interruption)
        if step < batches.total_steps:
            run.print(f"stopped and saved at step {step} of {batches.total_steps}: "
                      "--resume goes on from there")
            interruption.leave()
    run.print(f"saved {weights_out} after {step} steps{meter.summary()}{stepper.experts.summary()}; "
              f"metrics {log.path.name}, curve {log.curve.name}")


def plan_memory(run: Run, args: argparse.Namespace, model: Transformer, vision_model: nn.Module | None,
                train_set: Dataset) -> StepMemory:
    """What a step takes if its rows are as long as the longest; decides what --batch_size auto is."""
    longest = int(lengths_of(train_set).argmax())
    memory = plan_step(run.device, model, vision_model, collate([train_set[longest]]), args.num_workers)
    if args.batch_size == AUTO:
        sizes = run.share(memory.largest_batch())       # the ranks must agree
        if None in sizes:
            raise ValueError("this system does not say how much memory there is: give --batch_size a number")
        if not min(sizes):
            raise ValueError(f"not even one row fits: a step of it needs about {in_words(memory.needed(1))} "
                             f"of {in_words(memory.available)}: lower --max_seq_len, or take a smaller model")
        args.batch_size = min(sizes)
    return memory


def describe_memory(memory: StepMemory, batch_size: int, device: torch.device) -> str:
    largest, available = memory.largest_batch(), ""
    if largest is not None:
        available = f" of {in_words(memory.available)}; the largest batch that fits: {largest or 'none'}"
    return f"memory of a step: about {in_words(memory.needed(batch_size))} on {device}{available}"


def run_steps(run: Run, args: argparse.Namespace, loader: Loader, batches: GlobalBatches,
              keeper: "Keeper", interruption: Interruption) -> int:
    """Take the steps; returns how many are done: fewer than all if the run was told to stop.

    Whatever ends it, the steps done are saved.
    """
    stepper, meter, log = keeper.stepper, keeper.meter, keeper.log
    step, total_steps = batches.start_step, batches.total_steps
    bar = progress_bar(total=total_steps, initial=step, disable=not run.is_main, unit="step",
                       desc=keeper.saves.path.stem)
    try:
        for passes in by_step(prefetch(loader, run.device), args.accumulation_steps):
            size, stop = meter.count(passes, bool(interruption.number))
            if stop:
                break
            # ---- one optimizer step ---------------------------------------------------------------
            run.seed(args.seed, step)
            rate = learning_rate(step, total_steps, args)
            loss, grad_norm, skipped = stepper.step(passes, size, rate)
            step += 1
            # ---------------------------------------------------------------------------------------
            bar.update()
            meter.add(loss, skipped)
            last = step == total_steps
            if step % args.log_interval == 0 or last:
                values = meter.read(step) | stepper.read(grad_norm)
                log.write(**values)
                bar.set_postfix_str(describe_step(values), refresh=False)
                stepper.check_bad_steps(args.max_bad_steps)
            if args.save_interval and step % args.save_interval == 0 and not last:
                keeper.save_or_tell(step)
    except WorkerDied:
        if not interruption.number:     # else a signal to all processes has reached the loader's first
            raise
    finally:
        bar.close()
        keeper.finish(step)
    return step


class Keeper:
    """What is kept of a run: validation, saves, record."""

    def __init__(self, saves: Saves, stepper: "Stepper", meter: Meter, log: MetricsLog,
                 validation: Validation, total_steps: int):
        self.saves, self.stepper, self.meter, self.log = saves, stepper, meter, log
        self.validation, self.total_steps = validation, total_steps

    def save(self, step: int, validate: bool = True) -> None:
        """Measure the validation loss, and save everything."""
        measured = self.validation.measure(self.stepper) if validate else {}
        if measured:
            self.log.write(step=step, **measured)
            self.saves.keep_best(self.stepper.model, step, measured["val_loss"])
        state = {"stepper": self.stepper.state_dict(), "meter": self.meter.state_dict(),
                 "log": self.log.state_dict()}
        self.saves.save(self.stepper.model, step, self.total_steps, state, **measured)

    def save_or_tell(self, step: int) -> None:
        """A full disk in the middle of a run must not end it: room may come, and the last save is whole."""
        try:
            self.save(step)
        except OSError as error:
            self.saves.run.print(f"{error}; training goes on and saves again later")

    def finish(self, step: int) -> None:
        """Save what is not saved yet, then close the record. Before the end of the run nothing is validated:
        the other ranks may be gone."""
        try:
            if step > self.saves.last_step:
                self.save(step, validate=step == self.total_steps)
        finally:
            self.log.close()


class Stepper:
    """The model with what one optimizer step needs: optimizer, gradient scaler, DDP wrapper, dtype."""

    def __init__(self, run: Run, args: argparse.Namespace, model: Transformer,
                 vision_model: nn.Module | None):
        self.run, self.grad_clip = run, args.grad_clip or math.inf
        self.model = model.to(run.device).train()
        if args.compile:
            compile_blocks(self.model)
        if args.tf32:
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        self.dtype = choose_dtype(args.dtype, run.device)
        # CLIP is in no optimizer and no DDP bucket; frozen, it needs no fp32 copy of its weights.
        self.vision_model = vision_model.to(run.device, self.dtype) if vision_model else None
        self.trained = self.model if run.world_size == 1 else DistributedDataParallel(
            self.model, gradient_as_bucket_view=True)
        self.parameters = trained_parameters(self.model)
        self.optimizer = make_optimizer(self.model, args)
        # bfloat16 needs no scaler.
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=self.dtype == torch.float16)
        self.learning_rate = 0.0
        # Counted on the device, so that no step waits for the host: bad steps in all, and in a row.
        self.bad_steps = torch.zeros(2, dtype=torch.long, device=run.device)
        self.experts = ExpertRecord(run, self.model.config)

    def step(self, passes: list[dict], size: StepSize, learning_rate: float) -> tuple[Tensor, Tensor, Tensor]:
        """One optimizer step over the batches of all accumulation passes.

        The loss is the sum over the learnt tokens of the whole global batch (all ranks, all passes) divided
        by their number: one process with batch 8, two with batch 4, one with 4 x batch 2 take the same step.
        So it is with the balance loss of experts, which is added for the gradient: a mean over the rows of
        the global batch. A step whose loss or gradient is not finite changes nothing.

        size     what the global batch holds
        returns  that loss (without the balance), the gradient norm before clipping, and whether the step was
                 skipped; all on the device
        """
        self.learning_rate = learning_rate
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        total = torch.zeros((), device=self.run.device)
        for batch in passes:
            last = batch is passes[-1]      # ranks exchange gradients only once
            with contextlib.nullcontext() if last or self.trained is self.model else self.trained.no_sync():
                routing = self.experts.new_routing()
                loss = self.forward(batch, routing=routing) * batch["num_learnt"] / max(1, size.num_learnt)
                balance = self.experts.balance_loss(routing, size.num_rows)
                # Times world_size: DDP averages over ranks.
                self.scaler.scale((loss + balance) * self.run.world_size).backward()
            total += loss.detach()
        total = self.run.sum(total)
        self.experts.end_step()
        self.scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.grad_clip, foreach=True)
        bad_step = ~(total.isfinite() & grad_norm.isfinite())
        if not self.scaler.is_enabled():        # an enabled scaler tells the optimizer itself
            self.optimizer.found_inf = bad_step.float()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.bad_steps = (self.bad_steps + bad_step) * torch.stack([torch.ones_like(bad_step), bad_step])
        return total, grad_norm, bad_step

    def forward(self, batch: dict, model: nn.Module | None = None, routing: Routing | None = None) -> Tensor:
        """The mean loss over the learnt tokens of one batch; `model`: without the DDP wrapper."""
        batch = to_device(batch, self.run.device)
        features = self.image_features(batch)
        with torch.autocast(self.run.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return (model or self.trained)(batch["input_ids"], features, batch["image_slots"],
                                           batch["labels"], learnt=batch["learnt"], routing=routing)[1]

    def image_features(self, batch: dict) -> Tensor | None:
        """(M, N, V) from the feature cache, or from CLIP; None for a language model's conversations."""
        config = self.model.config
        if "image_features" in batch:
            return batch["image_features"].to(self.dtype)
        if self.vision_model:
            return get_img_embedding(batch["pixel_values"], self.vision_model)
        # A batch without a usable sample brings no features: none all the same take part in the step.
        empty = torch.zeros(0, config.num_image_tokens, config.vision_dim, device=self.run.device)
        return empty if config.vision_dim else None

    def read(self, grad_norm: Tensor) -> dict:
        """What the log records of the last step; waits for the device."""
        norm, bad_steps = grad_norm.item(), int(self.bad_steps[0])
        return {"learning_rate": self.learning_rate, "grad_norm": norm if math.isfinite(norm) else None,
                **({"bad_steps": bad_steps} if bad_steps else {}), **self.experts.read()}

    def check_bad_steps(self, most: int) -> None:
        in_row = int(self.bad_steps[1])
        if in_row >= most:
            raise AgreedError(f"the loss or the gradient of the last {in_row} steps was not finite; they "
                              "were skipped, and the weights are as before. Lower --learning_rate, or "
                              "compute in --dtype float32 or bfloat16")

    def state_dict(self) -> dict:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "bad_steps": self.bad_steps.cpu(), "experts": self.experts.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.bad_steps = state["bad_steps"].to(self.run.device)
        if "experts" in state:      # a save of an earlier version has none
            self.experts.load_state_dict(state["experts"])


def compile_blocks(model: Transformer) -> None:
    """Compile the blocks where they stand, so that names and weight files stay as they are. All blocks but
    the last are one piece of code to the compiler; the last sees another number of learnt tokens every step.
    """
    torch._dynamo.config.recompile_limit = 64       # one for each length of rows, and for each last batch
    for layer in model.layers[:-1]:
        layer.compile(dynamic=False)
    model.layers[-1].compile(dynamic=True)


def settings_of(run: Run, args: argparse.Namespace, model: Transformer, dataset: VLMDataset,
                batches: GlobalBatches) -> dict:
    """What decides the bits of a run: one that goes on must have the same."""
    named = ("batch_size", "accumulation_steps", "seed", "learning_rate", "warmup_steps", "weight_decay",
             "grad_clip", "train", "max_seq_len", "val_fraction", "jpeg_draft", "bucket",
             "compile", "tf32")
    return {"processes": run.world_size, "total_steps": batches.total_steps, "rows": len(dataset),
            "features": args.feature_dtype if args.feature_cache else None,
            "data": dataset.rows.fingerprint, "dtype": name_of(choose_dtype(args.dtype, run.device)),
            **{name: getattr(args, name) for name in named},
            **{f"rows.{name}": value for name, value in asdict(dataset.spec).items()},
            **{f"model.{name}": value for name, value in model.config.to_dict().items()}}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe_step(values: dict) -> str:
    loss = "not finite" if values["loss"] is None else f"{values['loss']:.4f}"
    experts = (f", experts {values['expert_load_least']:.2f}-{values['expert_load_most']:.2f}"
               if "expert_load" in values else "")
    return f"loss {loss}, lr {values['learning_rate']:.2e}, {values['tokens_per_s']:,.0f} tokens/s{experts}"


def describe_run(run: Run, args: argparse.Namespace, model: Transformer, vision_model: nn.Module | None,
                 train_set, val_set, batches: GlobalBatches, dtype: torch.dtype) -> str:
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
    text = (f"trained ({args.train}): {millions(trained)} parameters"
            f"{active if model.config.use_moe else ''}, {millions(projection)} of them the projection; "
            f"frozen: {clip}"
            f"{f' and {millions(still)} (language model)' if still else ''}\n"
            f"{len(train_set)} samples, {batches.samples_per_step} per step "
            f"({run.world_size} process(es) x batch {args.batch_size} x accumulation "
            f"{args.accumulation_steps}), {batches.total_steps} steps, "
            f"{name_of(dtype)} on {run.device}{threads}")
    if val_set:
        text += f"\n{len(val_set)} samples for the validation loss, at every save"
    return text
