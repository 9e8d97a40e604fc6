"""How weights are stored for answering, so that a product with few rows reads them at memory's pace.

Packer chooses for the language model, pack_linears() for the vision tower. What is fast differs:

    LAYOUTS    one row in float32 on a CPU; which one is fastest there is timed
    Packed     several rows, or bfloat16, on a CPU: oneDNN's own form
    Half       bfloat16 or float16 on a CPU that does not compute in them
    F.linear   a GPU, and all else

Letters: R rows, D width, n columns of the product.
"""

import itertools
import math
import time
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 32  # columns; measured: 16 to 32 read memory at its pace, 64 and more do not


class Layout(NamedTuple):
    """One way to store a weight (n, D), and the product with it."""

    arrange: Callable[[Tensor], Tensor]
    multiply: Callable[[Tensor, Tensor, int], Tensor]  # x (..., D), arranged weight, n -> (..., n)
    shape: Callable[
        [int, int], tuple[int, ...]
    ]  # n, a multiple of BLOCK, and D -> that of the arranged weight


def to_blocks(weight: Tensor) -> Tensor:
    """(n, D) -> (ceil(n / 32), D, 32), filled up with zeros."""
    if len(weight) % BLOCK:
        weight = F.pad(weight, (0, 0, 0, -len(weight) % BLOCK))
    return weight.unflatten(0, (-1, BLOCK)).transpose(1, 2).contiguous()


def blocked_product(x: Tensor, blocks: Tensor, n: int) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])  # (R, D)
    out = torch.bmm(rows.expand(len(blocks), -1, -1), blocks)  # (blocks, R, 32)
    return out.transpose(0, 1).reshape(len(rows), -1)[:, :n].unflatten(0, x.shape[:-1])


