"""What is each image worth? Measured row by row on a whole data file; trains nothing.

reads    the data, images, CLIP and tokenizer that the stage's flags name, and --weights
writes   --out FILE: a JSON line for each row that shows an image, the least gain first

    python -m trainer.gain sft @dataset/demo/sft.args --out gain.jsonl      # weights: the stage's own
    python -m trainer.gain sft --weights out/512_vlm_sft.pth --data_path my.jsonl --image_dir my_images
    python -m trainer.gain sft @dataset/demo/sft.args --validation          # only rows that are validated on
    torchrun --standalone --nproc_per_node 2 -m trainer.gain sft            # shared out over processes

The first argument names the stage: pretrain (default), sft, or a script of your own built like theirs. All
other flags are the stage's, which its script lists (--help).

The loss of a row's answers is taken three times: with its own image, with a blank one (features that are all
zero) and with another row's. Blank - own is its gain, in nats per token. By these a row

    needs its image        the answer is less likely without it
    does without it        blank is as good: the question says it, or it can be guessed
    is better without it   another's or none does better: the image is likely another row's, the answer wrong

That is visual information gain (arXiv 2602.17186) and visual necessity (arXiv 2603.01195), with another row's
image beside the blank one. Weights that see badly find little: look at a run's own figure first.
"""

import sys
from pathlib import Path

from model.files import check_weight_file, check_writable
from model.names import weights_path
from trainer.inputs import check_sources, make_config
from trainer.script import Parser, clean_exit, place_in_run
from trainer.stages import parse_stage


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.prog = "python -m trainer.gain"
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="of the model that is asked (default: those of the stage)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every row to this JSONL file")
    parser.add_argument(
        "--validation", action="store_true", help="only the rows that a run of these flags validates on"
    )
    own, args, stage, _ = parse_stage(parser, sys.argv[1:] if argv is None else argv)
    own.weights = own.weights or weights_path(args.out_dir, make_config(args), stage.weights_out)
    check_weight_file(own.weights, "train it first, or name another file with --weights")
    check_sources(args)
    if own.out and place_in_run().rank == 0:
        check_writable(own.out)

    from trainer.distributed import start_run  # only now: loading PyTorch takes seconds
    from trainer.necessity import measure_file

    with start_run(args.device, args.timeout) as run:
        measure_file(run, args, stage, own.weights, own.out, own.validation)


if __name__ == "__main__":
    clean_exit(main)
