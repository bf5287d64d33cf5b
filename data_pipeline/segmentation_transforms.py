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
from data_pipeline.shards.source import RawSample
from data_pipeline.targets.masks import IGNORED

_CROP_ATTEMPTS = 10  # after the first; this and the next two: mmsegmentation
_BRIGHTNESS = 32.0
_FACTOR = (0.5, 1.5)
_HUE_DEGREES = 18.0  # SSD: mmsegmentation counts them in steps of two


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


def distorted(pixels: Image, rng: np.random.Generator) -> Image:
    """SSD's distortion of uint8 (H, W, 3): brightness, contrast, saturation, hue, each with probability 1/2.

    Contrast is changed before or after saturation and hue, by a draw. As in mmsegmentation each step ends in bytes, cut
    off at black and white; hue and saturation are those of Pillow's HSV, in 256 steps each.
    """
    from PIL import Image as pil

    draws = rng.random(9).tolist()
    shift = _BRIGHTNESS * (2 * draws[1] - 1) if draws[0] < 0.5 else 0.0
    contrast, saturation = (
        _FACTOR[0] + (_FACTOR[1] - _FACTOR[0]) * strength if apply < 0.5 else 1.0
        for apply, strength in ((draws[2], draws[3]), (draws[4], draws[5]))
    )
    turn = round(_HUE_DEGREES / 360 * 256 * (2 * draws[7] - 1)) if draws[6] < 0.5 else 0
    early = draws[8] < 0.5
    level = np.arange(256)
    table = _bytes(level + shift)
    stretched = _bytes(level * contrast)
    picture = pil.fromarray(np.ascontiguousarray(pixels)).point((stretched[table] if early else table).tolist() * 3)
    if saturation != 1.0 or turn:
        hsv = [*((level + turn) % 256).tolist(), *_bytes(level * saturation).tolist(), *level.tolist()]
        picture = picture.convert("HSV").point(hsv).convert("RGB")
    if not early:
        picture = picture.point(stretched.tolist() * 3)
    return np.asarray(picture)


def _bytes(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
