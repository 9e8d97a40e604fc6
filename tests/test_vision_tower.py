"""Our vision tower: transformers' to the bit, from every kind of folder, and old caches keep their names."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import save_clip
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from model.fingerprint import fingerprint
from model.vision_config import read_vision_config
from model.vision_utils import get_img_embedding, get_vision_model, num_image_tokens

SMALL = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
FEW = {"num_hidden_layers": 1, "intermediate_size": 64}
GEOMETRIES = {
    "clip": [
        SMALL,
        {"num_hidden_layers": 2},  # ViT-B/32
        FEW | {"hidden_size": 1024, "num_attention_heads": 16, "patch_size": 14, "image_size": 112},  # L/14
        SMALL | {"hidden_size": 60, "num_attention_heads": 5, "image_size": 70, "patch_size": 14},
        SMALL | {"hidden_act": "gelu", "layer_norm_eps": 1e-3},
    ],
    "siglip": [
        SMALL,
        FEW,  # as wide as siglip-base-patch16-224
        SMALL | {"image_size": 50, "patch_size": 12},  # a margin that no patch covers
        SMALL | {"hidden_act": "quick_gelu"},
    ],
}
CLASSES = {
    "clip": (CLIPVisionModel, CLIPVisionConfig, {}),
    "siglip": (SiglipVisionModel, SiglipVisionConfig, {"vision_use_head": False}),
}


def save_tower(folder: Path, family: str, sizes: dict) -> Path:
    """A vision tower alone, whose biases and norms are random too, as transformers saves it."""
    model_class, config_class, settings = CLASSES[family]
    torch.manual_seed(0)
    tower = model_class(config_class(**sizes | settings))
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tower.save_pretrained(folder)
    colours = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(colours))
    return folder


def stock_tower(folder: Path, family: str) -> torch.nn.Module:
    model_class, _, settings = CLASSES[family]
    return model_class.from_pretrained(folder, dtype=torch.float32, **settings).eval()


@pytest.mark.parametrize(
    ("family", "sizes"), [(family, sizes) for family, each in GEOMETRIES.items() for sizes in each]
)
def test_features_are_those_of_transformers_to_the_bit(tmp_path, family, sizes):
    folder = save_tower(tmp_path / "tower", family, sizes)
    ours, _ = get_vision_model(folder)
    theirs = stock_tower(folder, family)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for dtype in (torch.float32, torch.bfloat16):
        ours.to(dtype), theirs.to(dtype)
        for num_images in (1, 2):
            pixels = torch.randn(num_images, 3, ours.config.image_size, ours.config.image_size)
            with torch.no_grad():
                expected = theirs(pixel_values=pixels.to(dtype)).last_hidden_state
            features = get_img_embedding(pixels, ours)
            assert features.dtype == dtype and torch.equal(features, expected)
            assert features.shape[1] == num_image_tokens(ours) == ours.config.num_tokens


# ---- folders -----------------------------------------------------------------------------------------------


def with_prefix(folder: Path) -> None:
    """As transformers 4 named the weights of a tower."""
    state = load_file(folder / "model.safetensors")
    state = {f"vision_model.{name.removeprefix('vision_model.')}": state[name] for name in state}
    save_file(state, folder / "model.safetensors")


def without_prefix(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(
        {name.removeprefix("vision_model."): state[name] for name in state}, folder / "model.safetensors"
    )


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def in_parts(folder: Path, ending: str = "safetensors", save=save_file) -> None:
    """Each tensor in one of three files, and an index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    name = {"safetensors": "model", "bin": "pytorch_model"}[ending]
    places = {tensor: f"{name}-{n % 3}.{ending}" for n, tensor in enumerate(sorted(state))}
    for file in set(places.values()):
        save({tensor: state[tensor] for tensor in state if places[tensor] == file}, folder / file)
    (folder / f"{name}.{ending}.index.json").write_text(json.dumps({"weight_map": places}))


def in_pickled_parts(folder: Path) -> None:
    in_parts(folder, "bin", torch.save)


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize(
    "rewrite", [with_prefix, without_prefix, as_pickle, in_parts, in_pickled_parts], ids=lambda f: f.__name__
)
def test_every_layout_of_a_folder_gives_the_same_tower(tmp_path, family, rewrite):
    folder = save_tower(tmp_path / "tower", family, SMALL)
    expected = stock_tower(folder, family).state_dict()
    rewrite(folder)
    found = get_vision_model(folder)[0].state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("rewrite", [lambda folder: None, as_pickle], ids=["safetensors", "bin"])
def test_weights_in_fp32_stay_mapped_from_their_file(clip_path, tmp_path, rewrite):
    """A copy of ViT-B/32 would take 350 MB for nothing."""
    folder = shutil.copytree(clip_path, tmp_path / "clip")
    rewrite(folder)
    vision_model, _ = get_vision_model(folder)
    address = vision_model.encoder.layers[0].mlp.fc1.weight.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= address < end:
            assert str(folder) in line
            return
    raise AssertionError("the weights lie nowhere")


