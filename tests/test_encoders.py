"""Encoders other than ViT-B/32, with the widths and patches of the real ones but random weights and one
layer: tokens per image and the projection follow from their config.json."""

import json
from pathlib import Path

import pytest
import torch
from conftest import run_inside, run_script, save_clip, weights_of
from transformers import SiglipConfig, SiglipModel

from model.data.batch import IGNORE_INDEX
from model.data.dataset import tokenize
from model.data.feature_store import store_name
from model.description import read_description
from model.packing import pack_linears
from model.prompt import Renderer
from model.vision_utils import get_img_embedding, get_vision_model, num_image_tokens

GEOMETRY = {"num_hidden_layers": 1, "intermediate_size": 64}
B16 = GEOMETRY | {"hidden_size": 768, "num_attention_heads": 12, "patch_size": 16}
L14 = GEOMETRY | {"hidden_size": 1024, "num_attention_heads": 16, "patch_size": 14}


def save_siglip(folder: Path, **vision) -> Path:
    """A folder as google/siglip-base-patch16-224 is laid out, with random weights."""
    torch.manual_seed(0)
    text = GEOMETRY | {"hidden_size": 24, "num_attention_heads": 2, "vocab_size": 50}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config={"image_size": 224} | vision))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
                "image_processor_type": "SiglipImageProcessor",
                "size": {"height": 224, "width": 224},
            }
        )
    )
    return folder


def flags_of(workplace: Path, encoder: Path) -> tuple[list[str], list[str]]:
    """Of two steps of training with another encoder, and of the chat, which finds it in the description."""
    return (
        [
            f"@{workplace}/args",
            f"--clip_path={encoder}",
            "--max_seq_len=400",
            "--max_steps=2",
            "--batch_size=2",
        ],
        [
            f"--out_dir={workplace}/out",
            "--dim=32",
            "--stage=vlm_pretrain",
            "--device=cpu",
            f"--image_dir={workplace}/images",
            "--max_new_tokens=3",
        ],
    )


def check_trained(workplace: Path, num_tokens: int, width: int) -> None:
    assert weights_of(workplace)["vision_proj.weight"].shape == (32, width)
    described = read_description(workplace / "out" / "32_vlm_pretrain.pth")
    assert described["step"] == 2 and described["config"]["num_image_tokens"] == num_tokens


@pytest.mark.parametrize(("save", "num_tokens"), [(save_clip, 197), (save_siglip, 196)])
def test_another_encoder_trains_and_answers(workplace, tmp_path, capsys, save, num_tokens):
    encoder = save(tmp_path / "encoder", **B16)
    training, chatting = flags_of(workplace, encoder)
    run_inside("1-pretrain_vlm.py", *training, f"--feature_cache={tmp_path}/features")
    check_trained(workplace, num_tokens, 768)
    run_inside("3-eval_chat.py", *chatting)
    said = capsys.readouterr().out
    assert said.count(".png]") == 6 and f"CLIP {encoder}" in said


def test_a_large_encoder_on_two_processes(workplace, tmp_path):
    training, chatting = flags_of(workplace, save_clip(tmp_path / "encoder", **L14))
    result = run_script("1-pretrain_vlm.py", *training, processes=2)
    assert result.returncode == 0, result.stderr
    check_trained(workplace, 257, 1024)
    result = run_script("3-eval_chat.py", *chatting)
    assert result.returncode == 0 and result.stdout.count(".png]") == 6, result.stderr


def test_a_context_too_short_for_the_images_is_refused_with_the_numbers(workplace, tmp_path, tokenizer):
    training, _ = flags_of(workplace, save_clip(tmp_path / "encoder", **B16))
    with pytest.raises(
        ValueError,
        match=r"max_seq_len 200 cannot hold 1 image\(s\) of 197 tokens each: .*"
        r"raise --max_seq_len .* --clip_path",
    ):
        run_inside("1-pretrain_vlm.py", *training, "--max_seq_len=200")
    row = [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "yes"}]
    verdicts = []
    for max_seq_len in range(514, 540):  # two images of 257 tokens, and the template
        renderer = Renderer(tokenizer, 257, max_seq_len)
        try:
            assert (tokenize(row, renderer)["labels"] != IGNORE_INDEX).any()
            renderer.check_context(max_images=2)
            verdicts.append(True)
        except ValueError:
            with pytest.raises(ValueError, match=f"max_seq_len {max_seq_len} cannot hold 2 image"):
                renderer.check_context(max_images=2)
            verdicts.append(False)
    assert set(verdicts) == {False, True} and sorted(verdicts) == verdicts


def test_siglip_gives_its_patch_tokens(tmp_path):
    """Those of the whole model of transformers; its own mean and spread; no pooling head; in bfloat16 too."""
    folder = save_siglip(tmp_path / "siglip", **B16)
    vision_model, processor = get_vision_model(folder)
    assert (processor.size, processor.mean, processor.std) == (224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert num_image_tokens(vision_model) == 196 and not hasattr(vision_model, "head")
    assert not any(parameter.requires_grad for parameter in vision_model.parameters())
    pixels = torch.randn(2, 3, 224, 224)
    features = get_img_embedding(pixels, vision_model)
    with torch.no_grad():
        expected = SiglipModel.from_pretrained(folder).vision_model(pixel_values=pixels).last_hidden_state
    assert features.shape == (2, 196, 768) and torch.equal(features, expected)
    assert get_img_embedding(pixels[:0], vision_model).shape == (0, 196, 768)
    name = store_name(vision_model, processor, "float16")
    pack_linears(vision_model.to(torch.bfloat16), 196)
    packed = get_img_embedding(pixels, vision_model).float()
    assert (packed - features).abs().max() < 0.05 * features.abs().max()

    clip, clip_processor = get_vision_model(save_clip(tmp_path / "clip", **B16))
    assert store_name(clip, clip_processor, "float16") != name


def test_another_kind_of_model_is_refused(tmp_path):
    folder = save_clip(tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "vit"}))
    with pytest.raises(ValueError, match="model of type vit, but images are encoded by clip or siglip"):
        get_vision_model(folder)
