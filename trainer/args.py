"""The flags that the launched scripts share, each with its bounds.

Flags can also come from a file, one or more per line: python 1-pretrain_vlm.py @my.args --max_steps 10
"""

import argparse
import os

from model.names import CLIP_PATH, FEATURE_DTYPES, TOKENIZER_PATH
from trainer.script import SEED_LIMIT, Parser, above, add_device_flags, at_least, true_or_false

AUTO = "auto"  # --batch_size, until the memory is known
TRAIN_CHOICES = ("all", "projection", "projection+last")


def number_or_auto(text: str) -> int | str:
    if text == AUTO:
        return AUTO
    if text.isdecimal() and int(text):
        return int(text)
    raise argparse.ArgumentTypeError(f"must be at least 1, or auto, not {text}")


def training_parser(description: str, data_path: str, image_dir: str, learning_rate: float) -> Parser:
    """All flags of a training stage; names and defaults are v1's where v1 has them."""
    parser = Parser(description)
    add_model_flags(parser)
    add_training_flags(parser, data_path, image_dir, learning_rate)
    return parser


def add_model_flags(parser: Parser) -> None:
    """The files that every script reads, and the device it runs on."""
    group = parser.add_argument_group("model")
    group.add_argument("--out_dir", default="out", help="folder of the weights, read and written")
    group.add_argument("--tokenizer_path", help=f"tokenizer folder (default: {TOKENIZER_PATH})")
    group.add_argument("--clip_path", help=f"CLIP folder (default: {CLIP_PATH})")
    group.add_argument(
        "--dim", type=at_least(1), default=512, help="model width: 512 with 8 layers, 768 with 16"
    )
    group.add_argument(
        "--use_moe",
        type=true_or_false,
        nargs="?",
        const=True,
        default=False,
        metavar="True|False",
        help="a mixture of experts; its files are *_moe_*.pth",
    )
    add_device_flags(group)
    group.add_argument(
        "--seed", type=at_least(0, below=SEED_LIMIT), default=1337, help="of weights, order and sampling"
    )


def add_training_flags(parser: Parser, data_path: str, image_dir: str, learning_rate: float) -> None:
    group = parser.add_argument_group("sizes")
    group.add_argument(
        "--llm",
        metavar="DIR",
        help="another language model as the base: a Hugging Face folder of type llama or qwen3 (Llama, "
        "SmolLM2, MiniMind2, Qwen3), whose sizes and tokenizer are taken; stage 1 begins with its weights",
    )
    group.add_argument("--n_layers", type=at_least(1), default=8, help="blocks of the transformer")
    group.add_argument("--n_heads", type=at_least(1), default=16, help="attention heads")
    group.add_argument(
        "--n_kv_heads",
        type=at_least(1),
        default=8,
        help="key/value heads, each shared by n_heads / n_kv_heads",
    )
    group.add_argument(
        "--vocab_size",
        type=at_least(0),
        default=0,
        help="rows of the embedding (0 = as many as the tokenizer has)",
    )
    group.add_argument(
        "--max_seq_len", type=at_least(2), default=512, help="tokens per sample, images included"
    )
    group = parser.add_argument_group("experts (--use_moe)")
    group.add_argument(
        "--n_routed_experts", type=at_least(1), default=4, help="experts per layer to choose from"
    )
    group.add_argument(
        "--num_experts_per_tok", type=at_least(1), default=2, help="how many of them a token chooses"
    )
    group.add_argument(
        "--n_shared_experts", type=at_least(0), default=1, help="one more that every token uses, or 0"
    )
    group.add_argument(
        "--aux_loss_alpha",
        type=at_least(0, float),
        default=0.01,
        help="weight of the loss that keeps the experts evenly used (0 = without)",
    )
    group.add_argument(
        "--norm_topk_prob",
        type=true_or_false,
        default=True,
        metavar="True|False",
        help="let the weights of a token's experts add up to 1",
    )
    add_data_flags(parser, data_path, image_dir)
    add_step_flags(parser, learning_rate)
    add_saving_flags(parser)


def add_data_flags(parser: Parser, data_path: str, image_dir: str) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_path",
        default=data_path,
        metavar="PATH",
        help='json, jsonl or parquet file, a folder of them, or a pattern in quotes ("data/*.parquet")',
    )
    group.add_argument("--image_dir", default=image_dir, help="folder of its images")
    group.add_argument(
        "--min_images",
        type=at_least(0),
        default=1,
        help="images and videos per row, at least; 0 = rows of text alone are trained on too",
    )
    group.add_argument(
        "--num_workers",
        type=at_least(0),
        default=min(8, os.cpu_count() or 1),
        help="processes that load images (0 = the training process itself)",
    )
    group.add_argument(
        "--on_bad_sample",
        default="stop",
        choices=["stop", "skip"],
        help="stop and name it, or skip, count and report it (still stops above 1 %% of the rows)",
    )
    group.add_argument(
        "--val_data_path",
        metavar="PATH",
        help="rows of their own for the validation loss, computed at every save",
    )
    group.add_argument(
        "--val_fraction",
        type=at_least(0, float, below=1),
        metavar="SHARE",
        help="or: keep this share of the rows (0.01 = 1 %%) out of training for it (default: 128 rows of a "
        "file of 20,000 or more in a run without --max_steps, else none)",
    )
    group.add_argument(
        "--feature_cache",
        metavar="DIR",
        help="encode every image with CLIP once and keep the features here; later epochs, "
        "stages and runs read them (75 KiB per image at ViT-B/32; the size is printed "
        "before anything is written)",
    )
    group.add_argument(
        "--feature_dtype",
        default="float16",
        choices=FEATURE_DTYPES,
        help="of the cache; float32 takes twice the room and loses nothing",
    )
    group.add_argument(
        "--about",
        metavar="FILE",
        help="JSON that says what a model trained on this data knows; it is kept with the weights, and chat "
        'and page obey it: {"knows": text, "questions": [examples], "image_dir": folder of example images}',
    )
    group.add_argument(
        "--jpeg_draft",
        action="store_true",
        help="decode large JPEGs at reduced size: faster, but pixels differ a little from "
        "what evaluation and chat see",
    )


