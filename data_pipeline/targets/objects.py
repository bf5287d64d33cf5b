"""Annotated objects of one image: the JSON beside it in a shard.

    {"image_id": 139, "file_name": "000000000139.jpg", "width": 640, "height": 426, "annotations": [
        {"id": 1768, "category": 56, "bbox": [x, y, width, height], "area": 9.5, "iscrowd": 0, "segmentation": ...}]}

Everything is as COCO has it (pixels of the upright image, from its upper left corner; polygons or run-length encoding),
except that `category` counts through the classes of the set; index.json tells the original category ids.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from data_pipeline.targets import rle
from data_pipeline.targets.fault import TargetError, require_same_size

EXTENSION = "json"
_FAR = 1e12
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class ObjectLabels:
    """What the categories of a set mean."""

    category_ids: tuple[int, ...]
    """The original id of each class."""

    masks: bool = True
    """Every object has a segmentation; otherwise boxes are all there is."""

    def to_json(self) -> dict[str, Any]:
        """What index.json says."""
        return {"category_ids": list(self.category_ids), "masks": self.masks}

    @classmethod
    def from_json(cls, num_classes: int, meaning: Mapping[str, Any]) -> ObjectLabels:
        """Raises ValueError where `meaning` makes no sense."""
        try:
            labels = cls(tuple(int(number) for number in meaning["category_ids"]), bool(meaning["masks"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"what the categories mean is not said ({type(error).__name__}: {error})") from error
        if len(labels.category_ids) != num_classes or len(set(labels.category_ids)) != num_classes:
            raise ValueError(f"{num_classes} classes need as many different category ids")
        return labels


@dataclass(frozen=True)
class ImageObject:
    """One annotated object."""

    id: int
    category: int
    """Class index."""

    box: Box
    """Left, top, width and height in pixels, as annotated: it may reach beyond the image, or be flat."""

    area: float
    """Of the object in pixels, as annotated."""

    crowd: bool
    """It stands for many objects; evaluation does not count what is found in it."""

    segmentation: Any
    """Polygons (a list of lists of x, y, x, y, ...), a run-length encoding, or None."""

    runs: npt.NDArray[np.int64] | None = field(default=None, compare=False, repr=False)
    """The run lengths that `segmentation` encodes, parsed; None for polygons."""

    def visible_box(self, size: tuple[int, int]) -> Box | None:
        """Left, top, right and bottom of what lies in an image of (height, width); None where that is less than a
        pixel wide or high, which is too flat to learn from."""
        left, top, width, height = self.box
        right, bottom = min(left + width, size[1]), min(top + height, size[0])
        left, top = max(left, 0.0), max(top, 0.0)
        return (left, top, right, bottom) if right - left >= 1 and bottom - top >= 1 else None


@dataclass(frozen=True)
class ImageObjects:
    """All annotated objects of one image."""

    image_id: int
    file_name: str
    size: tuple[int, int]
    """(height, width)"""

    objects: tuple[ImageObject, ...]

    def without_runs(self) -> ImageObjects:
        """The same without parsed run lengths, which are several times as large as their text."""
        return replace(self, objects=tuple(replace(thing, runs=None) for thing in self.objects))


def read_objects(data: bytes, labels: ObjectLabels) -> ImageObjects:
    """Read and check the annotations of an image; raises TargetError naming the annotation that is wrong."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TargetError(f"the annotations are damaged: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise TargetError("the annotations are no list of objects")
    height, width = content.get("height"), content.get("width")
    if not (_is_count(height) and _is_count(width) and height * width > 0):
        raise TargetError(f"the annotations state an image of {width} x {height} pixels")
    size = (height, width)
    if not _is_count(content.get("image_id")) or not isinstance(content.get("file_name"), str):
        raise TargetError("the annotations do not say the image's id and file name")
    objects = tuple(_object(entry, size, labels) for entry in content["annotations"])
    ids = {found.id for found in objects}
    if len(ids) != len(objects):
        raise TargetError("two of the annotations have the same id")
    return ImageObjects(content["image_id"], content["file_name"], size, objects)


def check_objects(data: bytes, size: tuple[int, int], labels: ObjectLabels) -> ImageObjects:
    """Read annotations that must be sound and made for the upright image `size` (height, width); raises TargetError."""
    found = read_objects(data, labels)
    require_same_size("the image that the annotations describe", found.size, size)
    return found