LAYOUTS = {
    "columns": Layout(
        arrange=lambda weight: weight.t().contiguous(),
        multiply=lambda x, columns, n: x @ columns,
        shape=lambda n, D: (D, n),
    ),
    "rows": Layout(  # as nn.Linear has it; a copy, for the original may be mapped from a file
        arrange=lambda weight: weight.clone(),
        multiply=lambda x, rows, n: F.linear(x, rows),
        shape=lambda n, D: (n, D),
    ),
    "blocks": Layout(to_blocks, blocked_product, shape=lambda n, D: (n // BLOCK, D, BLOCK)),
}
USUAL = "columns"

# In float32 numbers:
SCRATCH = 2**24  # 64 MB, more than caches hold
WINDOW = 2**21  # 8 MB are read at a time; of a larger weight a part is timed
SMALLEST = 2**17  # 512 kB; a cache holds a smaller weight, whatever its layout


def time_layouts(scratch: Tensor, n: int, D: int) -> dict[str, float]:
    """Seconds that one row times a weight (n, D) takes in each layout.

    They take turns on weights that lie one behind the other in scratch, so that none is still in a cache when
    its memory comes round again. The shortest of several turns counts: other programs can only add to it.
    """
    n = max(BLOCK, min(n, WINDOW // D) // BLOCK * BLOCK)
    weights = itertools.cycle(scratch[: len(scratch) // (n * D) * n * D].split(n * D))
    x, seconds = torch.ones(1, 1, D), dict.fromkeys(LAYOUTS, math.inf)
    for _ in range(5):
        for name, layout in LAYOUTS.items():
            window = [next(weights).view(layout.shape(n, D)) for _ in range(max(1, WINDOW // (n * D)))]
            start = time.perf_counter()
            for weight in window:
                layout.multiply(x, weight, n)
            seconds[name] = min(seconds[name], (time.perf_counter() - start) / len(window))
    return seconds


class Packer:
    """Stores weights of one model for products with about num_rows rows; any number works.

    dtype   of the activations: computing_dtype() of the weights
    layout  one of LAYOUTS; None: the fastest on this machine, timed once per shape (10 to 20 ms each)
    """

    def __init__(self, num_rows: int, dtype: torch.dtype, layout: str | None = None):
        self.num_rows, self.dtype, self.layout = num_rows, dtype, layout
        self.chosen: dict[tuple[int, int], str] = {}  # by shape of the weight
        self.scratch: Tensor | None = None

    def __call__(self, *weights: Tensor, num_rows: int | None = None) -> Callable[[Tensor], Tensor]:
        """The product x -> x @ cat(weights).T"""
        num_rows = num_rows or self.num_rows
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        if weight.dtype != self.dtype:
            return Half(weight, None)
        if not can_pack(weight):
            return partial(F.linear, weight=weight)
        if weight.dtype != torch.float32 or num_rows > 1:
            return Packed(weight, None, num_rows)
        layout = LAYOUTS[self.layout or self.choose(*weight.shape)]
        arranged, n = layout.arrange(weight), len(weight)
        return lambda x: layout.multiply(x, arranged, n)

    def choose(self, n: int, D: int) -> str:
        if n * D < SMALLEST:
            return USUAL
        if (n, D) not in self.chosen:
            if self.scratch is None:
                self.scratch = torch.ones(SCRATCH)
            seconds = time_layouts(self.scratch, n, D)
            # Each layout rounds its sums in its own way, so near ties are not left to chance.
            seconds[USUAL] *= 0.95
            self.chosen[n, D] = min(seconds, key=seconds.get)
        return self.chosen[n, D]


def can_pack(weight: Tensor) -> bool:
    """Has oneDNN a blocked form of this weight? In bfloat16 only where the processor has the instructions for
    it (AVX512, or AVX2 with NE_CONVERT); elsewhere asking for one raises."""
    return (
        weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and (
            weight.dtype == torch.float32
            or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
    )


class Packed(nn.Module):
    """nn.Linear with its weight in oneDNN's blocked form, chosen for num_rows; any number of rows works."""

    def __init__(self, weight: Tensor, bias: Tensor | None, num_rows: int):
        super().__init__()
        self.bias = bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), num_rows)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class Half(nn.Module):
    """nn.Linear that stores 16 bits and computes in float32: for CPUs that do not compute in bfloat16, where
    a bfloat16 product of many rows takes a hundred times as long as one in float32.

    Every processor with AVX2 widens float16 as it reads. What is stored is bfloat16's value wherever a weight
    lies between 6e-5 and 65504; smaller ones are off by 3e-8 at most, and of larger ones PyTorch warns.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        bias = None if bias is None else bias.detach().float()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.detach().float(), bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


def computing_dtype(weight: Tensor) -> torch.dtype:
    """What to compute in with a weight of this dtype: its own, or float32 where it is stored as Half."""
    is_half = weight.dtype in (torch.bfloat16, torch.float16)
    if is_half and weight.device.type == "cpu" and has_half_products() and is_emulated(weight.dtype):
        return torch.float32
    return weight.dtype


def has_half_products() -> bool:
    """Those of Half come with PyTorch for x86."""
    return torch.backends.quantized.engine in ("x86", "fbgemm")


@cache
def is_emulated(dtype: torch.dtype) -> bool:
    """Is a product of 16 bits slower than one in float32 on this CPU? Where it has instructions for them, it
    takes half the time at most."""
    if dtype == torch.float16:
        return not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    weight = torch.ones(256, 256)
    if not can_pack(weight.to(dtype)):
        return True
    seconds = {torch.float32: math.inf, dtype: math.inf}
    for number in seconds:
        product, x = Packed(weight.to(number), None, 64), torch.ones(64, 256, dtype=number)
        for _ in range(4):
            start = time.perf_counter()
            product(x)
            seconds[number] = min(seconds[number], time.perf_counter() - start)
    return seconds[dtype] > seconds[torch.float32]


def pack_linears(model: nn.Module, num_rows: int) -> None:
    """Give all linear layers of a frozen model on a CPU the form that is fast there; their nn.Linear goes.
    Afterwards the model computes in computing_dtype()."""
    dtype = computing_dtype(next(model.parameters()))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Linear):
                continue
            if child.weight.dtype != dtype:
                setattr(parent, name, Half(child.weight, child.bias))
            elif can_pack(child.weight):
                setattr(parent, name, Packed(child.weight, child.bias, num_rows))
    model.to(dtype)
