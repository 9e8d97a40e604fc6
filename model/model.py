"""The MiniMind transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU; with eyes, and with
experts (moe.py), if the config says so.

Letters: B rows, T tokens, L learnt tokens, D model width, H query heads, K key/value heads, E head width,
M images in the batch, N tokens per image, V vocabulary.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.lean import LeanRMSNorm, SwiGLUDown
from model.LMConfig import LMConfig
from model.moe import MixtureOfExperts, Routing
from model.vision_proj import check_image_slots, find_image_slots, make_vision_proj, overwrite_image_slots

IGNORE_INDEX = -100     # the label of a token that is not learnt
QUERY_BLOCK = 96        # on a CPU in bf16; measured: 48 to 96 are about the same


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products on x: autocast's where it is on, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def lean() -> bool:
    """Use the written-out backward passes of lean.py? torch.compile fuses the plain forms itself."""
    return not torch.compiler.is_compiling()


class RMSNorm(nn.Module):
    """Divide by the root mean square, in fp32, then scale (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if lean() and x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32:
            normed = LeanRMSNorm.apply(x, self.weight, self.eps)
        else:
            normed = F.rms_norm(x.float(), self.weight.shape, eps=self.eps).type_as(x) * self.weight
        return normed.to(compute_dtype(x))      # once here, or every matrix that reads it would cast it again


def rope_table(config: LMConfig, length: int, device: torch.device) -> Tensor:
    """Cosines and sines of the rotation angles, (2, length, E / 2), always fp32: bf16 angles would blur far
    positions."""
    half = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32),
                         config.rope_theta ** (-half / config.head_dim))
    return torch.stack([angles.cos(), angles.sin()])


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Turn neighbouring pairs (0,1), (2,3), ... of every head: v1's interleaved form, on which all weights
    depend.

    x     (B, T, heads, E)
    rope  (2, T, E / 2)
    """
    if not lean():      # torch.compile knows no complex numbers
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)        # (B, T, heads, E / 2)
        cos, sin = rope.unsqueeze(-2)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).type_as(x)
    # One complex product: a tenth of the time of its four real products on a CPU.
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))      # (B, T, heads, E / 2)
    turned = pairs * torch.complex(*rope).unsqueeze(-2)                  # rope: (..., T, 1, E / 2)
    return torch.view_as_real(turned).flatten(-2).type_as(x)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of every token to itself and those before it.

    q        (B, H, T, E)
    k, v     (B, K, T, E), each shared by H / K neighbouring query heads
    returns  (B, H, T, E)

    Rows are padded on the right, so causality alone keeps the padding out: no padding mask.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    # The backward pass of the CPU's bf16 flash attention takes two to seven times as long as plain products
    # do. Queries go block by block, each with the keys up to its own end, so that most of the masked half is
    # never computed. The G = H / K query heads of a group stand one below the other: no copy of K and V.
    B, H, T, E = q.shape
    K = k.shape[1]
    q, k, v = q.reshape(B * K, -1, T, E), k.reshape(B * K, T, E), v.reshape(B * K, T, E)
    size = -(-T // -(-T // QUERY_BLOCK))            # blocks as even as can be
    return torch.cat([attend_block(q[:, :, start:start + size], k[:, :start + size], v[:, :start + size])
                      for start in range(0, T, size)], dim=2).view(B, H, T, E)


def attend_block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last t of S tokens attend to all before them: q (R, G, t, E), k and v (R, S, E); (R, G, t, E)."""
    R, G, t, E = q.shape
    S = k.shape[1]
    future = torch.full((t, S), -math.inf, dtype=q.dtype).triu(S - t + 1).repeat(G, 1)      # (G * t, S)
    scores = torch.baddbmm(future, q.reshape(R, G * t, E), k.mT, alpha=E ** -0.5)           # (R, G * t, S)
    weights = scores.softmax(-1).type_as(v)
    return torch.bmm(weights, v).view(R, G, t, E)


class Attention(nn.Module):
    def __init__(self, config: LMConfig):
        super().__init__()
        self.head_dim = config.head_dim
        kv_dim = config.n_kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, config.dim, bias=False)
        self.wk = nn.Linear(config.dim, kv_dim, bias=False)
        self.wv = nn.Linear(config.dim, kv_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, rope: Tensor, keep: Tensor | None = None) -> Tensor:
        B, T, D = x.shape
        q = apply_rope(self.wq(x).view(B, T, -1, self.head_dim), rope).transpose(1, 2)    # (B, H, T, E)
        k = apply_rope(self.wk(x).view(B, T, -1, self.head_dim), rope)                    # (B, T, K, E)
        v = self.wv(x).view(B, T, -1, self.head_dim)                                      # (B, T, K, E)
        out = causal_attention(q, k.transpose(1, 2), v.transpose(1, 2))                   # (B, H, T, E)
        return self.wo(take(out.transpose(1, 2).reshape(B, T, D), keep))


