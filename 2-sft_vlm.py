"""Stage 2 of 2: learn to answer questions about an image; with --multi, about several, or about videos.

reads    out/512_vlm_pretrain.pth, dataset/LLaVA-Instruct/llava_instruct_230k.json, dataset/sft_images/
writes   out/512_vlm_sft.pth  (every --save_interval steps and at the end; .json, .metrics.jsonl and .png
         beside it)
--multi  reads out/512_vlm_sft.pth, dataset/sft_multi_images/output.json and its images;
         writes out/512_vlm_sft_multi.pth
trains   the projection and the language model; CLIP stays frozen

    torchrun --standalone --nproc_per_node 2 2-sft_vlm.py --use_wandb
    python 2-sft_vlm.py @dataset/demo/sft.args                # the demo world: two minutes on a laptop
    python 2-sft_vlm.py --multi True
    python 2-sft_vlm.py --multi --max_images 3 --max_frames 4     # images a row, frames a video
    python -m trainer.check sft                               # is everything in place?
"""

import argparse
from dataclasses import replace

from model.data.spec import SFT, SFT_MULTI
from trainer.args import check_training_args, training_parser
from trainer.inputs import Stage, check_inputs
from trainer.script import at_least, clean_exit, true_or_false

MULTI = {
    "data_path": "dataset/sft_multi_images/output.json",
    "image_dir": "dataset/sft_multi_images",
    "max_rounds": SFT_MULTI.max_rounds,
    "max_images": SFT_MULTI.max_images,
    "max_frames": SFT_MULTI.max_frames,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = training_parser(
        __doc__,
        data_path="dataset/LLaVA-Instruct/llava_instruct_230k.json",
        image_dir="dataset/sft_images",
        learning_rate=1e-6,
    )
    group = parser.add_argument_group("rows")
    group.add_argument(
        "--multi",
        type=true_or_false,
        nargs="?",
        const=True,
        default=False,
        metavar="True|False",
        help="tune on rows of several images, starting from the one-image weights",
    )
    group.add_argument(
        "--max_rounds",
        type=at_least(0),
        default=SFT.max_rounds,
        help="rounds of a conversation to learn from, every answer of them "
        "(0 = all; default: 1, as v1; with --multi 0)",
    )
    group.add_argument(
        "--max_images",
        type=at_least(1),
        default=SFT.max_images,
        help=f"with --multi: images per row, at most (default: {SFT_MULTI.max_images})",
    )
    group.add_argument(
        "--max_frames",
        type=at_least(0),
        default=SFT.max_frames,
        help="with --multi: frames of each video, at most, one per second; 0 = no videos "
        f"(default: {SFT_MULTI.max_frames})",
    )
    if parser.parse_args(argv).multi:
        parser.set_defaults(**MULTI)
    args = parser.parse_args(argv)
    if not args.multi and (args.max_images, args.max_frames) != (SFT.max_images, SFT.max_frames):
        raise ValueError("--max_images and --max_frames need --multi: without it, a row has one image")
    return check_training_args(args)


def make_stage(args: argparse.Namespace) -> Stage:
    spec = replace(
        SFT_MULTI if args.multi else SFT,
        min_images=args.min_images,
        max_rounds=args.max_rounds,
        max_images=args.max_images,
        max_frames=args.max_frames,
    )
    if args.multi:
        return Stage(spec, weights_in="vlm_sft", weights_out="vlm_sft_multi")
    return Stage(spec, weights_in="vlm_pretrain", weights_out="vlm_sft")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    stage = make_stage(args)
    check_inputs(args, stage)

    from trainer.distributed import start_run  # only now: loading PyTorch takes seconds
    from trainer.loop import train
    from trainer.stage import load_stage

    with start_run(args.device, args.timeout) as run:
        train(run, args, load_stage(run, args, stage))


if __name__ == "__main__":
    clean_exit(main)
