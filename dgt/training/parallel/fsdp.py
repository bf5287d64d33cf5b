"""Each rank holds a shard of every parameter (FSDP2); a block's weights are whole only while it computes."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from dgt.training.optim import OptimizerConfig
from dgt.training.parallel.blocks import units
from dgt.training.parallel.config import EngineConfig
from dgt.training.parallel.engine import Engine
from dgt.training.parallel.precision import HALF
from dgt.training.world import World


class FsdpEngine(Engine):
    """FSDP2's `fully_shard` around every DG-Attention block, every head of a dense network, and around the rest."""

    def __init__(self, network: nn.Module, world: World, config: EngineConfig, optimizer: OptimizerConfig):
        options = config.fsdp
        inner = outer = MixedPrecisionPolicy()
        if config.precision in HALF:
            inner = MixedPrecisionPolicy(param_dtype=HALF[config.precision], reduce_dtype=torch.float32)
            outer = dataclasses.replace(inner, output_dtype=torch.float32)
        offload = OffloadPolicy()
        if options.cpu_offload:
            offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
        network.to(world.device)
        shared: dict[str, Any] = {"mesh": mesh_of(world, options.shard_size), "offload_policy": offload}
        for unit in units(network):
            fully_shard(unit, mp_policy=inner, reshard_after_forward=options.reshard_after_forward, **shared)
        # The root's own weights are needed first in the backward pass that follows.
        fully_shard(network, mp_policy=outer, reshard_after_forward=False, **shared)
        super().__init__(network, world, config, optimizer)

    @contextmanager
    def accumulating(self, last: bool) -> Any:
        """Keeps whole gradients on this rank until the last micro-batch scatters their sum."""
        assert isinstance(self.network, FSDPModule)
        self.network.set_requires_gradient_sync(last)
        yield

    def reshard(self) -> None:
        """Frees the whole weights that FSDP keeps at the root after a forward pass without a backward one."""
        for module in self.network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def mesh_of(world: World, shard_size: int) -> DeviceMesh:
    """All ranks in a row, or copies times the `shard_size` ranks that share one (0 = all)."""
    kind, size = world.device.type, shard_size or world.size
    if size == world.size:
        return init_device_mesh(kind, (world.size,))
    return init_device_mesh(kind, (world.size // size, size), mesh_dim_names=("replicate", "shard"))
