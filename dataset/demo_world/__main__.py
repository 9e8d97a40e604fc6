"""Make the whole demo world on disk, in the formats of the real run:

    DIR/images/               all images
    DIR/videos/                and all videos
    DIR/tokenizer/            instead of MiniMind's
    DIR/pretrain.json         instead of LLaVA-Pretrain
    DIR/clip/                 instead of openai/clip-vit-base-patch32; it comes trained, as that one does
    DIR/sft.json              instead of LLaVA-Instruct
    DIR/128_llm.pth           instead of MiniMind's 512_llm.pth
    DIR/sft_multi.json        rows of two images, of a video, and a few of one image
    DIR/about.json            what a model of this world knows; the recipes give it to the weights
    DIR/*.args                recipes for the numbered scripts
    DIR/questions_*.jsonl     held-out questions with answers
    DIR/eval_images/          a few images never trained on

Work goes on in DIR.building, one finished part after another, and is moved to DIR when all parts are there: a
second call goes on where the first was stopped, and half a world is never taken for a whole one.
"""

import argparse
from pathlib import Path

from trainer.script import SEED_LIMIT, Parser, at_least, clean_exit

PRESETS = ("full", "tiny")  # of recipe.PRESETS


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.prog = "python -m dataset.demo_world"
    parser.add_argument(
        "--out", type=Path, default=Path("dataset/demo"), help="folder to make (default: %(default)s)"
    )
    parser.add_argument(
        "--weights_dir", type=Path, help="the recipes' --out_dir (default: the folder itself)"
    )
    parser.add_argument(
        "--preset", default="full", choices=PRESETS, help="full learns all; tiny is for tests"
    )
    parser.add_argument(
        "--seed", type=at_least(0, below=SEED_LIMIT), default=0, help="another seed is another world"
    )
    parser.add_argument(
        "--clip", type=Path, help="another CLIP than the one in dataset/demo_world/clip (see eye.py)"
    )
    parser.add_argument(
        "--use_moe",
        action="store_true",
        help="let the language model be a mixture of experts, and the recipes train one",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    from dataset.demo_world.build import SHIPPED, World  # only now: loading PyTorch takes seconds

    world = World(args.out, args.preset, args.seed, args.use_moe, args.clip or SHIPPED)
    world.build()
    if args.weights_dir or not (args.out / "eval.args").exists():  # a second call keeps where weights go
        world.write_recipes(args.weights_dir or args.out)
    print(
        f"demo world ({args.preset}, seed {args.seed}) in {args.out}; train on it with\n"
        f"    python 1-pretrain_vlm.py @{args.out}/pretrain.args\n"
        f"    python 2-sft_vlm.py @{args.out}/sft.args\n"
        f"    python 2-sft_vlm.py @{args.out}/sft_multi.args\n"
        f"    python 3-eval_chat.py @{args.out}/eval.args"
    )


if __name__ == "__main__":
    clean_exit(main)
