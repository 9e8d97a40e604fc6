"""The ways to take a training step that are compared: the scripts' own, with one gain left out, and
transformers' LLaVA.

Gains of the network are left out by not putting them on: every model begins as the plain one of
model/transformer.py and is given the fast forms that its variant names.
"""

import copy
from dataclasses import dataclass, replace

import torch

from benchmarks.machine import DTYPES
from model.fast import FastAttention, FastFeedForward, FastRMSNorm, choose_attend, use_fast_kernels
from model.transformer import Attention, FeedForward, RMSNorm, Transformer, apply_rope

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Variant:
    """A way to take the step; the defaults are the scripts' own."""

    dtype: str = "float32"
    cached: bool = False  # features from a feature cache
    bucket: bool = True
    pad_to: int = 0  # 0 = to the longest row
    clip_one_by_one: bool = False
    logits_everywhere: bool = False
    forms: str = "fast"  # of the network, see FORMS
    fused: bool = True  # the optimizer
    llava: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def is_slow(self) -> bool:
        return bool(self.pad_to) or self.llava


FP32, BF16, CACHED = Variant(), Variant("bfloat16"), Variant("bfloat16", cached=True)
PADDED = {"bucket": False, "pad_to": 512}
OURS = {
    "fp32": FP32,
    "bf16": BF16,
    "bf16, cached features": CACHED,
    "everything off": Variant(
        **PADDED, clip_one_by_one=True, logits_everywhere=True, forms="plain", fused=False
    ),
}
LLAVA = {
    "transformers' LLaVA, fp32": Variant(bucket=False, llava=True),
    "transformers' LLaVA, bf16": Variant("bfloat16", bucket=False, llava=True),
    "LLaVA padded to 512, fp32": Variant(**PADDED, llava=True),
    "LLaVA padded to 512, bf16": Variant("bfloat16", **PADDED, llava=True),
}
ABLATION = {
    "bf16, CLIP image by image": replace(BF16, clip_one_by_one=True),
    "cached, padded to 512": replace(CACHED, **PADDED),
    "cached, no buckets": replace(CACHED, bucket=False),
    "cached, logits everywhere": replace(CACHED, logits_everywhere=True),
    "cached, SDPA in bf16": replace(CACHED, forms="fast norms and SwiGLU"),
    "cached, norms and SwiGLU left to autograd": replace(CACHED, forms="fast attention"),
    "cached, plain network": replace(CACHED, forms="plain"),
    "cached, optimizer not fused": replace(CACHED, fused=False),
    "cached, fp32": replace(CACHED, dtype="float32"),
}


# ---- forms of the network ----------------------------------------------------------------------------------


def put_on_all(model: Transformer, dtype: torch.dtype) -> None:
    use_fast_kernels(model, CPU, dtype)


def put_on_attention(model: Transformer, dtype: torch.dtype) -> None:
    for module in model.modules():
        if isinstance(module, Attention):
            module.__class__ = FastAttention
            module.rotate, module.attend = apply_rope, choose_attend(CPU, dtype)


def put_on_norms_and_swiglu(model: Transformer, dtype: torch.dtype) -> None:
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.__class__ = FastRMSNorm
        elif isinstance(module, FeedForward):
            module.__class__ = FastFeedForward


FORMS = {
    "plain": lambda model, dtype: None,
    "fast": put_on_all,
    "fast attention": put_on_attention,
    "fast norms and SwiGLU": put_on_norms_and_swiglu,
}


def make_network(plain: Transformer, variant: Variant) -> Transformer:
    """A model in the variant's forms, on the parameters of the plain one: training either trains both."""
    shared = {id(parameter): parameter for parameter in plain.parameters()}
    network = copy.deepcopy(plain, shared)
    FORMS[variant.forms](network, variant.torch_dtype)
    return network
