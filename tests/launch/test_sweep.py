"""Several runs from one command."""

from __future__ import annotations

import pytest

from launch.runs import LaunchError
from launch.sweep import combinations


def test_nothing_swept_is_one_run_under_its_own_name() -> None:
    assert combinations([]) == [("", [])]


def test_every_combination_has_its_overrides_and_a_name_of_its_own() -> None:
    assert combinations(["optimizer.lr=5e-4,1e-3", "seed=0, 1"]) == [
        ("-lr-5e-4-seed-0", ["optimizer.lr=5e-4", "seed=0"]),
        ("-lr-5e-4-seed-1", ["optimizer.lr=5e-4", "seed=1"]),
        ("-lr-1e-3-seed-0", ["optimizer.lr=1e-3", "seed=0"]),
        ("-lr-1e-3-seed-1", ["optimizer.lr=1e-3", "seed=1"]),
    ]


def test_commas_in_lists_and_quotes_do_not_separate() -> None:
    assert combinations(["data.augment.scale=[0.1,1.0],[0.5, 1]"]) == [
        ("-scale-0.1_1.0", ["data.augment.scale=[0.1,1.0]"]),
        ("-scale-0.5_1", ["data.augment.scale=[0.5, 1]"]),
    ]
    assert combinations(["a.b='x,y',z"]) == [("-b-x_y", ["a.b='x,y'"]), ("-b-z", ["a.b=z"])]


@pytest.mark.parametrize("wrong", ["seed", "=1,2", "seed=", "seed= ,"])
def test_what_is_no_sweep_is_refused(wrong: str) -> None:
    with pytest.raises(LaunchError, match="expected key=a,b,c"):
        combinations([wrong])


def test_two_runs_of_one_name_are_refused() -> None:
    with pytest.raises(LaunchError, match="-seed-1; give each value once"):
        combinations(["seed=1,1"])
