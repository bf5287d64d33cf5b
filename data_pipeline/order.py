"""Which sample is served at which position of which epoch: pure functions, the same on every rank and every machine.

An epoch's order is a function of (seed, epoch, mode, sizes of the shards, streams, repeats) and of nothing else; a
rank's batch is a part of it. Nothing is remembered between calls, so resuming anywhere is computing a slice.

Under `block` the line of permuted shards is cut into C equal spans, the canonical streams. Positions are dealt to them
in pairs, in turn, and a rank takes its part of a batch stream by stream. So a node reads only the shards of its
streams, pairs of neighbours stay together, and the order depends on C but not on the number of nodes or ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Mode = Literal["sequential", "global", "block"]
Tail = Literal["drop", "wrap", "mask"]
Ids = npt.NDArray[np.int64]

# Every use of (seed, epoch) has its own stream, so that no two of them ever see the same numbers.
STREAM_SAMPLES, STREAM_SHARDS, STREAM_AUGMENT, STREAM_BATCHES, STREAM_SHORT_SIDES = range(5)

# Repeated augmentation: so many different samples stand before the first of them stands again. Even, so that a pair of
# neighbours is never one sample twice; small beside a batch, so that a step sees the copies together.
REPEAT_CHUNK = 32

_FILL = 1 << 20  # numbers written at a time, so that temporary arrays stay small


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
    of distinct numbers has one result whatever the algorithm, and it is faster (14 million: about 1 s) and needs no
    memory beside the result.
    """
    index_bits = np.uint64((1 << max(size - 1, 0).bit_length()) - 1)
    words = np.random.PCG64(keyed_seed(seed, epoch, *stream)).random_raw(size)
    words &= ~index_bits
    for start in range(0, size, _FILL):
        words[start : start + _FILL] |= np.arange(start, min(start + _FILL, size), dtype=np.uint64)
    words.sort()
    words &= index_bits
    return words.view(np.int64)


class Ordering(Protocol):
    """Position -> sample id for one epoch, as the loader asks for it; what each says is told at EpochOrder."""

    def __len__(self) -> int:
        """Positions of the epoch."""
        ...

    def at(self, positions: Ids) -> tuple[Ids, Ids]:
        """(sample ids, copies), both int64 (n,), at any positions (n,) of the epoch."""
        ...

    def groups(self, positions: Ids) -> list[tuple[int, int]]:
        """(stream, group) of shards that the positions read from; none where every shard is needed all the time."""
        ...

    def group_shards(self, stream: int, group: int) -> list[int]:
        """Numbers of the shards of a group."""
        ...


