"""What dense tasks do to images and their targets: plain frozen dataclasses, like those of data_pipeline.config."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SegmentationDataConfig:
    """How images and masks are resized and cropped for semantic segmentation."""

    crop_size: int = 512
    """Height and width of a training crop, in pixels."""

    short_side: int = 512
    """An image is resized so that its short side has so many pixels, in evaluation and, before `scale`, in training."""

    long_side: int = 2048
    """But its long side has at most so many: the smaller of both factors counts."""

    scale: tuple[float, float] = (0.5, 2.0)
    """A training image is resized by a further factor, drawn uniformly from this range."""

    max_class_share: float = 0.75
    """A crop is drawn anew, at most ten times, while one class has more than this share of its labelled pixels."""

    photometric_distortion: bool = True
    """Change brightness (by up to 32 levels), contrast and saturation (times 0.5 to 1.5) and hue (by up to 36 degrees)
    of training images, each with probability 1/2, as mmsegmentation does."""

    def __post_init__(self) -> None:
        for name in ("crop_size", "short_side"):
            _at_least(32, name, getattr(self, name))
        if self.long_side < self.short_side:
            raise ValueError(f"long_side: must not be below short_side {self.short_side}, got {self.long_side}")
        if not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise ValueError(f"scale: must be two numbers above 0, the smaller first, got {list(self.scale)}")
        if not 0 < self.max_class_share <= 1:
            raise ValueError(f"max_class_share: must lie in (0, 1], got {self.max_class_share}")


@dataclass(frozen=True)
class DetectionDataConfig:
    """How images and objects are resized and padded for detection and instance segmentation."""

    short_sides: tuple[int, ...] = (800,)
    """A training image is resized so that its short side has one of these many pixels; the one is drawn for a whole
    global batch, which so is padded little."""

    long_side: int = 1333
    """But its long side has at most so many: the smaller of both factors counts. In evaluation, too."""

    eval_short_side: int = 800
    """The short side in evaluation, in pixels."""

    aspect_bounds: tuple[float, ...] = (0.7, 0.95, 1.05, 1.4)
    """A global batch of training consists of images whose width / height lies between the same two of these bounds, and
    is padded to what is large enough for all such images; () puts any images together. Squares have a range of their
    own, or else they would be padded to 4 by 3."""

    def __post_init__(self) -> None:
        if not self.short_sides:
            raise ValueError("short_sides: must name at least one size")
        for name, sizes in (("short_sides", self.short_sides), ("eval_short_side", (self.eval_short_side,))):
            for size in sizes:
                _at_least(32, name, size)
        largest = max(*self.short_sides, self.eval_short_side)
        if self.long_side < largest:
            raise ValueError(f"long_side: must not be below the short side {largest}, got {self.long_side}")
        bounds = self.aspect_bounds
        if list(bounds) != sorted(set(bounds)) or not all(0 < bound < math.inf for bound in bounds):
            raise ValueError(f"aspect_bounds: must be numbers above 0 that rise, got {list(bounds)}")


def _at_least(least: int, name: str, value: int) -> None:
    if value < least:
        raise ValueError(f"{name}: must be at least {least} pixels, got {value}")
