"""Data for the benchmarks, made on the spot in the real formats: tokenizer, images, rows."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from model.prompt import render_conversation


@dataclass(frozen=True)
class Shape:
    """What rows of a stage look like, on the average."""

    name: str
    tokens: int  # in all, 50 per image included
    targets: int
    images: int = 1
    image: tuple[int, int] = (128, 128)  # pixels


PRETRAIN_SHAPE = Shape("pretrain", 89, 18)
SFT_SHAPE = Shape("SFT", 185, 90, image=(640, 480))
TWO_IMAGES_SHAPE = Shape("two images", 205, 60, images=2, image=(640, 480))


def make_words(count: int = 6000) -> list[str]:
    random = np.random.default_rng(0)
    return ["".join(random.choice(list("aeioubcdfgklmnprst"), 8)) for _ in range(count)]


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE with as many tokens as MiniMind's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        make_words(),
        trainers.BpeTrainer(
            vocab_size=6400,
            special_tokens=["<unk>", "<s>", "</s>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def save_data(folder: Path, shape: Shape, num_rows: int, num_images: int, tokenizer) -> Path:
    """rows.json and images. The lengths spread as those of captions do: a few are twice as long as most."""
    random, words = np.random.default_rng(1), make_words()
    folder.mkdir(parents=True)
    for number in range(num_images):
        coarse = random.integers(0, 256, (30, 40, 3), dtype=np.uint8)  # compresses as a photo does
        Image.fromarray(coarse).resize(shape.image, Image.Resampling.BICUBIC).save(
            folder / f"{number}.jpg", quality=90
        )
    pool = " ".join(random.choice(words, 4000))
    ids = tokenizer(pool)["input_ids"]

    def text(tokens: float) -> str:
        length = max(3, int(random.lognormal(np.log(max(3, tokens)) - 0.06, 0.35)))
        start = int(random.integers(0, len(ids) - length))
        return tokenizer.decode(ids[start : start + length])

    marks = "<image>\n" * shape.images
    empty = [{"from": "human", "value": marks}, {"from": "gpt", "value": "x"}]
    fixed = len(render_conversation(empty, tokenizer).input_ids)
    asked = shape.tokens + 1 - fixed - (shape.targets - 1)

    def names() -> str:
        return ", ".join(f"{random.integers(num_images)}.jpg" for _ in range(shape.images))

    rows = [
        {
            "id": str(n),
            "image": names(),
            "conversations": [
                {"from": "human", "value": marks + text(asked)},
                {"from": "gpt", "value": text(shape.targets - 1)},
            ],
        }
        for n in range(num_rows)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"
