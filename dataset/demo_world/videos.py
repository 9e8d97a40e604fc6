"""The videos of the demo world: one thing that goes to another place, or takes on another colour, once.

A video lasts four seconds. In each second the thing lies at one place in one colour; the change itself
happens in the last quarter of a second. Whoever looks once per second therefore never sees it on its way. A
thing that goes from one end of a row, a column or a diagonal to the other is seen in the middle between.

What is held out of the images is held out here: no training video shows an unseen triple, in any of its
seconds, and every test video begins or ends with one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import av
import numpy as np
from PIL import Image

from dataset.demo_world.colours import to_rgb
from dataset.demo_world.paint import choose_edges
from dataset.demo_world.recipe import Preset
from dataset.demo_world.scenes import (
    Scene,
    Triple,
    choose_rgb,
    divide_triples,
    draw,
    has_room,
    make_scene,
)
from dataset.demo_world.things import CLEAR_BANDS, POSITIONS, SIDE, Thing, somewhere_in
from dataset.demo_world.wording import COLOUR_CHANGE, MOVEMENT

SECONDS = 4
FRAMES_PER_SECOND, RESTING_FRAMES = 8, 6  # per second; the remaining frames lead over to the next second
QUALITY = {"crf": "18", "preset": "veryfast"}  # x264's: a video is 3 to 5 KB, its colours are a JPEG's
CHANGES = (MOVEMENT, COLOUR_CHANGE)
VIDEO_SPLITS = ("train", "unseen")

Video = tuple[Scene, ...]  # what is to be seen in each of its seconds


def change_of(video: Video) -> str:
    return MOVEMENT if video[0].things[0].position != video[-1].things[0].position else COLOUR_CHANGE


# ---- all videos ----


def make_videos(preset: Preset, seed: int) -> dict[str, list[Video]]:
    """The videos of the world by split, half of them movements."""
    triples = divide_triples(preset)
    rng = np.random.default_rng([seed, len("videos")])
    paths = find_paths(triples["known"], triples["unseen"], preset)
    counts = {"train": preset.train_videos, "unseen": preset.test_videos}
    videos = {}
    for split in VIDEO_SPLITS:
        made = [
            video
            for change in CHANGES
            for video in draw_lots(paths[split, change], counts[split] // len(CHANGES), preset, rng)
        ]
        videos[split] = [made[i] for i in rng.permutation(len(made))]
    return videos


def find_paths(
    known: Sequence[Triple], unseen: Sequence[Triple], preset: Preset
) -> dict[tuple[str, str], list[tuple[Triple, ...]]]:
    """(split, change) -> the triples that an object can go through, in order.

    Training goes through known triples only; a test path begins or ends with an unseen one.
    """
    paths = {(split, change): [] for split in VIDEO_SPLITS for change in CHANGES}
    held_out, drawn = set(unseen), {*known, *unseen}
    for start, end in permutations([*known, *unseen], 2):
        if start[:2] == end[:2]:
            change, path = MOVEMENT, straight_path(start, end)
        elif start[1:] == end[1:]:
            change, path = COLOUR_CHANGE, (start, end)
        else:
            continue
        if held_out.isdisjoint(path):
            paths["train", change].append(path)
        elif held_out & {start, end} and drawn.issuperset(path):
            paths["unseen", change].append(path)
    return paths


def straight_path(start: Triple, end: Triple) -> tuple[Triple, ...]:
    """From start to end, and through the position halfway where there is one."""
    (x0, y0), (x1, y1) = POSITIONS[start[2]], POSITIONS[end[2]]
    halfway = [
        (*start[:2], name) for name, place in POSITIONS.items() if place == ((x0 + x1) / 2, (y0 + y1) / 2)
    ]
    return (start, *halfway, end)


def draw_lots(
    paths: Sequence[tuple[Triple, ...]], count: int, preset: Preset, rng: np.random.Generator
) -> list[Video]:
    """`count` videos along different paths, or along each path equally often where there are too few."""
    order = [i for _ in range(-(-count // len(paths))) for i in rng.permutation(len(paths))]
    return [make_video(paths[i], preset, rng) for i in order[:count]]


def make_video(path: Sequence[Triple], preset: Preset, rng: np.random.Generator) -> Video:
    """The thing of the path's first triple; when it goes on along the path is left to chance."""
    colour, shape, position = path[0]
    size = preset.sizes[int(rng.integers(len(preset.sizes)))]
    while not (scenes := try_path(make_scene([(colour, shape, position, size)], rng), path, rng)):
        pass
    changes = rng.choice(np.arange(1, SECONDS), len(path) - 1, replace=False)
    return tuple(scenes[int((changes <= second).sum())] for second in range(SECONDS))


def try_path(first: Scene, path: Sequence[Triple], rng: np.random.Generator) -> list[Scene] | None:
    """The first scene, square and without noise, and those that follow; None where a colour of the path does
    not stand out from its paper."""
    scenes = [replace(first, width=SIDE, height=SIDE, noise=0.0)]
    if not has_room(first.things[0], (), (SIDE, SIDE)):
        return None
    for colour, _, position in path[1:]:
        thing = go_on(scenes[-1], colour, position, rng)
        if thing is None or not has_room(thing, (), (SIDE, SIDE)):
            return None
        scenes.append(replace(scenes[-1], things=(thing,)))
    return scenes


def go_on(scene: Scene, colour: str, position: str, rng: np.random.Generator) -> Thing | None:
    """The thing of a scene at another place or in another colour."""
    thing = scene.things[0]
    if position != thing.position:
        column, row = POSITIONS[position]
        centre = (
            somewhere_in(CLEAR_BANDS[column], thing.radius, rng),
            somewhere_in(CLEAR_BANDS[row], thing.radius, rng),
        )
        return replace(thing, position=position, centre=centre)
    rgb = choose_rgb(colour, scene.paper, rng)
    if not rgb:
        return None
    return replace(thing, colour=colour, rgb=rgb, edge=to_rgb(choose_edges(np.array(rgb), rng)))


# ---- one video ----


def draw_frames(video: Video) -> Iterator[Image.Image]:
    """The images of a video, FRAMES_PER_SECOND for every second."""
    glide = FRAMES_PER_SECOND - RESTING_FRAMES
    for now, then in zip(video, (*video[1:], video[-1]), strict=True):
        resting = draw(now)
        yield from [resting] * RESTING_FRAMES
        for number in range(1, glide + 1):
            yield draw(between(now, then, number / (glide + 1))) if now != then else resting


def between(now: Scene, then: Scene, share: float) -> Scene:
    """A scene on its way from one to the next; share: how far, 0 to 1."""
    first_thing, next_thing = now.things[0], then.things[0]

    def mix(first: tuple, second: tuple) -> np.ndarray:
        return (1 - share) * np.array(first) + share * np.array(second)

    x, y = mix(first_thing.centre, next_thing.centre).tolist()
    thing = replace(first_thing, centre=(x, y), rgb=to_rgb(mix(first_thing.rgb, next_thing.rgb)))
    return replace(now, things=(thing,))


def save_video(video: Video, path: Path) -> None:
    """Write an mp4 file (H.264), the same bytes every time."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=FRAMES_PER_SECOND, options=QUALITY)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # more would cost more than they save on so few pixels
        for image in draw_frames(video):
            file.mux(stream.encode(av.VideoFrame.from_image(image)))
        file.mux(stream.encode())
