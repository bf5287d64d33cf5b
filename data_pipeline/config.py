"""What the data pipeline can be told: plain frozen dataclasses, importable with the standard library alone.

A value that cannot work is a ValueError whose text begins with the field's name. Reading values from a file, checking
their types and naming a mistyped key is the work of whoever composes them into a program's whole configuration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from data_pipeline.dense_config import DetectionDataConfig, SegmentationDataConfig

Backend = Literal["webdataset", "ffcv", "synthetic"]
Order = Literal["global", "block"]
Decoding = Literal["fast", "exact"]
AugmentPlace = Literal["cpu", "device"]
Interpolation = Literal["antialias", "linear", "area"]
ErasingMode = Literal["pixel", "const"]
Kind = Literal["classification", "segmentation", "detection"]
"""What a set of samples teaches: a class, a class for each pixel, or objects."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class AugmentConfig:
    """What happens to a training image between decoding and the batch. Every draw is keyed by (seed, epoch, sample)."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop as a fraction of the image's area, drawn uniformly from this range."""

    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width / height of the random crop, drawn log-uniformly from this range."""

    horizontal_flip: float = 0.5
    """Probability of mirroring left and right. Use 0 where orientation carries meaning (digits, text)."""

    rand_augment: str = ""
    """RandAugment in timm's notation, such as "rand-m9-mstd0.5-inc1"; an empty string leaves it out."""

    three_augment: bool = False
    """3-Augment (DeiT III): one of grayscale, solarization and Gaussian blur for each image."""

    color_jitter: float = 0.0
    """Brightness, contrast and saturation are each multiplied by a factor from [max(0, 1 - x), 1 + x]."""

    repeats: int = 1
    """Repeated augmentation: an epoch serves 1 / repeats of the images, each this often with other augmentations."""

    place: AugmentPlace = "cpu"
    """Where RandAugment, 3-Augment, colour jitter and erasing run: "cpu", in the loader's threads, or "device", on
    the whole batch after its transfer. Crop, resize and flip always belong to the loader."""

    random_erasing: float = 0.0
    """Probability of overwriting one random rectangle of the image."""

    erasing_mode: ErasingMode = "pixel"
    """"pixel" fills the rectangle with normal noise per pixel, "const" with the mean colour."""

    interpolation: Interpolation = "antialias"
    """How a crop is resized: "antialias" (as PIL does it), "linear" (fastest) or "area" (as FFCV does it)."""

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale: must be two numbers in (0, 1], the smaller first, got {_shown(self.scale)}")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(f"ratio: must be two numbers above 0, the smaller first, got {_shown(self.ratio)}")
        if not 0 <= self.color_jitter < math.inf:
            raise ValueError(f"color_jitter: must be 0 or more and finite, got {self.color_jitter}")
        _at_least(1, "repeats", self.repeats)
        for name in ("horizontal_flip", "random_erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: is a probability, in [0, 1], got {getattr(self, name)}")


@dataclass(frozen=True)
class SyntheticConfig:
    """Images made from their sample id, for trying the whole system without any data."""

    train_samples: int = 1024
    """Number of images in the training split."""

    val_samples: int = 256
    """Number of images in the validation split."""

    seed: int = 0
    """Another seed gives other images of the same difficulty."""

    def __post_init__(self) -> None:
        for name in ("train_samples", "val_samples"):
            _at_least(1, name, getattr(self, name))


