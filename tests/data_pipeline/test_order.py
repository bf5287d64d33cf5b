from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order import Batching, EpochOrder, keyed_permutation

GOLDEN_PLAIN = [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
GOLDEN_STREAM = [0, 9, 5, 7, 8, 4, 6, 2, 3, 1]
SHARDS = (7, 0, 5, 12, 1, 9, 3)


def test_permutation_holds_every_index_once() -> None:
    for size in (0, 1, 2, 3, 64, 65, 1000):
        assert sorted(keyed_permutation(size, 3, 1, 0).tolist()) == list(range(size))


def test_permutation_never_changes_between_versions() -> None:
    # A change here changes the order of every run that is in progress: raise the loader's STATE_VERSION with it.
    assert keyed_permutation(10, seed=0, epoch=0).tolist() == GOLDEN_PLAIN
    assert keyed_permutation(10, 7, 3, 0, 5).tolist() == GOLDEN_STREAM


def test_permutation_is_spread_evenly() -> None:
    # Each of the 24 orders of 4 samples, over 4,800 epochs: 200 expected, deviation sqrt(200 * 23/24) = 13.8.
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(4800):
        order = tuple(keyed_permutation(4, 0, epoch).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert all(abs(count - 200) < 5 * 13.8 for count in counts.values())


def test_seed_0_epoch_1_differs_from_seed_1_epoch_0() -> None:
    assert not np.array_equal(keyed_permutation(100, 0, 1), keyed_permutation(100, 1, 0))


def test_streams_of_one_epoch_differ_and_trailing_zeros_count() -> None:
    orders = [keyed_permutation(100, 0, 0, *stream) for stream in ((), (0,), (0, 0), (1,), (0, 1))]
    assert len({order.tobytes() for order in orders}) == len(orders)


@pytest.mark.parametrize(("seed", "epoch"), [(-1, 0), (2**32, 0), (0, -1), (0, 2**32)])
def test_seed_or_epoch_that_could_collide_with_another_pair_is_refused(seed: int, epoch: int) -> None:
    with pytest.raises(ValueError, match=r"is not in \[0, 2\*\*32\)"):
        keyed_permutation(4, seed, epoch)


@pytest.mark.parametrize("mode", ["sequential", "global", "block"])
def test_epoch_serves_each_sample_once_however_it_is_sliced(mode: str) -> None:
    total = sum(SHARDS)
    order = EpochOrder(mode, SHARDS, 5, 2, block_shards=2)  # type: ignore[arg-type]
    whole = order.ids(0, total)
    assert len(order) == total
    assert sorted(whole.tolist()) == list(range(total))
    for step in (1, 4, 11, total):
        fresh = EpochOrder(mode, SHARDS, 5, 2, block_shards=2)  # type: ignore[arg-type]
        pieces = [fresh.ids(start, min(start + step, total)) for start in range(0, total, step)]
        assert np.concatenate(pieces).tolist() == whole.tolist()


def test_sequential_order_is_the_order_of_ids() -> None:
    assert EpochOrder("sequential", SHARDS, 5, 2).ids(3, 9).tolist() == [3, 4, 5, 6, 7, 8]


def test_global_order_does_not_depend_on_the_shards() -> None:
    assert (
        EpochOrder("global", (30,), 1, 1).ids(0, 30).tolist()
        == EpochOrder("global", (10, 20), 1, 1).ids(0, 30).tolist()
    )


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=12),
    block_shards=st.integers(1, 5),
    seed=st.integers(0, 3),
)
def test_block_order_reads_few_shards_at_a_time(sizes: list[int], block_shards: int, seed: int) -> None:
    order = EpochOrder("block", sizes, seed, 0, block_shards=block_shards)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    served = shard_of[order.ids(0, sum(sizes))].tolist()
    assert sorted(served) == shard_of.tolist()
    # cut where a group ends: every shard's samples lie in exactly one group of at most block_shards shards
    start = 0
    while start < len(served):
        stop, members = start, {served[start]}
        while any(shard in members for shard in served[stop:]):
            stop = max(position for position, shard in enumerate(served) if shard in members) + 1
            grown = set(served[start:stop])
            if grown == members:
                break
            members = grown
        assert len(members) <= block_shards
        start = stop


