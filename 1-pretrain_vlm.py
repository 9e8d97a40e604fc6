"""Stage 1 of 2: learn to describe a picture in one sentence.

reads    out/512_llm.pth, dataset/LLaVA-Pretrain/chat-translated.json, dataset/pretrain_images/
writes   out/512_vlm_pretrain.pth  (every --save_interval steps and at the end; .json, .metrics.jsonl and .png
         beside it)
trains   the projection and the language model; CLIP stays frozen

    torchrun --standalone --nproc_per_node 2 1-pretrain_vlm.py --use_wandb
    python 1-pretrain_vlm.py @dataset/demo/pretrain.args      # the demo world: two minutes on a laptop
    python -m trainer.check pretrain                          # is everything in place?
"""
import argparse
from collections.abc import Callable

from model.dataset import PRETRAIN
from trainer.args import Parser, add_model_flags, add_training_flags, check_args, clean_exit
from trainer.distributed import start_run
from trainer.loop import train_stage


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_model_flags(parser)
    add_training_flags(parser, data_path="dataset/LLaVA-Pretrain/chat-translated.json",
                       image_dir="dataset/pretrain_images", learning_rate=4e-4)
    return check_args(parser.parse_args(argv))


def main(argv: list[str] | None = None, do: Callable = train_stage) -> None:
    """do: what becomes of the stage; trainer.check looks at it instead of training."""
    args = parse_args(argv)
    with start_run(args.device, args.timeout) as run:
        do(run, args, PRETRAIN, weights_in="llm", weights_out="vlm_pretrain")


if __name__ == "__main__":
    clean_exit(main)
