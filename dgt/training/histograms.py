"""Histograms of weights and gradients, from what this rank holds of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

NUM_BINS = 64


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
    """Writes one TensorBoard histogram per parameter and per gradient, of 64 equal bins from least to largest.

    SummaryWriter.add_histogram sorts into 1,500 bins, which takes many times as long.
    """
    for name, values in distributions(network):
        numbers = values.double().numpy()
        counts, edges = np.histogram(numbers, NUM_BINS)
        curves.add_histogram_raw(
            name,
            min=numbers.min(),
            max=numbers.max(),
            num=len(numbers),
            sum=numbers.sum(),
            sum_squares=np.square(numbers).sum(),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )
