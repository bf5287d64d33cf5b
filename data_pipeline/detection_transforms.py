"""A training sample of detection: image, boxes and masks resized and mirrored together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from data_pipeline.batch import Batch
from data_pipeline.changes import mean_colour
from data_pipeline.config import DataConfig
from data_pipeline.decode import Picture, Size
from data_pipeline.dense_geometry import Image, fitted, nearest, pixels_of, resized, whole
from data_pipeline.dense_targets import Objects
from data_pipeline.shards.source import RawSample
from data_pipeline.targets import rle
from data_pipeline.targets.instances import Instances
from data_pipeline.targets.objects import Box, ImageObject, ImageObjects


@dataclass(frozen=True)
class DetectionTraining:
    """Fills a place with an image, at the upper left of the batch's canvas, and the objects on it.

    The short side becomes the batch's, if the long side is not too long then; the image that stands in for a damaged
    one becomes smaller where the canvas was not made for it. The rest of the canvas has the mean colour. The one draw
    decides on the flip.
    """

    config: DataConfig
    targets: Objects

    def put(self, batch: Batch, slot: int, picture: Picture, sample: RawSample, rng: np.random.Generator) -> None:
        """As Placing says."""
        image = batch.images[slot].numpy()
        found = self.targets.of(sample, picture.size)
        mirrored = bool(rng.random() < self.config.augment.horizontal_flip)
        canvas = image.shape[0], image.shape[1]
        size = fitted(picture.size, batch.short_side, self.config.detection.long_side, within=canvas)
        pixels = pixels_of(resized(whole(picture, size), size))
        image[: size[0], : size[1]] = pixels[:, ::-1] if mirrored else pixels
        image[size[0] :] = image[: size[0], size[1] :] = mean_colour(self.config)
        batch.sizes[slot], batch.targets[slot] = (
            size,
            instances(found, size, mirrored=mirrored, with_masks=self.targets.masks),
        )

    def clear(self, batch: Batch, slot: int) -> None:
        """A black image without a target."""
        batch.images[slot].numpy()[...] = 0


def instances(found: ImageObjects, size: Size, *, mirrored: bool, with_masks: bool = True) -> Instances:
    """What an image teaches once it is resized to (height, width) `size` and, if so, mirrored.

    Boxes are cut at the border. Left out are crowds, objects less than a pixel wide or high before or after resizing,
    and those of whose mask no pixel is left in the box: they would teach that there is nothing. A mask is what
    pycocotools draws at the stored size, or the stored runs; each pixel of the resized image takes the value of the
    stored pixel that its centre lies in.
    """
    candidates = [
        (thing, box)
        for thing in found.objects
        if not thing.crowd and (box := thing.visible_box(found.size)) is not None
    ]
    boxes = _moved([box for _, box in candidates], found.size, size, mirrored)
    kept = np.flatnonzero((boxes[:, 2:] - boxes[:, :2] >= 1).all(axis=1)).tolist()
    boxes = boxes[kept]
    things = [candidates[number][0] for number in kept]
    labels = np.array([thing.category for thing in things], np.int64)
    if not with_masks:
        return Instances(boxes, labels, None)
    masks = _masks(things, boxes, found.size, size, mirrored)
    kept = [number for number, mask in enumerate(masks) if mask.any()]
    return Instances(boxes[kept], labels[kept], tuple(masks[number] for number in kept))


def _moved(boxes: Sequence[Box], before: Size, after: Size, mirrored: bool) -> npt.NDArray[np.float32]:
    """Boxes (left, top, right, bottom) of an image that is resized and mirrored, (k, 4)."""
    corners = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    moved = tv_tensors.BoundingBoxes(corners, format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=before)
    moved = F.resize(moved, list(after))
    if mirrored:
        moved = F.horizontal_flip(moved)
    found: npt.NDArray[np.float32] = F.clamp_bounding_boxes(moved).to(torch.float32).numpy()
    return found


def _masks(
    things: Sequence[ImageObject], boxes: npt.NDArray[np.float32], before: Size, after: Size, mirrored: bool
) -> tuple[Image, ...]:
    """Of each object the pixels of its box rounded outwards, 0 or 1, (h, w)."""
    rows, columns = nearest(before[0], after[0]), nearest(before[1], after[1])
    if mirrored:
        columns = columns[::-1]
    first = np.floor(boxes[:, :2]).astype(np.int64).tolist()
    last = np.ceil(boxes[:, 2:]).astype(np.int64).tolist()
    return tuple(
        _sampled(_runs(thing, before), before[0], rows[top:bottom], columns[left:right])
        for thing, (left, top), (right, bottom) in zip(things, first, last, strict=True)
    )


def _sampled(
    runs: npt.NDArray[np.int64], height: int, rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]
) -> Image:
    """The pixels at these rows and columns of a mask of runs, without unpacking the columns beside them."""
    start, stop = int(columns.min()) * height, (int(columns.max()) + 1) * height
    ends = np.clip(np.cumsum(runs), start, stop)
    lengths = ends - np.concatenate(([start], ends[:-1]))
    pixels = np.repeat((np.arange(len(runs)) % 2).astype(np.uint8), lengths).reshape(-1, height)
    return np.ascontiguousarray(pixels[columns - columns.min()][:, rows].T)


def _runs(thing: ImageObject, size: Size) -> npt.NDArray[np.int64]:
    """Lengths of the runs of an object's mask at the stored (height, width)."""
    if isinstance(thing.segmentation, dict):
        return rle.runs_of(thing.segmentation) if thing.runs is None else thing.runs
    coco = _pycocotools()
    drawn = coco.merge(coco.frPyObjects(thing.segmentation, *size))
    return rle.runs_of({"size": list(size), "counts": drawn["counts"].decode("ascii")})


def _pycocotools() -> Any:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ImportError(
            "polygons are drawn by pycocotools, which is not installed: pip install 'dgt[dense]'"
        ) from error
    return mask
