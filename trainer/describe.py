"""What 3-eval_chat.py does with images, a folder of them, sets, or a video: ask one question of each."""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

from model.chat import Chat
from model.data.video import Frame, open_images
from model.files import check_image_dir, offer_download
from model.generate import Sampling
from model.images import find_images
from model.printable import printable
from model.prompt import put_marks
from trainer.distributed import Run
from trainer.script import AgreedError, print_stream


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
    order. What cannot be read is passed over; AgreedError at the end then says how many."""
    shown = list_shown(args)
    check_fitting(args, chat, shown)
    bad: list[Path] = []
    mine = {}
    for position in range(run.rank, len(shown), run.world_size):
        pieces = describe(args, chat, *shown[position], position, bad)
        mine[position] = print_stream(pieces) if run.world_size == 1 else "".join(pieces)
    if run.world_size > 1:
        for text in run.gather_in_order(mine):
            print(printable(text))
    if num_bad := sum(run.share(len(bad))):
        raise AgreedError(f'{num_bad} of {len(shown)} could not be described: see "passed over" above')


def describe(
    args: argparse.Namespace, chat: Chat, name: Path, files: list[Path], position: int, bad: list[Path]
) -> Iterator[str]:
    """The question and the answer, piece by piece; or one line about what cannot be read, and its name is
    added to `bad`."""
    turns, shown = compose(args, chat, files)
    try:
        if not files:
            raise ValueError("it holds no images")
        images = list(open_images(shown))
    except (ValueError, FileNotFoundError) as error:
        if args.video:
            raise
        bad.append(name)
        yield f"\n[{name}] passed over: {error}"
        return
    yield f"\n[{name}] {args.prompt}\n"
    yield from chat.stream(turns, images, make_sampling(args, position))


def answer_one(args: argparse.Namespace, chat: Chat) -> str:
    """The answer to --prompt about all of --image. Raises ValueError for what cannot be read or shown."""
    turns, shown = compose(args, chat, args.image)
    return printable("".join(chat.stream(turns, list(open_images(shown)), make_sampling(args))))


def list_shown(args: argparse.Namespace) -> list[tuple[Path, list[Path]]]:
    """What is described one by one: a name, and the files that are shown together."""
    if args.video:
        return [(args.video, [args.video])]
    check_image_dir(args.image_dir)
    if not args.multi:
        shown = [(image, [image]) for image in find_images(args.image_dir)]
        if not shown:
            raise FileNotFoundError(
                f"no images in {args.image_dir}: {offer_download(args.image_dir)}put some there, "
                "or name a folder with --image_dir"
            )
        return shown
    folders = sorted(
        path for path in args.image_dir.glob("*") if path.is_dir() and not path.name.startswith(".")
    )
    if not folders:
        raise FileNotFoundError(
            f"no folders in {args.image_dir}: --multi wants a folder there for each set "
            "of images; or name another place with --image_dir"
        )
    return [(folder, find_images(folder)) for folder in folders]


def check_fitting(args: argparse.Namespace, chat: Chat, shown: list[tuple[Path, list[Path]]]) -> None:
    """Raise ValueError before the first answer for a set of images that does not fit."""
    for _, files in shown if args.multi else []:
        compose(args, chat, files)


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
        place = "--image names" if args.image else f"{files[0].parent} holds"
        raise ValueError(
            f"{place} {len(files)} images of {config.num_image_tokens} tokens "
            f"each, {num_tokens} with the question, but the model's context holds "
            f"{config.max_seq_len} with the answer: at most {max(0, len(files) - too_many)} "
            "images fit"
        )
    return turns, [image for part in parts for image in part]
