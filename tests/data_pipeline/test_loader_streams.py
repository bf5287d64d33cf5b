"""Canonical streams, repeated augmentation, changing image sizes, and what a source is told and asked."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import AugmentConfig, Batching, DataConfig, DataError, Loader, SyntheticConfig, build_loader
from data_pipeline.order import EpochOrder
from data_pipeline.synthetic import SyntheticSource

# 3 whole shards of 100 and one of 37
CONFIG = DataConfig(
    backend="synthetic",
    num_classes=5,
    image_size=8,
    num_threads=0,
    order="block",
    block_shards=1,
    canonical_nodes=2,
    augment=AugmentConfig(scale=(0.3, 1.0), interpolation="linear"),
    synthetic=SyntheticConfig(train_samples=337, val_samples=23),
)

Served = dict[int, list[tuple[int, int, int, bytes]]]
"""Start of a global batch -> (place, id, copy, pixels) of its samples, by place"""


def serve(config: DataConfig, batch_size: int, world_size: int, state: dict[str, Any] | None, batches: int) -> Served:
    """So many batches of all ranks, and the state after them under the key -1."""
    served: Served = {}
    for rank in range(world_size):
        with build_loader(
            config, "train", train=True, global_batch_size=batch_size, rank=rank, world_size=world_size, seed=4
        ) as loader:
            if state is not None:
                loader.load_state_dict(state)
            start = loader.state_dict()["consumed"]
            for _, batch in zip(range(batches), loader, strict=False):
                rows = zip(batch.positions.tolist(), batch.ids.tolist(), batch.copies.tolist(), strict=True)
                assert (batch.ids[0::2] != batch.ids[1::2]).all(), "mixed with its own copy"
                pixels = [image.numpy().tobytes() for image in batch.images]
                served.setdefault(start, []).extend((*row, image) for row, image in zip(rows, pixels, strict=True))
                start += batch_size
    return {start: sorted(rows) for start, rows in served.items()}


def in_order(served: Served) -> list[tuple[int, int, bytes]]:
    """(id, copy, pixels) by position."""
    return [row[1:] for start in sorted(served) for row in served[start]]


@pytest.mark.parametrize("repeats", [1, 3])
def test_streams_resume_exactly_with_other_ranks_and_batch_sizes(repeats: int) -> None:
    config = replace(CONFIG, augment=replace(CONFIG.augment, repeats=repeats))
    whole = in_order(serve(config, 4, 1, None, 84))
    order = EpochOrder("block", (100, 100, 100, 37), 4, 0, block_shards=1, streams=2, repeats=repeats)
    ids, copies = order.at(np.arange(336))
    assert [(sample, copy) for sample, copy, _ in whole] == list(zip(ids.tolist(), copies.tolist(), strict=True))
    # every copy has its own augmentation; in images of 8 px two now and then draw the same crop
    assert len({image for _, _, image in whole}) > 320

    state: dict[str, Any] = {}
    with build_loader(config, "train", train=True, global_batch_size=4, rank=0, world_size=1, seed=4) as loader:
        state = loader.state_dict()
    again: list[tuple[int, int, bytes]] = []
    for batch_size, world_size, batches in ((16, 4, 3), (24, 3, 5), (12, 1, 2), (4, 2, 36)):
        again += in_order(serve(config, batch_size, world_size, state, batches))
        state = json.loads(json.dumps({**state, "consumed": len(again)}))
    assert again == whole


def test_state_names_the_streams_and_repeats_and_refuses_others() -> None:
    def state(config: DataConfig) -> dict[str, Any]:
        with build_loader(config, "train", train=True, global_batch_size=8, rank=0, world_size=1, seed=0) as loader:
            return loader.state_dict()

    one = replace(CONFIG, canonical_nodes=1)
    thrice = replace(CONFIG, augment=replace(CONFIG.augment, repeats=3))
    assert [state(config)["order"] for config in (one, CONFIG, thrice)] == [
        "block/1",
        "block/1/2",
        "block/1/2 repeats 3",
    ]
    assert state(replace(CONFIG, order="global"))["order"] == "global"
    with (
        build_loader(one, "train", train=True, global_batch_size=8, rank=0, world_size=1, seed=0) as loader,
        pytest.raises(DataError, match=r"order is 'block/1' now and was 'block/1/2'"),
    ):
        loader.load_state_dict(state(CONFIG))


def test_batches_that_do_not_fit_the_streams_are_refused() -> None:
    with pytest.raises(ValueError, match="a global batch of 6 is no multiple of 4"):
        build_loader(CONFIG, "train", train=True, global_batch_size=6, rank=0, world_size=1, seed=0)
    # an evaluation has no streams
    with build_loader(CONFIG, "val", train=False, global_batch_size=5, rank=0, world_size=1, seed=0) as loader:
        assert [sample for batch in loader for sample in batch.ids[batch.valid].tolist()] == list(range(23))


def test_evaluation_repeats_nothing() -> None:
    config = replace(CONFIG, augment=replace(CONFIG.augment, repeats=3), image_size_schedule=((0, 16),))
    with build_loader(config, "val", train=False, global_batch_size=5, rank=0, world_size=1, seed=0) as loader:
        batches = list(loader)
    assert [sample for batch in batches for sample in batch.ids[batch.valid].tolist()] == list(range(23))
    assert {tuple(batch.images.shape) for batch in batches} == {(5, 8, 8, 3)}


@pytest.mark.parametrize("num_threads", [0, 2])
def test_image_size_follows_the_epoch_and_resumes(num_threads: int) -> None:
    config = replace(CONFIG, num_threads=num_threads, image_size_schedule=((0, 8), (2, 12), (3, 20)))
    with build_loader(config, "train", train=True, global_batch_size=112, rank=0, world_size=1, seed=0) as loader:
        sizes, images = [], []
        for _ in range(5):
            for batch in loader:
                sizes.append(batch.images.shape[1])
                images.append(batch.images.clone())
                if len(sizes) == 8:  # within the epoch of another size than the first
                    state = loader.state_dict()
    assert sizes == [8] * 6 + [12] * 3 + [20] * 6
    with build_loader(config, "train", train=True, global_batch_size=112, rank=0, world_size=1, seed=0) as loader:
        loader.load_state_dict(state)
        rest = [batch.images.clone() for _ in range(3) for batch in loader]
    assert [image.shape for image in rest] == [image.shape for image in images[8:]]
    assert all((image == expected).all() for image, expected in zip(rest, images[8:], strict=True))


class Remote(SyntheticSource):
    """Notes what it is told, and in which of the announcements the shard of a read sample stood."""

    def __init__(self, config: DataConfig, split: str = "train") -> None:
        super().__init__(config, split)
        self.told: list[list[int]] = []
        self.read_shards: list[int] = []
        self.counts = {"cache_hits": 2.0}

    def expect(self, shards: Sequence[int]) -> None:
        self.told.append(list(shards))

    def read(self, index: int) -> Any:
        shard = index // 100
        assert shard in self.told[-1], f"shard {shard} is read unannounced"
        if shard not in self.read_shards:
            self.read_shards.append(shard)
        return super().read(index)

    def stats(self) -> dict[str, float]:
        counts, self.counts = self.counts, {"cache_hits": 0.0}
        return counts


def test_source_is_told_which_shards_come_before_they_are_read() -> None:
    config = replace(CONFIG, canonical_nodes=1, synthetic=SyntheticConfig(train_samples=900))
    source = Remote(config)
    with Loader(source, config, Batching(10), train=True, seed=0) as loader:
        list(loader)
        line, following = source.read_shards, EpochOrder("block", (100,) * 9, 0, 1, block_shards=1)
        assert sorted(line) == list(range(9))
        expected = [line[place : place + 2] for place in range(8)]
        expected.append([line[8], *following.group_shards(0, 0)])
        assert source.told == [list(dict.fromkeys(shards)) for shards in expected]
        assert loader.stats()["cache_hits"] == 2
        assert loader.stats()["cache_hits"] == 0


def test_rank_is_told_only_the_shards_of_its_streams() -> None:
    config = replace(CONFIG, canonical_nodes=4, synthetic=SyntheticConfig(train_samples=1600))
    told: list[set[int]] = []
    for rank in (0, 3):
        source = Remote(config)
        with Loader(source, config, Batching(16, rank, 4, streams=4), train=True, seed=0) as loader:
            list(loader)
        # the last of them belong to the next epoch
        told.append({shard for shards in source.told[:-1] for shard in shards})
        assert set(source.read_shards) <= told[-1] | set(source.told[-1])
        assert len(source.read_shards) <= 5
    assert len(told[0] & told[1]) == 0


def test_evaluation_announces_shards_too() -> None:
    source = Remote(replace(CONFIG, synthetic=SyntheticConfig(train_samples=450)))
    with Loader(source, CONFIG, Batching(50, tail="mask"), train=False, seed=0) as loader:
        list(loader)
    assert source.read_shards == [0, 1, 2, 3, 4]
    assert source.told == [[0, 1], [1, 2], [2, 3], [3, 4], [4, 0]]


def test_memory_stays_flat_over_many_batches() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    config = replace(CONFIG, num_threads=2, image_size=64, synthetic=SyntheticConfig(train_samples=128 * 40))
    with build_loader(config, "train", train=True, global_batch_size=128, rank=0, world_size=1, seed=0) as loader:
        after = []
        for number, batch in enumerate(loader):
            assert batch.images.shape == (128, 64, 64, 3)  # 1.6 MB each
            if number >= 10:
                after.append(resident())
    assert len(after) == 30
    assert max(after) - after[0] < 8e6
