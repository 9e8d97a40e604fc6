"""The sizes of a model in the words of transformers' own classes (config.json), both ways. Imports no torch.

LlamaForCausalLM, Qwen3ForCausalLM    a language model; Qwen3 is Llama with norms on queries and keys
Qwen2MoeForCausalLM                   the same with experts
LlavaForConditionalGeneration         one of the first two, and CLIP
"""

from model.LMConfig import LMConfig, str_of

TEXT_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
}
STOCK_TYPES = (*TEXT_CLASSES, "llava")  # model_type in config.json
DESCRIBED = "minimind_v"  # key in config.json: the description of the weights that were exported
NAMES = {  # of LMConfig, and of config.json
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "max_seq_len": "max_position_embeddings",
}
EXPERT_NAMES = {
    "hidden_dim": "moe_intermediate_size",
    "n_routed_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "norm_topk_prob": "norm_topk_prob",
}
# What may stand in a config.json and is not computed here, with the value that is; the first of each pair is
# what transformers takes where nothing stands.
ONLY = {
    "hidden_act": ("silu", "silu"),
    "attention_bias": (False, False),
    "mlp_bias": (False, False),
    "use_sliding_window": (False, False),
}
ONLY_EXPERTS = {"qkv_bias": (True, False), "decoder_sparse_step": (1, 1), "mlp_only_layers": ([], [])}
ONLY_LLAVA = {
    "projector_hidden_act": ("gelu", "linear"),
    "vision_feature_layer": (-2, -1),
    "vision_feature_select_strategy": ("default", "full"),
}


def text_type(config: LMConfig) -> str:
    """The model_type of the class that computes the same language model."""
    return "qwen2_moe" if config.use_moe else "qwen3" if config.qk_norm else "llama"


def text_config(config: LMConfig, bos_id: int, eos_id: int) -> dict:
    """config.json of the language model, for transformers 4 and 5."""
    kind = text_type(config)
    values = {
        "model_type": kind,
        "architectures": [TEXT_CLASSES[kind]],
        **{theirs: getattr(config, ours) for ours, theirs in NAMES.items()},
        "head_dim": config.head_dim,
        "tie_word_embeddings": config.tied,
        "rope_theta": config.rope_theta,  # transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # transformers 5
        **{name: only for name, (_, only) in ONLY.items()},
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": eos_id,
    }
    if config.use_moe:
        values |= {theirs: getattr(config, ours) for ours, theirs in EXPERT_NAMES.items()}
        values |= {name: only for name, (_, only) in ONLY_EXPERTS.items()}
        values |= {
            "shared_expert_intermediate_size": config.hidden_dim,
            "router_aux_loss_coef": config.aux_loss_alpha,
        }
    return values


def llava_config(config: LMConfig, vision: dict, bos_id: int, eos_id: int, image_id: int) -> dict:
    """config.json of the whole model. Our one matrix is LLaVA's first projection layer, its second the
    identity, and between them nothing.

    vision    what the config.json of CLIP says of its vision tower
    image_id  the token that stands for one of an image's places
    """
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": text_config(config, bos_id, eos_id),
        "vision_config": vision | {"model_type": "clip_vision_model"},
        **{name: only for name, (_, only) in ONLY_LLAVA.items()},
        "multimodal_projector_bias": config.vision_proj_bias,
        "image_seq_length": config.num_image_tokens,
        "image_token_id": image_id,
        "image_token_index": image_id,  # as it was called before
        "tie_word_embeddings": config.tied,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": eos_id,
    }


def read_stock_config(values: dict, path: object) -> dict:
    """config.json of one of STOCK_TYPES to fields of LMConfig. Raises ValueError, naming everything that is
    asked for and not computed here."""
    text = values.get("text_config", {}) if values["model_type"] == "llava" else values
    text = text if isinstance(text, dict) else {}
    sizes = read_text_config(text, path)
    if values["model_type"] == "llava":
        check_only(values, ONLY_LLAVA, path)
        vision = values.get("vision_config")
        side, patch = (
            vision.get(name) if isinstance(vision, dict) else 0 for name in ("image_size", "patch_size")
        )
        if type(side) is not int or type(patch) is not int or not 0 < patch <= side:
            raise ValueError(f"{path}/config.json: its vision_config has no image_size and patch_size")
        sizes |= {
            "num_image_tokens": (side // patch) ** 2 + 1,
            "vision_proj_bias": values.get("multimodal_projector_bias", True),
        }
    return sizes


def read_text_config(text: dict, path: object) -> dict:
    kind = text.get("model_type")
    if kind not in tuple(TEXT_CLASSES):  # it may be a list
        raise ValueError(
            f"{path} holds a language model of type {str_of(kind)}: {', '.join(TEXT_CLASSES)} are read here"
        )
    names = NAMES | EXPERT_NAMES if kind == "qwen2_moe" else NAMES
    missing = [theirs for theirs in names.values() if theirs not in text and theirs != "num_key_value_heads"]
    if missing:
        raise ValueError(f"{path}/config.json does not say {', '.join(missing)}: download it again")
    check_only(text, ONLY | ONLY_EXPERTS if kind == "qwen2_moe" else ONLY, path)
    sizes = {ours: text[theirs] for ours, theirs in names.items() if theirs in text}
    sizes.setdefault("n_kv_heads", sizes["n_heads"])
    sizes |= {
        "rope_theta": read_rope(text, path),
        "head_dim": text.get("head_dim") or (128 if kind == "qwen3" else 0),
        "tied": text.get("tie_word_embeddings", False),
        "qk_norm": kind == "qwen3",
    }
    if kind == "qwen2_moe":
        if text.get("shared_expert_intermediate_size") != sizes["hidden_dim"]:
            raise ValueError(f"{path}: its shared expert must be as wide as the others")
        sizes["use_moe"] = True
    return sizes


def read_rope(text: dict, path: object) -> float:
    """The base of the rotations. Raises ValueError for those that are scaled or cover a part of a head."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    kind = rope.get("rope_type", rope.get("type", "default"))
    share = rope.get("partial_rotary_factor", text.get("partial_rotary_factor", 1.0))
    if kind != "default" or share != 1:
        raise ValueError(
            f"{path}: rotations of type {str_of(kind)} over {str_of(share)} of a head are not computed"
        )
    return rope.get("rope_theta", text.get("rope_theta", 10000.0))


def check_only(values: dict, only: dict[str, tuple], path: object) -> None:
    """Raise ValueError for what is not computed here."""
    wrong = [
        f"{name} {str_of(values.get(name, usual))}, not {wanted}"
        for name, (usual, wanted) in only.items()
        if values.get(name, usual) != wanted
    ]
    if wrong:
        raise ValueError(f"{path}: its config.json asks for what is not computed here: {'; '.join(wrong)}")
