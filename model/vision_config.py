"""What the config.json of a CLIP or SigLIP folder says of its vision tower."""

import re
from pathlib import Path

from model.files import read_json
from model.LMConfig import str_of
from model.names import CLIP_CURE
from model.vision_tower import ACTIVATIONS

# What transformers takes where config.json says nothing. Neither projection_dim nor what follows
# layer_norm_eps plays a part here, nor has SigLIP its head, which would make one vector of an image.
DEFAULTS = {
    "clip": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "projection_dim": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "initializer_factor": 1.0,
    },
    "siglip": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "vision_use_head": False,
    },
}
# Sizes, and the largest that makes sense: known towers are up to 6,144 wide and 48 deep. Larger ones would
# fill the memory before a weight is compared.
LARGEST = {
    "hidden_size": 16_384,
    "intermediate_size": 131_072,
    "num_hidden_layers": 256,
    "num_attention_heads": 1_024,
    "image_size": 4_096,
    "patch_size": 4_096,
}
MAX_TOKENS = 16_384  # per image

# Feature caches are named, and weights marked, by a fingerprint of what transformers' config object holds;
# to_dict() says the same, so they stay valid. It holds these as well, whatever kind of model it describes:
GENERAL = {
    "architectures": None,
    "output_hidden_states": False,
    "return_dict": True,
    "dtype": "float32",
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "id2label": {0: "LABEL_0", 1: "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "problem_type": None,
}
# and leaves out these, which old files of every model carry.
NOT_KEPT = re.compile(
    "torch_dtype|num_labels|use_cache|(max|min)_length|do_sample|early_stopping|num_beams|num_beam_groups|"
    "diversity_penalty|temperature|top_k|top_p|typical_p|(repetition|length)_penalty|bad_words_ids|"
    "(encoder_)?no_repeat_ngram_size|num_return_sequences|output_scores|return_dict_in_generate|"
    "forced_(bos|eos)_token_id|remove_invalid_values|exponential_decay_length_penalty|(begin_)?suppress_tokens"
)


class VisionConfig:
    """The values of the file, each an attribute: hidden_size, image_size, patch_size, ..."""

    def __init__(self, family: str, values: dict):
        """family: "clip" or "siglip", whose DEFAULTS hold where `values` are silent"""
        self.family, self.values = family, DEFAULTS[family] | values
        for name in DEFAULTS[family]:
            setattr(self, name, self.values[name])

    @property
    def is_clip(self) -> bool:
        return self.family == "clip"

    @property
    def num_tokens(self) -> int:
        """One per patch, and CLIP's class token: 7 * 7 + 1 = 50 for ViT-B/32."""
        return (self.image_size // self.patch_size) ** 2 + self.is_clip

    def problems(self) -> list[str]:
        """What is asked for and not computed here, or makes no sense."""
        found = [
            f"{name} is {str_of(self.values[name])}, not a whole number from 1 to {most:,}"
            for name, most in LARGEST.items()
            if type(self.values[name]) is not int or not 1 <= self.values[name] <= most
        ]
        epsilon = self.layer_norm_eps
        if type(epsilon) not in (int, float) or not 0 < epsilon < 1:  # NaN is neither
            found.append(f"layer_norm_eps is {str_of(epsilon)}, not a number between 0 and 1")
        if type(self.num_channels) is not int or self.num_channels != 3:
            found.append(f"num_channels is {str_of(self.num_channels)}, but images have 3")
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACTIVATIONS:
            found.append(f"hidden_act is {str_of(self.hidden_act)}, none of {', '.join(ACTIVATIONS)}")
        if found:
            return found
        if self.hidden_size % self.num_attention_heads:
            found.append(f"hidden_size {self.hidden_size} is no multiple of {self.num_attention_heads} heads")
        if self.patch_size > self.image_size:
            found.append(f"patch_size {self.patch_size} is larger than image_size {self.image_size}")
        elif self.num_tokens > MAX_TOKENS:
            found.append(f"an image would have {self.num_tokens:,} tokens, at most {MAX_TOKENS:,} are read")
        return found

    def to_dict(self) -> dict:
        """What transformers' config object would hold, in its order; see GENERAL."""
        values = GENERAL | self.values
        values["model_type"] = f"{self.family}_vision_model"
        values["output_attentions"] = values.pop("output_attentions", False)
        values["id2label"] = {
            int(number): label for number, label in (values["id2label"] or GENERAL["id2label"]).items()
        }
        values["dtype"] = GENERAL["dtype"]  # as it is loaded
        if not self.is_clip:
            values["vision_use_head"] = False
        return {name: value for name, value in values.items() if not NOT_KEPT.fullmatch(name)}


def read_vision_config(path: Path) -> VisionConfig:
    """Of a folder with the whole CLIP or SigLIP, or with its vision tower alone. Raises ValueError."""
    values = read_json(path / "config.json")
    if values.get("model_type") == "llava" and isinstance(values.get("vision_config"), dict):
        values = values["vision_config"]  # an exported model has its CLIP inside
    kind = values.get("model_type", "clip")
    kind = kind if isinstance(kind, str) else str_of(kind)
    family = kind.removesuffix("_vision_model")
    if family not in DEFAULTS:
        raise ValueError(
            f"{path} holds a model of type {kind}, but images are encoded by "
            f"{' or '.join(DEFAULTS)}: {CLIP_CURE}, or name yours with --clip_path"
        )
    values = values.get("vision_config", values)
    if not isinstance(values, dict):
        raise ValueError(f"{path}/config.json holds no vision_config: {CLIP_CURE}")
    config = VisionConfig(family, values)
    problems = config.problems()
    labels = values.get("id2label") or {}
    if not isinstance(labels, dict) or not all(label.isdecimal() and len(label) < 10 for label in labels):
        problems.append("id2label does not name labels by number")
    if problems:
        raise ValueError(
            f"cannot compute the CLIP at {path} (config.json: {'; '.join(problems)}): "
            f"{CLIP_CURE}, or name yours with --clip_path"
        )
    return config
