"""Stage 1 of 2: learn to describe an image in one sentence.

reads    out/512_llm.pth, dataset/LLaVA-Pretrain/chat-translated.json, dataset/pretrain_images/
writes   out/512_vlm_pretrain.pth  (every --save_interval steps and at the end; .json, .metrics.jsonl and .png
         beside it)
trains   the projection and the language model; CLIP stays frozen

    torchrun --standalone --nproc_per_node 2 1-pretrain_vlm.py --use_wandb
    python 1-pretrain_vlm.py @dataset/demo/pretrain.args      # the demo world: two minutes on a laptop
    python -m trainer.check pretrain                          # is everything in place?
"""

import argparse
from dataclasses import replace

from model.data.spec import PRETRAIN
from trainer.args import check_training_args, training_parser
from trainer.inputs import Stage, check_inputs
from trainer.script import clean_exit


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = training_parser(
        __doc__,
        data_path="dataset/LLaVA-Pretrain/chat-translated.json",
        image_dir="dataset/pretrain_images",
        learning_rate=4e-4,
    )
    return check_training_args(parser.parse_args(argv))


def make_stage(args: argparse.Namespace) -> Stage:
    return Stage(replace(PRETRAIN, min_images=args.min_images), weights_in="llm", weights_out="vlm_pretrain")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    stage = make_stage(args)
    check_inputs(args, stage)

    from trainer.distributed import start_run  # only now: loading PyTorch takes seconds
    from trainer.loop import train
    from trainer.stage import load_stage

    with start_run(args.device, args.timeout) as run:
        train(run, args, load_stage(run, args, stage))  # tokenizer, CLIP, model and data; then the loop


if __name__ == "__main__":
    clean_exit(main)
