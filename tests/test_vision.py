"""Images and CLIP: every image mode, the processor's pixels, the frozen tower from the real on-disk
formats."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import save_clip
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel

from model.images import open_image, to_rgb
from model.vision_utils import (
    ImageProcessor,
    get_img_embedding,
    get_img_process,
    get_vision_model,
    load_pixels,
    num_image_tokens,
)


def test_pixels_equal_the_processor_of_transformers():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (97, 141, 3), dtype=np.uint8))
    processor = CLIPImageProcessorPil(size={"height": 224, "width": 224}, do_center_crop=False)
    expected = processor(image, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(get_img_process(image, ImageProcessor()), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr", "LAB", "HSV"])
def test_opaque_modes_show_the_same_image(mode):
    grey = Image.new("RGB", (8, 8), (255, 255, 255))
    grey.paste((0, 0, 0), (0, 0, 4, 8))
    shown = np.asarray(to_rgb(grey.convert(mode)))
    assert shown.shape == (8, 8, 3) and shown[:, :4].max() <= 2 and shown[:, 4:].min() >= 253


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_white_paper_not_black(mode, tmp_path):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 4, 8))
    image.convert(mode).save(tmp_path / "a.png")
    shown = np.asarray(open_image(tmp_path / "a.png"))
    assert shown[:, 4:].min() >= 250
    assert shown[:, :4, 1:].max() < 120 or mode == "LA"


def test_a_photo_taken_sideways_is_turned_upright(tmp_path):
    image = Image.new("RGB", (8, 4), (255, 255, 255))
    image.paste((255, 0, 0), (0, 0, 2, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90 degrees clockwise to view"
    image.save(tmp_path / "a.png", exif=exif)
    shown = open_image(tmp_path / "a.png")
    assert (
        shown.size == (4, 8)
        and shown.getpixel((1, 0)) == (255, 0, 0)
        and shown.getpixel((1, 7)) == (255, 255, 255)
    )


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n then nothing"])
def test_a_broken_image_is_named(tmp_path, content):
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(ValueError, match="cannot read image .*broken.png"):
        open_image(tmp_path / "broken.png")
    with pytest.raises(FileNotFoundError, match="gone.png"):
        open_image(tmp_path / "gone.png")


def test_a_truncated_image_is_named(tmp_path):
    Image.effect_noise((64, 64), 90).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    with pytest.raises(ValueError, match="half.jpg"):
        open_image(tmp_path / "half.jpg")


def test_jpeg_draft_shows_nearly_the_same_image(tmp_path):
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8))
    coarse.resize((1280, 960), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg")
    whole, draft = (
        load_pixels(tmp_path / "a.jpg", ImageProcessor(jpeg_draft=flag)) for flag in (False, True)
    )
    assert open_image(tmp_path / "a.jpg", 224).size == (320, 240)
    assert whole.shape == draft.shape and not torch.equal(whole, draft)
    assert (whole - draft).abs().mean() < 0.03


def test_batched_features_equal_one_by_one(clip_path):
    """A batch of one, and of none, keep their first dimension (a squeeze() once ate it)."""
    vision_model, processor = get_vision_model(clip_path)
    pixels = torch.randn(3, 3, 224, 224)
    together = get_img_embedding(pixels, vision_model)
    assert together.shape == (3, 50, 24) and num_image_tokens(vision_model) == 50 and processor.size == 224
    for number in range(3):
        torch.testing.assert_close(
            get_img_embedding(pixels[number : number + 1], vision_model), together[number : number + 1]
        )
    assert get_img_embedding(pixels[:0], vision_model).shape == (0, 50, 24)


def to_old_format(folder, old):
    """The layout of 2021: pytorch_model.bin with both towers, position_ids among the weights, half
    precision."""
    old.mkdir()
    state = CLIPModel.from_pretrained(folder).state_dict()
    state = {name: tensor.half() for name, tensor in state.items()}
    state["vision_model.embeddings.position_ids"] = torch.arange(50)[None]
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    torch.save(state, old / "pytorch_model.bin")
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(folder / name, old / name)


def test_the_format_of_2021_loads_the_same_tower(clip_path, tmp_path):
    to_old_format(clip_path, tmp_path / "old")
    new, _ = get_vision_model(clip_path)
    old, _ = get_vision_model(tmp_path / "old")
    assert next(old.parameters()).dtype == torch.float32  # not the checkpoint's
    for name, tensor in new.state_dict().items():
        torch.testing.assert_close(old.state_dict()[name].float(), tensor.float(), rtol=1e-3, atol=1e-3)


def test_features_are_those_of_the_hook_that_v1_used(clip_path):
    """v1 took what the encoder's last layer hands to the final layer norm."""
    vision_model, _ = get_vision_model(clip_path)
    caught = []
    handle = vision_model.encoder.layers[-1].register_forward_hook(
        lambda module, inputs, output: caught.append(output)
    )
    pixels = torch.randn(2, 3, 224, 224)
    features = get_img_embedding(pixels, vision_model)
    handle.remove()
    last = caught[0][0] if isinstance(caught[0], tuple) else caught[0]
    assert torch.equal(features, last)


def test_the_tower_is_frozen(clip_path):
    vision_model, _ = get_vision_model(clip_path)
    assert not vision_model.training and not any(
        parameter.requires_grad for parameter in vision_model.parameters()
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: shutil.rmtree(folder),
            "no CLIP folder at .*python -m model.download clip",
        ),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "neither model.safetensors nor pytorch_model.bin",
        ),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config.json"),
        (
            lambda folder: (folder / "model.safetensors").write_text(
                "version https://git-lfs.github.com/spec/v1\noid"
            ),
            "git-lfs pointer",
        ),
        (lambda folder: (folder / "model.safetensors").write_text("<!DOCTYPE html><html>"), "web page"),
    ],
)
def test_a_clip_folder_that_cannot_be_used_says_why(clip_path, tmp_path, damage, message):
    folder = tmp_path / "clip"
    shutil.copytree(clip_path, folder)
    damage(folder)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        get_vision_model(folder)


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path):
    """transformers would fill missing layers with random numbers and only warn."""
    folder = save_clip(tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="weights missing"):
        get_vision_model(folder)
