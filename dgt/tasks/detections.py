"""What a detector says of one image, and beside it what was annotated there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.targets.objects import ImageObjects


@dataclass(frozen=True)
class Detected:
    """d detections, the most likely first, in pixels of the stored image."""

    boxes: npt.NDArray[np.float32]
    """(d, 4) left, top, right, bottom."""
    scores: npt.NDArray[np.float32]
    """(d,) in [0, 1]."""
    labels: npt.NDArray[np.int64]
    """(d,) class indices from 0 on."""
    masks: tuple[dict[str, Any], ...] | None
    """Run-length encodings as COCO has them: {"size": [H, W], "counts": text}; None of a detector without masks."""


@dataclass(frozen=True)
class Judged:
    """One image of an evaluation: a record of `Findings.records` in detection."""

    detected: Detected
    truth: ImageObjects
