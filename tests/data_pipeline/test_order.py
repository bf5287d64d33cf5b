from __future__ import annotations

import hashlib
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order import Batching, EpochOrder, keyed_permutation

GOLDEN_PLAIN = [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
GOLDEN_STREAM = [0, 9, 5, 7, 8, 4, 6, 2, 3, 1]
GOLDEN_STREAMS = [
    1, 0, 22, 13, 29, 27, 11, 4, 21, 15, 30, 33, 6, 8, 19, 18, 31, 32, 5, 10, 16, 24, 25, 26, 7, 9, 14, 23,
    28, 36, 3, 2, 17, 20, 35, 34, 12,
]  # fmt: skip
SHARDS = (7, 0, 5, 12, 1, 9, 3)
UNEVEN = (40, 3, 77, 0, 61, 1, 50, 33, 58, 29, 44, 5)  # 401 samples


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


def test_order_of_one_stream_never_changes_between_versions() -> None:
    # Recorded before there were streams; raise the loader's STATE_VERSION with any change.
    two = [1, 0, 11, 4, 6, 8, 5, 10, 7, 9, 3, 2, 15, 18, 16, 17, 21, 22, 13, 23, 19, 14, 20, 24, 12, 25, 32, 30, 28, 29,
           33, 26, 27, 31, 36, 34, 35]  # fmt: skip
    whole = [12, 22, 27, 23, 13, 25, 6, 35, 32, 33, 5, 24, 4, 18, 26, 20, 15, 31, 29, 9, 21, 11, 30, 1, 10, 3, 0, 34,
             36, 17, 2, 8, 14, 19, 7, 28, 16]  # fmt: skip
    assert EpochOrder("block", SHARDS, 5, 2, block_shards=2).ids(0, 37).tolist() == two
    assert EpochOrder("global", SHARDS, 5, 2).ids(0, 37).tolist() == whole
    large = EpochOrder("block", np.full(1000, 100), 3, 4).ids(0, 100_000).astype("<i8").tobytes()
    assert hashlib.sha256(large).hexdigest() == "ca8c0351e58d806b2de1181ef19cfa6e547696b739b82f32c1e91ed5e81817c2"


def test_order_of_several_streams_never_changes_between_versions() -> None:
    assert EpochOrder("block", SHARDS, 5, 2, block_shards=2, streams=3).ids(0, 37).tolist() == GOLDEN_STREAMS


@pytest.mark.parametrize("sizes", [SHARDS, UNEVEN, (1,), (2, 3), (0, 0, 9), (40,)])
@pytest.mark.parametrize("streams", [2, 3, 4, 7])
def test_streams_serve_each_sample_once(sizes: tuple[int, ...], streams: int) -> None:
    total = sum(sizes)
    order = EpochOrder("block", sizes, 1, 6, block_shards=2, streams=streams)
    whole = order.ids(0, total)
    assert sorted(whole.tolist()) == list(range(total))
    fresh = EpochOrder("block", sizes, 1, 6, block_shards=2, streams=streams)
    assert np.concatenate([fresh.ids(start, min(start + 5, total)) for start in range(0, total, 5)]).tolist() == (
        whole.tolist()
    )


def test_pairs_are_dealt_to_the_streams_in_turn_from_equal_spans_of_the_line_of_shards() -> None:
    order = EpochOrder("block", (10,) * 12, 0, 0, block_shards=2, streams=3)
    shards = (order.ids(0, 120) // 10).reshape(-1, 3, 2)  # (unit, stream, place in the pair)
    spans = [list(dict.fromkeys(shards[:, stream].ravel().tolist())) for stream in range(3)]
    assert [len(span) for span in spans] == [4, 4, 4]
    line = keyed_permutation(12, 0, 0, 1).tolist()
    assert [sorted(span) for span in spans] == [sorted(line[start : start + 4]) for start in (0, 4, 8)]
    for stream in range(3):  # two shards at a time
        assert set(shards[:10, stream].ravel().tolist()) == set(line[4 * stream : 4 * stream + 2])


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_a_node_reads_only_the_shards_of_its_streams(nodes: int) -> None:
    order, batch, ranks_per_node = EpochOrder("block", UNEVEN * 4, 3, 1, block_shards=2, streams=4), 16, 2
    world = nodes * ranks_per_node
    ends = np.cumsum(UNEVEN * 4)
    line = keyed_permutation(48, 3, 1, 1)
    line_ends = np.cumsum(np.array(UNEVEN * 4)[line])
    touched: list[set[int]] = [set() for _ in range(nodes)]
    served: list[int] = []
    for rank in range(world):
        batching = Batching(batch, rank, world, "mask", streams=4)
        for number in range(batching.num_batches(len(order))):
            places = batching.rank_places(order, number * batch)
            ids = places.ids[places.valid]
            touched[rank // ranks_per_node] |= set(np.searchsorted(ends, ids, side="right").tolist())
            served += ids.tolist()
    assert sorted(served) == list(range(4 * sum(UNEVEN)))
    for node, shards in enumerate(touched):
        # its part of the line of shards; streams are equal within one pair, so the border may move by one shard
        begin, end = (int(len(order) * part / nodes) for part in (node, node + 1))
        first, last = np.searchsorted(line_ends, [begin - 8, min(end + 8, len(order) - 1)], side="right")
        assert shards <= set(line[first : last + 1].tolist())
    together = sum(len(shards) for shards in touched)
    assert together <= np.count_nonzero(UNEVEN) * 4 + nodes  # a shard on a border is read by both sides


@pytest.mark.parametrize("streams", [1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_order_of_a_batch_does_not_depend_on_the_number_of_ranks(world_size: int, streams: int) -> None:
    order = EpochOrder("block", UNEVEN, 0, 0, block_shards=3, streams=streams)
    for start in (0, 16, 384):
        batch = np.full(16, -1)
        for rank in range(world_size):
            batching = Batching(16, rank, world_size, "mask", streams)
            pairs = batching.positions.reshape(-1, 2)
            assert (pairs[:, 0] % 2 == 0).all()
            assert (pairs[:, 1] == pairs[:, 0] + 1).all(), "pairs of neighbours stay together"
            assert (np.diff(pairs[:, 0] // 2 % streams) >= 0).all(), "stream by stream"
            batch[batching.positions] = batching.rank_places(order, start).ids
        expected = order.ids(start, min(start + 16, 401)).tolist()
        assert batch.tolist() == expected + [-1] * (16 - len(expected))


@pytest.mark.parametrize(("mode", "streams"), [("global", 1), ("block", 1), ("block", 3)])
@pytest.mark.parametrize("repeats", [2, 3])
def test_repeats_serve_fewer_samples_more_often_in_chunks(mode: str, streams: int, repeats: int) -> None:
    sizes, kwargs = (600,) * 2, {"block_shards": 2, "streams": streams}
    total = sum(sizes)
    order = EpochOrder(mode, sizes, 0, 0, repeats=repeats, **kwargs)  # type: ignore[arg-type]
    once = EpochOrder(mode, sizes, 0, 0, **kwargs)  # type: ignore[arg-type]
    assert len(order) == total
    ids, copies = order.at(np.arange(total))
    assert len(set(zip(ids.tolist(), copies.tolist(), strict=True))) == total, "a copy is served once"
    for stream in range(streams):
        mine = np.flatnonzero(np.arange(total) // 2 % streams == stream)
        chunk = 32 * repeats
        for start in range(0, len(mine) // chunk * chunk, chunk):
            served = ids[mine[start : start + chunk]].reshape(repeats, 32)
            assert (copies[mine[start : start + chunk]].reshape(repeats, 32) == np.arange(repeats)[:, None]).all()
            assert (served == served[0]).all()
            first = start // repeats
            assert served[0].tolist() == once.at(mine[first : first + 32])[0].tolist()
    assert (ids[0::2] != ids[1::2]).all(), "no pair of neighbours is one sample twice"


def test_groups_name_the_shards_that_are_read() -> None:
    order = EpochOrder("block", UNEVEN, 2, 0, block_shards=2, streams=3)
    ends = np.cumsum(UNEVEN)
    for position in range(0, 396, 6):
        for place in range(position, position + 6):
            ((stream, group),) = order.groups(np.array([place]))
            assert stream == place // 2 % 3
            shard = int(np.searchsorted(ends, order.ids(place, place + 1)[0], side="right"))
            assert shard in order.group_shards(stream, group)
    assert order.group_shards(0, 99) == []
    assert EpochOrder("sequential", UNEVEN, 0, 0, block_shards=2).group_shards(0, 1) == [2, 3]
    assert EpochOrder("global", UNEVEN, 0, 0).group_shards(0, 0) == []


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
    assert peak < 130e6  # the permutation itself, and little else


def test_positions_outside_the_epoch_are_refused() -> None:
    order = EpochOrder("global", (10,), 0, 0)
    for start, stop in ((-1, 3), (3, 11), (5, 4)):
        with pytest.raises(IndexError, match="not inside an epoch of 10 samples"):
            order.ids(start, stop)


def test_unknown_order_and_empty_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown order 'random'"):
        EpochOrder("random", (10,), 0, 0)  # type: ignore[arg-type]
    for name in ("block_shards", "streams", "repeats"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
            EpochOrder("block", (10,), 0, 0, **{name: 0})
    with pytest.raises(ValueError, match="order 'global' has one stream and not 2"):
        EpochOrder("global", (10,), 0, 0, streams=2)


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
        ((12, 0, 1, "drop", 4), "a global batch of 12 is no multiple of 8, twice the number of canonical streams"),
    ],
)
def test_batching_that_makes_no_sense_is_refused(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batching(*arguments)