@dataclass(frozen=True)
class CacheConfig:
    """Where remote shards are kept on this node, and how they are fetched. Unused where `data.path` is a folder."""

    folder: str = ""
    """A folder on the node's own disk (NVMe), shared by its ranks and by later jobs; must be set for a remote path.
    Variables such as $TMPDIR are filled in on the node."""

    max_gb: float = 500.0
    """What the folder may hold, in 10^9 bytes, unfinished files included. The shards unused for longest make room; one
    in use never does."""

    ahead: int = 8
    """Shards fetched ahead of need, each by a thread of its own."""

    attempts: int = 6
    """Tries before a fetch fails, with growing, randomly spread pauses between them."""

    timeout: float = 30.0
    """Seconds in which an answer must begin, and each further piece of it be there (1 MiB over HTTP, up to 8 MiB from
    other storage); else the try is given up, and the next goes on where it stopped."""

    def __post_init__(self) -> None:
        for name in ("ahead", "attempts"):
            _at_least(1, name, getattr(self, name))
        for name in ("max_gb", "timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: must be above 0 and finite, got {getattr(self, name)}")


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they become batches."""

    backend: Backend = "webdataset"
    """"webdataset": tar shards made by `python -m data_pipeline.prepare`; "ffcv": .beton files made by it (with
    `--format ffcv`) or by the ffcv package; "synthetic": images made in memory."""

    path: str = ""
    """Folder of the prepared data, the one with index.json; for "webdataset" also a URL (http, https, s3, or another
    protocol that fsspec knows). Unused by "synthetic"."""

    train_split: str = "train"
    """Name of the split to train on."""

    val_split: str = "val"
    """Name of the split to evaluate on."""

    num_classes: int = 1000
    """Number of classes; opening a data set with another number is an error."""

    image_size: int = 224
    """Height and width of the images in a batch, in pixels."""

    image_size_schedule: tuple[tuple[int, int], ...] = ()
    """Progressive resizing: pairs of (epoch, size), epochs rising from 0. From that epoch on training images have that
    size; evaluation always uses image_size. Empty: image_size throughout."""

    decoding: Decoding = "fast"
    """JPEG decoding: "fast" uses libjpeg's fast DCT and chroma upsampling and decodes at a reduced scale where that
    pays; "exact" gives Pillow's pixels, bit for bit."""

    num_threads: int = -1
    """Decoding threads per rank; 0 decodes in the caller's thread when a batch is asked for; -1 takes the cores this
    process may use, shared among the ranks of the machine."""

    prefetch: int = 2
    """Batches decoded ahead of the one in use."""

    order: Order = "global"
    """"global": one permutation over all samples; "block": over groups of shards, for slow or remote storage."""

    block_shards: int = 16
    """Shards that are shuffled together under order "block"."""

    canonical_nodes: int = 1
    """Order "block" deals the shards to this many streams, of which a node reads its share: set it to the largest
    number of nodes you may run on. The order depends on it and not on the nodes there are. A global batch must be a
    multiple of twice this number."""

    stall_seconds: float = 600.0
    """So many seconds of waiting for a batch, in which no thread finishes anything and no byte of a remote shard comes,
    end the run, with the stacks of all threads."""

    max_bad_samples: int = 16
    """Different damaged samples a rank replaces (and reports) before it gives up."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from each RGB channel, on the scale 0 to 1."""

    std: tuple[float, float, float] = IMAGENET_STD
    """Each RGB channel is divided by it, on the scale 0 to 1."""

    eval_crop_pct: float = 0.875
    """Evaluation resizes the short side to image_size / eval_crop_pct and takes the central square."""

    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes to training images."""

    segmentation: SegmentationDataConfig = field(default_factory=SegmentationDataConfig)
    """Used by semantic segmentation, in place of image_size, eval_crop_pct and all of `augment` but the flip and
    `repeats`."""

    detection: DetectionDataConfig = field(default_factory=DetectionDataConfig)
    """Used by detection, in place of image_size, eval_crop_pct and all of `augment` but the flip; `repeats` is
    refused."""

    cache: CacheConfig = field(default_factory=CacheConfig)
    """Used where `path` is a URL."""

    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    """Used by the "synthetic" backend only."""

    def train_image_size(self, epoch: int) -> int:
        """Height and width of training images in an epoch, in pixels."""
        sizes = [size for first, size in self.image_size_schedule if first <= epoch]
        return sizes[-1] if sizes else self.image_size

    @property
    def largest_image_size(self) -> int:
        """Height and width of the largest images of a run, in pixels."""
        return max([self.image_size, *(size for _, size in self.image_size_schedule)])

    def __post_init__(self) -> None:
        limits = {"num_classes": 1, "image_size": 8, "num_threads": -1, "prefetch": 0, "block_shards": 1}
        for name, least in (limits | {"max_bad_samples": 0, "canonical_nodes": 1}).items():
            _at_least(least, name, getattr(self, name))
        if not 0 < self.stall_seconds < math.inf:
            raise ValueError(f"stall_seconds: must be above 0 and finite, got {self.stall_seconds}")
        epochs = [epoch for epoch, _ in self.image_size_schedule]
        if epochs != sorted(set(epochs)) or epochs[:1] not in ([], [0]):
            raise ValueError(f"image_size_schedule: epochs must rise from 0, got {_shown(epochs)}")
        for _, size in self.image_size_schedule:
            _at_least(8, "image_size_schedule", size)
        if not all(0 <= channel <= 1 for channel in self.mean):
            raise ValueError(f"mean: is on the scale 0 to 1, got {_shown(self.mean)}")
        if not all(0 < channel < math.inf for channel in self.std):
            raise ValueError(f"std: must be above 0 and finite, got {_shown(self.std)}")
        if not 0 < self.eval_crop_pct <= 1:
            raise ValueError(f"eval_crop_pct: must be in (0, 1], got {self.eval_crop_pct}")


def _at_least(least: int, name: str, value: int) -> None:
    if value < least:
        raise ValueError(f"{name}: must be at least {least}, got {value}")


def _shown(numbers: Sequence[float]) -> str:
    return f"[{', '.join(map(str, numbers))}]"
