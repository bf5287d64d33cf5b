"""What an evaluation of a classifier counts: sums that add up over batches and ranks, and what they say.

Everything is a count, or a sum of float32 confidences. In float64 such sums are exact, whatever their order, while
samples times classes stay below 2^28: a confidence is at least 1 / classes and has 24 significant bits. So the tables
do not depend on how the samples were spread over batches and ranks; the summed cross-entropy does, in its last bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.shards.source import DataError

NUM_BINS = 15
"""Bins of the calibration error (Guo et al. 2017, section 4)."""

MAX_CONFUSION_CLASSES = 100
"""Most classes for which an evaluation during training counts every pair of classes."""


@dataclass(frozen=True)
class Counts:
    """Which sums are kept, in one float64 vector."""

    num_classes: int
    confusion: bool
    """Count every pair of true and guessed class: num_classes^2 more numbers."""

    def of(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """The sums over the samples with `valid` set: (size,) float64 on the device of `logits`.

        Args:
            logits: (n, num_classes) float; equal ones rank by class, so nothing depends on a device's top-k.
            labels: (n,) int64.
            valid: (n,) bool.
        """
        classes, weight = self.num_classes, valid.double()
        losses = F.cross_entropy(logits, labels, reduction="none").double()
        ranked = logits.argsort(dim=1, descending=True, stable=True)[:, :5]
        hits = ranked == labels[:, None]
        top1, top5 = hits[:, 0].double(), hits.any(dim=1).double()
        confidence = logits.softmax(dim=1).amax(dim=1).double()
        guess = ranked[:, 0]
        # bin m of M holds ((m - 1) / M, m / M]; a network that has diverged says nan, which counts in the first
        bins = ((confidence.nan_to_num(0.0) * NUM_BINS).ceil().long() - 1).clamp(0, NUM_BINS - 1)

        def summed(index: Tensor, size: int, *values: Tensor) -> Tensor:
            into = torch.zeros(size, len(values), dtype=torch.float64, device=logits.device)
            return into.index_add_(0, index, torch.stack(values, dim=1) * weight[:, None])

        one = torch.ones_like(weight)
        everything = torch.zeros_like(labels)
        parts = [
            summed(everything, 1, one, top1, top5, losses),
            summed(bins, NUM_BINS, one, top1, confidence),
            summed(labels, classes, one, top1, top5),
            summed(guess, classes, one),
        ]
        if self.confusion:
            parts.append(summed(labels * classes + guess, classes * classes, one))
        return torch.cat([part.flatten() for part in parts])

    def read(self, totals: Tensor) -> Counted:
        """What summed vectors say; `totals`: (size,) float64 on the CPU. Raises DataError where nothing was counted."""
        numbers, classes = totals.numpy(), self.num_classes
        sizes = [4, 3 * NUM_BINS, 3 * classes, classes]
        overall, bins, per_class, guessed, pairs = np.split(numbers, np.cumsum(sizes))
        samples, right, among_five, loss = overall.tolist()
        if samples == 0:
            raise DataError("nothing could be evaluated: every sample of the evaluation split is damaged")
        support, top1, top5 = per_class.reshape(classes, 3).T
        return Counted(
            samples=samples,
            top1=right,
            top5=among_five,
            loss=loss,
            bins=bins.reshape(NUM_BINS, 3),
            support=support.astype(np.int64),
            hits=top1.astype(np.int64),
            hits5=top5.astype(np.int64),
            guessed=guessed.astype(np.int64),
            confusion=pairs.reshape(classes, classes).astype(np.int64) if self.confusion else None,
        )


@dataclass(frozen=True)
class Counted:
    """A whole evaluation."""

    samples: float
    top1: float
    """Samples whose first guess is right."""
    top5: float
    """Samples whose class is among five guesses."""
    loss: float
    """Summed cross-entropy."""
    bins: np.ndarray
    """float64 (NUM_BINS, 3): samples, right first guesses and summed confidence, by the confidence of the guess."""
    support: np.ndarray
    """int64 (classes,): samples of the class; the following are int64 (classes,), too."""
    hits: np.ndarray
    """Samples of the class whose first guess is right."""
    hits5: np.ndarray
    """Samples of the class that is among five guesses."""
    guessed: np.ndarray
    """Samples of any class whose first guess is this class."""
    confusion: np.ndarray | None
    """int64 (classes, classes): samples by class and by first guess; None where not counted."""

    @property
    def metrics(self) -> dict[str, float]:
        """top1, top5 and ece in percent, mean loss, and the number of samples they were counted over."""
        n = self.samples
        return {
            "top1": 100 * self.top1 / n,
            "top5": 100 * self.top5 / n,
            "loss": self.loss / n,
            "ece": self.calibration_error,
            "samples": n,
        }

    @property
    def calibration_error(self) -> float:
        """Expected calibration error in percent: the mean over samples of |accuracy - confidence| of their bin.

        Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.
        """
        return float(100 * np.abs(self.bins[:, 1] - self.bins[:, 2]).sum() / self.samples)
