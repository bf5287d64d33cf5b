"""Configurations of dense tasks that are small enough for many real runs, with all on that could break exactness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from small import small_config

from data_pipeline.config import DataConfig
from data_pipeline.dense_config import DetectionDataConfig, SegmentationDataConfig
from dgt.config import Config
from dgt.models.rcnn_config import HeadsConfig, RPNConfig
from dgt.tasks import DetectionConfig, SegmentationConfig
from dgt.tasks.segmentation_config import UPerNetConfig
from dgt.training.mixing import MixingConfig
from dgt.training.steps import StepsConfig

TASKS = ("segmentation", "detection")
CLASSES = {"segmentation": 7, "detection": 6}
HELD_OUT = 7
"""Images of the evaluation split."""

SEGMENTATION = SegmentationConfig(head=UPerNetConfig(channels=16, auxiliary_channels=16, norm_groups=4))
DETECTION = DetectionConfig(
    fpn_channels=16,
    norm="group",
    rpn=RPNConfig(anchor_sizes=(8, 16, 32, 48, 64), pre_nms=100, post_nms=50, anchors_per_image=64),
    heads=HeadsConfig(rois_per_image=32, hidden_features=32, mask_convs=1, mask_channels=16),
    max_detections=20,
)


def dense_config(task: str, folder: Path, data: Path, engine: str = "ddp", **sections: Any) -> Config:
    """dgt_nano with tiny heads at 64 px, five steps of four images, evaluated after the third and the last."""
    parts: dict[str, Any] = {
        "name": task,
        "task": SEGMENTATION if task == "segmentation" else DETECTION,
        "data": DataConfig(
            path=str(data), num_classes=CLASSES[task], num_threads=1,
            segmentation=SegmentationDataConfig(crop_size=64, short_side=64, long_side=128),
            detection=DetectionDataConfig(
                short_sides=(48, 64), long_side=96, eval_short_side=64, aspect_bounds=(1.0,)
            ),
        ),
        "steps": StepsConfig(
            total_steps=5, global_batch_size=4, micro_batch_size=1, evaluate_every_steps=3, evaluate_batch_size=2
        ),
        "mixing": MixingConfig(mixup_alpha=0.0, cutmix_alpha=0.0),
    }  # fmt: skip
    return small_config(folder, engine, **(parts | sections))
