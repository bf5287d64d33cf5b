"""The engines: one file each. The loop builds one by its configured name and knows none."""

from __future__ import annotations

import importlib.util

from torch import nn

from dgt.training.optim import NEEDS_WHOLE_TENSORS, OptimizerConfig
from dgt.training.parallel.blocks import compile_blocks, use_apex_layer_norm
from dgt.training.parallel.config import EngineConfig
from dgt.training.parallel.engine import Accept, Engine, StepResult
from dgt.training.parallel.precision import allow_tf32
from dgt.training.world import World

__all__ = ["Accept", "Engine", "EngineConfig", "StepResult", "build_engine", "check_engine"]


def check_engine(config: EngineConfig, optimizer: OptimizerConfig, ranks: int) -> None:
    """Raises ValueError where this optimizer, this number of ranks or a missing package rule the engine out."""
    if config.name == "fsdp" and config.fsdp.shard_size and ranks % config.fsdp.shard_size:
        raise ValueError(
            f"engine.fsdp.shard_size: {ranks} ranks do not divide into groups of {config.fsdp.shard_size}; "
            "0 makes one group of all"
        )
    if config.name == "deepspeed" and optimizer.name in NEEDS_WHOLE_TENSORS:
        raise ValueError(
            f"optimizer.name: {optimizer.name} needs whole tensors, which ZeRO cuts; set engine.name to fsdp"
        )
    if config.name == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            "engine.name: deepspeed is not installed; install the extra dgt[deepspeed], or choose another engine"
        )
    if config.apex_layer_norm and importlib.util.find_spec("apex") is None:
        raise ValueError(
            "engine.apex_layer_norm: NVIDIA's apex is not installed; build it from its source "
            "(https://github.com/NVIDIA/apex), or set this to false"
        )


def build_engine(network: nn.Module, world: World, config: EngineConfig, optimizer: OptimizerConfig) -> Engine:
    """Spreads a freshly built `network`, equal on all ranks, over the ranks.

    The order is fixed: activation checkpointing (inside each block), then compilation of each block, then sharding
    around it. Raises ValueError as `check_engine` does.
    """
    check_engine(config, optimizer, world.size)
    from dgt.training.parallel.ddp import DdpEngine
    from dgt.training.parallel.deepspeed import DeepSpeedEngine
    from dgt.training.parallel.fsdp import FsdpEngine

    allow_tf32(config.precision == "tf32")
    if config.apex_layer_norm:
        use_apex_layer_norm(network)
    if config.activation_checkpointing != "none":
        network.set_grad_checkpointing(  # type: ignore[operator]
            True, mode=config.activation_checkpointing, every=config.activation_checkpointing_every
        )
    if config.compile:
        compile_blocks(network)
    engines: dict[str, type[Engine]] = {"ddp": DdpEngine, "fsdp": FsdpEngine, "deepspeed": DeepSpeedEngine}
    return engines[config.name](network, world, config, optimizer)
