"""Telling a source which shards it will be asked for, so that a remote one can fetch them ahead of need."""

from __future__ import annotations

from collections.abc import Callable

from data_pipeline.order import Batching, Ordering
from data_pipeline.shards.source import Source


class Expectation:
    """This rank's shards of the groups in use and of those that follow, told to the source when they change.

    A group (`block_shards` shards of a stream) is read as a whole, so its shards are all needed almost at once. Near
    an epoch's end the shards that the next epoch begins with are told, too. Sources that do not ask are told nothing.
    """

    def __init__(self, source: Source, batching: Batching, order: Ordering, following: Callable[[], Ordering]):
        """`following`: makes the order of the next epoch, when it is needed."""
        self._expect = getattr(source, "expect", None)
        self._batching, self._order, self._following = batching, order, following
        self._told: list[tuple[int, int]] = []

    def at(self, start: int) -> None:
        """The batch that begins at position `start` is read next."""
        if self._expect is None:
            return
        positions = start + self._batching.positions
        groups = self._order.groups(positions[positions < len(self._order)])
        if groups == self._told or not groups:
            return
        self._told = groups
        shards = _shards_of(self._order, groups)
        later = _shards_of(self._order, [(stream, group + 1) for stream, group in groups])
        if not later:
            following, first = self._following(), self._batching.positions
            later = _shards_of(following, following.groups(first[first < len(following)]))
        wanted = list(dict.fromkeys(shards + later))
        if wanted:
            self._expect(wanted)


def _shards_of(order: Ordering, groups: list[tuple[int, int]]) -> list[int]:
    return [shard for stream, group in groups for shard in order.group_shards(stream, group)]
