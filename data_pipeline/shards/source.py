"""What every source of images offers to the loader, and the errors it may raise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from data_pipeline.restart_rows import RestartRows


class DataError(Exception):
    """The data set as a whole cannot be used: missing, cut short, stale or of another kind. The message says which."""


class DamagedSampleError(Exception):
    """One sample cannot be used; the others can.

    `shard` is the shard's path within the data set, `key` the sample's key, `reason` what was found.
    """

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(shard, key, reason)  # all three, so that the error survives pickling
        self.shard = shard
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"sample '{self.key}' in shard {self.shard}: {self.reason}"


@dataclass(frozen=True)
class RawSample:
    """One stored sample, before decoding."""

    key: str
    """Unique within the split."""

    image: bytes | npt.NDArray[np.uint8] | RestartRows
    """An encoded image file; or decoded RGB pixels of shape (H, W, 3); or a JPEG whose rows are read when they are
    asked for, which may then raise DamagedSampleError."""

    label: int
    """Class index in [0, num_classes); -1 where the sample has none."""

    shard: str
    """The shard's path within the data set, for messages."""

    target: bytes | None = None
    """What a dense task is to learn: the file of a mask (PNG) or of annotations (JSON)."""

    verified: bool = False
    """A checksum has proved that `image` is what was written, from an image that was found sound then."""


@runtime_checkable
class Source(Protocol):
    """A split of a data set with random access. `read` may be called from several threads at once.

    A source of shards also has `shard_sizes`, the number of samples in each: ids count through the shards in turn. It
    may have `expect(shards)`: these shards are read next, soonest first, and earlier calls no longer hold; and
    `stats() -> dict[str, float]`: numbers since the last call, which are reported beside the loader's own.
    """

    @property
    def num_classes(self) -> int: ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever a sample, its label or its place in the split changes."""
        ...

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def read(self, index: int) -> RawSample:
        """The sample at `index` in [0, len(self)).

        Raises DamagedSampleError where the stored bytes are not those that were written, IndexError out of range.
        """
        ...

    def close(self) -> None: ...