def _object(entry: Any, size: tuple[int, int], labels: ObjectLabels) -> ImageObject:
    if not isinstance(entry, dict) or not _is_count(entry.get("id")):
        raise TargetError(f"an annotation has no id: {str(entry)[:80]}")
    try:
        category, area, crowd = entry.get("category"), entry.get("area"), entry.get("iscrowd", 0)
        if not _is_count(category) or category >= len(labels.category_ids):
            raise TargetError(f"its category {category!r} is none of the {len(labels.category_ids)} classes")
        if not _is_number(area) or area < 0:
            raise TargetError(f"its area is {area!r}, and evaluation needs it")
        if type(crowd) is not int or crowd not in (0, 1):
            raise TargetError(f"iscrowd is {crowd!r} instead of 0 or 1")
        segmentation, runs = entry.get("segmentation") if labels.masks else None, None
        box = _box(entry.get("bbox"), size)
        if labels.masks:
            runs = _checked_runs(segmentation, size)
            _require_overlap(_bounds(segmentation, runs, size[0]), box)
        return ImageObject(entry["id"], category, box, area, crowd == 1, segmentation, runs)
    except TargetError as error:
        raise TargetError(f"annotation {entry['id']}: {error}") from None


def _box(box: Any, size: tuple[int, int]) -> Box:
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
        raise TargetError(f"its box is {str(box)[:80]} instead of [x, y, width, height]")
    left, top, width, height = box
    if width < 0 or height < 0:
        raise TargetError(f"its box {box} has a negative side")
    if left > size[1] or top > size[0] or left + width < 0 or top + height < 0:
        raise TargetError(f"its box {box} lies outside of the image of {size[1]}x{size[0]}")
    return left, top, width, height


def _checked_runs(segmentation: Any, size: tuple[int, int]) -> npt.NDArray[np.int64] | None:
    """The runs of a run-length encoding, None of polygons; raises TargetError for what is neither."""
    if isinstance(segmentation, dict):
        if segmentation.get("size") != list(size):
            raise TargetError(f"its mask is made for [height, width] {segmentation.get('size')}, not {list(size)}")
        runs = rle.runs_of(segmentation)
        if not runs[1::2].any():
            raise TargetError("its mask holds no pixel")
        return runs
    if not (isinstance(segmentation, list) and segmentation):
        raise TargetError("it has no segmentation (with --boxes-only none is needed)")
    if not all(map(_is_polygon, segmentation)):
        raise TargetError("its segmentation has a polygon that is no list of three or more points x, y, x, y, ...")
    _check_polygons(segmentation, size)
    return None


def _bounds(segmentation: Any, runs: npt.NDArray[np.int64] | None, height: int) -> Box:
    """Left, top, right and bottom of polygons, or of the pixels of runs."""
    if runs is not None:
        return rle.bounds_of(runs, height)
    x, y = (list(itertools.chain(*(points[axis::2] for points in segmentation))) for axis in (0, 1))
    return min(x), min(y), max(x), max(y)


def _require_overlap(bounds: Box, box: Box) -> None:
    """A mask that lies beside its box teaches that there is nothing in it; a pixel is left for rounding."""
    left, top, width, height = box
    beside = bounds[0] > left + width + 1 or bounds[2] < left - 1
    if beside or bounds[1] > top + height + 1 or bounds[3] < top - 1:
        raise TargetError(
            f"its mask, from ({bounds[0]:g}, {bounds[1]:g}) to ({bounds[2]:g}, {bounds[3]:g}), lies beside its box "
            f"{list(box)} [x, y, width, height]"
        )


def _check_polygons(polygons: list[list[float]], size: tuple[int, int]) -> None:
    """Points may lie beside the image, but not far from it: drawing takes memory for every pixel of a line."""
    height, width = size
    seen = False
    for points in polygons:
        left, right = min(points[0::2]), max(points[0::2])
        top, bottom = min(points[1::2]), max(points[1::2])
        if left < -width or right > 2 * width or top < -height or bottom > 2 * height:
            raise TargetError(f"its segmentation has a point far outside of the image of {width}x{height}")
        seen = seen or (left <= width and right >= 0 and top <= height and bottom >= 0)
    if not seen:
        raise TargetError(f"its segmentation lies outside of the image of {width}x{height}")


def _is_polygon(points: Any) -> bool:
    return isinstance(points, list) and len(points) >= 6 and len(points) % 2 == 0 and all(map(_is_number, points))


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and abs(value) < _FAR  # false for what is not a number, too
