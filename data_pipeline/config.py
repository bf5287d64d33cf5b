"""What the data pipeline can be told: plain frozen dataclasses, importable with the standard library alone.

They are defaults and types only. Reading them from a file, checking them and naming a mistyped key is the work of
whoever composes them into a program's whole configuration.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Backend = Literal["webdataset", "synthetic"]
Order = Literal["global", "block"]
Interpolation = Literal["antialias", "linear", "area"]
ErasingMode = Literal["pixel", "const"]

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

    random_erasing: float = 0.0
    """Probability of overwriting one random rectangle of the image."""

    erasing_mode: ErasingMode = "pixel"
    """"pixel" fills the rectangle with normal noise per pixel, "const" with the mean colour."""

    interpolation: Interpolation = "antialias"
    """How a crop is resized: "antialias" (as PIL does it), "linear" (fastest) or "area" (as FFCV does it)."""


@dataclass(frozen=True)
class SyntheticConfig:
    """Images made from their sample id, for trying the whole system without any data."""

    train_samples: int = 1024
    """Number of images in the training split."""

    val_samples: int = 256
    """Number of images in the validation split."""

    seed: int = 0
    """Another seed gives other images of the same difficulty."""


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they become batches."""

    backend: Backend = "webdataset"
    """"webdataset": tar shards made by `python -m data_pipeline.prepare`; "synthetic": images made in memory."""

    path: str = ""
    """Folder of the prepared shards: the one with a sub-folder per split. Unused by "synthetic"."""

    train_split: str = "train"
    """Name of the split to train on."""

    val_split: str = "val"
    """Name of the split to evaluate on."""

    num_classes: int = 1000
    """Number of classes; opening a data set with another number is an error."""

    image_size: int = 224
    """Height and width of the images in a batch, in pixels."""

    num_threads: int = -1
    """Decoding threads per rank; 0 decodes in the caller's thread when a batch is asked for; -1 takes the cores this
    process may use, shared among the ranks of the machine."""

    prefetch: int = 2
    """Batches decoded ahead of the one in use."""

    order: Order = "global"
    """"global": one permutation over all samples; "block": over groups of shards, for slow or remote storage."""

    block_shards: int = 16
    """Shards that are shuffled together under order "block"."""

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

    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    """Used by the "synthetic" backend only."""
