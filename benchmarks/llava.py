"""Our weights in the classes of transformers that a user would take instead: the same function of the same
numbers, so that times and answers can be compared. What a folder of them looks like is model/export.
"""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from model.stock_config import llava_config, text_config
from model.stock_weights import PROJECTOR, projector, to_stock
from model.transformer import Transformer

IMAGE_TOKEN = 0  # "<unk>", which no text produces, stands for one of an image's 50 places
IDS = (1, 2)  # of <s> and </s>


def llama_state(model: Transformer) -> dict[str, Tensor]:
    """The language model's weights under Llama's names, the tied matrix under both."""
    state = to_stock(model.state_dict(), model.config)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def to_llama(model: Transformer) -> LlamaForCausalLM:
    """The language model alone, without eyes."""
    llama = LlamaForCausalLM(LlamaConfig.from_dict(text_config(model.config, *IDS)))
    llama.load_state_dict(llama_state(model), strict=True)
    return llama.eval().requires_grad_(False)


def to_llava(model: Transformer, vision_model: nn.Module) -> LlavaForConditionalGeneration:
    """The whole model.

    vision_model  a VisionTower, or transformers' own CLIPVisionModel
    """
    config = llava_config(model.config, vision_model.config.to_dict(), *IDS, IMAGE_TOKEN)
    llava = LlavaForConditionalGeneration(LlavaConfig.from_dict(config))
    llama = llama_state(model)
    llava.lm_head.weight = torch.nn.Parameter(llama.pop("lm_head.weight"))
    llava.model.language_model.load_state_dict(
        {name.removeprefix("model."): tensor for name, tensor in llama.items()}, strict=True
    )
    llava.model.language_model.embed_tokens.weight = llava.lm_head.weight
    llava.model.vision_tower.load_state_dict(vision_model.state_dict(), strict=True)
    layers = projector(model.state_dict())
    llava.model.multi_modal_projector.load_state_dict(
        {name.removeprefix(PROJECTOR): tensor for name, tensor in layers.items()}, strict=True
    )
    return llava.eval().requires_grad_(False)


def to_llava_ids(input_ids: Tensor, image_slots: Tensor) -> Tensor:
    """Our placeholders ("<" and ">") replaced by LLaVA's one image token; both (B, T)."""
    ids = input_ids.clone()
    ids.view(-1)[image_slots.reshape(-1)] = IMAGE_TOKEN
    return ids
