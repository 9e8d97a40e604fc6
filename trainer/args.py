"""The flags that the launched scripts share, checked before anything is loaded.

Flags can also come from a file, one or more per line: python 1-pretrain_vlm.py @my.args --max_steps 10
"""
import argparse
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable

from model.chat import CLIP_PATH, TOKENIZER_PATH
from model.device import DEVICE_NAME, DTYPES
from model.feature_store import FEATURE_DTYPES
from trainer.distributed import AgreedError
from trainer.optimizer import TRAIN_CHOICES

AUTO = "auto"       # --batch_size, until the memory is known


class Parser(argparse.ArgumentParser):
    """argparse with @files whose lines hold flags and # comments, and with errors of one line."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         fromfile_prefix_chars="@", allow_abbrev=False)

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        return shlex.split(arg_line, comments=True)

    def error(self, message: str):
        self.exit(2, f"error: {message} (--help lists the flags)\n")


def true_or_false(text: str) -> bool:
    """--multi True and --multi False mean what they say (bool("False") would be True)."""
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"must be True or False, not {text!r}")


def number_or_auto(text: str) -> int | str:
    if text == AUTO:
        return AUTO
    if text.isdecimal() and int(text):
        return int(text)
    raise argparse.ArgumentTypeError(f"must be at least 1, or auto, not {text}")


def add_model_flags(parser: Parser) -> None:
    """The files that every script reads, and the device it runs on."""
    group = parser.add_argument_group("model")
    group.add_argument("--out_dir", default="out", help="folder of the weights, read and written")
    group.add_argument("--tokenizer_path", help=f"tokenizer folder (default: {TOKENIZER_PATH})")
    group.add_argument("--clip_path", help=f"CLIP folder (default: {CLIP_PATH})")
    group.add_argument("--dim", type=int, default=512, help="model width: 512 with 8 layers, 768 with 16")
    group.add_argument("--use_moe", type=true_or_false, nargs="?", const=True, default=False,
                       metavar="True|False", help="a mixture of experts; its files are *_moe_*.pth")
    group.add_argument("--device", default="auto",
                       help="auto (CUDA if there is any, else CPU), cpu, cuda, cuda:N, mps")
    group.add_argument("--dtype", default="auto", choices=["auto", *DTYPES],
                       help="arithmetic of the matrix products; "
                            "auto: bfloat16 on GPUs that have it, else float32")
    group.add_argument("--seed", type=int, default=1337)


def add_training_flags(parser: Parser, data_path: str, image_dir: str, learning_rate: float) -> None:
    """The flags of a training stage; names and defaults are v1's where v1 has them."""
    group = parser.add_argument_group("sizes")
    group.add_argument("--n_layers", type=int, default=8)
    group.add_argument("--n_heads", type=int, default=16, help="attention heads")
    group.add_argument("--n_kv_heads", type=int, default=8,
                       help="key/value heads, each shared by n_heads / n_kv_heads")
    group.add_argument("--vocab_size", type=int, default=0,
                       help="rows of the embedding (0 = as many as the tokenizer has)")
    group.add_argument("--max_seq_len", type=int, default=512, help="tokens per sample, images included")
    group = parser.add_argument_group("experts (--use_moe)")
    group.add_argument("--n_routed_experts", type=int, default=4, help="experts per layer to choose from")
    group.add_argument("--num_experts_per_tok", type=int, default=2, help="how many of them a token chooses")
    group.add_argument("--n_shared_experts", type=int, default=1,
                       help="one more that every token uses, or 0")
    group.add_argument("--aux_loss_alpha", type=float, default=0.01,
                       help="weight of the loss that keeps the experts evenly used (0 = without)")
    group.add_argument("--norm_topk_prob", type=true_or_false, default=True, metavar="True|False",
                       help="let the weights of a token's experts add up to 1 (default: %(default)s)")
    group = parser.add_argument_group("data")
    group.add_argument("--data_path", default=data_path,
                       help="json, jsonl or parquet file (default: %(default)s)")
    group.add_argument("--image_dir", default=image_dir, help="folder of its pictures (default: %(default)s)")
    group.add_argument("--num_workers", type=int, default=min(8, os.cpu_count() or 1),
                       help="processes that load pictures "
                            "(0 = the training process itself; default: %(default)s)")
    group.add_argument("--on_bad_sample", default="stop", choices=["stop", "skip"],
                       help="stop and name it, or skip, count and report "
                            "(stops above 1 %% of the rows all the same)")
    group.add_argument("--val_data_path",
                       help="rows of their own for the validation loss, computed at every save")
    group.add_argument("--val_fraction", type=float, default=0.0,
                       help="or: keep this share of the rows (0.01 = 1 %%) out of training for it")
    group.add_argument("--feature_cache", metavar="DIR",
                       help="encode every picture with CLIP once and keep the features here; later epochs, "
                            "stages and runs read them (75 KiB per picture at ViT-B/32; told before written)")
    group.add_argument("--feature_dtype", default="float16", choices=list(FEATURE_DTYPES),
                       help="of the cache; float32 takes twice the room and loses nothing")
    group.add_argument("--jpeg_draft", action="store_true",
                       help="decode large JPEGs at reduced size: faster, but pixels differ a little from "
                            "what evaluation and chat see")
    add_step_flags(parser, learning_rate)
    add_saving_flags(parser)


