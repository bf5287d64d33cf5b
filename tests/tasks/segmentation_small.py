"""Segmentation tasks that are small enough for many tests."""

from __future__ import annotations

from typing import Any

from data_pipeline.config import DataConfig, SegmentationDataConfig
from dgt.models import ModelConfig
from dgt.tasks import SegmentationConfig
from dgt.tasks.segmentation import Segmentation
from dgt.tasks.segmentation_config import UPerNetConfig

CLASSES = 5
HEAD = UPerNetConfig(channels=16, auxiliary_channels=8, norm_groups=4)


def task(crop: int = 32, short: int = 32, long: int = 128, **options: Any) -> Segmentation:
    data = SegmentationDataConfig(crop_size=crop, short_side=short, long_side=long)
    config = SegmentationConfig(head=options.pop("head", HEAD), **options)
    return Segmentation(
        config, ModelConfig(name="dgt_nano", drop_path_rate=0.2), DataConfig(num_classes=CLASSES, segmentation=data)
    )
