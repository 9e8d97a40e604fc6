"""Whoever draws a star with another program is understood: pictures that the demo world has not drawn."""

import json

import pytest
import torch

from benchmarks import drawn
from dataset.demo_world import encoder
from dataset.demo_world.colours import COLOURS
from dataset.demo_world.encoder import clip_tokenizer, embed_text, phrase
from dataset.demo_world.eye import SHIPPED
from dataset.demo_world.things import POSITIONS, SHAPES, SIZES
from model.images import open_image
from model.vision_utils import ImageProcessor, get_img_process

COUNT = 96  # two of each colour and shape


@pytest.fixture(scope="module")
def clip():
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(SHIPPED).eval()


@pytest.fixture(scope="module")
def phrases(clip) -> tuple[list[tuple[int, ...]], torch.Tensor]:
    things = [
        (colour, shape, position, size)
        for colour in range(len(COLOURS))
        for shape in range(len(SHAPES))
        for position in range(len(POSITIONS))
        for size in range(len(SIZES))
    ]
    with torch.no_grad():
        return things, embed_text(clip, clip_tokenizer(SHIPPED), [phrase(*thing) for thing in things])


@pytest.mark.parametrize("family", [family for family in drawn.FAMILIES if family != "two"])
def test_the_encoder_names_colour_and_shape_of_pictures_by_another_hand(family, clip, phrases, tmp_path):
    """By the patch and the phrase that fit each other best, whatever the others say."""
    drawn.make_family(family, tmp_path, COUNT, seed=1)
    rows = [json.loads(line) for line in (tmp_path / f"{family}.jsonl").read_text().splitlines()]
    rows = {kind: [row for row in rows if row["kind"] == kind] for kind in ("colour", "shape")}
    images = [open_image(tmp_path / row["image"]) for row in rows["colour"]]
    pixels = torch.stack([get_img_process(image, ImageProcessor()) for image in images])
    with torch.no_grad():
        patches = clip.vision_model.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        tokens = encoder.embed_patches(clip, patches)[:, 1:]
    things, vectors = phrases
    best = (tokens @ vectors.T).amax(1).argmax(1).tolist()
    for place, (kind, names) in enumerate((("colour", list(COLOURS)), ("shape", list(SHAPES)))):
        told = [drawn.WORDS[names[things[number][place]]] for number in best]
        right = [word in row["answer"] for word, row in zip(told, rows[kind], strict=True)]
        assert sum(right) >= 0.9 * COUNT, (kind, sum(right) / COUNT)
