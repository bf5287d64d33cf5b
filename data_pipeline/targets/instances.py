"""The objects of one training image as it is served: resized, mirrored, cut at its border."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Instances:
    """k objects to be learned; crowds, what is less than a pixel wide or high, and masks without a pixel are not among
    them."""

    boxes: npt.NDArray[np.float32]
    """(k, 4) left, top, right, bottom in pixels of the served image."""

    labels: npt.NDArray[np.int64]
    """(k,) class indices from 0 on."""

    masks: tuple[npt.NDArray[np.uint8], ...] | None
    """For each object, 0 or 1 for every pixel of its box rounded outwards (floor of left and top, ceiling of right and
    bottom), (h, w); None where the set has boxes only. So hundreds of objects take few more than their own pixels."""

    def __len__(self) -> int:
        return len(self.labels)