def add_step_flags(parser: Parser, learning_rate: float) -> None:
    """What a step is made of, and how many there are."""
    group = parser.add_argument_group("training")
    group.add_argument("--train", default="all", choices=TRAIN_CHOICES,
                       help="what is trained besides CLIP, which never is: all, the projection alone, or the "
                            "projection with the last block and the final norm (default: %(default)s, as v1)")
    group.add_argument("--epochs", type=int, default=19)
    group.add_argument("--max_steps", type=int, default=0,
                       help="optimizer steps (0 = as many as --epochs takes)")
    group.add_argument("--batch_size", type=number_or_auto, default=32, metavar="N|auto",
                       help="samples per process and forward pass (default: %(default)s); auto: the largest "
                            "power of two up to 256 whose memory is there; the learning rate stays")
    group.add_argument("--bucket", type=true_or_false, default=True, metavar="True|False",
                       help="put samples of like length into one step, so that little is padded; still "
                            "shuffled every epoch (default: %(default)s)")
    group.add_argument("--accumulation_steps", type=int, default=1, help="forward passes per optimizer step")
    group.add_argument("--learning_rate", type=float, default=learning_rate,
                       help="peak; a cosine takes it to a tenth (default: %(default)s)")
    group.add_argument("--warmup_steps", type=int, default=0,
                       help="optimizer steps of linear rise to the peak")
    group.add_argument("--weight_decay", type=float, default=0.0,
                       help="AdamW decay of matrices (0 = Adam, as v1)")
    group.add_argument("--grad_clip", type=float, default=1.0, help="largest gradient norm (0 = no limit)")
    group.add_argument("--max_bad_steps", type=int, default=20,
                       help="a step whose loss or gradient is not finite is skipped; "
                            "stop after so many in a row")
    group.add_argument("--compile", action="store_true",
                       help="compile the blocks (torch.compile): faster on a GPU after a minute or two; rows "
                            "are then padded to a multiple of 64 tokens")
    group.add_argument("--tf32", action="store_true",
                       help="on a GPU, float32 products in TF32: several times faster, 10 bits of mantissa")
    group.add_argument("--timeout", type=float, default=50,
                       help="seconds after which a process of the run that does not answer is given up")


