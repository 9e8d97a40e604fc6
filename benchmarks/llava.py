"""Our weights in the classes of transformers that a user would take instead: the same function of the same
numbers, so that times and answers can be compared.
"""

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from model.LMConfig import LMConfig
from model.transformer import Transformer

IMAGE_TOKEN = 0  # "<unk>", which no text produces, stands for one of an image's 50 places


def half_split(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of wq or wk: a head's pairs (0,1), (2,3), ... become Llama's pairs (0,E/2), (1,E/2+1), ..."""
    pairs = weight.view(-1, head_dim // 2, 2, weight.shape[1])  # (heads, E / 2, 2, D)
    return pairs.transpose(1, 2).reshape(weight.shape)


def llama_state(model: Transformer) -> dict[str, Tensor]:
    """The language model's weights under Llama's names."""
    names = {
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    state = {
        "model.embed_tokens.weight": model.tok_embeddings.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.output.weight,
    }
    for number, layer in enumerate(model.layers):
        place = f"model.layers.{number}."
        state |= {
            f"{place}{theirs}.weight": layer.get_submodule(ours).weight for ours, theirs in names.items()
        }
        for ours, theirs in (("wq", "q_proj"), ("wk", "k_proj")):
            weight = layer.attention.get_submodule(ours).weight
            state[f"{place}self_attn.{theirs}.weight"] = half_split(weight, model.config.head_dim)
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def llama_config(config: LMConfig) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.hidden_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def to_llama(model: Transformer) -> LlamaForCausalLM:
    """The language model alone, without eyes."""
    llama = LlamaForCausalLM(llama_config(model.config))
    llama.load_state_dict(llama_state(model), strict=True)
    return llama.eval().requires_grad_(False)


def to_llava(model: Transformer, vision_model: nn.Module) -> LlavaForConditionalGeneration:
    """The whole model. Our one matrix is LLaVA's first projection layer; its second becomes the identity.

    vision_model  a VisionTower, or transformers' own CLIPVisionModel
    """
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig.from_dict(vision_model.config.to_dict()),
            text_config=llama_config(model.config),
            image_token_index=IMAGE_TOKEN,
            projector_hidden_act="linear",
            multimodal_projector_bias=False,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            image_seq_length=model.config.num_image_tokens,
            tie_word_embeddings=True,
        )
    )
    llama = llama_state(model)
    llava.lm_head.weight = torch.nn.Parameter(llama.pop("lm_head.weight"))
    llava.model.language_model.load_state_dict(
        {name.removeprefix("model."): tensor for name, tensor in llama.items()}, strict=True
    )
    llava.model.language_model.embed_tokens.weight = llava.lm_head.weight
    llava.model.vision_tower.load_state_dict(vision_model.state_dict(), strict=True)
    with torch.no_grad():
        llava.model.multi_modal_projector.linear_1.weight.copy_(model.vision_proj.weight)
        llava.model.multi_modal_projector.linear_2.weight.copy_(torch.eye(model.config.dim))
    return llava.eval().requires_grad_(False)


def to_llava_ids(input_ids: Tensor, image_slots: Tensor) -> Tensor:
    """Our placeholders ("<" and ">") replaced by LLaVA's one image token; both (B, T)."""
    ids = input_ids.clone()
    ids.view(-1)[image_slots.reshape(-1)] = IMAGE_TOKEN
    return ids
