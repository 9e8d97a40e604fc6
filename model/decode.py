"""The network as answering computes it: the same function as Transformer.forward, one token at a time.

transformer.py defines what is computed. Here nothing is computed twice: the keys and values of earlier tokens
stay in a cache. One token then costs what it costs to read every weight once, so the weights are stored for
that (packing.py), and the operations between the products are few.

Letters: B rows, T tokens of the longest prompt, P of a prefix, S slots in use, D model width, H query heads,
K key/value heads, E head width, M images, N tokens per image, V vocabulary.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model.LMConfig import LMConfig
from model.moe import MixtureOfExperts, mix
from model.packing import Packer, computing_dtype
from model.transformer import Block, FeedForward, RMSNorm, Transformer, apply_rope


class KVCache:
    """Keys and values of one batch of answers in the making. Every batch owns its own, so two users can never
    share one.

    Slot s holds the s-th token computed, of all rows alike: first the T places of the prompts, then one slot
    per step. A shorter prompt leaves a gap behind it (gather(): in front of it), which is masked.
    """

    def __init__(
        self,
        config: LMConfig,
        lengths: Tensor,
        num_slots: int,
        dtype: torch.dtype,
        gap_in_front: bool = False,
    ):
        self.config = config
        shape = (config.n_layers, len(lengths), config.n_kv_heads, num_slots, config.head_dim)
        self.keys, self.values = (torch.empty(shape, device=lengths.device, dtype=dtype) for _ in range(2))
        self.positions = lengths  # where the next token of every row stands, (B,)
        self.used = T = int(lengths.max())
        slots = torch.arange(num_slots, device=lengths.device)
        gap = slots < T - lengths[:, None] if gap_in_front else (lengths[:, None] <= slots) & (slots < T)
        # Added to the attention scores.
        self.mask = torch.zeros_like(gap, dtype=dtype).masked_fill(gap, -math.inf)[:, None, None]

    @classmethod
    def gather(cls, rows: list[tuple["KVCache", int]], room: int) -> "KVCache":
        """A cache of rows of others, for answers that began at different times, with room for so many steps.
        The last tokens of all rows stand in one slot, so the next ones do too."""
        first = rows[0][0]
        filled = [cache.mask[row, 0, 0, : cache.used] == 0 for cache, row in rows]  # (slots,) of each
        lengths = torch.stack([slots.sum() for slots in filled])
        new = cls(first.config, lengths, int(lengths.max()) + room, first.keys.dtype, gap_in_front=True)
        for place, ((cache, row), slots) in enumerate(zip(rows, filled, strict=True)):
            start = new.used - int(lengths[place])
            for old, tensor in ((cache.keys, new.keys), (cache.values, new.values)):
                tensor[:, place, :, start : new.used] = old[:, row, :, : cache.used][:, :, slots]
                tensor[:, place, :, :start] = (
                    0  # what stands in a gap is multiplied by 0, so it must be finite
                )
        return new

    @property
    def room(self) -> int:
        """Steps that still fit."""
        return self.keys.shape[3] - self.used

    def select(self, rows: list[int]) -> None:
        """Forget all rows but these, in their order."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.positions, self.mask = self.positions[rows], self.mask[rows]


class Norm:
    """An RMSNorm: x beside -x has the mean 0, so its layer norm, one kernel where PyTorch's rms_norm takes
    seven on a CPU, divides by the root mean square of x."""

    def __init__(self, norm: RMSNorm, dtype: torch.dtype):
        self.weight, self.eps = torch.cat([norm.weight, norm.weight]).to(dtype), norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        D = x.shape[-1]
        return F.layer_norm(torch.cat([x, -x], dim=-1), (2 * D,), self.weight, None, self.eps)[..., :D]


