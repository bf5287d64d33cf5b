import math

import pytest

from dgt.training.schedule import ScheduleConfig, learning_rate

CONFIG = ScheduleConfig(warmup_epochs=2, warmup_lr=1e-6, min_lr=1e-5)


def at(step: int) -> float:
    return learning_rate(step, peak=1e-3, total_steps=100, warmup_steps=20, config=CONFIG)


def test_first_step_has_the_warmup_learning_rate() -> None:
    assert at(0) == 1e-6


def test_warmup_is_linear_and_meets_the_cosine_at_its_peak() -> None:
    assert at(10) == pytest.approx((1e-6 + 1e-3) / 2, rel=1e-12)
    assert at(19) == pytest.approx(1e-6 + (1e-3 - 1e-6) * 19 / 20, rel=1e-12)
    assert at(20) == 1e-3


def test_cosine_passes_its_middle_and_ends_one_step_before_the_minimum() -> None:
    assert at(60) == pytest.approx((1e-3 + 1e-5) / 2, rel=1e-12)
    expected = 1e-5 + (1e-3 - 1e-5) * 0.5 * (1 + math.cos(math.pi * 79 / 80))
    assert at(99) == pytest.approx(expected, rel=1e-12)
    assert at(100) == 1e-5


def test_without_warmup_the_peak_comes_first() -> None:
    assert learning_rate(0, peak=1e-3, total_steps=10, warmup_steps=0, config=CONFIG) == 1e-3
