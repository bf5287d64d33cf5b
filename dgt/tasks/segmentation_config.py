"""What can be chosen about semantic segmentation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class UPerNetConfig:
    """The decoder: UPerNet (Xiao et al., "Unified Perceptual Parsing for Scene Understanding", arXiv 1807.10221)."""

    channels: int = 512
    """Of the pyramid and of the fused map."""
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    """Cells a side into which the pyramid pooling module averages the last stage's map (PSPNet, 1612.01105)."""
    auxiliary_channels: int = 256
    """Of the FCN head on stage 3, which is there in training only; 0 = no such head."""
    auxiliary_weight: float = 0.4
    """Weight of its loss."""
    norm_groups: int = 32
    """Groups of the heads' GroupNorm (1803.08494), which divide all channels above."""
    dropout: float = 0.1
    """Probability of dropping a channel before the classifiers; drawn from the sample's key, as drop path is."""

    def __post_init__(self) -> None:
        for name in ("channels", "norm_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("auxiliary_channels", "auxiliary_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: must be a number that is not negative, got {getattr(self, name)}")
        for name in ("channels", "auxiliary_channels"):
            if getattr(self, name) % self.norm_groups:
                raise ValueError(f"{name}: must be a multiple of norm_groups {self.norm_groups}")
        if self.channels == self.norm_groups:
            raise ValueError(
                f"norm_groups: {self.norm_groups} leave one channel to a group, whose norm makes nothing of a map of "
                "one cell, such as the mean of an image; take half as many or fewer"
            )
        if not self.pool_scales or min(self.pool_scales) < 1:
            raise ValueError(f"pool_scales: must be numbers of cells, got {list(self.pool_scales)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: must lie in [0, 1), got {self.dropout}")


@dataclass(frozen=True)
class SegmentationInferenceConfig:
    """How an image of any size is answered."""

    mode: Literal["whole", "slide"] = "whole"
    """"whole": the resized image at once; "slide": windows of data.segmentation.crop_size, whose probabilities are
    averaged where they overlap."""
    stride: int = 0
    """Pixels between windows; 0 = two thirds of the window."""
    scales: tuple[float, ...] = (1.0,)
    """Factors on data.segmentation.short_side and long_side; the probabilities at all of them are averaged."""
    flip: bool = False
    """Also answer to the mirror image, and average."""

    def __post_init__(self) -> None:
        if self.stride < 0:
            raise ValueError(f"stride: must not be negative, got {self.stride}")
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"scales: must be factors above 0, got {list(self.scales)}")


@dataclass(frozen=True)
class SegmentationConfig:
    """One class per pixel."""

    name: Literal["segmentation"] = "segmentation"
    """The task."""
    head: UPerNetConfig = field(default_factory=UPerNetConfig)
    class_weights: tuple[float, ...] = ()
    """Factor on the loss of each class's pixels; () = 1 for all."""
    ohem_threshold: float = 0.0
    """Learn only from pixels whose own class has less than this probability (online hard example mining, 1604.03540);
    0 = from all."""
    ohem_min_kept: int = 100_000
    """But from this many of each image's at least, those of the lowest probability."""
    inference: SegmentationInferenceConfig = field(default_factory=SegmentationInferenceConfig)

    def __post_init__(self) -> None:
        if not all(0 <= weight < math.inf for weight in self.class_weights):
            raise ValueError(f"class_weights: must be numbers that are not negative, got {list(self.class_weights)}")
        if not 0 <= self.ohem_threshold < 1:
            raise ValueError(f"ohem_threshold: must lie in [0, 1), got {self.ohem_threshold}")
        if self.ohem_min_kept < 1:
            raise ValueError(f"ohem_min_kept: must be at least 1, got {self.ohem_min_kept}")
