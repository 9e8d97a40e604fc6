"""What 3-eval_chat.py does with a folder of images, sets of images, or a video: ask one question of each."""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

from model.chat import Chat
from model.data.video import Frame, open_images
from model.files import check_image_dir
from model.generate import Sampling
from model.names import IMAGE_SUFFIXES
from model.prompt import put_marks
from serving.terminal import print_stream
from trainer.distributed import Run


def make_sampling(args: argparse.Namespace, position: int = 0) -> Sampling:
    """position: number of the image or question; each draws from a stream of its own, whatever process
    answers it."""
    return Sampling(
        args.temperature,
        args.top_k,
        args.top_p,
        args.repetition_penalty,
        args.max_new_tokens,
        args.seed + position,
    )


def describe_all(run: Run, args: argparse.Namespace, chat: Chat) -> None:
    """One answer for each, streamed; with several processes each answers its share and rank 0 prints all in
    order."""
    shown = list_shown(args)
    if args.multi:  # what does not fit is reported before the first answer
        for _, files in shown:
            compose(args, chat, files)
    if run.world_size == 1:
        for position, (name, files) in enumerate(shown):
            print(f"\n[{name}] {args.prompt}")
            print_stream(answer(args, chat, files, position))
        return
    mine = {
        position: "".join(answer(args, chat, shown[position][1], position))
        for position in range(run.rank, len(shown), run.world_size)
    }
    for (name, _), text in zip(shown, run.gather_in_order(mine), strict=run.is_main):
        print(f"\n[{name}] {args.prompt}\n{text}")


def list_shown(args: argparse.Namespace) -> list[tuple[Path, list[Path]]]:
    """What is described one by one: a name, and the files that are shown together."""
    if args.video:
        return [(args.video, [args.video])]
    check_image_dir(args.image_dir)
    if not args.multi:
        return [(image, [image]) for image in list_images(args.image_dir)]
    folders = sorted(path for path in args.image_dir.glob("*") if path.is_dir())
    if not folders:
        raise FileNotFoundError(
            f"no folders in {args.image_dir}: --multi wants a folder there for each set "
            "of images; or name another place with --image_dir"
        )
    return [(folder, list_images(folder)) for folder in folders]


def list_images(folder: Path) -> list[Path]:
    images = sorted(path for path in folder.glob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise FileNotFoundError(f"no images in {folder}: put some there, or name a folder with --image_dir")
    return images


def compose(args: argparse.Namespace, chat: Chat, files: list[Path]) -> tuple[list[dict], list[Path | Frame]]:
    """The question of --prompt about images, or about a video: its turns, and the images and frames that it
    shows.

    raises  ValueError if there are more images than the model's context holds
    """
    marked = put_marks(args.prompt, 0, 1) if args.video else put_marks(args.prompt, len(files))
    parts, turns = chat.prepare([{"from": "human", "value": marked}], files, args.max_frames)
    config, num_tokens = chat.decoder.config, len(chat.render(turns).input_ids)
    too_many = math.ceil((num_tokens - config.max_seq_len + 1) / config.num_image_tokens)
    if too_many > 0 and len(files) > 1:
        raise ValueError(
            f"{files[0].parent} holds {len(files)} images of {config.num_image_tokens} tokens "
            f"each, {num_tokens} with the question, but the model's context holds "
            f"{config.max_seq_len} with the answer: at most {max(0, len(files) - too_many)} "
            "images fit"
        )
    return turns, [image for part in parts for image in part]


def answer(args: argparse.Namespace, chat: Chat, files: list[Path], position: int = 0) -> Iterator[str]:
    """The answer, piece by piece."""
    turns, shown = compose(args, chat, files)
    yield from chat.stream(turns, list(open_images(shown)), make_sampling(args, position))
