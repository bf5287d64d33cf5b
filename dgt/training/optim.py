"""The optimizer and which parameters it decays; timm builds both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.optim import create_optimizer_v2
from torch import nn


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with timm's rules: no weight decay on biases, norms and what the model names in `no_weight_decay`."""

    lr: float = 1e-3
    """Peak learning rate, for the global batch size as configured (it is not scaled)."""
    weight_decay: float = 0.05
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad_norm: float = 5.0
    """Largest L2 norm of the whole gradient; 0 = no clipping."""

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "eps", "clip_grad_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: must lie in [0, 1), got {self.betas}")


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over the parameters of the unwrapped or fully sharded `model`."""
    return create_optimizer_v2(
        model,
        opt="adamw",
        lr=config.lr,
        weight_decay=config.weight_decay,
        betas=tuple(config.betas),
        eps=config.eps,
        filter_bias_and_bn=True,
        foreach=True,  # one call for all parameters: with sharded ones each call has a price of its own
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every parameter group, times the group's `lr_scale` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
