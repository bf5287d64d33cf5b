"""What an evaluation of a segmentation counts: pixels by class and by answer, and what these counts say.

Counts are whole numbers in float64, of which sums are exact below 2^53: they do not depend on how the images were
spread over batches and ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipeline.shards.source import DataError
from data_pipeline.targets.masks import IGNORED


@dataclass(frozen=True)
class PixelCounts:
    """Which sums are kept, in one float64 vector: the confusion matrix, and the number of images."""

    num_classes: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_classes <= IGNORED:
            raise ValueError(f"num_classes: a class map holds 1 to {IGNORED} classes, got {self.num_classes}")

    @property
    def size(self) -> int:
        """Numbers in the vector."""
        return self.num_classes**2 + 1

    def of(self, answer: Tensor, truth: Tensor) -> Tensor:
        """The counts of one image, (size,) float64 on the device of `answer`.

        Args:
            answer: (H, W) uint8 or int64, a class for every pixel.
            truth: the same, on any device; pixels with data_pipeline.targets.masks.IGNORED are not counted.

        Raises:
            ValueError: for maps of different sizes, or a class that there is not.
        """
        if answer.shape != truth.shape:
            raise ValueError(f"the answer has {tuple(answer.shape)} pixels, the class map {tuple(truth.shape)}")
        classes = self.num_classes
        truth = truth.to(answer.device).long()
        counted = truth != IGNORED
        # one class more, into which falls whatever is out of range: an index must not leave the matrix
        rows, columns = truth[counted].clamp(0, classes), answer[counted].long().clamp(0, classes)
        pairs = torch.bincount(rows * (classes + 1) + columns, minlength=(classes + 1) ** 2)
        pairs = pairs.reshape(classes + 1, classes + 1)
        if int(pairs[classes].sum()) or int(pairs[:, classes].sum()):
            raise ValueError(f"a class map or an answer holds a class above {classes - 1}; data.num_classes is wrong")
        return torch.cat([pairs[:classes, :classes].flatten().double(), pairs.new_ones(1).double()])

    def nothing(self, device: torch.device | None = None) -> Tensor:
        """The counts of no image, (size,) float64."""
        return torch.zeros(self.size, dtype=torch.float64, device=device)

    def read(self, totals: Tensor) -> CountedPixels:
        """What summed vectors say; `totals`: (size,) float64 on the CPU. Raises DataError where nothing was counted."""
        numbers = totals.numpy()
        if numbers[-1] == 0:
            raise DataError("nothing could be evaluated: every image of the evaluation split is damaged")
        confusion = numbers[:-1].reshape(self.num_classes, self.num_classes).astype(np.int64)
        return CountedPixels(confusion, int(numbers[-1]))


@dataclass(frozen=True)
class CountedPixels:
    """A whole evaluation. Shares lie in [0, 1]; nan where there is nothing to divide by."""

    confusion: np.ndarray
    """int64 (classes, classes): pixels by class (rows) and by answer (columns)."""
    images: int
    """Images that were answered."""

    @property
    def hits(self) -> np.ndarray:
        """int64 (classes,): pixels whose answer is right, by class."""
        return self.confusion.diagonal()

    @property
    def support(self) -> np.ndarray:
        """int64 (classes,): pixels of each class."""
        return self.confusion.sum(axis=1)

    @property
    def answered(self) -> np.ndarray:
        """int64 (classes,): pixels whose answer is this class."""
        return self.confusion.sum(axis=0)

    @property
    def iou(self) -> np.ndarray:
        """float64 (classes,): intersection over union; nan for a class that is neither there nor ever answered."""
        return _ratio(self.hits, self.support + self.answered - self.hits)

    @property
    def accuracy(self) -> np.ndarray:
        """float64 (classes,): share of the class's pixels whose answer is right; nan for a class that is not there."""
        return _ratio(self.hits, self.support)

    @property
    def precision(self) -> np.ndarray:
        """float64 (classes,): share of right ones among the pixels with this answer; nan for one never given."""
        return _ratio(self.hits, self.answered)

    @property
    def miou(self) -> float:
        """Mean of `iou` over the classes that have one."""
        return _mean(self.iou)

    @property
    def macc(self) -> float:
        """Mean of `accuracy` over the classes that have one."""
        return _mean(self.accuracy)

    @property
    def pixel_accuracy(self) -> float:
        """Share of all labelled pixels whose answer is right."""
        return float(_ratio(self.hits.sum(keepdims=True), self.support.sum(keepdims=True))[0])

    @property
    def metrics(self) -> dict[str, float]:
        """miou, macc and pixel_acc in percent, and the number of images they were counted over.

        Without a single labelled pixel nothing was right: 0 for all three.
        """
        shares = {"miou": self.miou, "macc": self.macc, "pixel_acc": self.pixel_accuracy}
        percent = {name: 100 * share if share == share else 0.0 for name, share in shares.items()}
        return {**percent, "samples": float(self.images)}


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, nan where whole is 0."""
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


def _mean(values: np.ndarray) -> float:
    """Of those that are numbers; nan where none is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
