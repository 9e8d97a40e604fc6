"""The network as training computes it: the functions of transformer.py and moe.py, in less time and memory.

`use_fast_kernels` puts these forms on a model once, where training starts. They share the parameters of the
plain ones, so weight files and names stay as they are, and nothing here need be read to understand the model.
tests/test_fast.py holds each equal to its plain form, in every dtype it serves, gradients included.

    FastRMSNorm, FastFeedForward    backward passes written out: less is kept than autograd would record
    FastAttention                   bf16 on a CPU: block by block; fp32 on a GPU: with K and V repeated
    GroupedExperts                  bf16 on a GPU: all experts in one kernel

Letters: B rows, T tokens, S keys, D model width, W feed-forward width, H query heads, K key/value heads,
E head width (in the functions on experts, E experts).
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.moe import MixtureOfExperts
from model.transformer import Attention, FeedForward, RMSNorm, Transformer, apply_rope

QUERY_BLOCK = 96  # tokens; measured on a CPU in bf16: 48 to 96 are about the same
ALIGNMENT = 8  # bf16 numbers in the 16 bytes at which a group of grouped_mm's backward pass may begin


def use_fast_kernels(
    model: Transformer, device: torch.device, dtype: torch.dtype, compiled: bool = False
) -> None:
    """Put on the forms that are fast on this device in this dtype; calling it again chooses anew.

    compiled  torch.compile the blocks: it fuses norms and SwiGLU itself, and knows no complex numbers
    """
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.__class__ = RMSNorm if compiled else FastRMSNorm
        elif isinstance(module, FeedForward):
            module.__class__ = FeedForward if compiled else FastFeedForward
        elif isinstance(module, Attention):
            module.__class__ = FastAttention
            module.rotate, module.attend = (
                rotate_real if compiled or device.type == "mps" else apply_rope,
                choose_attend(device, dtype),
            )
        elif isinstance(module, MixtureOfExperts):
            module.__class__ = GroupedExperts if can_group(device, dtype) else MixtureOfExperts
    if compiled:
        compile_blocks(model)


def compile_blocks(model: Transformer) -> None:
    """Compile the blocks in place, so that names and weight files stay as they are. All blocks but the last
    are one piece of code to the compiler; the last sees another number of targets every step."""
    torch._dynamo.config.recompile_limit = 64  # one for each length of rows, and for each last batch
    for layer in model.layers[:-1]:
        layer.compile(dynamic=False)
    model.layers[-1].compile(dynamic=True)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products on x: autocast's where it is on, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


# ---- norms and feed-forward --------------------------------------------------------------------------------


class FastRMSNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32:
            normed = LeanRMSNorm.apply(x, self.weight, self.eps)
        else:
            normed = super().forward(x)
        return normed.to(product_dtype(x))  # once here, or every matrix that reads it would cast it again


class FastFeedForward(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w1(x), self.w3(x)
        return SwiGLUDown.apply(gate, up, self.w2.weight.type_as(gate))


class LeanRMSNorm(torch.autograd.Function):
    """x (..., D) divided by its root mean square r, times weight (D,). Keeps x and 1 / r alone for the
    backward pass, and touches memory half as often as the dozen steps that autograd would record on a CPU."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # (..., 1)
        inverse = inverse.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, inverse = ctx.saved_tensors
        D, shape = x.shape[-1], x.shape
        x, grad, inverse = x.reshape(-1, D), grad.reshape(-1, D), inverse.reshape(-1, 1)
        product = grad * x
        grad_weight = (inverse.mT @ product).view(D)
        along_x = (product @ weight.unsqueeze(1)).mul_(inverse.pow(3).div_(D))  # through r itself
        grad_x = torch.addcmul((grad * weight).mul_(inverse), along_x, x, value=-1)
        return grad_x.view(shape), grad_weight, None


