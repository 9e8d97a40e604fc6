"""Where and in what arithmetic to compute, from what the user asked for."""

import contextlib
from collections.abc import Iterator

import torch
from torch.overrides import TorchFunctionMode

from model.names import DEVICE


def choose_device(device: str, index: int = 0) -> torch.device:
    """ "auto" (CUDA if there is any, else Apple's MPS, else CPU), "cpu", "mps", "cuda" (number `index`) or
    "cuda:N".

    Raises ValueError if it is not available.
    """
    if not DEVICE.fullmatch(device):
        raise ValueError(f"--device must be auto, cpu, cuda, cuda:N or mps, not {device}")
    if device == "auto":
        device = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else device
    kind = device.partition(":")[0]
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                "--device cuda: no CUDA device is available to this PyTorch "
                f"({torch.__version__}); use --device cpu or install a CUDA build"
            )
        number = int(device.partition(":")[2] or index)
        if number >= torch.cuda.device_count():
            raise ValueError(
                f"--device cuda:{number}: this machine has {torch.cuda.device_count()} "
                "CUDA device(s); start fewer processes (--nproc_per_node)"
            )
        return torch.device("cuda", number)
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: not available to this PyTorch; use --device cpu")
    return torch.device(kind)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """A name of names.DTYPES, or "auto": bfloat16 on GPUs that have it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


class NoInit(TorchFunctionMode):
    """Inside, functions of torch.nn.init leave a tensor as it is."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Models made inside cost nothing: their tensors have a shape but no memory, until they take a file's.

    Nor are they filled. There is nothing to fill, but PyTorch would import its compiler for it, which takes
    as long as all the rest of it.
    """
    with torch.device("meta"), NoInit():
        yield