class PackedFeedForward:
    """A FeedForward, with the two matrices that multiply the same thing made one."""

    def __init__(self, feed_forward: FeedForward, pack: Packer, num_rows: int | None = None):
        self.w13 = pack(feed_forward.w1.weight, feed_forward.w3.weight, num_rows=num_rows)
        self.w2 = pack(feed_forward.w2.weight, num_rows=num_rows)

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class PackedExperts:
    """A MixtureOfExperts. Of the experts only the chosen ones are read, so the host asks which these are."""

    def __init__(self, mixture: MixtureOfExperts, pack: Packer):
        self.gate = copy.deepcopy(mixture.gate)
        expected = max(1, pack.num_rows * self.gate.num_chosen // len(mixture.experts))  # rows per expert
        self.experts = [PackedFeedForward(expert, pack, expected) for expert in mixture.experts]
        self.shared = mixture.shared_experts and PackedFeedForward(mixture.shared_experts, pack)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)  # (B * T, D)
        _, weights, chosen = self.gate(rows)
        out = mix(rows, weights, chosen, self.experts, chosen_ones)
        return (out + self.shared(rows) if self.shared else out).view_as(x)


def chosen_ones(experts: list[PackedFeedForward], rows: Tensor, counts: Tensor) -> Tensor:
    """As moe.one_by_one(), without those that nobody chose."""
    parts = zip(experts, rows.split(counts.tolist()), strict=True)
    return torch.cat([expert(part) for expert, part in parts if len(part)])


class Layer:
    """One block's weights, with the matrices that multiply the same thing made one."""

    def __init__(self, block: Block, pack: Packer):
        attention, feed_forward = block.attention, block.feed_forward
        self.attention_norm = Norm(block.attention_norm, pack.dtype)
        self.ffn_norm = Norm(block.ffn_norm, pack.dtype)
        self.wqkv = pack(attention.wq.weight, attention.wk.weight, attention.wv.weight)
        self.wo = pack(attention.wo.weight)
        form = PackedExperts if isinstance(feed_forward, MixtureOfExperts) else PackedFeedForward
        self.feed_forward = form(feed_forward, pack)