def add_step_flags(parser: Parser, learning_rate: float) -> None:
    """What a step is made of, and how many there are."""
    group = parser.add_argument_group("training")
    group.add_argument(
        "--train",
        default="all",
        choices=TRAIN_CHOICES,
        help="what is trained (CLIP never is): all, the projection alone, or the "
        "projection with the last block and the final norm (default: %(default)s, as v1)",
    )
    group.add_argument("--epochs", type=at_least(1), default=19, help="passes over the data")
    group.add_argument(
        "--max_steps", type=at_least(0), default=0, help="optimizer steps (0 = as many as --epochs takes)"
    )
    group.add_argument(
        "--batch_size",
        type=number_or_auto,
        default=32,
        metavar="N|auto",
        help="samples per process and forward pass; auto: the largest power of two up to 256 "
        "that fits into memory; the learning rate stays",
    )
    group.add_argument(
        "--bucket",
        type=true_or_false,
        default=True,
        metavar="True|False",
        help="put samples of similar length into one step, so that little is padded; still "
        "shuffled every epoch",
    )
    group.add_argument(
        "--accumulation_steps", type=at_least(1), default=1, help="micro-batches per optimizer step"
    )
    group.add_argument(
        "--learning_rate", type=above(0), default=learning_rate, help="peak; a cosine takes it to a tenth"
    )
    group.add_argument(
        "--warmup_steps", type=at_least(0), default=0, help="optimizer steps of linear rise to the peak"
    )
    group.add_argument(
        "--weight_decay",
        type=at_least(0, float),
        default=0.0,
        help="AdamW decay of matrices (0 = Adam, as v1)",
    )
    group.add_argument(
        "--grad_clip", type=at_least(0, float), default=1.0, help="largest gradient norm (0 = no limit)"
    )
    group.add_argument(
        "--max_bad_steps",
        type=at_least(1),
        default=20,
        help="a step whose loss or gradient is not finite is skipped; stop after this many in a row",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the blocks (torch.compile): faster on a GPU after a minute or two; rows "
        "are then padded to a multiple of 64 tokens",
    )
    group.add_argument(
        "--tf32",
        action="store_true",
        help="on a GPU, float32 products in TF32: several times faster, 10 bits of mantissa",
    )
    group.add_argument(
        "--timeout",
        type=above(0),
        default=50,
        help="seconds after which a process of the run that does not answer is given up",
    )


def add_saving_flags(parser: Parser) -> None:
    """What a training stage keeps, and how it resumes."""
    group = parser.add_argument_group("interruption")
    group.add_argument(
        "--resume",
        action="store_true",
        help="resume an unfinished run, to the same bits; start one if there is none",
    )
    group.add_argument(
        "--resume_weights_only",
        action="store_true",
        help="start a new schedule from the weights that an earlier run of this stage left",
    )
    group = parser.add_argument_group("record")
    group.add_argument(
        "--log_interval",
        type=at_least(1),
        default=10,
        help="optimizer steps between lines of the metrics log",
    )
    group.add_argument(
        "--save_interval",
        type=at_least(0),
        default=100,
        help="optimizer steps between saves (0 = only at the end)",
    )
    group.add_argument(
        "--keep",
        type=at_least(1),
        default=1,
        metavar="N",
        help="resume files of an unfinished run to keep: the newest, and those of the N - 1 saves before as "
        "*.resume.1 and so on; to go back, rename one",
    )
    group.add_argument(
        "--keep_best",
        action="store_true",
        help="also keep the weights of the lowest validation loss (*.best.pth)",
    )
    group.add_argument(
        "--samples",
        type=at_least(0),
        default=0,
        metavar="N",
        help="at saves, ask about the images of N validation rows: answers and a sheet of them lie beside "
        "the weights (*.samples.jsonl, *.samples.png); at fewer and fewer saves as the run goes on",
    )
    group.add_argument(
        "--sample_questions",
        metavar="FILE",
        help="for --samples: the first N questions of this file instead, as 3-eval_chat.py --questions "
        "takes it",
    )
    group.add_argument("--use_wandb", action="store_true", help="mirror the metrics log to Weights & Biases")
    group.add_argument("--wandb_project", default="MiniMind-V", help="project there")
    group.add_argument("--wandb_run_name", help="default: made of stage, size and batch")


def check_training_args(args: argparse.Namespace) -> argparse.Namespace:
    """Raise ValueError with every pair of flags that do not go together."""
    problems = []
    if args.val_fraction and args.val_data_path:
        problems.append("--val_fraction and --val_data_path exclude each other")
    if args.keep_best and not (args.val_fraction or args.val_data_path):
        problems.append("--keep_best needs a validation loss: give --val_fraction or --val_data_path")
    if args.sample_questions and not args.samples:
        problems.append("--sample_questions needs --samples N: how many of them are asked")
    if args.resume and args.resume_weights_only:
        problems.append(
            "--resume continues the old schedule, --resume_weights_only begins a new one: give one of them"
        )
    if args.compile and args.use_moe:
        problems.append("--compile does not go with --use_moe: experts choose their rows anew at every step")
    if problems:
        raise ValueError("; ".join(problems))
    return args
