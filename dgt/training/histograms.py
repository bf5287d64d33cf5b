"""Histograms of weights and gradients, from what this rank holds of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def distributions(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The finite elements of each parameter and its gradient, float32 on the CPU: weights/NAME and gradients/NAME.

    Of a sharded tensor this rank's shard; nothing where an engine keeps gradients elsewhere or a shard is empty.
    """
    for name, parameter in network.named_parameters():
        for kind, tensor in (("weights", parameter), ("gradients", parameter.grad)):
            if tensor is None:
                continue
            own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            values = own.detach().float().cpu().flatten()
            if len(finite := values[torch.isfinite(values)]):
                yield f"{kind}/{name}", finite


def add(curves: SummaryWriter, network: nn.Module, step: int) -> None:
    """Writes one TensorBoard histogram per parameter and per gradient."""
    for name, values in distributions(network):
        curves.add_histogram(name, values, step)
