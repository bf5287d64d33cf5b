"""The measures of benchmarks.shuffle_quality, on orders whose quality is known."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.shuffle_quality import different, measure, together

SIZES = np.full(100, 200)


def test_batches_of_different_and_of_equal_values() -> None:
    batches = np.array([[1, 1, 1, 1], [1, 2, 3, 4], [5, 5, 6, 6]])
    assert different(batches) == pytest.approx((1 + 4 + 2) / 3)
    assert together(batches) == pytest.approx((12 + 0 + 4) / (3 * 4 * 3))


def test_global_order_is_as_good_as_chance() -> None:
    found = measure("global", 0, 1, SIZES, num_classes=50, batch_size=100)
    chance = 50 * (1 - (1 - 1 / 50) ** 100)
    assert found.classes_if_by_class == pytest.approx(chance, rel=0.02)
    assert found.classes_if_mixed == pytest.approx(chance, rel=0.02)
    assert found.again == pytest.approx(1, abs=0.05)
    assert found.moved == pytest.approx(1 / 3, abs=0.01)
    assert abs(found.rank_correlation) < 4 / np.sqrt(SIZES.sum())


def test_streams_mix_as_groups_of_so_many_more_shards_do() -> None:
    alone, streams, larger = (measure("block", *block, SIZES, 50, 96) for block in ((4, 1), (4, 4), (16, 1)))
    assert alone.shards == pytest.approx(4 + 24 * 4 / 208, abs=0.2)  # batches on one of 24 borders have twice as many
    assert streams.shards == pytest.approx(larger.shards, rel=0.1)
    assert alone.again > 2 * streams.again
    assert streams.again == pytest.approx(larger.again, rel=0.25)
    assert alone.classes_if_by_class < 5 < 12 < streams.classes_if_by_class
    assert alone.classes_if_mixed == pytest.approx(larger.classes_if_mixed, rel=0.02)