class EpochOrder:
    """Position -> sample id for one epoch; only what is asked for is computed, and each stream's last group is kept.

    `sequential` is the identity; `global` permutes all samples; `block` permutes the shards, deals that line to the
    streams, cuts each stream into groups of `block_shards` and permutes the samples inside each group, so that a reader
    touches few shards at a time and no array as long as the data set is ever built.

    With `repeats` R > 1 the epoch is as long as ever, but each 32 R positions of a stream hold 32 different samples:
    all of them R times in turn (repeated augmentation; Hoffer et al. 2020). The last such chunk may be cut short.
    """

    def __init__(
        self,
        mode: Mode,
        shard_sizes: Sequence[int] | Ids,
        seed: int,
        epoch: int,
        *,
        block_shards: int = 16,
        streams: int = 1,
        repeats: int = 1,
    ) -> None:
        """`shard_sizes`: samples in each shard, in the order of their ids. Raises ValueError where nothing fits."""
        if mode not in ("sequential", "global", "block"):
            raise ValueError(f"unknown order '{mode}': use 'sequential', 'global' or 'block'")
        for name, value in (("block_shards", block_shards), ("streams", streams), ("repeats", repeats)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if streams > 1 and mode != "block":
            raise ValueError(f"order '{mode}' has one stream and not {streams}: only order 'block' has more")
        self.mode, self.seed, self.epoch, self.block_shards = mode, seed, epoch, block_shards
        self._repeats = repeats
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        if mode == "global":  # one group that holds everything
            sizes = sizes.sum(keepdims=True)
        self._sizes = sizes
        self._first_ids = np.cumsum(sizes) - sizes
        if mode == "block":
            self._line = keyed_permutation(len(sizes), seed, epoch, STREAM_SHARDS)
        else:
            self._line = np.arange(len(sizes))
        self._line_ends = np.cumsum(sizes[self._line])
        self._stream_ends = np.cumsum(_dealt(len(self), streams))
        self._streams: dict[int, _Stream] = {}

    def __len__(self) -> int:
        """Positions in the epoch: as many as there are samples."""
        return int(self._line_ends[-1]) if len(self._line_ends) else 0

    def ids(self, start: int, stop: int) -> Ids:
        """Sample ids at the positions [start, stop), int64 (stop - start,). Raises IndexError outside the epoch."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"positions [{start}, {stop}) are not inside an epoch of {len(self)} samples")
        return self.at(np.arange(start, stop, dtype=np.int64))[0]

    def at(self, positions: Ids) -> tuple[Ids, Ids]:
        """(sample ids, number of the copy in [0, repeats)), both int64 (n,), at any positions (n,) of the epoch."""
        streams, offsets, copies = self._places(positions)
        ids = np.empty(len(positions), np.int64)
        for number in np.unique(streams).tolist():
            chosen = np.flatnonzero(streams == number)
            ids[chosen] = self._stream(number).at(offsets[chosen])
        return ids, copies

    def groups(self, positions: Ids) -> list[tuple[int, int]]:
        """(stream, group) of the first of the positions (n,) in each stream that they touch, by stream."""
        streams, offsets, _ = self._places(positions)
        found = [(int(number), int(offsets[streams == number].min())) for number in np.unique(streams)]
        return [(number, self._stream(number).group_of(offset)) for number, offset in found]

    def group_shards(self, stream: int, group: int) -> list[int]:
        """The shards that a group of a stream is read from; none where the stream has no such group.

        Under "global" everything is one group and says nothing of shards: the list is empty.
        """
        if self.mode == "global":
            return []
        return self._stream(stream).group_shards(group).tolist()

    def _places(self, positions: Ids) -> tuple[Ids, Ids, Ids]:
        """Stream, place in it (of the first copy), and number of the copy, for each position."""
        count = len(self._stream_ends)
        units, within = positions // 2, positions % 2
        offsets = units // count * 2 + within
        chunks, rest = np.divmod(offsets, REPEAT_CHUNK * self._repeats)
        return units % count, chunks * REPEAT_CHUNK + rest % REPEAT_CHUNK, rest // REPEAT_CHUNK

    def _stream(self, number: int) -> _Stream:
        if number not in self._streams:
            start = int(self._stream_ends[number - 1]) if number else 0
            self._streams[number] = _Stream(self, number, start, int(self._stream_ends[number]))
        return self._streams[number]


class _Stream:
    """The span [start, stop) of an order's line of shards: pieces of shards, in groups that are shuffled each."""

    def __init__(self, order: EpochOrder, number: int, start: int, stop: int) -> None:
        self._order, self._number = order, number
        ends = order._line_ends
        # A shard on the border of two streams belongs to both with a piece of it; an order of one stream has them all.
        first = int(np.searchsorted(ends, start, side="right")) if number else 0
        last = int(np.searchsorted(ends, stop, side="left")) + 1 if number + 1 < len(order._stream_ends) else len(ends)
        self._shards = order._line[first:last]
        sizes = order._sizes[self._shards]
        line_starts = ends[first:last] - sizes
        piece_starts = np.maximum(line_starts, start)
        self._sizes = np.maximum(np.minimum(ends[first:last], stop) - piece_starts, 0)
        self._first_ids = order._first_ids[self._shards] + piece_starts - line_starts
        size = order.block_shards
        self._group_ends = np.cumsum(np.add.reduceat(self._sizes, np.arange(0, len(self._sizes), size)))
        self._cached: tuple[int, Ids] = (-1, np.empty(0, np.int64))

    def at(self, offsets: Ids) -> Ids:
        """Sample ids at places (n,) of this stream."""
        if self._order.mode == "sequential":
            return offsets
        groups = np.searchsorted(self._group_ends, offsets, side="right")
        ids = np.empty(len(offsets), np.int64)
        for group in np.unique(groups).tolist():
            members, chosen = self._group(group), groups == group
            ids[chosen] = members[offsets[chosen] - (int(self._group_ends[group]) - len(members))]
        return ids

    def group_of(self, offset: int) -> int:
        """The group that holds this place."""
        return int(np.searchsorted(self._group_ends, offset, side="right"))

    def group_shards(self, group: int) -> Ids:
        """The shards of a group; (0,) where there is no such group."""
        size = self._order.block_shards
        return self._shards[group * size : (group + 1) * size]

    def _group(self, group: int) -> Ids:
        """The ids of a group's samples in the order in which they are served."""
        if self._cached[0] != group:
            order, size = self._order, self._order.block_shards
            first_ids, sizes = (column[group * size : (group + 1) * size] for column in (self._first_ids, self._sizes))
            # from a place in the group to the sample's id: the piece's first id less the piece's first place
            shifts = first_ids - (np.cumsum(sizes) - sizes)
            key = (STREAM_SAMPLES, group, self._number) if self._number else (STREAM_SAMPLES, group)
            ids = keyed_permutation(int(sizes.sum()), order.seed, order.epoch, *key)
            if len(sizes) > 1:
                ids += np.repeat(shifts, sizes)[ids]
            elif shifts[0]:
                ids += shifts[0]
            self._cached = (group, ids)
        return self._cached[1]


def _dealt(total: int, streams: int) -> Ids:
    """How many of `total` positions each stream gets when pairs are dealt in turn, (streams,)."""
    pairs, single = divmod(total, 2)
    sizes = 2 * ((pairs - np.arange(streams) + streams - 1) // streams)
    sizes[pairs % streams] += single
    return sizes


class Places(NamedTuple):
    """One rank's part of one batch; all arrays have one entry per place."""

    ids: Ids
    """Sample ids; -1 for padding."""

    copies: Ids
    """Which copy of the sample it is under repeated augmentation, else 0."""

    valid: npt.NDArray[np.bool_]
    """False for padding."""


@dataclass(frozen=True)
class Batching:
    """How an order becomes one rank's batches: global batch g is order[gB : (g + 1)B], rank r has its r-th part.

    The parts are cut from the batch's places sorted by (stream, place): where there is one stream, from the batch.
    """

    global_batch_size: int
    """Samples in a batch over all ranks; must be a multiple of world_size, and of 2 * streams where there are more
    streams than one."""

    rank: int = 0
    world_size: int = 1

    tail: Tail = "drop"
    """What becomes of the samples after the last whole batch. "drop": not served in this epoch; "wrap": the batch is
    filled up from the start of the same epoch's order; "mask": the batch is filled up with places marked invalid, so
    that every sample is served once and every rank has the same number of batches."""

    streams: int = 1
    """Canonical streams of the order that is served."""

    def __post_init__(self) -> None:
        if self.tail not in ("drop", "wrap", "mask"):
            raise ValueError(f"unknown tail '{self.tail}': use 'drop', 'wrap' or 'mask'")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not in [0, {self.world_size})")
        if self.global_batch_size < 1 or self.global_batch_size % self.world_size:
            raise ValueError(
                f"a global batch of {self.global_batch_size} cannot be shared evenly by {self.world_size} ranks"
            )
        if self.streams > 1 and self.global_batch_size % (2 * self.streams):
            raise ValueError(
                f"a global batch of {self.global_batch_size} is no multiple of {2 * self.streams}, twice the number of "
                "canonical streams (canonical_nodes), so streams could not be served at the same pace"
            )

    @property
    def rank_batch_size(self) -> int:
        """Samples in this rank's part of a batch."""
        return self.global_batch_size // self.world_size

    @property
    def positions(self) -> Ids:
        """This rank's places in the global batch, int64 (rank_batch_size,), stream by stream."""
        by_stream = np.arange(self.rank_batch_size, dtype=np.int64) + self.rank * self.rank_batch_size
        if self.streams == 1:
            return by_stream
        stream, place = np.divmod(by_stream, self.global_batch_size // self.streams)
        return (place // 2 * self.streams + stream) * 2 + place % 2

    def num_batches(self, remaining: int) -> int:
        """Batches that `remaining` samples make; the same on every rank."""
        if self.tail == "drop":
            return remaining // self.global_batch_size
        return -(-remaining // self.global_batch_size)

    def rank_places(self, order: Ordering, start: int) -> Places:
        """What this rank serves, (rank_batch_size,), in the batch that begins at position `start`.

        Under "wrap" positions go on from the start of the order; under "mask" they are marked invalid, with id -1.
        """
        positions = start + self.positions
        if self.tail == "wrap":
            positions %= len(order)
        valid = positions < len(order)
        ids, copies = np.full(len(positions), -1, np.int64), np.zeros(len(positions), np.int64)
        ids[valid], copies[valid] = order.at(positions[valid])
        return Places(ids, copies, valid)
