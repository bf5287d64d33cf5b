"""Histograms of weights and gradients, from what this rank holds of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from dgt.training.parallel import Engine

NUM_BINS = 64


def distributions(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """The finite elements of each parameter and its gradient, float32 on the CPU: weights/NAME and gradients/NAME.

    Of what this rank holds of them; nothing of a tensor where that is empty.
    """
    weights = {name: piece.local for name, piece in engine.weights().items()}
    for kind, tensors in (("weights", weights), ("gradients", engine.gradients())):
        for name, tensor in tensors.items():
            values = tensor.detach().float().cpu().flatten()
            if len(finite := values[torch.isfinite(values)]):
                yield f"{kind}/{name}", finite


def add(curves: SummaryWriter, engine: Engine, step: int) -> None:
    """Writes one TensorBoard histogram per parameter and per gradient, of 64 equal bins from least to largest.

    SummaryWriter.add_histogram sorts into 1,500 bins, which takes many times as long.
    """
    for name, values in distributions(engine):
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
