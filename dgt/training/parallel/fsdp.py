"""Each rank holds a shard of every parameter (FSDP2); a block's weights are whole only while it computes."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from dgt.models import DGTBlock
from dgt.training.optim import OptimizerConfig
from dgt.training.parallel.config import EngineConfig
from dgt.training.parallel.engine import Engine
from dgt.training.world import World


class FsdpEngine(Engine):
    """FSDP2's `fully_shard` around every DG-Attention block and around the rest."""

    def __init__(self, network: nn.Module, world: World, config: EngineConfig, optimizer: OptimizerConfig):
        mesh = init_device_mesh(world.device.type, (world.size,))
        inner = outer = MixedPrecisionPolicy()
        if config.precision == "bf16":
            inner = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            outer = dataclasses.replace(inner, output_dtype=torch.float32)
        network.to(world.device)
        for block in [module for module in network.modules() if isinstance(module, DGTBlock)]:
            fully_shard(block, mesh=mesh, mp_policy=inner)
        fully_shard(network, mesh=mesh, mp_policy=outer)
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
