"""Reading the targets of dense tasks, and evaluating on whole images: what both tasks share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from data_pipeline.batch import Batch, Placing
from data_pipeline.config import DataConfig, Kind
from data_pipeline.decode import Picture, Size
from data_pipeline.dense_geometry import whole
from data_pipeline.shards.source import DataError, RawSample, Source
from data_pipeline.targets.check import TargetCheck, target_check
from data_pipeline.targets.fault import TargetError
from data_pipeline.targets.masks import MaskLabels, class_table
from data_pipeline.targets.objects import ImageObjects, ObjectLabels

NOTHING_SIDE = 64
"""Height and width of the black image in a place of an evaluation that does not count."""


def _checked(check: TargetCheck, sample: RawSample, size: Size) -> Any:
    if sample.target is None:
        raise TargetError("it has no target")
    return check(sample.target, size)


class ClassMaps:
    """Reads masks as maps of class indices."""

    def __init__(self, num_classes: int, meaning: Mapping[str, Any]) -> None:
        """Raises ValueError where `meaning`, of index.json, makes no sense."""
        check = target_check("segmentation", num_classes, meaning)
        assert check is not None
        self._check = check
        self._table = class_table(MaskLabels.from_json(num_classes, meaning))

    def of(self, sample: RawSample, size: Size) -> npt.NDArray[np.uint8]:
        """uint8 (H, W) as large as the upright image, `size`; IGNORED where it teaches nothing. Raises TargetError."""
        classes: npt.NDArray[np.uint8] = self._table[_checked(self._check, sample, size)]
        return classes


class Objects:
    """Reads annotated objects."""

    def __init__(self, num_classes: int, meaning: Mapping[str, Any]) -> None:
        """Raises ValueError where `meaning`, of index.json, makes no sense."""
        check = target_check("detection", num_classes, meaning)
        assert check is not None
        self._check = check
        self.masks = ObjectLabels.from_json(num_classes, meaning).masks
        """Whether objects have masks; otherwise boxes are all there is."""

    def of(self, sample: RawSample, size: Size) -> ImageObjects:
        """The objects, checked against the size of the upright image. Raises TargetError."""
        found: ImageObjects = _checked(self._check, sample, size)
        return found


@dataclass(frozen=True)
class WholeImages:
    """Fills a place of an evaluation with the upright image at its own size, and what it shows as stored."""

    targets: ClassMaps | Objects

    def put(self, batch: Batch, slot: int, picture: Picture, sample: RawSample, rng: np.random.Generator) -> None:
        """As Placing says."""
        target = self.targets.of(sample, picture.size)
        if isinstance(target, ImageObjects):
            target = target.without_runs()  # an evaluation keeps the objects of all images, and sends them to one rank
        pixels = np.array(whole(picture), order="C")  # the loader's threads use the memory again
        assert isinstance(batch.images, list)
        batch.images[slot] = torch.from_numpy(pixels)
        batch.sizes[slot], batch.targets[slot] = picture.size, target

    def clear(self, batch: Batch, slot: int) -> None:
        """A small black image, and no target."""
        assert isinstance(batch.images, list)
        batch.images[slot] = torch.zeros((NOTHING_SIDE, NOTHING_SIDE, 3), dtype=torch.uint8)
        batch.sizes[slot], batch.targets[slot] = (NOTHING_SIDE, NOTHING_SIDE), None


def dense_placing(config: DataConfig, source: Source, kind: Kind, *, train: bool) -> Placing:
    """How the samples of a dense task are written into batches.

    Raises DataError where the source does not say what its targets mean.
    """
    from data_pipeline.detection_transforms import DetectionTraining
    from data_pipeline.segmentation_transforms import SegmentationTraining

    try:
        meaning = source.meaning  # type: ignore[attr-defined]  # only sources of dense tasks have it
        if kind == "segmentation":
            classes = ClassMaps(source.num_classes, meaning)
            return SegmentationTraining(config, classes) if train else WholeImages(classes)
        objects = Objects(source.num_classes, meaning)
        return DetectionTraining(config, objects) if train else WholeImages(objects)
    except (AttributeError, ValueError) as error:
        raise DataError(f"the set for {kind} does not say what its targets mean: {error}") from error
