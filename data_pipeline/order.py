"""Which sample is served at which position of which epoch: pure functions, the same on every rank and every machine.

An epoch's order is a function of (seed, epoch, mode, sizes of the shards) and of nothing else; a rank's batch is a
slice of it. Nothing is remembered between calls, so resuming anywhere is computing a slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Mode = Literal["sequential", "global", "block"]
Tail = Literal["drop", "wrap", "mask"]
Ids = npt.NDArray[np.int64]

# Every use of (seed, epoch) has its own stream, so that no two of them ever see the same numbers.
STREAM_SAMPLES, STREAM_SHARDS, STREAM_AUGMENT = range(3)


def keyed_seed(seed: int, epoch: int, *stream: int) -> np.random.SeedSequence:
    """The seed of one stream of one epoch; (seed 0, epoch 1) and (seed 1, epoch 0) are unrelated.

    Raises ValueError outside [0, 2**32), where two pairs could stand for the same words.
    """
    for name, value in (("seed", seed), ("epoch", epoch)):
        if not 0 <= value < 2**32:
            raise ValueError(f"{name} {value} is not in [0, 2**32)")
    return np.random.SeedSequence([seed, epoch], spawn_key=stream)


def keyed_permutation(size: int, seed: int, epoch: int, *stream: int) -> Ids:
    """A permutation of range(size), int64 (size,), that is a function of its arguments alone.

    Random words are sorted with the index in their low bits, rather than shuffled by `Generator.permutation`: NumPy
    keeps the words of a bit generator the same in every version but not the methods of a Generator, an ordinary sort
    of distinct numbers has one result whatever the algorithm, and it is faster (14 million: about 1.3 s, 220 MB at the
    peak).
    """
    index_bits = np.uint64((1 << max(size - 1, 0).bit_length()) - 1)
    words = np.random.PCG64(keyed_seed(seed, epoch, *stream)).random_raw(size)
    words &= ~index_bits
    words |= np.arange(size, dtype=np.uint64)
    words.sort()
    words &= index_bits
    return words.view(np.int64)


class EpochOrder:
    """Position -> sample id for one epoch; only what is asked for is computed, and the last group is kept.

    `sequential` is the identity; `global` permutes all samples; `block` permutes the shards, cuts that sequence into
    groups of `block_shards` and permutes the samples inside each group, so that a reader touches few shards at a time
    and no array as long as the data set is ever built.
    """

    def __init__(
        self, mode: Mode, shard_sizes: Sequence[int] | Ids, seed: int, epoch: int, *, block_shards: int = 16
    ) -> None:
        """`shard_sizes`: samples in each shard, in the order of their ids. Raises ValueError for an unknown mode."""
        if mode not in ("sequential", "global", "block"):
            raise ValueError(f"unknown order '{mode}': use 'sequential', 'global' or 'block'")
        if block_shards < 1:
            raise ValueError(f"block_shards must be at least 1, not {block_shards}")
        self.mode, self.seed, self.epoch = mode, seed, epoch
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        if mode != "block":  # one group that holds everything
            sizes, block_shards = sizes.sum(keepdims=True), 1
        self._block_shards = block_shards
        self._shard_sizes = sizes
        self._shard_starts = np.cumsum(sizes) - sizes
        if mode == "block":
            self._shards = keyed_permutation(len(sizes), seed, epoch, STREAM_SHARDS)
        else:
            self._shards = np.arange(len(sizes))
        group_sizes = np.add.reduceat(sizes[self._shards], np.arange(0, len(sizes), block_shards))
        self._group_ends = np.cumsum(group_sizes)
        self._cached: tuple[int, Ids] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        """Samples in the epoch."""
        return int(self._group_ends[-1]) if len(self._group_ends) else 0

    def ids(self, start: int, stop: int) -> Ids:
        """Sample ids at the positions [start, stop), int64 (stop - start,). Raises IndexError outside the epoch."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"positions [{start}, {stop}) are not inside an epoch of {len(self)} samples")
        if self.mode == "sequential":
            return np.arange(start, stop, dtype=np.int64)
        pieces = []
        group = int(np.searchsorted(self._group_ends, start, side="right"))
        while start < stop:
            group_end = int(self._group_ends[group])
            members = self._group(group)
            offset = start - (group_end - len(members))
            pieces.append(members[offset : offset + min(stop, group_end) - start])
            start = min(stop, group_end)
            group += 1
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def _group(self, group: int) -> Ids:
        if self._cached[0] != group:
            shards = self._shards[group * self._block_shards : (group + 1) * self._block_shards]
            sizes = self._shard_sizes[shards]
            # from a place in the group to the sample's id: the shard's first id less the shard's first place
            shifts = np.repeat(self._shard_starts[shards] - (np.cumsum(sizes) - sizes), sizes)
            shuffled = keyed_permutation(int(sizes.sum()), self.seed, self.epoch, STREAM_SAMPLES, group)
            self._cached = (group, shuffled + shifts[shuffled] if self.mode == "block" else shuffled)
        return self._cached[1]


@dataclass(frozen=True)
class Batching:
    """How an order becomes one rank's batches: global batch g is order[gB : (g + 1)B], rank r has its r-th part."""

    global_batch_size: int
    """Samples in a batch over all ranks; must be a multiple of world_size."""

    rank: int = 0
    world_size: int = 1

    tail: Tail = "drop"
    """What becomes of the samples after the last whole batch. "drop": not served in this epoch; "wrap": the batch is
    filled up from the start of the same epoch's order; "mask": the batch is filled up with places marked invalid, so
    that every sample is served once and every rank has the same number of batches."""

    def __post_init__(self) -> None:
        if self.tail not in ("drop", "wrap", "mask"):
            raise ValueError(f"unknown tail '{self.tail}': use 'drop', 'wrap' or 'mask'")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not in [0, {self.world_size})")
        if self.global_batch_size < 1 or self.global_batch_size % self.world_size:
            raise ValueError(
                f"a global batch of {self.global_batch_size} cannot be shared evenly by {self.world_size} ranks"
            )

    @property
    def rank_batch_size(self) -> int:
        """Samples in this rank's part of a batch."""
        return self.global_batch_size // self.world_size

    @property
    def positions(self) -> Ids:
        """This rank's places in the global batch, int64 (rank_batch_size,)."""
        return np.arange(self.rank_batch_size, dtype=np.int64) + self.rank * self.rank_batch_size

    def num_batches(self, remaining: int) -> int:
        """Batches that `remaining` samples make; the same on every rank."""
        if self.tail == "drop":
            return remaining // self.global_batch_size
        return -(-remaining // self.global_batch_size)

    def rank_ids(self, order: EpochOrder, start: int) -> tuple[Ids, npt.NDArray[np.bool_]]:
        """(ids int64, valid bool), both (rank_batch_size,), of this rank in the batch that begins at `start`.

        Under "wrap" positions go on from the start of the order; under "mask" they are marked invalid, with id -1.
        """
        total = len(order)
        first = start + self.rank * self.rank_batch_size
        last = first + self.rank_batch_size
        if self.tail == "wrap" and last > total:
            positions = np.arange(first, last) % total
            ids = np.concatenate([order.ids(int(p), int(p) + 1) for p in positions])
            return ids, np.ones(len(ids), np.bool_)
        ids = order.ids(min(first, total), min(last, total))
        padding = self.rank_batch_size - len(ids)
        valid = np.arange(self.rank_batch_size) < len(ids)
        return np.concatenate([ids, np.full(padding, -1, np.int64)]), valid
