"""What the benchmarks work on, made on the spot in the real formats: tokenizer, images, rows, models."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from model.LMConfig import LMConfig
from model.prompt import IMAGE_MARK, Renderer
from model.transformer import Transformer

SMALL_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


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


# ---- data --------------------------------------------------------------------------------------------------


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


def save_images(folder: Path, count: int, size: tuple[int, int]) -> None:
    """0.jpg, 1.jpg, ...: coarse noise, which compresses as a photo does."""
    random = np.random.default_rng(1)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)


def save_data(folder: Path, shape: Shape, num_rows: int, num_images: int, tokenizer) -> Path:
    """rows.json and images. The lengths spread as those of captions do: a few are twice as long as most."""
    save_images(folder, num_images, shape.image)
    random = np.random.default_rng(2)
    ids = tokenizer(" ".join(random.choice(make_words(), 4000))).input_ids

    def text(tokens: float) -> str:
        length = max(3, int(random.lognormal(np.log(max(3, tokens)) - 0.06, 0.35)))
        start = int(random.integers(0, len(ids) - length))
        return tokenizer.decode(ids[start : start + length])

    def row(number: int) -> dict:
        names = (f"{random.integers(num_images)}.jpg" for _ in range(shape.images))
        return {
            "id": str(number),
            "image": ", ".join(names),
            "conversations": [
                {"from": "human", "value": marks + text(question_tokens)},
                {"from": "gpt", "value": text(shape.targets - 1)},
            ],
        }

    marks = f"{IMAGE_MARK}\n" * shape.images
    wordless = [{"from": "human", "value": marks}, {"from": "gpt", "value": "x"}]
    template = len(Renderer(tokenizer).render(wordless).input_ids)
    question_tokens = shape.tokens + 1 - template - (shape.targets - 1)
    path = folder / "rows.json"
    path.write_text(json.dumps([row(number) for number in range(num_rows)]))
    return path


# ---- models, with random weights ---------------------------------------------------------------------------


def make_clip(**sizes) -> CLIPVisionModel:
    """Of ViT-B/32's geometry where no sizes are given."""
    torch.manual_seed(0)
    return CLIPVisionModel(CLIPVisionConfig(**sizes)).eval().requires_grad_(False)


def save_clip(folder: Path, clip: CLIPVisionModel) -> None:
    disable_progress_bar()
    clip.save_pretrained(folder)
    processor = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def config_of(size: str) -> LMConfig:
    """Of "512x8": width x layers."""
    dim, n_layers = map(int, size.split("x"))
    return LMConfig(dim=dim, n_layers=n_layers)


def make_answering_model(config: LMConfig) -> Transformer:
    """Loud enough that greedy decoding does not repeat one token for ever."""
    torch.manual_seed(0)
    model = Transformer(config).eval().requires_grad_(False)
    for parameter in model.layers.parameters():
        if parameter.ndim > 1:
            parameter.mul_(3)
    return model
