"""Stage 2 of 2: learn to answer questions about a picture; with --multi, about several, or about films.

reads    out/512_vlm_pretrain.pth, dataset/LLaVA-Instruct/llava_instruct_230k.json, dataset/sft_images/
writes   out/512_vlm_sft.pth  (every --save_interval steps and at the end; .json, .metrics.jsonl and .png
         beside it)
--multi  reads out/512_vlm_sft.pth, dataset/sft_multi_images/output.json and its pictures;
         writes out/512_vlm_sft_multi.pth
trains   the projection and the language model; CLIP stays frozen

    torchrun --standalone --nproc_per_node 2 2-sft_vlm.py --use_wandb
    python 2-sft_vlm.py @dataset/demo/sft.args                # the demo world: two minutes on a laptop
    python 2-sft_vlm.py --multi True
    python 2-sft_vlm.py --multi --max_images 3 --max_frames 4     # pictures a row, frames a film
    python -m trainer.check sft                               # is everything in place?
"""
import argparse
from collections.abc import Callable
from dataclasses import replace

from model.dataset import SFT, SFT_MULTI
from trainer.args import Parser, add_model_flags, add_training_flags, check_args, clean_exit, true_or_false
from trainer.distributed import start_run
from trainer.loop import train_stage

ONE_IMAGE = {"data_path": "dataset/LLaVA-Instruct/llava_instruct_230k.json",
             "image_dir": "dataset/sft_images"}
MULTI = {"data_path": "dataset/sft_multi_images/output.json", "image_dir": "dataset/sft_multi_images",
         "max_images": SFT_MULTI.max_images, "max_frames": SFT_MULTI.max_frames}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--multi", type=true_or_false, nargs="?", const=True, default=False,
                        metavar="True|False",
                        help="tune on rows of several pictures, starting from the one-picture weights")
    parser.add_argument("--max_images", type=int, default=SFT.max_images,
                        help=f"with --multi: pictures per row, at most (default: {SFT_MULTI.max_images})")
    parser.add_argument("--max_frames", type=int, default=SFT.max_frames,
                        help="with --multi: frames of each film, at most, one per second; 0 = no films "
                             f"(default: {SFT_MULTI.max_frames})")
    add_model_flags(parser)
    add_training_flags(parser, **ONE_IMAGE, learning_rate=1e-6)
    if parser.parse_args(argv).multi:
        parser.set_defaults(**MULTI)
    args = parser.parse_args(argv)
    if not args.multi and (args.max_images, args.max_frames) != (SFT.max_images, SFT.max_frames):
        raise ValueError("--max_images and --max_frames need --multi: without it, a row has one picture")
    return check_args(args)


def main(argv: list[str] | None = None, do: Callable = train_stage) -> None:
    """do: what becomes of the stage; trainer.check looks at it instead of training."""
    args = parse_args(argv)
    with start_run(args.device, args.timeout) as run:
        if args.multi:
            spec = replace(SFT_MULTI, max_images=args.max_images, max_frames=args.max_frames)
            do(run, args, spec, weights_in="vlm_sft", weights_out="vlm_sft_multi")
        else:
            do(run, args, SFT, weights_in="vlm_pretrain", weights_out="vlm_sft")


if __name__ == "__main__":
    clean_exit(main)
