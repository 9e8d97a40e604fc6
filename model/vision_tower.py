"""The frozen eye: a vision transformer, as CLIP and SigLIP have it.

The same function, to the bit, as CLIPVisionModel and SiglipVisionModel of transformers (a test holds them
equal), whose import takes longer than all else that a first step waits for. Modules and parameters have
their names, so weight files fit as they are.

Letters: M images, N tokens per image (50), V width (768), H heads, E head width, P side of a patch (32),
S side in pixels (224); the numbers are those of CLIP ViT-B/32.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def quick_gelu(x: Tensor) -> Tensor:
    """What OpenAI trained CLIP with, in the place of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {  # hidden_act in config.json
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class VisionTower(nn.Module):
    """Images to features; config is a vision_config.VisionConfig.

    CLIP has a class token before the patches and a norm before the layers, and gives what the last layer
    gives, as v1 took it. SigLIP has a bias on its patches, neither of the two, and gives its final norm.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        if config.is_clip:
            self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)  # CLIP spells it so
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    @property
    def dtype(self) -> torch.dtype:
        return self.post_layernorm.weight.dtype

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(M, 3, S, S) -> (M, N, V)"""
        h = self.embeddings(pixel_values)
        if self.config.is_clip:
            h = self.pre_layrnorm(h)
        for layer in self.encoder.layers:
            h = layer(h)
        return h if self.config.is_clip else self.post_layernorm(h)


class Embeddings(nn.Module):
    """The image in patches, each a token that knows its place."""

    def __init__(self, config):
        super().__init__()
        V, P = config.hidden_size, config.patch_size
        if config.is_clip:
            self.class_embedding = nn.Parameter(torch.zeros(V))
        self.patch_embedding = nn.Conv2d(3, V, kernel_size=P, stride=P, bias=not config.is_clip)
        self.position_embedding = nn.Embedding(config.num_tokens, V)

    def forward(self, pixel_values: Tensor) -> Tensor:
        h = self.patch_embedding(pixel_values)  # (M, V, S / P, S / P)
        h = h.flatten(2).transpose(1, 2)  # (M, patches, V), row by row
        if hasattr(self, "class_embedding"):
            h = torch.cat([self.class_embedding.expand(len(h), 1, -1), h], dim=1)
        return h + self.position_embedding.weight  # (M, N, V)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.self_attn(self.layer_norm1(h))
        return h + self.mlp(self.layer_norm2(h))


class Attention(nn.Module):
    """Every token looks at every other one: nothing is masked."""

    def __init__(self, config):
        super().__init__()
        self.H, V = config.num_attention_heads, config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(V, V) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        M, N, V = x.shape
        E = V // self.H
        q, k, v = (
            project(x).view(M, N, self.H, E).transpose(1, 2)  # (M, H, N, E)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v, scale=E**-0.5)
        return self.out_proj(out.transpose(1, 2).reshape(M, N, V))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))
