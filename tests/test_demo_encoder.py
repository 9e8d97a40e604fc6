"""The demo world's encoder: training reproduces to the bit, and whoever reads it finds a real CLIP."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor, CLIPVisionModel

from dataset.demo_world import encoder, scenes
from dataset.demo_world.scenes import PRESETS, draw, make_splits
from model.prompt import load_tokenizer
from model.vision_utils import get_img_embedding, get_vision_model

FEW = dataclasses.replace(PRESETS["tiny"], clip=scenes.Stage(steps=3, batch_size=16, lr=1e-3))


@pytest.fixture(scope="module")
def few_images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    few = make_splits(FEW, seed=0)["train"][:80]
    paths = [folder / f"{i}.jpg" for i in range(len(few))]
    for path, scene in zip(paths, few, strict=True):
        draw(scene).save(path, quality=scenes.JPEG_QUALITY)
    return paths, few


@pytest.fixture(scope="module")
def clip_folder(few_images, world_tokenizer_path, tmp_path_factory):
    """An encoder after three steps, saved."""
    losses = []
    tokenizer = encoder.clip_tokenizer(world_tokenizer_path)
    model, final = encoder.train_encoder(
        *few_images, tokenizer, FEW, seed=0, progress=lambda step, loss: losses.append(loss)
    )
    assert final == losses[-1] and len(losses) == 3
    folder = tmp_path_factory.mktemp("clip")
    encoder.save_encoder(model, tokenizer, folder)
    return folder


def test_training_reproduces_bit_for_bit(few_images, world_tokenizer_path, clip_folder):
    tokenizer = encoder.clip_tokenizer(world_tokenizer_path)
    torch.manual_seed(99)  # the global generator must not matter, and must not be disturbed
    before = torch.get_rng_state()
    again, _ = encoder.train_encoder(*few_images, tokenizer, FEW, seed=0)
    other, _ = encoder.train_encoder(*few_images, tokenizer, FEW, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    saved = CLIPModel.from_pretrained(clip_folder).state_dict()
    assert all(torch.equal(weight, saved[name]) for name, weight in again.state_dict().items())
    name = "visual_projection.weight"
    assert not torch.equal(other.state_dict()[name], saved[name])


def test_a_stock_vision_tower_loads_without_a_missing_weight(clip_folder):
    _, report = CLIPVisionModel.from_pretrained(clip_folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]


def test_the_frozen_filters_are_the_cosines_and_are_not_trained(
    clip_folder, few_images, world_tokenizer_path
):
    weight = CLIPModel.from_pretrained(clip_folder).vision_model.embeddings.patch_embedding.weight
    cosines, _ = encoder.cosine_filters(FEW.clip_frequencies)
    scale = (weight * cosines).sum((1, 2, 3)) / cosines.square().sum((1, 2, 3))
    assert weight.shape == (192, 3, 32, 32) and (scale > 0).all()
    assert torch.allclose(weight, cosines * scale[:, None, None, None], atol=1e-6)


def test_cosine_filters_are_orthogonal_within_a_colour_axis():
    cosines, u_plus_v = encoder.cosine_filters(8)
    filters = cosines.view(3, 64, -1)
    products = filters @ filters.mT
    assert torch.allclose(products, torch.diag_embed(products.diagonal(dim1=1, dim2=2)), atol=1e-2)
    assert u_plus_v.view(3, 8, 8)[1].diagonal().tolist() == list(range(0, 16, 2))


def test_the_class_token_shortcut_equals_the_whole_tower(clip_folder, few_images):
    """Training computes the last layer for the class token only; everyone else runs the stock forward."""
    model = CLIPModel.from_pretrained(clip_folder).eval()
    pixels = encoder.load_pixels(few_images[0][:8])
    with torch.no_grad():
        patches = encoder.encode_patches(model, few_images[0][:8])
        stock = torch.nn.functional.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
        torch.testing.assert_close(encoder.embed_patches(model, patches), stock, atol=1e-5, rtol=0)


def test_the_stock_processor_reads_the_folder(clip_folder, few_images):
    """Images come out as in model/vision_utils.py, captions end in the mark where the text is read off."""
    processor = CLIPProcessor.from_pretrained(clip_folder)
    image = encoder.open_image(few_images[0][0])
    texts = ["图片上方有一个小的星形。", "a star"]
    inputs = processor(text=texts, images=image, padding=True, return_tensors="pt")
    ours = encoder.load_pixels(few_images[0][:1])
    torch.testing.assert_close(inputs.pixel_values, ours, atol=1e-5, rtol=0)
    model = CLIPModel.from_pretrained(clip_folder)
    end = model.config.text_config.eos_token_id
    assert end == processor.tokenizer.eos_token_id == len(processor.tokenizer) - 1
    assert (inputs.input_ids == end).any(1).all()
    model(**inputs)


def test_the_repository_reads_the_folder(clip_folder, few_images):
    vision_model, image_processor = get_vision_model(clip_folder)
    assert image_processor.size == 224
    features = get_img_embedding(encoder.load_pixels(few_images[0][:2]), vision_model)
    assert features.shape == (2, 50, 192)


def test_the_tokenizer_of_the_encoder_is_its_own(clip_folder, world_tokenizer_path):
    """CLIP's two marks must not leak into the tokenizer of the language model."""
    clip = AutoTokenizer.from_pretrained(clip_folder)
    tokenizer = load_tokenizer(world_tokenizer_path)
    assert len(clip) == len(tokenizer) + 2
    assert clip("图").input_ids[1:-1] == tokenizer("图").input_ids


def test_hard_batches_hold_two_colours(few_images):
    colours = np.array([scene.colour or "" for scene in few_images[1]])
    rng = np.random.default_rng(0)
    for step in range(20):
        picked = encoder.draw_batch(colours, step, 10, rng)
        assert len(set(picked.tolist())) == len(picked)
        assert step % 2 == 0 or len(set(colours[picked])) == 2 and "" not in colours[picked]


def test_equal_captions_share_the_target(clip_folder, few_images):
    """Otherwise equal images would have to be told apart, which only noise can do."""
    model = CLIPModel.from_pretrained(clip_folder).eval()
    patches = torch.zeros(4, 49, 192)  # four times the same image, so that all similarities are equal
    input_ids = torch.tensor([[3, model.config.text_config.eos_token_id]])
    with torch.no_grad():
        loss = encoder.contrastive_loss(model, patches, input_ids, torch.zeros(4, dtype=torch.long))
    assert loss.item() == pytest.approx(np.log(4))  # the loss of indifference, its minimum here


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    stage = scenes.Stage(steps=1000, batch_size=1, lr=1.0)
    rates = [encoder.learning_rate(step, stage) for step in range(stage.steps)]
    assert rates[0] < 0.02 and max(rates) == pytest.approx(1, abs=0.06)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    peak = int(np.argmax(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(
        rates[peak:], reverse=True
    )
