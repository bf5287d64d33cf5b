"""Goodput under failures: the simulation against what the exponential model says exactly."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from launch.goodput import (
    LEAST_STALL,
    NODES,
    Cluster,
    Faults,
    at_scale,
    best_interval,
    daly_interval,
    exact_goodput,
    simulate,
    young_interval,
)

HOUR, YEAR = 3600.0, 365 * 86400.0
CLUSTER = Cluster(
    node_mtbf=5 * YEAR, checkpoint=1.5e9, copy_per_node=2e9, write_per_node=1e9, restart=300.0, bytes_per_node=2e8,
    read_per_node=2e9, storage=1e11,
)  # fmt: skip


def test_without_failures_only_the_stalls_are_lost() -> None:
    faults = Faults(0.0, stall=10.0, restart=300.0)
    whole = 7 * 100.0  # seven segments of 90 s of work and 10 s of stall
    found = simulate(90.0, faults, whole, runs=3)
    assert (found.mean, found.low, found.high, found.error) == pytest.approx((0.9, 0.9, 0.9, 0.0))
    assert exact_goodput(90.0, faults) == pytest.approx(0.9)


@pytest.mark.parametrize("interval", [200.0, 1200.0, 6000.0])
@pytest.mark.parametrize("restart", [0.0, 400.0])
def test_simulation_agrees_with_the_exact_expectation(interval: float, restart: float) -> None:
    faults = Faults(1 / HOUR, stall=60.0, restart=restart)
    # Over n failures the run's beginning and end matter by 1/n; 5 standard errors hold with 1 - 6e-7.
    found = simulate(interval, faults, 3000 * HOUR, runs=50)
    assert found.mean == pytest.approx(exact_goodput(interval, faults), abs=5 * found.error + 1 / 3000)
    assert found.error < 0.01 * found.mean
    assert found.low <= found.mean <= found.high


def test_recommended_interval_is_the_optimum_and_close_to_dalys_and_youngs() -> None:
    faults = Faults(1 / (24 * HOUR), stall=20.0, restart=300.0)
    best = best_interval(faults, 30 * 24 * HOUR)
    assert best == pytest.approx(daly_interval(faults), rel=0.01)
    assert best == pytest.approx(young_interval(faults), rel=0.02)
    for other in (best / 2, best * 2):
        assert exact_goodput(other, faults) < exact_goodput(best, faults)
        worse, better = (simulate(i, faults, 2000 * 24 * HOUR, runs=100, seed=7) for i in (other, best))
        assert worse.mean + 3 * worse.error < better.mean - 3 * better.error


def test_a_checkpoint_that_counts_late_loses_more() -> None:
    faults = Faults(1 / HOUR, stall=10.0, restart=60.0)
    at_once, late = (simulate(600.0, replace(faults, commit=c), 1000 * HOUR) for c in (0.0, 300.0))
    assert late.mean < at_once.mean - 3 * at_once.error
    # 300 of 610 s of a segment lose one segment more: 600 s of work a failure, with probability 300 / 610.
    per_failure = HOUR + faults.restart
    expected = at_once.mean - 600 * 300 / 610 / per_failure
    assert late.mean == pytest.approx(expected, abs=5 * (late.error + at_once.error) + 0.01)


def test_goodput_grows_with_the_time_between_failures() -> None:
    means = [simulate(600.0, Faults(1 / mtbf, 10.0, 300.0), 500 * HOUR).mean for mtbf in (900.0, HOUR, 1e4, 1e5, 1e6)]
    assert means == sorted(means)
    assert means[-1] - means[0] > 0.3


def test_equal_seeds_repeat_and_others_do_not() -> None:
    faults = Faults(1 / HOUR, 10.0, 60.0)
    first, again, other = (simulate(600.0, faults, 100 * HOUR, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_table_covers_one_to_4096_nodes_and_falls_with_their_number() -> None:
    rows = at_scale(CLUSTER, 30 * 24 * HOUR, runs=50)
    assert [row.nodes for row in rows] == list(NODES) == [2**i for i in range(13)]
    means = [row.goodput.mean for row in rows]
    assert all(later < sooner + 1e-3 for sooner, later in itertools.pairwise(means))
    intervals = [row.interval for row in rows if row.interval < 30 * 24 * HOUR]
    assert intervals == sorted(intervals, reverse=True)
    assert rows[-1].young == pytest.approx(math.sqrt(2 * LEAST_STALL * 5 * YEAR / 4096))


def test_nodes_share_the_copying_and_the_writing_of_a_checkpoint() -> None:
    one, three, many = (CLUSTER.faults(nodes) for nodes in (1, 3, 4096))
    assert (one.stall, one.commit, one.restart) == pytest.approx((0.75, 1.5, 300.0 + 0.75))
    assert (three.stall, three.commit, three.restart) == pytest.approx((0.25, 0.5, 300.0 + 0.75))
    # 4,096 nodes write 100 GB/s, what the storage takes, and get 24 MB/s each.
    assert (many.stall, many.commit) == pytest.approx((LEAST_STALL, 0.015))
    assert many.restart == pytest.approx(300.0 + 1.5e9 * 4096 / 1e11)
    waiting = replace(CLUSTER, asynchronous=False).faults(3)
    assert (waiting.stall, waiting.commit) == pytest.approx((0.25 + 0.5, 0.0))


def test_storage_that_cannot_feed_all_nodes_takes_its_share() -> None:
    rows = {row.nodes: row for row in at_scale(CLUSTER, 24 * HOUR, (256, 1024), runs=10)}
    assert rows[256].input_share == 1.0  # 51 of 100 GB/s
    assert rows[1024].input_share == pytest.approx(1e11 / (1024 * 2e8))
    assert rows[1024].goodput.mean <= rows[1024].input_share


@pytest.mark.parametrize("change", [{"stall": -1.0}, {"failure_rate": math.inf}, {"restart": math.nan}])
def test_impossible_faults_are_named(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))}: must be 0 or more"):
        Faults(**({"failure_rate": 0.1, "stall": 1.0, "restart": 1.0} | change))


def test_impossible_simulations_are_named() -> None:
    with pytest.raises(ValueError, match="interval and seconds must be above 0"):
        simulate(0.0, Faults(0.1, 1.0, 1.0), 10.0)
