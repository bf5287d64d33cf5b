"""Tiny sets for dense tasks, made by the converters, and what a loader serves of them in a form to compare."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_pipeline.batch import Batch
from data_pipeline.config import DataConfig
from data_pipeline.dense_config import DetectionDataConfig, SegmentationDataConfig
from data_pipeline.prepare import main
from data_pipeline.targets.instances import Instances
from data_pipeline.targets.objects import ImageObjects, ObjectLabels, read_objects

Pixels = npt.NDArray[np.uint8]

MASK_SHADES = np.array([10, 70, 130, 190, 250], np.uint8)
"""Brightness of the pixels of each value of a mask: 0 to 3 are classes, and 4 stands for what is ignored (255)."""

SEGMENTATION = SegmentationDataConfig(crop_size=40, short_side=32, long_side=64, photometric_distortion=False)
DETECTION = DetectionDataConfig(short_sides=(32, 48), long_side=80, eval_short_side=32, aspect_bounds=(0.7, 1.0, 1.4))
# (height, width): four aspect ranges, of which the first holds three images and the last an image without objects
DETECTION_SIZES = [(50, 30)] * 3 + [(40, 36)] * 4 + [(36, 40)] * 6 + [(30, 50)] * 4 + [(24, 60)]


def png(pixels: Pixels) -> bytes:
    """The bytes of a PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def mask_of(number: int) -> Pixels:
    """The mask of an image of the segmentation set: four quarters of different values and a patch that is ignored."""
    height, width = 40 + 3 * (number % 5), 44 + 5 * (number % 4)
    mask = np.zeros((height, width), np.uint8)
    mask[: height // 2, width // 3 :] = 1
    mask[height // 2 :, : width // 2] = 2
    mask[height // 2 :, width // 2 :] = 3
    mask[5:12, 7:15] = 255
    return mask


def jpeg(pixels: Pixels) -> bytes:
    """The bytes of a JPEG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def segmentation_set(folder: Path, train: int = 12, val: int = 5, encoded: Callable[[Pixels], bytes] = png) -> Path:
    """Images whose brightness is that of MASK_SHADES; four classes, 255 is ignored."""
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "annotations"):
            (folder / "source" / kind / split).mkdir(parents=True)
        for number in range(count):
            mask = mask_of(number)
            image = np.repeat(MASK_SHADES[np.minimum(mask, 4)][:, :, None], 3, axis=2)
            (folder / "source" / "images" / split / f"{number:04d}.{encoded.__name__}").write_bytes(encoded(image))
            (folder / "source" / "annotations" / split / f"{number:04d}.png").write_bytes(png(mask))
    command = [
        "segmentation",
        "--src",
        str(folder / "source"),
        "--out",
        str(folder / "set"),
        "--class-names",
        "a,b,c,d",
    ]
    assert main([*command, "--shard-size", "5", "--jobs", "1"]) == 0
    return folder / "set"


def rectangle(left: float, top: float, right: float, bottom: float) -> list[float]:
    """The polygon of a rectangle."""
    return [left, top, right, top, right, bottom, left, bottom]


def annotation(number: int, box: tuple[float, float, float, float], segmentation: Any = None, **more: Any) -> Any:
    """An annotation as shards hold it, `box` being left, top, right, bottom; its mask is the box unless told."""
    left, top, right, bottom = box
    return {
        "id": number, "category": number % 2, "bbox": [left, top, right - left, bottom - top], "iscrowd": 0,
        "area": (right - left) * (bottom - top),
        "segmentation": [rectangle(*box)] if segmentation is None else segmentation, **more,
    }  # fmt: skip


def objects_of(size: tuple[int, int], annotations: Iterable[Any], masks: bool = True) -> ImageObjects:
    """Annotations of an image of (height, width) as the loader reads them; two categories."""
    content = {"image_id": 1, "file_name": "1.png", "height": size[0], "width": size[1]}
    data = json.dumps({**content, "annotations": list(annotations)}).encode()
    return read_objects(data, ObjectLabels((3, 9), masks))


def detection_set(folder: Path, sizes: list[tuple[int, int]] = DETECTION_SIZES, masks: bool = True) -> Path:
    """Black images with one or two rectangles in white; two categories; the last image has no object."""
    (folder / "source" / "annotations").mkdir(parents=True)
    for split, chosen in (("train", sizes), ("val", sizes[::4])):
        (folder / "source" / split).mkdir()
        images, annotations = [], []
        for number, (height, width) in enumerate(chosen):
            pixels = np.zeros((height, width, 3), np.uint8)
            for place in range(1 + number % 2 if number + 1 < len(chosen) else 0):
                left, top = 3 + number % 5, 2 + 12 * place
                right, bottom = left + 12, top + 8
                pixels[top:bottom, left:right] = 255
                segmentation = {"segmentation": [rectangle(left, top, right, bottom)]} if masks else {}
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": number, "category_id": 3 + 6 * place, "iscrowd": 0,
                     "bbox": [left, top, right - left, bottom - top], "area": 96, **segmentation}
                )  # fmt: skip
            (folder / "source" / split / f"{number:04d}.png").write_bytes(png(pixels))
            images.append({"id": number, "file_name": f"{number:04d}.png", "height": height, "width": width})
        categories = [{"id": 3, "name": "upper"}, {"id": 9, "name": "lower"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "source" / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    command = ["coco", "--src", str(folder / "source"), "--out", str(folder / "set"), "--splits", "train", "val"]
    assert main([*command, *([] if masks else ["--boxes-only"]), "--shard-size", "5", "--jobs", "1"]) == 0
    return folder / "set"


def segmentation_config(path: Path, **changes: Any) -> DataConfig:
    """Settings for `segmentation_set`; `changes` are those of its section."""
    return DataConfig(path=str(path), num_classes=4, num_threads=0, segmentation=replace(SEGMENTATION, **changes))


def detection_config(path: Path, **changes: Any) -> DataConfig:
    """Settings for `detection_set`; `changes` are those of its section."""
    return DataConfig(path=str(path), num_classes=2, num_threads=0, detection=replace(DETECTION, **changes))


def told(target: Any) -> Any:
    """A target as something that can be compared."""
    if isinstance(target, np.ndarray):
        return target.shape, target.tobytes()
    if isinstance(target, Instances):
        masks = None if target.masks is None else [(mask.shape, mask.tobytes()) for mask in target.masks]
        return target.boxes.tolist(), target.labels.tolist(), masks
    return target


def contents(batch: Batch) -> list[tuple[Any, ...]]:
    """(position, id, valid, size, digest of the pixels, target) of each place."""
    columns = (batch.positions.tolist(), batch.ids.tolist(), batch.valid.tolist(), batch.sizes)
    pixels = [(tuple(image.shape), hashlib.sha256(image.numpy().tobytes()).hexdigest()) for image in batch.images]
    return list(zip(*columns, pixels, map(told, batch.targets), strict=True))
