"""The optimizer, which parameters it decays, and how fast each layer learns; timm builds them all."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dgt.models import DenseNetwork
from dgt.training.pieces import Piece, Pieces, piece_of

OptimizerName = Literal[
    "adamw", "adam", "nadamw", "sgd", "lamb", "lars", "lion", "adan", "muon", "fused_adamw", "fused_lamb"
]

NEEDS_WHOLE_TENSORS = frozenset({"lamb", "lars", "muon", "fused_lamb"})
"""Optimizers whose update of an element depends on its whole tensor: on its norm, or on it as a matrix."""
FROM_APEX = frozenset({"fused_adamw", "fused_lamb"})
NUM_BETAS = {"sgd": 0, "lars": 0, "adan": 3}
"""How many decay rates an optimizer has; the others have two."""
MOMENTUM = {"sgd": 0.9, "lars": 0.9, "muon": 0.95}
"""The optimizers with a momentum, and what it is unless configured."""
WITHOUT_EPS = frozenset({"sgd", "lion"})
WITH_FUSED = frozenset({"adamw", "adam", "sgd"})
WITHOUT_FOREACH = frozenset({"muon"}) | FROM_APEX
FOREACH_NEEDS_WHOLE = frozenset({"nadamw", "lion"})
"""Optimizers whose foreach uses an operation (lerp) that sharded tensors do not have."""


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights change; biases, norms and what the model names in `no_weight_decay` are not decayed."""

    name: OptimizerName = "adamw"
    """adamw (Loshchilov and Hutter, arXiv 1711.05101), adam, nadamw, sgd (with Nesterov momentum), lamb (1904.00962),
    lars (1708.03888), lion (2302.06675), adan (2208.06677), muon (2502.16982: matrices and convolutions are
    orthogonalised, at AdamW's scale; biases, norms, depth-wise convolutions and the classifier, or all heads of a dense
    task, take AdamW), and apex's fused_adamw and fused_lamb, where it is installed."""
    lr: float = 1e-3
    """Peak learning rate, for the global batch size as configured (it is not scaled)."""
    weight_decay: float = 0.05
    """Decoupled weight decay; adam, sgd and lars add it to the gradient, lamb to the update, as they are defined."""
    betas: tuple[float, ...] | None = None
    """Decay rates of the moments; null = the optimizer's own ([0.9, 0.999] for adamw)."""
    momentum: float | None = None
    """Share of the earlier gradients in sgd, lars (null: 0.9) and muon (null: 0.95)."""
    eps: float | None = None
    """Added to the root of the second moment; null = the optimizer's own (1e-8 for adamw)."""
    clip_grad_norm: float = 5.0
    """Largest L2 norm of the whole gradient; 0 = no clipping."""
    layer_decay: float = 1.0
    """Layer-wise decay of the learning rate (BEiT, arXiv 2106.08254): the head learns at the full rate, each block
    below at this many times the rate of the one above; 1 = all layers alike."""
    implementation: Literal["auto", "foreach", "fused", "for-loop"] = "auto"
    """"foreach": a few operations on all tensors together; "fused": one kernel (adamw, adam, sgd); "for-loop": one
    tensor after the other, for the least memory; "auto": foreach where the optimizer has it."""

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "clip_grad_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative, got {getattr(self, name)}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay: must lie in (0, 1], got {self.layer_decay}")
        if self.betas is not None:
            count = NUM_BETAS.get(self.name, 2)
            if len(self.betas) != count:
                raise ValueError(f"betas: {self.name} has {count} of them, got {list(self.betas)}; null takes its own")
            if not all(0 <= beta < 1 for beta in self.betas):
                raise ValueError(f"betas: must lie in [0, 1), got {list(self.betas)}")
        if self.momentum is not None and not (self.name in MOMENTUM and 0 <= self.momentum < 1):
            raise ValueError(f"momentum: lies in [0, 1) and is for {', '.join(MOMENTUM)}; got {self.momentum}")
        if self.eps is not None and (self.name in WITHOUT_EPS or self.eps < 0):
            raise ValueError(f"eps: must not be negative, and {', '.join(sorted(WITHOUT_EPS))} have none")
        if self.implementation == "fused" and self.name not in WITH_FUSED:
            raise ValueError(f"implementation: 'fused' is there for {', '.join(sorted(WITH_FUSED))}, not {self.name}")
        if self.implementation == "foreach" and self.name in WITHOUT_FOREACH:
            raise ValueError(f"implementation: 'foreach' is not there for {self.name}; set it to auto")


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer over the parameters of the unwrapped or fully sharded `model` that need gradients.

    Raises ValueError where there are none, and as `check_optimizer` does.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    sharded = any(isinstance(p, DTensor) for p in parameters)
    check_optimizer(config, sharded)
    if not parameters:
        raise ValueError("model.freeze: nothing is left to train")
    options: dict[str, Any] = {"betas": config.betas, "eps": config.eps}
    options = {key: value for key, value in options.items() if value is not None}
    if config.name in MOMENTUM:
        options["momentum"] = MOMENTUM[config.name] if config.momentum is None else config.momentum
    if config.name not in WITHOUT_FOREACH:
        whole_only = config.name in FOREACH_NEEDS_WHOLE and sharded
        options["foreach"] = config.implementation in ("auto", "foreach") and not whole_only
    if config.implementation == "fused":
        options["fused"] = True
    if config.name in ("lamb", "fused_lamb"):
        options["max_grad_norm"] = float("inf")  # the engine clips, and knows the norm before
    if config.name == "muon":
        options["fallback_list"] = [f"{name}.*" for name in answering(model)]
    return create_optimizer_v2(
        model,
        opt=config.name.replace("_", ""),
        lr=config.lr,
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay if config.layer_decay < 1 else None,
        **options,
    )


def answering(model: nn.Module) -> list[str]:
    """Modules that Muon leaves to AdamW: the classifier; of a dense network all but the backbone, as its heads end in
    classifiers and regressions, and are drawn anew where the backbone is not."""
    if isinstance(model, DenseNetwork):
        return [name for name, _ in model.named_children() if name != "backbone"]
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier")
    return [classifier] if isinstance(classifier, str) else []


def check_optimizer(config: OptimizerConfig, sharded: bool) -> None:
    """Raises ValueError where apex is asked for and not installed, or what is asked for does not do with shards."""
    name, plain = config.name, config.name.removeprefix("fused_")
    if name in FROM_APEX and importlib.util.find_spec("apex") is None:
        raise ValueError(
            f"optimizer.name: {name} is part of NVIDIA's apex, which is built from its source "
            f"(https://github.com/NVIDIA/apex), and needs a CUDA GPU; {plain} computes the same without either"
        )
    if sharded and name in FROM_APEX:
        raise ValueError(f"optimizer.name: {name} knows no sharded parameters; use {plain}, or engine.name=ddp")
    if sharded and name in FOREACH_NEEDS_WHOLE and config.implementation == "foreach":
        raise ValueError(f"optimizer.implementation: {name} has no foreach for sharded weights; set it to auto")


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
    """Where an optimizer keeps its state: a name for each value, and the dictionary and key that hold it.

    Truth values are none: they say how a parameter is treated, which follows from its shape.
    """
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if not isinstance(value, bool):
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