def test_block_order_changes_shards_and_samples_with_the_epoch() -> None:
    first, second = (EpochOrder("block", (50,) * 8, 0, epoch, block_shards=2).ids(0, 400) for epoch in (0, 1))
    assert not np.array_equal(first // 50, second // 50)
    assert not np.array_equal(np.sort(first[:100]), first[:100])


def test_block_order_of_five_billion_samples_computes_only_what_is_asked_for() -> None:
    order = EpochOrder("block", np.full(500_000, 10_000), 0, 0)
    tracemalloc.start()
    ids = order.ids(2_345_678_901, 2_345_679_925)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(ids.tolist())) == 1024
    assert len(set((ids // 10_000).tolist())) <= 16
    assert peak < 50e6


def test_global_order_of_fourteen_million_samples_fits_in_500_megabytes() -> None:
    tracemalloc.start()
    ids = EpochOrder("global", (14_000_000,), 0, 0).ids(9_999_999, 10_001_023)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(ids.tolist())) == 1024
    assert peak < 500e6


def test_positions_outside_the_epoch_are_refused() -> None:
    order = EpochOrder("global", (10,), 0, 0)
    for start, stop in ((-1, 3), (3, 11), (5, 4)):
        with pytest.raises(IndexError, match="not inside an epoch of 10 samples"):
            order.ids(start, stop)


def test_unknown_order_and_empty_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown order 'random'"):
        EpochOrder("random", (10,), 0, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="block_shards must be at least 1"):
        EpochOrder("block", (10,), 0, 0, block_shards=0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_together_serve_the_global_batch_in_order(world_size: int) -> None:
    order = EpochOrder("global", (20,), 0, 0)
    for start in (0, 6, 12):
        parts = [Batching(6, rank, world_size).rank_places(order, start) for rank in range(world_size)]
        assert np.concatenate([part.ids for part in parts]).tolist() == order.ids(start, start + 6).tolist()
        assert all(part.valid.all() and not part.copies.any() for part in parts)
    positions = [Batching(6, rank, world_size).positions for rank in range(world_size)]
    assert np.concatenate(positions).tolist() == [0, 1, 2, 3, 4, 5]


def test_tails_differ_only_in_the_last_batch() -> None:
    order = EpochOrder("sequential", (10,), 0, 0)
    assert [Batching(4, tail=tail).num_batches(10) for tail in ("drop", "wrap", "mask")] == [2, 3, 3]
    assert [Batching(5, tail=tail).num_batches(10) for tail in ("drop", "wrap", "mask")] == [2, 2, 2]
    wrapped = [Batching(4, rank, 2, "wrap").rank_places(order, 8) for rank in (0, 1)]
    assert [part.ids.tolist() for part in wrapped] == [[8, 9], [0, 1]]
    assert all(part.valid.all() for part in wrapped)
    masked = [Batching(6, rank, 3, "mask").rank_places(order, 9) for rank in (0, 1, 2)]
    assert [part.ids.tolist() for part in masked] == [[9, -1], [-1, -1], [-1, -1]]
    assert [part.valid.tolist() for part in masked] == [[True, False], [False, False], [False, False]]


def test_wrap_goes_round_as_often_as_needed() -> None:
    places = Batching(8, tail="wrap").rank_places(EpochOrder("sequential", (3,), 0, 0), 0)
    assert places.ids.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 0, 3), "a global batch of 10 cannot be shared evenly by 3 ranks"),
        ((0, 0, 1), "a global batch of 0"),
        ((4, 2, 2), r"rank 2 is not in \[0, 2\)"),
        ((4, 0, 1, "pad"), "unknown tail 'pad'"),
    ],
)
def test_batching_that_makes_no_sense_is_refused(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batching(*arguments)
