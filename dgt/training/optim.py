"""The optimizer and which parameters it decays; timm builds both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from dgt.training.pieces import Piece, Pieces, piece_of


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


@torch.no_grad()
def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Gives every parameter its state (zero moments) now, so that a checkpoint is whole even before the first update.

    Optimizers make theirs in an update; this one, of learning rate 0 and without gradients, leaves no other trace.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for _, container, key in slots({}, optimizer):
        value = container[key]
        container[key] = value.zero_() if isinstance(value, Tensor) else type(value)(0)


def slots(names: Mapping[Any, str], optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Where an optimizer keeps its state: a name for each value, and the dictionary and key that hold it."""
    for parameter, state in optimizer.state.items():
        for key in state:
            yield f"{names.get(parameter, '')}.{key}", state, key
    for i, group in enumerate(optimizer.param_groups):
        if "step" in group:  # some of timm's count there
            yield f"groups.{i}.step", group, "step"


def state_pieces(network: nn.Module, optimizer: torch.optim.Optimizer, rank: int, world_size: int) -> Pieces:
    """The optimizer's state by parameter name; plain numbers as float64 tensors."""
    names: dict[Any, str] = {parameter: name for name, parameter in network.named_parameters()}
    pieces = {}
    for name, container, key in slots(names, optimizer):
        value = container[key]
        if isinstance(value, Tensor):
            pieces[name] = piece_of(value, rank, world_size)
        else:
            pieces[name] = Piece(torch.tensor(value, dtype=torch.float64), (), 0, rank, world_size)
    return pieces


def adopt_numbers(network: nn.Module, optimizer: torch.optim.Optimizer, pieces: Pieces) -> None:
    """Takes the plain numbers out of `pieces` that were loaded; tensors were loaded in place."""
    names: dict[Any, str] = {parameter: name for name, parameter in network.named_parameters()}
    for name, container, key in slots(names, optimizer):
        if not isinstance(container[key], Tensor):
            container[key] = type(container[key])(pieces[name].local.item())
