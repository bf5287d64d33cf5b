from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.aspect_order import AspectOrder, Aspects, aspects_of, largest_canvas
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.dense_config import DetectionDataConfig
from data_pipeline.dense_geometry import fitted
from data_pipeline.order import EpochOrder
from data_pipeline.synthetic import SyntheticSource

RANGES = np.array([0, 1, 1, 2, 1, 0, 1, 2, 2, 1, 1, 0, 2, 1, 2, 1, 0, 1, 2])
BOUNDS = (0.7, 1.0, 1.4)
PINNED = [1, 15, 4, 2, 0, 16, 11, 5, 3, 12, 14, 7, 17, 6, 10, 13, 8, 18, 9]


def _ids(order: AspectOrder) -> np.ndarray:
    return order.at(np.arange(len(order)))[0]


@pytest.mark.parametrize("batch", [1, 2, 4, 8, 32])
def test_batches_hold_one_range_or_what_is_left_in_the_global_order(batch: int) -> None:
    order = _ids(AspectOrder(RANGES, batch, 3, 1))
    assert sorted(order.tolist()) == list(range(19))
    permuted = EpochOrder("global", (19,), 3, 1).ids(0, 19).tolist()
    expected, left = [], set(range(19))
    for wanted in range(3):
        members = [number for number in permuted if RANGES[number] == wanted]
        expected += [members[start : start + batch] for start in range(0, len(members) // batch * batch, batch)]
        left -= {number for ids in expected for number in ids}
    mixed = [number for number in permuted if number in left]
    expected += [mixed[start : start + batch] for start in range(0, len(mixed), batch)]
    found = [order[start : start + batch].tolist() for start in range(0, 19, batch)]
    assert sorted(found) == sorted(expected)
    assert all(len(ids) == batch for ids in found[:-1]), "what is not whole is the last"


def test_mixed_batches_lie_anywhere_in_the_epoch() -> None:
    ranges, places = np.repeat([0, 1, 2, 3], 23), []
    for epoch in range(60):
        batches = ranges[_ids(AspectOrder(ranges, 4, 0, epoch))].reshape(-1, 4)
        places += np.flatnonzero((batches != batches[:, :1]).any(axis=1)).tolist()
    assert len(places) > 120, "four times three images are left: three batches"
    assert set(places) == set(range(23))
    assert abs(np.mean(places) - 11) < 1.6  # six standard errors: 6.6 / sqrt(170)


def test_the_order_depends_on_seed_epoch_and_batch_and_is_the_same_everywhere() -> None:
    assert _ids(AspectOrder(RANGES, 4, 3, 1)).tolist() == PINNED
    others = [AspectOrder(RANGES, 4, 4, 1), AspectOrder(RANGES, 4, 3, 2), AspectOrder(RANGES, 2, 3, 1)]
    assert all(_ids(order).tolist() != PINNED for order in others)


def test_whole_batches_are_mixed_over_the_epoch() -> None:
    ranges = np.repeat([0, 1], 400)
    firsts = ranges[_ids(AspectOrder(ranges, 4, 0, 0))[::4]]
    changes = int((np.diff(firsts) != 0).sum())
    assert 70 < changes < 130, "199 places where the range may change, each with a chance of one half"


def _sizes(count: int = 400) -> np.ndarray:
    rng = np.random.default_rng(0)
    heights = rng.integers(60, 400, count)
    return np.stack([heights, (heights * np.exp(rng.normal(0, 0.5, count))).astype(int) + 1], axis=1).astype(np.int32)


@pytest.mark.parametrize("bounds", [BOUNDS, (), (1.0,)])
@pytest.mark.parametrize(("short", "long"), [(256, 512), (320, 512), (800, 1333), (333, 333)])
def test_a_canvas_holds_all_images_of_its_ranges_and_is_a_multiple_of_32(bounds, short: int, long: int) -> None:
    sizes, config = _sizes(), DetectionDataConfig((short,), long, short, bounds)
    aspects, ranges = Aspects(sizes, config), np.searchsorted(bounds, sizes[:, 1] / sizes[:, 0], side="right")
    for number in range(len(bounds) + 1):
        members = np.flatnonzero(ranges == number)
        height, width = aspects.canvas(members[:3], short)
        assert height % 32 == width % 32 == 0
        needed = np.array([fitted(tuple(sizes[member].tolist()), short, long) for member in members]).max(axis=0)
        assert height - 32 <= needed[0] <= height
        assert width - 32 <= needed[1] <= width
        assert aspects.canvas(members[3:4], short) == (height, width), "one canvas for all batches of a range"


def test_a_mixed_batch_has_the_larger_height_and_the_larger_width() -> None:
    sizes = np.array([(50, 30), (40, 36), (36, 40), (30, 50)], np.int32)
    aspects = Aspects(sizes, DetectionDataConfig((32,), 80, 32, BOUNDS))
    tall, wide = aspects.canvas(np.array([0]), 32), aspects.canvas(np.array([3]), 32)
    assert (tall, wide) == ((64, 32), (32, 64))  # 53 x 32 and 32 x 53
    assert aspects.canvas(np.array([3, 0]), 32) == (64, 64)


@pytest.mark.parametrize(("short", "long"), [(256, 512), (320, 520), (800, 1333)])
def test_the_largest_canvas_is_that_of_long_upright_and_wide_images_together(short: int, long: int) -> None:
    config = DetectionDataConfig((32, short), long, short, BOUNDS)
    sizes = np.array([(90, 30), (30, 90), (50, 50)], np.int32)
    aspects = Aspects(sizes, config)
    assert aspects.canvas(np.array([0, 1]), short) == largest_canvas(config) == (-(-long // 32) * 32,) * 2
    assert max(aspects.canvas(np.array([0, 2]), short)[1], aspects.canvas(np.array([1]), 32)[0]) < long


def test_short_sides_are_drawn_for_each_batch_from_all_that_are_named() -> None:
    aspects = Aspects(_sizes(8), DetectionDataConfig((32, 48, 64), 80, 32, BOUNDS))
    drawn = [aspects.short_side(1, 0, position) for position in range(0, 1200, 4)]
    assert drawn == [aspects.short_side(1, 0, position) for position in range(0, 1200, 4)]
    assert all(70 <= drawn.count(side) <= 130 for side in (32, 48, 64))  # 100, with a deviation of 8
    assert drawn != [aspects.short_side(1, 1, position) for position in range(0, 1200, 4)]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig(order="block"), "data.order 'block': detection puts images of similar shapes together"),
        (DataConfig(augment=AugmentConfig(repeats=3)), "data.augment.repeats 3: detection serves each image once"),
    ],
)
def test_settings_that_do_not_go_with_aspect_ranges_are_refused(config: DataConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aspects_of(config, SyntheticSource(config, "train"))
