"""A training sample of semantic segmentation: image and mask resized, cropped, mirrored and padded together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torchvision.transforms.v2 import functional as F

from data_pipeline.batch import Batch
from data_pipeline.changes import mean_colour
from data_pipeline.config import DataConfig
from data_pipeline.decode import Box, Picture, Size
from data_pipeline.dense_geometry import Image, fitted, nearest, pixels_of, resized, whole
from data_pipeline.dense_targets import ClassMaps
from data_pipeline.photometric import distorted
from data_pipeline.shards.source import RawSample
from data_pipeline.targets.masks import IGNORED

_CROP_ATTEMPTS = 10  # after the first, as in mmsegmentation


@dataclass(frozen=True)
class SegmentationTraining:
    """Fills a place with a crop of an image and the classes of its pixels, both (crop_size, crop_size).

    Order: resize to (short_side, long_side) times a factor from `scale`, crop, flip, photometric distortion, padding at
    the right and lower edge with the mean colour and IGNORED. All draws come from the place's own generator, and always
    as many, whatever they say. A crop without a labelled pixel is drawn anew, too (as mmsegmentation does), but none is
    where max_class_share is 1 or the whole image fits.
    """

    config: DataConfig
    targets: ClassMaps

    def put(self, batch: Batch, slot: int, picture: Picture, sample: RawSample, rng: np.random.Generator) -> None:
        """As Placing says."""
        image, config = batch.images[slot].numpy(), self.config.segmentation
        classes = self.targets.of(sample, picture.size)
        draws = rng.random(2 + 2 * (1 + _CROP_ATTEMPTS))
        factor = config.scale[0] + (config.scale[1] - config.scale[0]) * float(draws[0])
        size = fitted(picture.size, config.short_side, config.long_side, factor)
        crop = min(config.crop_size, size[0]), min(config.crop_size, size[1])
        mirrored = bool(draws[1] < self.config.augment.horizontal_flip)
        box, labels = self._crop(classes, size, crop, draws[2:].reshape(-1, 2))
        pixels = pixels_of(F.crop(resized(whole(picture, size), size), *box))
        if mirrored:
            pixels, labels = pixels[:, ::-1], labels[:, ::-1]
        if config.photometric_distortion:
            pixels = distorted(pixels, rng)
        target = np.full((config.crop_size, config.crop_size), IGNORED, np.uint8)
        target[: crop[0], : crop[1]] = labels
        image[: crop[0], : crop[1]] = pixels
        image[crop[0] :] = image[: crop[0], crop[1] :] = mean_colour(self.config)
        batch.sizes[slot], batch.targets[slot] = crop, target

    def clear(self, batch: Batch, slot: int) -> None:
        """A black image without a target."""
        batch.images[slot].numpy()[...] = 0

    def _crop(self, classes: Image, size: Size, crop: Size, draws: npt.NDArray[np.float64]) -> tuple[Box, Image]:
        """The box of the resized image, and the classes in it, (*crop,)."""
        rows, columns = nearest(classes.shape[0], size[0]), nearest(classes.shape[1], size[1])
        largest = self.config.segmentation.max_class_share
        for row_draw, column_draw in draws.tolist():
            top, left = int(row_draw * (size[0] - crop[0] + 1)), int(column_draw * (size[1] - crop[1] + 1))
            labels = classes[rows[top : top + crop[0], None], columns[left : left + crop[1]]]
            if crop == size or largest == 1 or _is_mixed(labels, largest):
                break
        return (top, left, *crop), labels


def _is_mixed(labels: Image, largest: float) -> bool:
    """Whether there are labelled pixels, of which no class has more than the share `largest`."""
    counts = np.bincount(labels.ravel(), minlength=256)[:IGNORED]
    return 0 < int(counts.max()) <= largest * int(counts.sum())
