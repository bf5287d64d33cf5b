"""Going on within data sets of 14 million and of 5 billion samples; benchmarks.data_resume tells the times."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.data_resume import CASES, SHARD_SAMPLES, Case, make_set, resume_elsewhere, write_shard
from data_pipeline.order import Batching, EpochOrder


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shard") / "one.tar"
    write_shard(path)
    return path


@pytest.mark.parametrize("case", CASES, ids=["14-million", "5-billion"])
def test_any_position_of_a_huge_set_is_served_exactly_in_little_memory(case: Case, shard: Path, tmp_path: Path) -> None:
    make_set(tmp_path, case, shard)
    order = EpochOrder(case.order, np.full(case.shards, SHARD_SAMPLES), 0, 0, streams=case.streams)
    batching = Batching(case.global_batch_size, case.rank, case.world_size, streams=case.streams)
    for position in case.positions():
        found = resume_elsewhere(tmp_path, case, position)
        assert found["ids"] == batching.rank_places(order, position).ids.tolist()
        assert found["bytes"] < case.max_bytes
