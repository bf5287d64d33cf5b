"""The engines: one file each. The loop builds one by its configured name and knows none."""

from __future__ import annotations

from torch import nn

from dgt.training.optim import OptimizerConfig
from dgt.training.parallel.config import EngineConfig
from dgt.training.parallel.engine import Accept, Engine, StepResult
from dgt.training.world import World

__all__ = ["Accept", "Engine", "EngineConfig", "StepResult", "build_engine"]


def build_engine(network: nn.Module, world: World, config: EngineConfig, optimizer: OptimizerConfig) -> Engine:
    """Spreads a freshly built `network`, equal on all ranks, over the ranks.

    The order is fixed: activation checkpointing first (inside each block), then sharding around it.
    """
    from dgt.training.parallel.ddp import DdpEngine
    from dgt.training.parallel.fsdp import FsdpEngine

    if config.activation_checkpointing != "none":
        network.set_grad_checkpointing(True, mode=config.activation_checkpointing)  # type: ignore[operator]
    engines: dict[str, type[Engine]] = {"ddp": DdpEngine, "fsdp": FsdpEngine}
    return engines[config.name](network, world, config, optimizer)