class SwiGLU(torch.autograd.Function):
    """silu(a) * b. Autograd would keep silu(a) for the backward pass, a seventh of all that a step keeps."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return F.silu(a).mul_(b)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * b, a), F.silu(a).mul_(grad)


class SwiGLUDown(torch.autograd.Function):
    """silu(a) * b, times weight.T (D, W). Not even the product is kept: a sixth of the rest, for one more
    multiplication in the backward pass."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, weight)
        return F.linear(F.silu(a).mul_(b), weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        a, b, weight = ctx.saved_tensors
        silu, grad_weight = F.silu(a), None
        if ctx.needs_input_grad[2]:
            grad_weight = grad.flatten(0, -2).mT @ (silu * b).flatten(0, -2)
        grad = grad @ weight
        return torch.ops.aten.silu_backward(grad * b, a), silu.mul_(grad), grad_weight


# ---- attention ---------------------------------------------------------------------------------------------


class FastAttention(Attention):
    """Attention with the functions that use_fast_kernels chose."""

    rotate: Callable[[Tensor, Tensor], Tensor]
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        B, T, D = x.shape
        q = self.q_norm(self.wq(x).view(B, T, -1, self.head_dim))
        k = self.k_norm(self.wk(x).view(B, T, -1, self.head_dim))
        q = self.rotate(q, rope).transpose(1, 2)  # (B, H, T, E)
        k = self.rotate(k, rope).transpose(1, 2)  # (B, K, T, E)
        v = self.wv(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, E)
        return self.wo(self.attend(q, k, v).transpose(1, 2).flatten(2))


def choose_attend(device: torch.device, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(q, k, v) -> what causal attention gives, (B, H, T, E) as q; k and v are (B, K, T, E)."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        return attend_in_blocks
    if device.type == "cuda" and dtype == torch.float32:
        return attend_repeated
    return partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)


def attend_repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With enable_gqa in float32, CUDA falls back to its slow form that holds all scores in memory."""
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The backward pass of the CPU's bf16 flash attention takes two to seven times as long as plain products
    do. Queries go block by block, each with the keys up to its own end, so that most of the masked half is
    never computed. The G = H / K query heads of a group stand one below the other: no copy of K and V."""
    B, H, T, E = q.shape
    K = k.shape[1]
    q, k, v = q.reshape(B * K, -1, T, E), k.reshape(B * K, T, E), v.reshape(B * K, T, E)
    size = -(-T // -(-T // QUERY_BLOCK))  # blocks as even as can be
    return torch.cat(
        [
            attend_block(q[:, :, start : start + size], k[:, : start + size], v[:, : start + size])
            for start in range(0, T, size)
        ],
        dim=2,
    ).view(B, H, T, E)


def attend_block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last t of S tokens attend to all before them: q (R, G, t, E), k and v (R, S, E); (R, G, t, E)."""
    R, G, t, E = q.shape
    S = k.shape[1]
    future = torch.full((t, S), -math.inf, dtype=q.dtype).triu(S - t + 1).repeat(G, 1)  # (G * t, S)
    scores = torch.baddbmm(future, q.reshape(R, G * t, E), k.mT, alpha=E**-0.5)  # (R, G * t, S)
    weights = scores.softmax(-1).type_as(v)
    return torch.bmm(weights, v).view(R, G, t, E)


def rotate_real(x: Tensor, rope: Tensor) -> Tensor:
    """apply_rope without complex products; on a CPU, uncompiled, they take a tenth of the time of these."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, heads, E / 2)
    cos, sin = torch.view_as_real(rope).unsqueeze(-3).unbind(-1)  # (T, 1, E / 2)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).type_as(x)


# ---- experts -----------------------------------------------------------------------------------------------


def can_group(device: torch.device, dtype: torch.dtype) -> bool:
    """Can all experts be computed in one kernel? GPUs of compute capability 8 do so, in bfloat16.

    On a CPU the loop is as fast: at 512 wide the loop, products padded to the busiest expert, and grouped_mm
    took the same time within what the machine's own load moved, and the loop alone copies no weights.
    """
    return (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and hasattr(F, "grouped_mm")
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


class GroupedExperts(MixtureOfExperts):
    def compute(self, experts: nn.ModuleList, rows: Tensor, counts: Tensor) -> Tensor:
        return grouped(experts, rows, counts)


def grouped(experts: nn.ModuleList, rows: Tensor, counts: Tensor) -> Tensor:
    """All experts in two grouped products. The host never learns how many rows each has, so it need not wait
    for the GPU: the rows are spread over a buffer that is large enough for any split."""

    def stack(*names: str) -> Tensor:  # (E, D, W): W adds up where there are several names
        return torch.stack(
            [torch.cat([getattr(expert, name).weight.to(rows.dtype) for name in names]) for expert in experts]
        ).mT

    padded = (counts + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    ends = padded.cumsum(0)
    number = torch.arange(len(rows), device=rows.device)
    expert = torch.searchsorted(counts.cumsum(0), number, right=True)
    place = number + (ends - padded - counts.cumsum(0) + counts)[expert]
    size = (len(rows) // ALIGNMENT + len(experts) + 2) * ALIGNMENT  # beyond the last end it is idle
    buffer = rows.new_zeros(size, rows.shape[1]).index_copy(0, place, rows)
    ends = ends.to(torch.int32)
    gate, up = F.grouped_mm(buffer, stack("w1", "w3"), offs=ends).chunk(2, dim=-1)
    return F.grouped_mm(SwiGLU.apply(gate, up), stack("w2"), offs=ends).index_select(0, place)
