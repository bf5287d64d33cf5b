"""What can be chosen about a detector of the R-CNN family."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class RPNConfig:
    """Region proposals (Faster R-CNN, arXiv 1506.01497), on the levels of the pyramid at strides 4 to 64."""

    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Side in pixels of the anchors of each level, the finest first."""
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height / width of the anchors, on every level."""
    pre_nms: int = 2000
    """Proposals of a level that go into suppression, in training; half as many in evaluation."""
    post_nms: int = 1000
    """Proposals of an image that come out of it."""
    nms_threshold: float = 0.7
    """Overlap (IoU) above which the less likely of two proposals is dropped."""
    anchors_per_image: int = 256
    """Anchors of an image that are learned from, half of them with an object if there are enough."""

    def __post_init__(self) -> None:
        if len(self.anchor_sizes) != 5 or min(self.anchor_sizes) < 1:
            raise ValueError(f"anchor_sizes: must be five sides, one for each level, got {list(self.anchor_sizes)}")
        if not self.aspect_ratios or not all(0 < ratio < math.inf for ratio in self.aspect_ratios):
            raise ValueError(f"aspect_ratios: must be numbers above 0, got {list(self.aspect_ratios)}")
        for name in ("pre_nms", "post_nms", "anchors_per_image"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}: must be at least 2, got {getattr(self, name)}")
        if not 0 < self.nms_threshold <= 1:
            raise ValueError(f"nms_threshold: must lie in (0, 1], got {self.nms_threshold}")


@dataclass(frozen=True)
class HeadsConfig:
    """What is said of each region."""

    rois_per_image: int = 512
    """Regions of an image that are learned from."""
    positive_share: float = 0.25
    """Of these, at most this share shows an object."""
    hidden_features: int = 1024
    """Of the box head's two linear layers."""
    mask_convs: int = 4
    """3x3 convolutions of the mask head."""
    mask_channels: int = 256
    """Their channels."""
    cascade_ious: tuple[float, ...] = (0.5, 0.6, 0.7)
    """Of cascade_mask_rcnn: overlap from which on a region counts as showing an object, at each of its stages."""
    cascade_weights: tuple[float, ...] = (1.0, 0.5, 0.25)
    """Of cascade_mask_rcnn: weights of the stages' losses."""

    def __post_init__(self) -> None:
        for name in ("rois_per_image", "hidden_features", "mask_convs", "mask_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if not 0 < self.positive_share <= 1:
            raise ValueError(f"positive_share: must lie in (0, 1], got {self.positive_share}")
        if not self.cascade_ious or not all(0 < iou < 1 for iou in self.cascade_ious):
            raise ValueError(f"cascade_ious: must lie in (0, 1), got {list(self.cascade_ious)}")
        weights = self.cascade_weights
        if len(weights) != len(self.cascade_ious) or not all(0 <= weight < math.inf for weight in weights):
            raise ValueError(
                f"cascade_weights: must be numbers from 0 on, as many as cascade_ious, got {list(weights)}"
            )


@dataclass(frozen=True)
class RCNNConfig:
    """Boxes, and with a mask_rcnn masks, of the objects of an image."""

    detector: Literal["faster_rcnn", "mask_rcnn", "cascade_mask_rcnn"] = "mask_rcnn"
    """"faster_rcnn": boxes; "mask_rcnn" (arXiv 1703.06870): masks, too; "cascade_mask_rcnn" (1906.09756): boxes in
    stages that ask for more and more overlap."""
    fpn_channels: int = 256
    """Of the feature pyramid (1612.03144)."""
    norm: Literal["none", "group", "frozen_batch", "sync_batch"] = "none"
    """In pyramid and heads: "none", as in Mask R-CNN's own recipe; "group": GroupNorm (1803.08494); "frozen_batch":
    BatchNorm with fixed statistics, for weights that bring some; "sync_batch": BatchNorm over all ranks, on GPUs only
    and outside of the promise that a batch may be split in any way."""
    rpn: RPNConfig = field(default_factory=RPNConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    score_threshold: float = 0.05
    """Detections below it are not given."""
    nms_threshold: float = 0.5
    """Overlap (IoU) above which the less likely of two detections of a class is dropped."""
    max_detections: int = 100
    """Detections given for an image at most; the most likely ones."""

    def __post_init__(self) -> None:
        if self.fpn_channels < 1 or self.max_detections < 1:
            raise ValueError("fpn_channels, max_detections: must be at least 1")
        if not 0 <= self.score_threshold < 1:
            raise ValueError(f"score_threshold: must lie in [0, 1), got {self.score_threshold}")
        if not 0 < self.nms_threshold <= 1:
            raise ValueError(f"nms_threshold: must lie in (0, 1], got {self.nms_threshold}")

    @property
    def has_masks(self) -> bool:
        """Whether objects are segmented."""
        return self.detector != "faster_rcnn"
