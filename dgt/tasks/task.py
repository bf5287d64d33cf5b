"""The interface between the training loop and what is learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch
from data_pipeline.config import Kind


@dataclass(frozen=True)
class Inputs:
    """One micro-batch as the network sees it."""

    images: Tensor
    """(n, 3, H, W) float, normalised."""
    labels: Tensor
    """(n,) int64."""
    sample_keys: Tensor
    """(n,) int64 in [0, 2**32): keys of the samples' drop-path masks, and of every other draw for them."""
    partner_labels: Tensor | None = None
    """(n,) int64 labels of the samples mixed in; None = not mixed."""
    share: Tensor | None = None
    """(n,) float32 share of each sample that is its own; None = not mixed."""
    sizes: Sequence[tuple[int, int]] = ()
    """Of dense tasks: (height, width) of each image, from the upper left corner; the rest is padding."""
    targets: Sequence[Any] = ()
    """Of dense tasks: what each sample teaches, on the host, as `data_pipeline.batch.Batch.targets` says."""


@dataclass
class Findings:
    """What (a part of) an evaluation has found; those of batches and of ranks add up."""

    totals: Tensor
    """(m,) float64 on the device: sums over samples."""
    records: dict[int, Any] = field(default_factory=dict)
    """By sample id: what cannot be summed, such as detections. It travels between ranks."""
    pictures: dict[int, np.ndarray] = field(default_factory=dict)
    """By sample id, uint8 (H, W, 3): answers drawn onto a few images, for a person."""

    def add(self, other: Findings) -> None:
        """Adds those of further samples."""
        self.totals.add_(other.totals)
        self.records |= other.records
        self.pictures |= other.pictures


class Task(Protocol):
    """What the loop knows of a task."""

    kind: Kind
    """What its samples teach."""
    best_metric: str
    """Name of the metric, higher is better, by which the best checkpoint is chosen."""

    def build_model(self) -> nn.Module:
        """The network, freshly initialised from torch's global generator."""
        ...

    def train_size(self, epoch: int) -> tuple[int, int]:
        """(height, width) of training images in an epoch, in pixels; the largest where they vary."""
        ...

    def macs(self, network: nn.Module, height: int, width: int) -> int | None:
        """Multiply-accumulates of one forward pass of one image of that many pixels; None where the network does not
        say."""
        ...

    def loss(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Scalar: the *sum* of the samples' losses, so that any split of a batch adds up to the same."""
        ...

    def found(self, model: nn.Module, batch: Batch, device: torch.device) -> Findings:
        """What the network, in evaluation mode, makes of the samples with `valid` set.

        Every place of a batch takes as many passes of the network on every rank, valid or not: a sharded network
        computes together.
        """
        ...

    def metrics(self, totals: Tensor, records: dict[int, Any]) -> dict[str, float]:
        """The metrics of a whole evaluation, whatever batches and ranks it was made in; `totals` lie on the CPU.

        `records` are sorted by sample id. Raises DataError where nothing could be evaluated.
        """
        ...

    def confusion(self, totals: Tensor) -> np.ndarray | None:
        """int64 (classes, classes): samples (or pixels) by class and by answer; None where that is not counted."""
        ...
