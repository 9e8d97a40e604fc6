"""What is trained, by which optimizer, how fast."""

import math
from collections.abc import Callable

import torch
from torch import nn

from model.transformer import Transformer


def choose_trained(model: Transformer, choice: str) -> None:
    """Freeze what --train leaves out (args.TRAIN_CHOICES).

    all              the projection and the language model, as v1
    projection       the projection alone: LLaVA's first stage
    projection+last  the projection, the last block and the final norm
    """
    trained = {
        "all": ("",),
        "projection": ("vision_proj.",),
        "projection+last": ("vision_proj.", f"layers.{model.config.n_layers - 1}.", "norm."),
    }[choice]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def plain(method: Callable) -> Callable:
    """A method of PyTorch's optimizers without the wrapping that keeps torch.compile out of it."""
    return getattr(method, "__wrapped__", method)


class AdamW(torch.optim.AdamW):
    """PyTorch's, to the bit and in its files, as long as nobody compiles it, which nobody does here. The
    wrappings of its methods import PyTorch's compiler, which takes as long as all the rest of PyTorch."""

    step = torch.no_grad()(plain(torch.optim.AdamW.step))
    zero_grad = plain(torch.optim.AdamW.zero_grad)
    add_param_group = plain(torch.optim.AdamW.add_param_group)
    state_dict = plain(torch.optim.AdamW.state_dict)
    load_state_dict = plain(torch.optim.AdamW.load_state_dict)


def make_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """AdamW; decay, if any, on matrices only. Without decay this is Adam, v1's optimizer.

    Fused: one pass over the memory, and a step that turned out not to be finite is skipped on the device.
    """
    parameters = trained_parameters(model)
    groups = [
        {
            "params": [parameter for parameter in parameters if parameter.ndim >= 2],
            "weight_decay": weight_decay,
        },
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return AdamW(groups, lr=learning_rate, fused=True)


def learning_rate_at(step: int, total_steps: int, peak: float, warmup_steps: int = 0) -> float:
    """Linear warm-up, then a cosine from the peak to a tenth of it."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
