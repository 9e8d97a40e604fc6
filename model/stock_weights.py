"""The tensors of a model under the names of transformers' own classes, both ways, to the bit.

Ours turns neighbouring channels, (0,1), (2,3), ...; theirs channel i and i + E / 2. So the rows of wq and wk
change places within each head, and nothing else changes: a head's scores are sums over its channels, whose
order does not matter.

Letters: H heads, E head width, D model width.
"""

import re

import torch
from torch import Tensor

from model.LMConfig import LMConfig

# Parts of a name, ours and theirs.
WORDS = (
    ("tok_embeddings.", "embed_tokens."),
    ("output.", "lm_head."),
    ("attention_norm.", "input_layernorm."),
    ("ffn_norm.", "post_attention_layernorm."),
    ("attention.w", "self_attn.w"),
    ("attention.q_norm.", "self_attn.q_norm."),
    ("attention.k_norm.", "self_attn.k_norm."),
    (".wq.", ".q_proj."),
    (".wk.", ".k_proj."),
    (".wv.", ".v_proj."),
    (".wo.", ".o_proj."),
    ("feed_forward.", "mlp."),
    ("mlp.shared_experts.", "mlp.shared_expert."),
    (".w1.", ".gate_proj."),
    (".w2.", ".down_proj."),
    (".w3.", ".up_proj."),
)
ROTATED = re.compile(r"layers\.\d+\.attention\.(w[qk]|[qk]_norm)\.weight")
SHARED_DOWN = re.compile(r"layers\.\d+\.feed_forward\.shared_experts\.w2\.weight")
SHARED_GATE = "mlp.shared_expert_gate.weight"  # Qwen2-MoE's: sigmoid of it scales the shared expert
WRAPPERS = re.compile(
    r"^(model\.)?(language_model\.)?(model\.)?"
)  # transformers 4 and 5, with and without eyes
PROJECTOR, TOWER = "multi_modal_projector.", "vision_tower."


def half_split(tensor: Tensor, head_dim: int) -> Tensor:
    """(H * E, ...) of a matrix that makes queries or keys, or (E,) of their norm: our pairs (0,1), (2,3), ...
    become (0,E/2), (1,E/2+1), ..."""
    return tensor.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def interleaved(tensor: Tensor, head_dim: int) -> Tensor:
    """The inverse of half_split()."""
    return tensor.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def to_stock(state: dict[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """The language model of a state dict under the names of LlamaForCausalLM or, with experts,
    Qwen2MoeForCausalLM. An output matrix that is tied is left out."""
    stock = {}
    for name, tensor in state.items():
        if name.startswith("vision_proj.") or (config.tied and name.startswith("output.")):
            continue
        if ROTATED.fullmatch(name):
            tensor = half_split(tensor, config.head_dim)
        elif SHARED_DOWN.fullmatch(name):
            tensor = 2 * tensor  # exact, as is the half that the gate below makes of it
        for ours, theirs in WORDS:
            name = name.replace(ours, theirs)
        stock[name if name.startswith("lm_head.") else f"model.{name}"] = tensor
    return stock | (shared_experts(state, config) if config.use_moe else {})


def shared_experts(state: dict[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """What Qwen2-MoE has beside ours: a gate of the shared expert, sigmoid(0) = 1/2 here; and where ours has
    no shared expert, one that gives zero."""
    like, D = state["tok_embeddings.weight"], config.dim
    more = {}
    for number in range(config.n_layers):
        place = f"model.layers.{number}."
        more[f"{place}{SHARED_GATE}"] = like.new_zeros(1, D)
        if not config.n_shared_experts:
            for name, shape in (("gate", (-1, D)), ("up", (-1, D)), ("down", (D, -1))):
                zeros = like.new_zeros(config.hidden_dim * D).view(shape)
                more[f"{place}mlp.shared_expert.{name}_proj.weight"] = zeros
    return more


def projector(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our projection as LLaVA's two layers: the second is the identity."""
    weight = state["vision_proj.weight"]
    layers = {
        f"{PROJECTOR}linear_1.weight": weight,
        f"{PROJECTOR}linear_2.weight": torch.eye(len(weight), dtype=weight.dtype),
    }
    if "vision_proj.bias" in state:
        layers[f"{PROJECTOR}linear_1.bias"] = state["vision_proj.bias"]
        layers[f"{PROJECTOR}linear_2.bias"] = torch.zeros_like(state["vision_proj.bias"])
    return layers


def from_stock(state: dict[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """The inverse of to_stock() and projector(): names as transformers 4 or 5 writes them to ours. The vision
    tower is left out; projection layers that were trained on since become one matrix.

    Raises ValueError for a gate of a shared expert that ours has not.
    """
    ours, layers = {}, {}
    for name, tensor in state.items():
        name = WRAPPERS.sub("", name)
        if name.startswith(PROJECTOR):
            layers[name.removeprefix(PROJECTOR)] = tensor
        elif name.endswith(SHARED_GATE):
            if tensor.any():
                raise ValueError(
                    f"{name} is not zero: a shared expert with a gate of its own is not computed"
                )
        elif not name.startswith(TOWER):
            for our_word, their_word in reversed(WORDS):
                name = name.replace(their_word, our_word)
            if ROTATED.fullmatch(name):
                tensor = interleaved(tensor, config.head_dim)
            elif SHARED_DOWN.fullmatch(name):
                tensor = tensor / 2
            if config.n_shared_experts or ".shared_experts." not in name:
                ours[name] = tensor
    return ours | (fold_projector(layers) if layers else {})


def fold_projector(layers: dict[str, Tensor]) -> dict[str, Tensor]:
    """LLaVA's two projection layers, with nothing between them, as one. Raises ValueError if one is not
    there."""
    if not {"linear_1.weight", "linear_2.weight"} <= layers.keys():
        raise ValueError(f"its projection has {', '.join(layers)}, not the two layers of LLaVA")
    first, second = layers["linear_1.weight"], layers["linear_2.weight"]
    bias, more = layers.get("linear_1.bias"), layers.get("linear_2.bias")
    if not torch.equal(second, torch.eye(len(second), dtype=second.dtype)):
        first = (second.double() @ first.double()).type_as(first)
        bias = None if bias is None else (second.double() @ bias.double()).type_as(bias)
    if bias is not None and more is not None and more.any():
        bias = bias + more
    return {"vision_proj.weight": first} | ({} if bias is None else {"vision_proj.bias": bias})
