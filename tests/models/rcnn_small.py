"""Detectors that are small enough for many tests, and images with objects for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.targets.instances import Instances
from dgt.models import ModelConfig
from dgt.models.rcnn import RCNN
from dgt.models.rcnn_config import HeadsConfig, RCNNConfig, RPNConfig

CLASSES = 3
CANVAS = (64, 128)
DETECTORS = ("faster_rcnn", "mask_rcnn", "cascade_mask_rcnn")
RPN = RPNConfig(anchor_sizes=(8, 16, 32, 64, 128), pre_nms=60, post_nms=40, anchors_per_image=32)
HEADS = HeadsConfig(rois_per_image=16, hidden_features=24, mask_convs=1, mask_channels=8)


def build(detector: Any = "mask_rcnn", drop_path_rate: float = 0.0, **options: Any) -> RCNN:
    torch.manual_seed(0)
    config = RCNNConfig(**({"detector": detector, "fpn_channels": 16, "rpn": RPN, "heads": HEADS} | options))
    return RCNN(ModelConfig(name="dgt_nano", drop_path_rate=drop_path_rate), CLASSES, config)


def images(n: int) -> Tensor:
    return torch.randn(n, 3, *CANVAS, generator=torch.Generator().manual_seed(1))


def instances(seed: int, count: int, size: tuple[int, int]) -> Instances:
    """Ellipses somewhere in the image, with boxes that are no whole numbers."""
    rng = np.random.default_rng(seed)
    height, width = size
    corners = rng.uniform(0, 0.6, (count, 2)) * (width, height)
    far = np.minimum(corners + rng.uniform(6, 40, (count, 2)), (width, height))
    boxes = np.concatenate([corners, far], axis=1).astype(np.float32)
    masks = []
    for left, top, right, bottom in boxes.tolist():
        y, x = np.mgrid[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] + 0.5
        along = (2 * x - left - right) / (right - left), (2 * y - top - bottom) / (bottom - top)
        masks.append((along[0] ** 2 + along[1] ** 2 < 1).astype(np.uint8))
    return Instances(boxes, rng.integers(0, CLASSES, count), tuple(masks))


def full_masks(target: Instances, size: tuple[int, int]) -> Tensor:
    """(k, H, W) uint8."""
    whole = torch.zeros(len(target), *size, dtype=torch.uint8)
    assert target.masks is not None
    for k, ((left, top, _, _), mask) in enumerate(zip(target.boxes.tolist(), target.masks, strict=True)):
        whole[k, int(top) : int(top) + mask.shape[0], int(left) : int(left) + mask.shape[1]] = torch.from_numpy(mask)
    return whole


SIZES = [(64, 128), (50, 128), (64, 90)]
TARGETS = [instances(0, 4, SIZES[0]), instances(1, 0, SIZES[1]), instances(2, 7, SIZES[2])]
KEYS = torch.tensor([11, 2**32 - 1, 987654321])