def take(h: Tensor, keep: Tensor | None) -> Tensor:
    """The rows `keep` (L,) of h (B, T, D) flattened to (B * T, D), as (L, D); None: h as it is."""
    return h if keep is None else h.flatten(0, 1).index_select(0, keep)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w1(x), self.w3(x)
        if lean():
            return SwiGLUDown.apply(gate, up, self.w2.weight.type_as(gate))
        return self.w2(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: LMConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = (MixtureOfExperts(config, FeedForward) if config.use_moe
                             else FeedForward(config))

    def forward(self, h: Tensor, rope: Tensor, keep: Tensor | None = None,
                routing: Routing | None = None) -> Tensor:
        """h (B, T, D) to the next layer's; with `keep` (L,) only those positions of B * T, (L, D)."""
        if routing is not None:     # which experts a token would choose counts where nothing is learnt too
            h = h + self.attention(self.attention_norm(h), rope)
            return take(h, keep) + self.feed_forward(self.ffn_norm(h), keep, routing)
        h = take(h, keep) + self.attention(self.attention_norm(h), rope, keep)
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
        # Tied: a sixth of the 27 M parameters would be spent twice.
        self.output.weight = self.tok_embeddings.weight
        if config.vision_dim:
            self.vision_proj = make_vision_proj(config.vision_dim, config.dim, config.vision_proj_bias)
        # Not a buffer: .to(bfloat16) would round a buffer's angles and a meta-device load would leave it
        # garbage.
        self._rope = None
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        # What each block ADDS to the residual stream starts smaller, so its variance does not grow with depth
        # (GPT-2).
        std = 0.02 / math.sqrt(2 * self.config.n_layers)
        if isinstance(module, Attention):
            nn.init.normal_(module.wo.weight, std=std)
        if isinstance(module, FeedForward):
            nn.init.normal_(module.w2.weight, std=std)

    def rope(self, length: int, device: torch.device) -> Tensor:
        """The rotation table for at least `length` positions, made once per device."""
        if self._rope is None or self._rope.device != device or self._rope.shape[1] < length:
            self._rope = rope_table(self.config, max(length, self.config.max_seq_len), device)
        return self._rope

    def embed(self, input_ids: Tensor, image_features: Tensor | None, image_slots: Tensor | None) -> Tensor:
        """Token embeddings (B, T, D), with the placeholders overwritten by what the images look like."""
        h = self.tok_embeddings(input_ids)
        if image_features is None:
            if image_slots is not None and len(image_slots):
                raise ValueError(f"the prompt holds {len(image_slots)} image placeholder(s) "
                                 "but no images were given")
            return h
        if not self.config.vision_dim:
            raise ValueError("this is a language model without a vision projection (vision_dim 0); "
                             "it takes no images")
        if image_slots is None:
            image_slots = find_image_slots(input_ids, self.config.num_image_tokens)
        check_image_slots(image_slots, image_features)
        return overwrite_image_slots(h, self.vision_proj(image_features), image_slots)

    def hidden_states(self, input_ids: Tensor, image_features: Tensor | None = None,
                      image_slots: Tensor | None = None, keep: Tensor | None = None,
                      routing: Routing | None = None) -> Tensor:
        """The last layer's normalised states (B, T, D), or (L, D) at the positions `keep` of B * T; other
        arguments as for forward()."""
        h = self.embed(input_ids, image_features, image_slots)
        T = input_ids.shape[1]
        rope = self.rope(T, h.device)[:, :T]                                              # (2, T, E / 2)
        for layer in self.layers[:-1]:
            h = layer(h, rope, routing=routing)
        # What the last layer says of a position is read there only, so the rest of it need not be computed.
        return self.norm(self.layers[-1](h, rope, keep, routing))

    def forward(self, input_ids: Tensor, image_features: Tensor | None = None,
                image_slots: Tensor | None = None, labels: Tensor | None = None,
                learnt: Tensor | None = None,
                routing: Routing | None = None) -> tuple[Tensor, Tensor | None]:
        """Predict the next token at every position.

        input_ids       (B, T), padded on the right
        image_features  (M, N, vision_dim) for all images of the batch in reading order, or None
        image_slots     (M, N) flat indices into B * T; None: the placeholder runs are searched for in
                        input_ids
        labels          (B, T) already shifted, IGNORE_INDEX where nothing is learnt
        learnt          (L,) where labels are not IGNORE_INDEX, flat into B * T, if the caller knows: finding
                        them on a GPU makes the host wait
        routing         to be filled, if the model has experts and labels are given: their balance loss is
                        not part of the loss returned, because it is a mean over rows and not over tokens
        returns         (logits (B, T, V), None) without labels; with labels (logits (L, V), mean loss over
                        them): the last feed-forward and the vocabulary, the widest layer, are computed only
                        where something is learnt
        raises          ValueError if images and placeholders do not match
        """
        if labels is None:
            return self.output(self.hidden_states(input_ids, image_features, image_slots)), None
        if learnt is None:
            learnt = (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
        if routing is not None:
            routing.begin(labels != IGNORE_INDEX)
        logits = self.output(self.hidden_states(input_ids, image_features, image_slots, learnt, routing))
        # A sum over nothing is 0 (a mean would be NaN): a batch with nothing to learn is harmless.
        loss = F.cross_entropy(logits.float(), labels.flatten()[learnt], reduction="sum")
        return logits, loss / max(1, len(learnt))

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def num_active_parameters(self) -> int:
        """Those that one token uses: all of them, except for the experts that it does not choose."""
        config = self.config
        num_idle = config.n_routed_experts - config.num_experts_per_tok if config.use_moe else 0
        return self.num_parameters() - config.n_layers * num_idle * 3 * config.dim * config.hidden_dim
