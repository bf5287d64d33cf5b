"""The engines: one file each. The loop builds one by its configured name and knows none."""

from __future__ import annotations

import importlib.util

from torch import nn

from dgt.training.optim import NEEDS_WHOLE_TENSORS, OptimizerConfig, check_optimizer
from dgt.training.parallel.blocks import compile_blocks, use_apex_layer_norm
from dgt.training.parallel.config import DeepSpeedConfig, EngineConfig
from dgt.training.parallel.engine import Accept, Engine, StepResult
from dgt.training.parallel.precision import allow_tf32
from dgt.training.world import World

__all__ = ["Accept", "Engine", "EngineConfig", "StepResult", "build_engine", "check_engine", "check_network"]


def check_engine(config: EngineConfig, optimizer: OptimizerConfig, ranks: int) -> None:
    """Raises ValueError where this optimizer, this number of ranks or a missing package rule the engine out."""
    check_optimizer(optimizer, sharded=config.name == "fsdp")
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
    if config.name == "deepspeed" and config.deepspeed.settings:
        check_settings(config.deepspeed)
    if config.apex_layer_norm and importlib.util.find_spec("apex") is None:
        raise ValueError(
            "engine.apex_layer_norm: NVIDIA's apex is not installed; build it from its source "
            "(https://github.com/NVIDIA/apex), or set this to false"
        )


def check_settings(config: DeepSpeedConfig) -> None:
    """Raises ValueError where DeepSpeed does not take a value among the settings for it."""
    from dgt.training.parallel.deepspeed import imported, settings_of

    imported()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**settings_of(config, clip=0.0, elements=1)["zero_optimization"])
    except ValueError as error:
        raise ValueError(f"engine.deepspeed.settings: DeepSpeed refuses zero_optimization: {error}") from None


def check_network(network: nn.Module, ranks: int) -> None:
    """Raises ValueError where nothing in the network learns, or it keeps running statistics on more than one rank."""
    if not any(p.requires_grad for p in network.parameters()):
        raise ValueError("model.freeze: nothing is left to train")
    kept = [name for name, module in network.named_modules() if keeps_own_statistics(module)]
    if kept and ranks > 1:
        module = kept[0]
        raise ValueError(
            f"model.name: the module {module!r} ({type(network.get_submodule(module)).__name__}) keeps running "
            f"statistics, and each of {ranks} ranks would keep others, of its own samples; train on one rank, or "
            "choose a network that normalises each sample by itself (layer or group norm), such as a dgt_* model"
        )


def keeps_own_statistics(module: nn.Module) -> bool:
    """Whether training changes what the module normalises by, on each rank as its own samples are."""
    from timm.layers import FrozenBatchNormAct2d
    from torchvision.ops import FrozenBatchNorm2d

    if isinstance(module, nn.SyncBatchNorm | FrozenBatchNormAct2d | FrozenBatchNorm2d):
        return False
    return any(name in ("running_mean", "running_var") for name, _ in module.named_buffers(recurse=False))


def build_engine(network: nn.Module, world: World, config: EngineConfig, optimizer: OptimizerConfig) -> Engine:
    """Spreads a freshly built `network`, equal on all ranks, over the ranks.

    The order is fixed: activation checkpointing (inside each block), then compilation of each block, then sharding
    around it. Raises ValueError as `check_engine` and `check_network` do.
    """
    check_engine(config, optimizer, world.size)
    check_network(network, world.size)
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
