"""The MiniMind transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

This file is the definition. The network is written three times: here, to be read; in fast.py, as training
computes it; in decode.py, as answering does. Tests hold both equal to this file (tests/test_fast.py,
tests/test_decode.py), so whoever changes the network changes it here first, and then there.

Letters: B rows, T tokens, L target tokens, D model width, H query heads, K key/value heads, E head width,
M images in the batch, N tokens per image, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.data.batch import IGNORE_INDEX
from model.LMConfig import LMConfig
from model.moe import MixtureOfExperts
from model.vision_proj import make_vision_proj, overwrite_image_slots, settle_image_slots


class RMSNorm(nn.Module):
    """Divide by the root mean square, in fp32, then scale (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, eps=self.eps).type_as(x) * self.weight


def rope_table(config: LMConfig, length: int, device: torch.device) -> Tensor:
    """One complex number per position and pair of channels, (length, E / 2). Always complex64: half-precision
    angles would blur distant positions."""
    half = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    frequencies = config.rope_theta ** (-half / config.head_dim)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
    return torch.complex(angles.cos(), angles.sin())


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the channel pairs (0,1), (2,3), ... of every head of x (B, T, heads, E) by rope (T, E / 2).
    Interleaved, not half-split: v1's weights were trained with this pairing."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, T, heads, E / 2)
    return torch.view_as_real(pairs * rope.unsqueeze(-2)).flatten(-2).type_as(x)  # (B, T, heads, E)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): H / K query heads share a key/value head."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.head_dim = config.head_dim
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, q_dim, bias=False)
        self.wk = nn.Linear(config.dim, kv_dim, bias=False)
        self.wv = nn.Linear(config.dim, kv_dim, bias=False)
        self.wo = nn.Linear(q_dim, config.dim, bias=False)
        # Not MiniMind's, but of some language models that can take its place (--llm).
        self.q_norm, self.k_norm = (
            RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity() for _ in range(2)
        )

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        B, T, D = x.shape
        q = self.q_norm(self.wq(x).view(B, T, -1, self.head_dim))
        k = self.k_norm(self.wk(x).view(B, T, -1, self.head_dim))
        q = apply_rope(q, rope).transpose(1, 2)  # (B, H, T, E)
        k = apply_rope(k, rope).transpose(1, 2)  # (B, K, T, E)
        v = self.wv(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, E)
        # Rows are padded on the right, so causality alone hides the padding: no mask.
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # (B, H, T, E)
        return self.wo(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)  # gate
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)  # down
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)  # up

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config: LMConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = MixtureOfExperts(config, FeedForward) if config.use_moe else FeedForward(config)

    def forward(self, h: Tensor, rope: Tensor, keep: Tensor | None = None) -> Tensor:
        """h (B, T, D) -> (B, T, D); with `keep` (L,), indices into B * T, only those positions: (L, D)."""
        h = h + self.attention(self.attention_norm(h), rope)
        if keep is not None:
            h = h.flatten(0, 1)[keep]
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    """MiniMind; parameter names are those of v1, so its files load as they are."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.output.weight = self.tok_embeddings.weight  # a sixth of the 27 M parameters saved
        if config.vision_dim:
            self.vision_proj = make_vision_proj(config.vision_dim, config.dim, config.vision_proj_bias)
        # Not a buffer: .to(bfloat16) would destroy it, and a load on the meta device leave it garbage.
        self._rope = None
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        # The two matrices that write to the residual stream start smaller, so that its variance does not grow
        # with depth (GPT-2).
        std = 0.02 / math.sqrt(2 * self.config.n_layers)
        if isinstance(module, Attention):
            nn.init.normal_(module.wo.weight, std=std)
        if isinstance(module, FeedForward):
            nn.init.normal_(module.w2.weight, std=std)

    def rope(self, length: int, device: torch.device) -> Tensor:
        """The rotations of the first `length` positions, (length, E / 2); computed once per device."""
        if self._rope is None or self._rope.device != device or len(self._rope) < length:
            self._rope = rope_table(self.config, max(length, self.config.max_seq_len), device)
        return self._rope[:length]

    def embed(self, input_ids, image_features=None, image_slots=None, num_images=None) -> Tensor:
        """Token embeddings (B, T, D); at the placeholders, the projected images instead. See forward()."""
        h = self.tok_embeddings(input_ids)
        image_slots = settle_image_slots(input_ids, image_features, image_slots, num_images, self.config)
        if image_features is None:
            return h
        return overwrite_image_slots(h, self.vision_proj(image_features), image_slots)

    def forward(
        self,
        input_ids: Tensor,
        image_features: Tensor | None = None,
        image_slots: Tensor | None = None,
        labels: Tensor | None = None,
        target_positions: Tensor | None = None,
        num_images: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Predict the next token at every position or, given labels, the loss.

        input_ids         (B, T), padded on the right
        image_features    (M, N, vision_dim), all images of the batch in reading order
        image_slots       (M, N), flat indices into B * T; None: the placeholders are searched for
        labels            (B, T), already shifted, IGNORE_INDEX where there is no target
        target_positions  (L,), where labels are not IGNORE_INDEX; finding them here makes a GPU's host wait
        num_images        (B,), if given, checked against the placeholders of each row
        returns           (logits (B, T, V), None), or with labels (logits (L, V), their mean loss)
        raises            ValueError if images and placeholders do not match
        """
        h = self.embed(input_ids, image_features, image_slots, num_images)  # (B, T, D)
        rope = self.rope(input_ids.shape[1], h.device)  # (T, E / 2)
        if labels is None:
            for layer in self.layers:
                h = layer(h, rope)
            return self.output(self.norm(h)), None

        if target_positions is None:
            target_positions = (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
        for layer in self.layers[:-1]:
            h = layer(h, rope)
        # The last block is read at the targets only, so its feed-forward and the vocabulary, the widest
        # layer, are computed only there.
        h = self.layers[-1](h, rope, target_positions)  # (L, D)
        logits = self.output(self.norm(h))  # (L, V)
        # A sum over nothing is 0 (a mean would be NaN): a batch without targets is harmless.
        loss = F.cross_entropy(logits.float(), labels.flatten()[target_positions], reduction="sum")
        return logits, loss / max(1, len(target_positions))

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def num_active_parameters(self) -> int:
        """Those that one token uses: all but the experts that it does not choose."""
        config = self.config
        num_idle = config.n_routed_experts - config.num_experts_per_tok if config.use_moe else 0
        return self.num_parameters() - config.n_layers * num_idle * 3 * config.dim * config.hidden_dim
