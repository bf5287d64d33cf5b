"""Every rank holds the whole network; gradients are averaged in the last micro-batch's backward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dgt.training.optim import OptimizerConfig
from dgt.training.parallel.config import EngineConfig
from dgt.training.parallel.engine import Engine
from dgt.training.parallel.precision import HALF
from dgt.training.world import World


class DdpEngine(Engine):
    """DistributedDataParallel; a world of one needs no wrapper."""

    def __init__(self, network: nn.Module, world: World, config: EngineConfig, optimizer: OptimizerConfig):
        # Gradients of channels-last convolutions have that layout; weights that share it spare DDP a copy of each.
        network = network.to(world.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        super().__init__(network, world, config, optimizer)
        if world.size > 1:
            devices = [world.device] if world.device.type == "cuda" else None
            self.model = DistributedDataParallel(network, device_ids=devices, gradient_as_bucket_view=True)

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Holds gradients back on this rank until the last micro-batch."""
        return nullcontext() if last or self.model is self.network else self.model.no_sync()  # type: ignore[operator]

    def arithmetic(self) -> AbstractContextManager[Any]:
        """Autocast to 16 bits where configured; weights and gradients stay float32."""
        half = HALF.get(self.config.precision)
        return torch.autocast(self.world.device.type, half) if half else nullcontext()
