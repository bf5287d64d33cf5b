"""Tiny sets for dense tasks and exported files of random weights for them, whose answers are not all alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from data_pipeline.prepare import main as prepare
from dgt.config import load, to_yaml
from dgt.tasks import build_task

SIZES = [(40, 56), (64, 64), (52, 36), (48, 48), (36, 70)]
"""(height, width) of the validation images: as many as neither 2 nor 3 ranks divide."""
CLASSES = ("sky", "road", "car", "tree")
CATEGORIES = {18: "dog", 3: "car", 44: "bottle"}
OBJECTS = 4
"""In each image for detection; one of the last image's is a crowd."""


def pixels(size: tuple[int, int], seed: int) -> np.ndarray:
    """Coarse noise, uint8 (H, W, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (-(-size[0] // 8), -(-size[1] // 8), 3), np.uint8)
    return coarse.repeat(8, axis=0).repeat(8, axis=1)[: size[0], : size[1]]


def mask_of(number: int) -> np.ndarray:
    """The classes of an image of the segmentation set, uint8 (H, W), with a patch that is ignored."""
    mask = pixels(SIZES[number], 50 + number)[..., 0] % 4
    mask[3:20, 5:17] = 255
    return mask


def segmentation_set(folder: Path) -> Path:
    """The shards of a set with `mask_of` as masks."""
    for number, size in enumerate(SIZES):
        for kind, content in (("images", pixels(size, number)), ("annotations", mask_of(number))):
            for split in ("train", "val"):
                path = folder / "source" / kind / split / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(content).save(path)
    command = ["segmentation", "--src", str(folder / "source"), "--out", str(folder / "set"), "--jobs", "1"]
    assert prepare([*command, "--class-names", ",".join(CLASSES)]) == 0
    return folder / "set"


def objects_of(number: int) -> list[dict[str, Any]]:
    """The annotations of an image of the detection set."""
    rng, (height, width) = np.random.default_rng(number), SIZES[number]
    objects = []
    for place in range(OBJECTS):
        w, h = rng.integers(14, 34, 2).tolist()
        x, y = int(rng.integers(width - w)), int(rng.integers(height - h))
        crowd = number == len(SIZES) - 1 and place == 0
        runs: Any = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        if crowd:  # the upper half of its box as runs down the columns
            mask = np.zeros((height, width), int)
            mask[y : y + h // 2, x : x + w] = 1
            edges = np.flatnonzero(np.diff(mask.T.ravel(), prepend=0))
            runs = {"size": [height, width], "counts": np.diff([0, *edges, mask.size]).tolist()}
        objects.append(
            {"id": 10 * number + place, "image_id": 70 - number, "category_id": int(rng.choice([*CATEGORIES])),
             "bbox": [x, y, w, h], "area": w * h, "iscrowd": int(crowd), "segmentation": runs}
        )  # fmt: skip
    return objects


def detection_set(folder: Path) -> Path:
    """The shards of a set in COCO's format; image ids fall, and category ids do neither rise nor fall."""
    for split in ("train", "val"):
        (folder / "source" / split).mkdir(parents=True)
        (folder / "source" / "annotations").mkdir(exist_ok=True)
        images = []
        for number, (height, width) in enumerate(SIZES):
            Image.fromarray(pixels((height, width), number)).save(folder / "source" / split / f"{number}.png")
            images.append({"id": 70 - number, "file_name": f"{number}.png", "height": height, "width": width})
        content = {
            "images": images,
            "annotations": [one for number in range(len(SIZES)) for one in objects_of(number)],
            "categories": [{"id": number, "name": name} for number, name in CATEGORIES.items()],
        }
        (folder / "source" / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    command = ["coco", "--src", str(folder / "source"), "--out", str(folder / "set"), "--splits", "train", "val"]
    assert prepare([*command, "--jobs", "1"]) == 0
    return folder / "set"


def settings(path: Path, task: dict[str, Any], classes: int, **data: Any) -> dict[str, Any]:
    """A configuration for the set at `path`."""
    return {
        "task": task,
        "model": {"name": "dgt_nano"},
        "data": {"path": str(path), "num_classes": classes, "num_threads": 0, **data},
        "steps": {"global_batch_size": 4, "micro_batch_size": 2},
        "mixing": {"mixup_alpha": 0.0, "cutmix_alpha": 0.0},
        "engine": {"precision": "fp32", "threads": 1, "activation_checkpointing": "none"},
    }


def exported(
    folder: Path, values: dict[str, Any], spread: Mapping[str, float], fixed: Mapping[str, float] = MappingProxyType({})
) -> Path:
    """A file as launch/export.py writes it, of random weights; some have a deviation or a value."""
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    config = load(folder / "tiny.yaml")
    torch.manual_seed(0)
    network = build_task(config.task, config.model, config.data).build_model()
    with torch.no_grad():
        for name, deviation in spread.items():
            network.get_parameter(name).normal_(std=deviation)
        for name, value in fixed.items():
            network.get_parameter(name).fill_(value)
    facts = {"format": "pt", "config": to_yaml(config), "step": "5", "weights": "ema"}
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, folder / "tiny.safetensors", metadata=facts)
    return folder / "tiny.safetensors"


def segmentation_weights(folder: Path) -> Path:
    """Of a UPerNet, beside its set."""
    task = {"name": "segmentation", "head": {"channels": 16, "auxiliary_channels": 8, "norm_groups": 4}}
    sizes = {"crop_size": 32, "short_side": 32, "long_side": 96}
    values = settings(segmentation_set(folder), task, len(CLASSES), segmentation=sizes)
    return exported(folder, values, {"classifier.conv.weight": 2.0})


def detection_weights(folder: Path) -> Path:
    """Of a Mask R-CNN, beside its set."""
    task = {
        "name": "detection", "fpn_channels": 16, "score_threshold": 0.0, "nms_threshold": 0.9, "max_detections": 150,
        "rpn": {"anchor_sizes": [32, 32, 40, 48, 64], "pre_nms": 600, "post_nms": 300, "nms_threshold": 0.95},
        "heads": {"hidden_features": 16, "mask_convs": 1, "mask_channels": 16, "rois_per_image": 16},
    }  # fmt: skip
    sizes = {"short_sides": [64], "eval_short_side": 64, "long_side": 128}
    values = settings(detection_set(folder), task, len(CATEGORIES), detection=sizes)
    head = "roi_heads.box_heads.0.predictor"
    # boxes are those of anchors, a few of which fit some object; all classes are about as likely, and masks fill boxes
    spread = {f"{head}.cls_score.weight": 0.1, f"{head}.bbox_pred.weight": 0.0, "rpn.head.bbox_pred.weight": 0.0}
    return exported(folder, values, spread, {"roi_heads.mask_head.1.mask_fcn_logits.bias": 9.0})
