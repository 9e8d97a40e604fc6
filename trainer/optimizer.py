"""What is trained, by which optimizer, how fast."""

import math

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
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)


def learning_rate_at(step: int, total_steps: int, peak: float, warmup_steps: int = 0) -> float:
    """Linear warm-up, then a cosine from the peak to a tenth of it."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