class Decoder:
    """A Transformer that answers, arranged for about batch_size prompts at once; any number works.

    It takes the blocks out of the model it is given, one by one, so that no weight lies in memory twice; that
    model cannot be called any more.

    layout  see Packer
    """

    @torch.no_grad()
    def __init__(self, model: Transformer, batch_size: int = 1, layout: str | None = None):
        self.config, self.num_parameters = model.config, model.num_parameters()
        self.num_active = model.num_active_parameters()
        self.device, self.dtype = model.output.weight.device, computing_dtype(model.output.weight)
        self.rope = model.rope(self.config.max_seq_len, self.device)  # (positions, E / 2)
        pack = Packer(batch_size, self.dtype, layout)
        self.layers = []
        while len(model.layers):
            self.layers.append(Layer(model.layers.pop(0), pack))
        model.layers = None
        self.output = pack(model.output.weight)
        self.norm = Norm(model.norm, self.dtype)
        # A copy: the model's weights may be mapped from a file, which is let go with the last of them.
        self.embed = copy.deepcopy(model).to(self.dtype).embed

    @torch.inference_mode()
    def prefill(
        self,
        input_ids: Tensor,
        lengths: Tensor,
        num_steps: int,
        image_features: Tensor | None = None,
        image_slots: Tensor | None = None,
    ) -> tuple[Tensor, KVCache]:
        """Read the prompts.

        input_ids       (B, T), padded on the right
        lengths         (B,) tokens of each row
        num_steps       calls of step() for which the cache must have room
        image_features  (M, N, vision_dim), and image_slots (M, N), as for Transformer.forward
        returns         logits of every row's next token (B, V), and the cache for step()
        """
        T = input_ids.shape[1]
        cache = KVCache(self.config, lengths, T + num_steps, self.dtype)
        h = self.embed(input_ids, image_features, image_slots)
        rows, last = torch.arange(len(h), device=h.device), lengths - 1
        for number, layer in enumerate(self.layers):
            q, k, v = self.project(layer, h, self.rope[:T])
            cache.keys[number, :, :, :T], cache.values[number, :, :, :T] = k, v
            # Causality alone keeps the padding on the right out of the way.
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            if layer is self.layers[-1]:  # only the last token of every prompt predicts
                h, attended = h[rows, last].unsqueeze(1), attended[rows, :, last].unsqueeze(2)
            h = self.finish(layer, h, attended)
        return self.output(self.norm(h[:, 0])), cache

    @torch.inference_mode()
    def read(
        self, h: Tensor, num_last: int, prefix: list[tuple[Tensor, Tensor]] | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Read rows of one length at once, behind a prefix that they all share and that is computed once.

        h         (B, T, D), from embed()
        num_last  how many tokens at the end of each row predict
        prefix    per layer, keys and values of the P tokens before, (1, K, P, E); None: there are none
        returns   the logits of the tokens after those (B, num_last, V); and per layer, the keys and values of
                  all tokens so far, (B, K, P + T, E)
        """
        B, T = h.shape[:2]
        P = prefix[0][0].shape[2] if prefix else 0
        seen = torch.ones(T, P + T, dtype=torch.bool, device=h.device).tril(P)
        read = []
        for number, layer in enumerate(self.layers):
            q, k, v = self.project(layer, h, self.rope[P : P + T])
            if prefix:
                k, v = (
                    torch.cat([old.expand(B, -1, -1, -1), new], dim=2)
                    for old, new in zip(prefix[number], (k, v), strict=True)
                )
            read.append((k, v))
            if layer is self.layers[-1]:  # only the last tokens predict
                h, q, seen = h[:, -num_last:], q[:, :, -num_last:], seen[-num_last:]
            attended = F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
            h = self.finish(layer, h, attended)
        return self.output(self.norm(h)), read

    @torch.inference_mode()
    def step(self, next_ids: Tensor, cache: KVCache) -> Tensor:
        """Read one more token per row: next_ids (B,) -> logits of the token after it (B, V)."""
        S = cache.used + 1
        all_keys, all_values = (tensor[:, :, :, :S].unbind() for tensor in (cache.keys, cache.values))
        mask = cache.mask[..., :S]
        rope = self.rope[cache.positions].unsqueeze(1)  # (B, 1, E / 2)
        h = self.embed(next_ids[:, None], None, None)  # (B, 1, D)
        for layer, keys, values in zip(self.layers, all_keys, all_values, strict=True):  # (B, K, S, E)
            q, k, v = self.project(layer, h, rope)
            keys[:, :, -1:], values[:, :, -1:] = k, v
            # The query heads that share a key stand where several tokens would: (B, K, H / K, E).
            q = q.view(len(h), k.shape[1], -1, k.shape[3])
            attended = F.scaled_dot_product_attention(q, keys, values, mask)
            h = self.finish(layer, h, attended.flatten(1, 2).unsqueeze(2))
        cache.used, cache.positions = S, (cache.positions + 1).clamp(max=len(self.rope) - 1)
        return self.output(self.norm(h[:, 0]))

    def project(self, layer: Layer, h: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, E) and keys and values (B, K, T, E), rotated by rope (..., T, E / 2)."""
        H, K = self.config.n_heads, self.config.n_kv_heads
        heads = layer.wqkv(layer.attention_norm(h)).unflatten(-1, (H + 2 * K, -1))  # (B, T, heads, E)
        q, k = apply_rope(heads[:, :, : H + K], rope).transpose(1, 2).split([H, K], dim=1)
        return q, k, heads[:, :, H + K :].transpose(1, 2)

    def finish(self, layer: Layer, h: Tensor, attended: Tensor) -> Tensor:
        """The rest of a block after its attention, attended (B, H, T, E); h and the result are (B, T, D)."""
        h = h + layer.wo(attended.transpose(1, 2).flatten(2))
        return h + layer.feed_forward(layer.ffn_norm(h))
