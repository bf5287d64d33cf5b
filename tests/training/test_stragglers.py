"""Slow ranks: who is named, when, and by what."""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ranks import run_ranks
from small import small_config

from dgt.config import Config
from dgt.tasks import Classification
from dgt.training import stragglers
from dgt.training.guard import GuardConfig
from dgt.training.steps import StepsConfig
from dgt.training.stragglers import Pace, Stragglers, slowest
from dgt.training.trainer import train


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [([1.0], (0, 1.0)), ([1.0, 3.0], (1, 3.0)), ([2.0, 8.0, 2.0, 4.0], (1, 4.0)), ([0.0, 0.0], (0, 1.0)),
     ([5.0, 1.0, 1.0, 1.0, 100.0], (4, 100.0))],
)  # fmt: skip
def test_the_slowest_rank_is_measured_by_the_median_of_the_others(
    seconds: list[float], expected: tuple[int, float]
) -> None:
    assert slowest(seconds) == expected


def paces(*seconds: float) -> list[Pace]:
    """A report of ranks on nodes of their own that wait a tenth of their time for data."""
    return [Pace(s, s / 10, f"node{rank}") for rank, s in enumerate(seconds)]


def test_a_rank_is_named_once_after_the_reports_in_a_row_and_again_after_it_was_fast() -> None:
    judge = Stragglers(factor=1.5, reports=3).judge
    slow, fast = paces(1.0, 2.0, 1.0), paces(1.0, 1.4, 1.0)
    said = [judge(report)[1] for report in (slow, slow, slow, slow, fast, slow, slow, slow)]
    assert [bool(words) for words in said] == [False, False, True, False, False, False, False, True]
    assert said[2] == (
        "rank 1 on node node1 is slow: 2000 ms a step, 200 of them waiting for data, 2.0 times as long as the others, "
        "in 3 reports in a row"
    )
    assert judge(slow)[0] == {"speed/slowest_rank": 1.0, "speed/slowest_ratio": 2.0}


def test_ranks_that_take_turns_are_nobodys_fault_and_factor_0_names_nobody() -> None:
    taking_turns, off = Stragglers(1.5, 2), Stragglers(0.0, 1)
    for report in (paces(3.0, 1.0, 1.0), paces(1.0, 3.0, 1.0)) * 3:
        assert taking_turns.judge(report)[1] == ""
        assert off.judge(report)[1] == ""
    assert Stragglers(1.5, 1).judge(paces(9.0)) == ({}, ""), "a rank alone"


def train_beside_a_slow_rank(config: Config) -> list[str]:
    """By its clock the last of the ranks takes a quarter of an hour for each loss; what is said about slow ranks."""
    said: list[str] = []
    slept = 0.0

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logging.getLogger("dgt").addHandler(Listener(logging.WARNING))
    original = Classification.loss

    def loss(self: Classification, *args: Any) -> Any:
        nonlocal slept
        slept += 900.0 * (os.environ["RANK"] == "2")
        return original(self, *args)

    Classification.loss = loss  # type: ignore[method-assign]
    stragglers.time = SimpleNamespace(perf_counter=lambda: time.perf_counter() + slept)  # type: ignore[assignment]
    train(config)
    return [words for words in said if "is slow" in words]


def test_the_rank_that_is_slow_is_named_by_rank_0(tmp_path: Path) -> None:
    steps = StepsConfig(epochs=1, global_batch_size=12, micro_batch_size=4, evaluate_every_epochs=0, max_steps=2)
    config = small_config(tmp_path, steps=steps, guard=GuardConfig(straggler_factor=2.0, straggler_reports=2))
    config = replace(config, engine=replace(config.engine, threads=1))
    said = [result.value for result in run_ranks(3, train_beside_a_slow_rank, config)]
    assert [len(words) for words in said] == [1, 0, 0]
    assert said[0][0].startswith("rank 2 on node ")
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["speed/slowest_rank"] for row in rows if "train/loss" in row] == [2.0, 2.0]