def add_saving_flags(parser: Parser) -> None:
    """What a training stage keeps, and how it goes on."""
    group = parser.add_argument_group("interruption")
    group.add_argument("--resume", action="store_true",
                       help="go on with an unfinished run, to the same bits; begin if there is none")
    group.add_argument("--resume_weights_only", action="store_true",
                       help="begin a new schedule from the weights that an earlier run of this stage left")
    group = parser.add_argument_group("record")
    group.add_argument("--log_interval", type=int, default=10,
                       help="optimizer steps between lines of the metrics log")
    group.add_argument("--save_interval", type=int, default=100,
                       help="optimizer steps between saves (0 = only at the end)")
    group.add_argument("--keep_best", action="store_true",
                       help="also keep the weights of the lowest validation loss (*.best.pth)")
    group.add_argument("--use_wandb", action="store_true", help="mirror the metrics log to Weights & Biases")
    group.add_argument("--wandb_project", default="MiniMind-V")
    group.add_argument("--wandb_run_name", help="default: made of stage, size and batch")


def check_args(args: argparse.Namespace) -> argparse.Namespace:
    """Raise ValueError with every flag whose value cannot be meant."""
    at_least = {"dim": 1, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "vocab_size": 0, "max_seq_len": 2,
                "num_workers": 0, "epochs": 1, "max_steps": 0, "batch_size": 1, "accumulation_steps": 1,
                "warmup_steps": 0, "weight_decay": 0, "grad_clip": 0, "log_interval": 1, "save_interval": 0,
                "max_bad_steps": 1, "val_fraction": 0, "seed": 0, "max_rounds": 0, "max_images": 1,
                "max_frames": 0, "n_routed_experts": 1, "num_experts_per_tok": 1, "n_shared_experts": 0,
                "aux_loss_alpha": 0}
    problems = [f"--{name} must be at least {low}, not {getattr(args, name)}"
                for name, low in at_least.items()
                if getattr(args, name, AUTO) != AUTO and not getattr(args, name) >= low]
    if not 0 < getattr(args, "learning_rate", 1) < math.inf:
        problems.append(f"--learning_rate must be above 0, not {args.learning_rate}")
    if getattr(args, "val_fraction", 0) >= 1:
        problems.append(f"--val_fraction must be below 1 (0.01 is 1 %), not {args.val_fraction}")
    if getattr(args, "val_fraction", 0) and args.val_data_path:
        problems.append("--val_fraction and --val_data_path exclude each other")
    if getattr(args, "keep_best", False) and not (args.val_fraction or args.val_data_path):
        problems.append("--keep_best needs a validation loss: give --val_fraction or --val_data_path")
    if getattr(args, "resume", False) and args.resume_weights_only:
        problems.append("--resume goes on with the old schedule, --resume_weights_only begins a new one: "
                        "give one of them")
    if getattr(args, "compile", False) and args.use_moe:
        problems.append("--compile does not go with --use_moe: experts choose their rows anew at every step")
    if not getattr(args, "timeout", 1) > 0:
        problems.append(f"--timeout must be above 0, not {args.timeout}")
    if not DEVICE_NAME.fullmatch(getattr(args, "device", "auto")):
        problems.append(f"--device must be auto, cpu, cuda, cuda:N or mps, not {args.device}")
    if problems:
        raise ValueError("; ".join(problems))
    return args


def clean_exit(main: Callable[[], None]) -> None:
    """Run a script's main(): what the user can cure ends in one line and exit status 2, without a traceback.

    MINIMIND_DEBUG=1 shows the traceback.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as error:
        if not re.search(r"gloo|nccl|connection (closed|reset)|timed? ?out", str(error), re.IGNORECASE):
            raise
        tell_and_exit("another process of this run has ended or does not answer; what was learnt is saved, "
                      "--resume goes on with it")
    except (ValueError, OSError) as error:
        if os.environ.get("MINIMIND_DEBUG"):
            raise
        tell_and_exit(str(error), agreed=isinstance(error, AgreedError))


def tell_and_exit(message: str, agreed: bool = False) -> None:
    """One line and exit status 2, once per run: where several ranks have the same to say, rank 0 says it, and
    its end makes torchrun end the others meanwhile.

    agreed  all ranks certainly have the same to say
    """
    is_main = os.environ.get("RANK", "0") == "0"
    if not is_main:
        time.sleep(5)
    if is_main or not agreed:
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
