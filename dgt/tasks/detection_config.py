"""What can be chosen about detection and instance segmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dgt.models.rcnn_config import RCNNConfig


@dataclass(frozen=True)
class DetectionConfig(RCNNConfig):
    """Boxes, and with a mask_rcnn masks, of the objects of an image; the detector is all there is to choose."""

    name: Literal["detection"] = "detection"
    """The task."""
