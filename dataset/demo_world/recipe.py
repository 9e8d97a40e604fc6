"""How large a demo world is, and how long everything trains: all sizes, step counts and learning rates."""

from dataclasses import dataclass

from dataset.demo_world.colours import COLOURS
from dataset.demo_world.things import SHAPES, SIZES


@dataclass(frozen=True)
class Stage:
    """One training run; the learning rate rises to `lr` and falls along a cosine to a tenth of it."""

    steps: int
    batch_size: int
    lr: float
    warmup: int = 30


@dataclass(frozen=True)
class Preset:
    """Everything that decides how large the world is and how long the training takes."""

    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    sizes: tuple[str, ...]
    train_images: int
    text_rows: int  # about one image; half as many about two, and two for each video
    dialogues_per_image: int  # of several things; half as many about one
    # the rows of the last stage; each video makes two
    two_image_rows: int
    train_videos: int
    one_image_rows: int
    # the language model
    dim: int
    n_layers: int
    # the stages, in the order in which they run
    llm: Stage
    pretrain: Stage
    sft: Stage
    multi: Stage
    # what both presets share
    test_images: int = 200  # per test split
    test_videos: int = 400  # half of them movements
    unnamed_share: float = 0.08  # training images of one thing in a colour that no word names
    several_share: float = 0.7  # training images of two or three things
    rounds: int = 5  # of questions in each dialogue about one image
    n_heads: int = 8
    n_kv_heads: int = 4


PRESETS = {
    "full": Preset(
        colours=tuple(COLOURS),
        shapes=SHAPES,
        sizes=tuple(SIZES),
        train_images=12000,
        text_rows=6000,
        dialogues_per_image=2,
        two_image_rows=3500,
        train_videos=1000,
        one_image_rows=5000,
        dim=128,
        n_layers=3,
        llm=Stage(steps=60, batch_size=32, lr=1.5e-3),
        pretrain=Stage(steps=500, batch_size=32, lr=3e-3),
        sft=Stage(steps=950, batch_size=32, lr=3e-3),
        multi=Stage(steps=800, batch_size=20, lr=2e-3),
    ),
    "tiny": Preset(  # under a minute, for the tests
        colours=("red", "yellow", "green", "blue"),
        shapes=("circle", "square", "triangle", "star"),
        sizes=("large",),
        train_images=1000,
        text_rows=6000,
        dialogues_per_image=4,
        two_image_rows=400,
        train_videos=100,
        one_image_rows=100,
        test_videos=60,
        test_images=100,
        several_share=0.3,
        rounds=3,
        dim=96,
        n_layers=3,
        llm=Stage(steps=40, batch_size=24, lr=2e-3),
        pretrain=Stage(steps=200, batch_size=24, lr=2e-3),
        sft=Stage(steps=240, batch_size=24, lr=2e-3),
        multi=Stage(steps=50, batch_size=16, lr=1e-3),
    ),
}
