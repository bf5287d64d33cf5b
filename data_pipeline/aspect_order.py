"""Batches of images of similar shapes, for detection: which images go together, and how large their canvas is.

Everything is a pure function of (seed, epoch, global batch size, bounds, sizes of the images), the same on every rank.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from data_pipeline.config import DataConfig
from data_pipeline.dense_config import DetectionDataConfig
from data_pipeline.order import (
    STREAM_BATCHES,
    STREAM_SHORT_SIDES,
    EpochOrder,
    Ids,
    keyed_permutation,
    keyed_seed,
)
from data_pipeline.shards.source import DataError, Source

CANVAS_MULTIPLE = 32
"""Sides of a canvas are multiples of it: the networks' coarsest maps have a thirty-second of the pixels."""

_ROUNDING = 1e-6  # of a side in pixels: more than floating point errs by


class AspectOrder:
    """Position -> sample id for one epoch of detection; a data_pipeline.order.Ordering.

    All ids are permuted as under order "global". The ids of each aspect range, in that order, are cut into whole global
    batches; what is left of all ranges, in the order of that permutation, into batches of mixed shapes. All whole
    batches are permuted together, so that no shape has its place at the end of the epoch; one that is not whole is the
    last.
    """

    def __init__(self, ranges: npt.NDArray[np.int64], global_batch_size: int, seed: int, epoch: int) -> None:
        """`ranges`: the number of each sample's aspect range, (samples,)."""
        ids = EpochOrder("global", (len(ranges),), seed, epoch).ids(0, len(ranges))
        of_ids = ranges[ids]
        whole, rest = [], np.zeros(len(ids), np.bool_)
        for number in np.unique(of_ids).tolist():
            members = np.flatnonzero(of_ids == number)
            count = len(members) // global_batch_size * global_batch_size
            whole.append(ids[members[:count]].reshape(-1, global_batch_size))
            rest[members[count:]] = True
        mixed = ids[rest]
        count = len(mixed) // global_batch_size * global_batch_size
        batches = np.concatenate([*whole, mixed[:count].reshape(-1, global_batch_size)])
        batches = batches[keyed_permutation(len(batches), seed, epoch, STREAM_BATCHES)]
        self._ids = np.concatenate([batches.ravel(), mixed[count:]])

    def __len__(self) -> int:
        return len(self._ids)

    def at(self, positions: Ids) -> tuple[Ids, Ids]:
        """(sample ids, zeros), both int64 (n,), at any positions (n,) of the epoch."""
        return self._ids[positions], np.zeros(len(positions), np.int64)

    def groups(self, positions: Ids) -> list[tuple[int, int]]:
        """None: every shard is needed all the time."""
        return []

    def group_shards(self, stream: int, group: int) -> list[int]:
        """None."""
        return []


class Aspects:
    """The shapes of all images of a set: their aspect ranges, and the canvases that hold them."""

    def __init__(self, sizes: npt.NDArray[np.int32], config: DetectionDataConfig) -> None:
        """`sizes`: (height, width) of each upright image, (samples, 2)."""
        self._config = config
        aspects = sizes[:, 1] / sizes[:, 0]
        self._ranges = np.searchsorted(np.asarray(config.aspect_bounds), aspects, side="right")
        count = len(config.aspect_bounds) + 1
        self._least, self._largest = np.full(count, math.inf), np.zeros(count)
        np.minimum.at(self._least, self._ranges, aspects)
        np.maximum.at(self._largest, self._ranges, aspects)

    def order(self, global_batch_size: int, seed: int, epoch: int) -> AspectOrder:
        """The order of an epoch."""
        return AspectOrder(self._ranges, global_batch_size, seed, epoch)

    def order_name(self, global_batch_size: int) -> str:
        """What the order depends on beside seed, epoch and data."""
        return f"global/aspect B {global_batch_size} {list(self._config.aspect_bounds)}"

    def short_side(self, seed: int, epoch: int, position: int) -> int:
        """The short side of the images of the global batch that begins at a position."""
        word = np.random.PCG64(keyed_seed(seed, epoch, STREAM_SHORT_SIDES, position)).random_raw()
        return self._config.short_sides[int(word) % len(self._config.short_sides)]

    def canvas(self, ids: Ids, short_side: int) -> tuple[int, int]:
        """(height, width) that holds the images of a whole global batch, and all others of their aspect ranges.

        So few sizes occur, whatever is drawn: one for each range and short side, and for mixed batches the larger
        height and the larger width of theirs.
        """
        long_side = self._config.long_side
        heights, widths = [], []
        for number in np.unique(self._ranges[ids]).tolist():
            narrow, wide = float(self._least[number]), float(self._largest[number])
            heights.append(min(short_side / narrow, long_side) if narrow < 1 else min(short_side, long_side / narrow))
            widths.append(min(short_side * wide, long_side) if wide > 1 else min(short_side, long_side * wide))
        return _rounded_up(max(heights)), _rounded_up(max(widths))


def _rounded_up(side: float) -> int:
    return -(-math.ceil(side - _ROUNDING) // CANVAS_MULTIPLE) * CANVAS_MULTIPLE


def largest_canvas(config: DetectionDataConfig) -> tuple[int, int]:
    """(height, width) that no canvas exceeds, whatever images a set has: that of a mixed batch of long upright and long
    wide images."""
    return _rounded_up(config.long_side), _rounded_up(config.long_side)


def aspects_of(config: DataConfig, source: Source) -> Aspects:
    """The shapes of a set that is to be served for detection.

    Raises ValueError for settings that groups of similar shapes do not go with, DataError for a source that does not
    know the sizes of its images.
    """
    if config.order != "global":
        raise ValueError(f"data.order '{config.order}': detection puts images of similar shapes together: use 'global'")
    if config.augment.repeats > 1:
        raise ValueError(f"data.augment.repeats {config.augment.repeats}: detection serves each image once: use 1")
    sizes = getattr(source, "sizes", None)
    if sizes is None:
        raise DataError("detection puts images of similar shapes together, and this source does not know their sizes")
    return Aspects(sizes(), config.detection)
