"""The engines: one file each. The loop builds one by its configured name and knows none."""

from __future__ import annotations

from torch import nn

from dgt.training.optim import OptimizerConfig
from dgt.training.parallel.blocks import compile_blocks, use_apex_layer_norm
from dgt.training.parallel.config import EngineConfig
from dgt.training.parallel.engine import Accept, Engine, StepResult
from dgt.training.parallel.precision import allow_tf32
from dgt.training.world import World

__all__ = ["Accept", "Engine", "EngineConfig", "StepResult", "build_engine"]


def build_engine(network: nn.Module, world: World, config: EngineConfig, optimizer: OptimizerConfig) -> Engine:
    """Spreads a freshly built `network`, equal on all ranks, over the ranks.

    The order is fixed: activation checkpointing (inside each block), then compilation of each block, then sharding
    around it. Raises ValueError for what the number of ranks, the optimizer or the engine does not allow, and
    RuntimeError for a package that is missing.
    """
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
