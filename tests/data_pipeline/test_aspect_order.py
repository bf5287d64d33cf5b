from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.aspect_order import AspectOrder, Aspects, aspects_of
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
def test_batches_hold_one_range_and_what_is_left_follows_in_the_global_order(batch: int) -> None:
    order = _ids(AspectOrder(RANGES, batch, 3, 1))
    assert sorted(order.tolist()) == list(range(19))
    permuted = EpochOrder("global", (19,), 3, 1).ids(0, 19)
    whole = sum(np.bincount(RANGES) // batch)
    batches = [order[number * batch : (number + 1) * batch] for number in range(whole)]
    assert all(len(set(RANGES[ids].tolist())) == 1 for ids in batches)
    left = order[whole * batch :].tolist()
    assert left == [number for number in permuted.tolist() if number in left]
    for wanted in range(3):  # within a range the global order holds, up to the order of its batches
        members = [number for number in permuted.tolist() if RANGES[number] == wanted]
        expected = [members[start : start + batch] for start in range(0, len(members) // batch * batch, batch)]
        assert sorted(expected) == sorted(ids.tolist() for ids in batches if RANGES[ids[0]] == wanted)


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
