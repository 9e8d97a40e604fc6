"""Is everything in place? Answers in seconds, before a run of hours; trains nothing, saves nothing.

    python -m trainer.check                                           # stage 1
    python -m trainer.check pretrain @dataset/demo/pretrain.args      # with the flags of the run to come
    python -m trainer.check sft --multi True
    python -m trainer.check sft --all_images                        # load all rows with their images
    torchrun --standalone --nproc_per_node 2 -m trainer.check         # for a run of two processes

The first argument names the stage: pretrain (default), sft, or a script of your own built like theirs. All
other flags are the stage's, which its script lists (--help): its parse_args and make_stage say what would be
trained.
Exit status 0 if all is in place; else 2, after one line per problem that says what cures it.
"""

import sys

from trainer.script import Parser, clean_exit
from trainer.stages import parse_stage

NUM_LOADED = 200  # rows loaded with their images, spread over the file


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.prog = "python -m trainer.check"
    parser.add_argument(
        "--all_images",
        "--all_pictures",
        action="store_true",
        help=f"load all rows with their images, instead of {NUM_LOADED} of them",
    )
    own, args, stage, path = parse_stage(parser, sys.argv[1:] if argv is None else argv)

    from trainer.inspection import inspect  # only now: loading PyTorch takes seconds

    num_loaded = None if own.all_images else NUM_LOADED
    if inspect(args, stage, path.name, num_loaded):
        sys.exit(2)


if __name__ == "__main__":
    clean_exit(main)
