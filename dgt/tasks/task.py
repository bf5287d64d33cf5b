"""The interface between the training loop and what is learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor, nn


@dataclass(frozen=True)
class Inputs:
    """One micro-batch as the network sees it."""

    images: Tensor
    """(n, 3, H, W) float, normalised."""
    labels: Tensor
    """(n,) int64."""
    sample_keys: Tensor
    """(n,) int64 in [0, 2**32): keys of the samples' drop-path masks."""
    partner_labels: Tensor | None = None
    """(n,) int64 labels of the samples mixed in; None = not mixed."""
    share: Tensor | None = None
    """(n,) float32 share of each sample that is its own; None = not mixed."""


class Task(Protocol):
    """What the loop knows of a task."""

    best_metric: str
    """Name of the metric, higher is better, by which the best checkpoint is chosen."""

    def build_model(self) -> nn.Module:
        """The network, freshly initialised from torch's global generator."""
        ...

    def macs(self, network: nn.Module, image_size: int) -> int | None:
        """Multiply-accumulates of one forward pass of one square image of that many pixels a side; None where the
        network does not say."""
        ...

    def loss(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Scalar: the *sum* of the samples' losses, so that any split of a batch adds up to the same."""
        ...

    def totals(self, model: nn.Module, images: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """(m,) float64 counts over the samples with `valid` set; totals of batches and ranks add up."""
        ...

    def metrics(self, totals: Tensor) -> dict[str, float]:
        """The metrics of a whole evaluation from its summed totals."""
        ...

    def confusion(self, totals: Tensor) -> np.ndarray | None:
        """int64 (classes, classes): samples by class and by first guess; None where that is not counted."""
        ...