def drop(name: str):
    def change(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        save_file({n: state[n] for n in state if not n.endswith(name)}, folder / "model.safetensors")

    return change


def add(name: str):
    def change(folder: Path) -> None:
        state = load_file(folder / "model.safetensors") | {name: torch.zeros(2)}
        save_file(state, folder / "model.safetensors")

    return change


def configure(**values):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["vision_config"] |= values
        (folder / "config.json").write_text(json.dumps(config))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("layers.1.mlp.fc1.bias"), r"1 weights missing, .*layers\.1\.mlp\.fc1\.bias"),
        (drop("class_embedding"), r"1 weights missing, .*class_embedding"),
        (add("vision_model.encoder.layers.2.mlp.fc1.bias"), "0 weights missing, .*1 unknown"),
        (add("classifier.weight"), r"1 unknown \(classifier.weight"),
        (configure(intermediate_size=32), "0 weights missing, 6 of other shape"),
        (configure(hidden_act="silu"), "hidden_act is 'silu', none of quick_gelu, gelu, gelu_pytorch_tanh"),
        (configure(hidden_act=["gelu"]), r"hidden_act is \['gelu'\], none of"),
        (configure(hidden_size="wide"), "hidden_size is 'wide', not a whole number from 1 to"),
        (configure(image_size=[224, 224]), r"image_size is \[224, 224\], not a whole number from 1 to"),
        (configure(num_attention_heads=5), "hidden_size 24 is no multiple of 5 heads"),
        (configure(num_channels=1), "num_channels is 1, but images have 3"),
        (configure(layer_norm_eps=None), "layer_norm_eps is None, not a number"),
    ],
)
def test_weights_or_settings_that_do_not_fit_are_refused_in_one_line(clip_path, tmp_path, change, message):
    folder = shutil.copytree(clip_path, tmp_path / "clip")
    change(folder)
    with pytest.raises(ValueError, match=message) as caught:
        get_vision_model(folder)
    assert "\n" not in str(caught.value) and "python -m model.download clip" in str(caught.value)


def test_a_config_without_a_vision_tower_is_refused(clip_path, tmp_path):
    folder = shutil.copytree(clip_path, tmp_path / "clip")
    (folder / "config.json").write_text('{"model_type": "clip", "vision_config": null}')
    with pytest.raises(ValueError, match="holds no vision_config"):
        get_vision_model(folder)


# ---- names of caches ---------------------------------------------------------------------------------------

# The vision_config of openai/clip-vit-base-patch32, as transformers 4.16 wrote it.
OPENAI = json.loads("""{
    "_name_or_path": "", "add_cross_attention": false, "architectures": null, "attention_dropout": 0.0,
    "bad_words_ids": null, "bos_token_id": null, "chunk_size_feed_forward": 0, "do_sample": false,
    "cross_attention_hidden_size": null, "decoder_start_token_id": null, "diversity_penalty": 0.0,
    "dropout": 0.0, "early_stopping": false, "encoder_no_repeat_ngram_size": 0, "eos_token_id": null,
    "finetuning_task": null, "forced_bos_token_id": null, "forced_eos_token_id": null,
    "hidden_act": "quick_gelu", "hidden_size": 768, "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "image_size": 224, "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 3072,
    "is_decoder": false, "is_encoder_decoder": false, "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "layer_norm_eps": 1e-05, "length_penalty": 1.0, "max_length": 20, "min_length": 0,
    "model_type": "clip_vision_model", "no_repeat_ngram_size": 0, "num_attention_heads": 12,
    "num_beam_groups": 1, "num_beams": 1, "num_hidden_layers": 12, "num_return_sequences": 1,
    "output_attentions": false, "output_hidden_states": false, "output_scores": false, "pad_token_id": null,
    "patch_size": 32, "prefix": null, "projection_dim": 512, "problem_type": null, "pruned_heads": {},
    "remove_invalid_values": false, "repetition_penalty": 1.0, "return_dict": true,
    "return_dict_in_generate": false, "sep_token_id": null, "task_specific_params": null,
    "temperature": 1.0, "tie_encoder_decoder": false, "tie_word_embeddings": true, "tokenizer_class": null,
    "top_k": 50, "top_p": 1.0, "torch_dtype": null, "torchscript": false,
    "transformers_version": "4.16.0.dev0", "use_bfloat16": false
}""")
LAION = {"dropout": 0.0, "hidden_act": "gelu", "hidden_size": 1280, "model_type": "clip_vision_model"}
LAION |= {"num_attention_heads": 16, "patch_size": 14, "torch_dtype": "float32"}


def remembered(config: dict) -> str:
    """What the names of feature caches and the fingerprints in weights are made of."""
    return repr(
        {name: config[name] for name in config if name != "transformers_version" and not name.startswith("_")}
    )


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("clip", {"model_type": "clip", "vision_config": OPENAI}),
        ("clip", {"model_type": "clip", "torch_dtype": "float16", "vision_config": LAION}),
        (
            "clip",
            {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"], "dtype": "bfloat16"},
        ),
        ("siglip", {"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}}),
        ("siglip", {"model_type": "siglip", "vision_config": {"image_size": 256, "vision_use_head": True}}),
    ],
)
def test_caches_and_weights_of_earlier_versions_keep_their_names(tmp_path, family, config):
    """They were named by what transformers' config object holds, in its order."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, config_class, settings = CLASSES[family]
    theirs = config_class.from_pretrained(tmp_path, dtype="float32", **settings)
    assert remembered(read_vision_config(tmp_path).to_dict()) == remembered(theirs.to_dict())


def test_an_update_of_transformers_does_not_rename_the_caches_of_openais_clip(tmp_path):
    """As above, but recorded."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": OPENAI}))
    assert fingerprint(remembered(read_vision_config(tmp_path).to_dict())) == "5789ad3a7abdaced"


def test_another_number_of_heads_is_another_tower(tmp_path):
    """The weights alone do not show it."""
    configs = [read_vision_config(save_clip(tmp_path / str(n), num_attention_heads=n)) for n in (2, 4)]
    assert configs[0].to_dict() != configs[1].to_dict()
