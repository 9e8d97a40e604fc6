"""Three functions of the transformer whose backward pass is written out: it keeps and reads less
memory than what autograd records. Nothing here need be read to understand the model.
"""
import torch
import torch.nn.functional as F
from torch import Tensor


class LeanRMSNorm(torch.autograd.Function):
    """x (..., D) divided by its root mean square r, times weight (D,). Keeps x and 1 / r alone for the
    backward pass, and touches memory half as often as the dozen steps that autograd would record on a CPU."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True)     # (..., 1)
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
        along_x = (product @ weight.unsqueeze(1)).mul_(inverse.pow(3).div_(D))      # through r itself
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
