import dataclasses
import math

import pytest

from dgt.training.schedule import ScheduleConfig, learning_rate

CONFIG = ScheduleConfig(warmup_epochs=2, warmup_lr=1e-6, min_lr=1e-5)


def at(step: int) -> float:
    return learning_rate(step, peak=1e-3, total_steps=100, steps_per_epoch=10, config=CONFIG)


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
    config = ScheduleConfig(warmup_epochs=0)
    assert learning_rate(0, peak=1e-3, total_steps=10, steps_per_epoch=10, config=config) == 1e-3


def test_a_warmup_in_steps_takes_the_place_of_one_in_epochs() -> None:
    config = ScheduleConfig(warmup_epochs=2, warmup_steps=5, warmup_lr=0.0)
    rates = [learning_rate(n, peak=1.0, total_steps=100, steps_per_epoch=10, config=config) for n in (0, 4, 5)]
    assert rates == [0.0, 0.8, 1.0]


def test_polynomial_decay_runs_straight_from_the_peak_to_the_minimum() -> None:
    config = ScheduleConfig("polynomial", warmup_steps=20, min_lr=0.2)

    def rate(step: int, power: float = 1.0) -> float:
        chosen = dataclasses.replace(config, power=power)
        return learning_rate(step, peak=1.0, total_steps=100, steps_per_epoch=7, config=chosen)

    assert (rate(20), rate(60), rate(100)) == (1.0, pytest.approx(0.6, rel=1e-12), 0.2)
    assert rate(60, power=2.0) == pytest.approx(0.2 + 0.8 * 0.25, rel=1e-12)


def test_steps_fall_by_gamma_at_each_milestone_and_not_below_the_minimum() -> None:
    config = ScheduleConfig("steps", warmup_epochs=0, milestones=(8, 11), gamma=0.1, min_lr=0.0)
    rates = [learning_rate(n, peak=1.0, total_steps=120, steps_per_epoch=10, config=config) for n in (79, 80, 109, 110)]
    assert rates == pytest.approx([1.0, 0.1, 0.1, 0.01], rel=1e-12)
    held = dataclasses.replace(config, min_lr=0.05)
    assert learning_rate(119, peak=1.0, total_steps=120, steps_per_epoch=10, config=held) == 0.05


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"decay": "steps"}, "milestones: are for decay: steps"),
        ({"milestones": (3.0,)}, "milestones: are for decay: steps"),
        ({"decay": "steps", "milestones": (3.0, 2.0)}, "milestones: must be epochs above 0 that rise"),
        ({"power": 0.0}, "power: must be above 0"),
        ({"gamma": 1.5}, "gamma: must lie in"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(options: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ScheduleConfig(**options)
