"""Hangs: every rank says where it stood, the process ends with a status of its own, and the launcher learns of it."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from small import small_config

from data_pipeline.synthetic import SyntheticSource
from dgt.config import Config
from dgt.tasks import Classification
from dgt.training.guard import GuardConfig
from dgt.training.interrupt import Interruption
from dgt.training.trainer import train
from dgt.training.watchdog import HUNG, Watchdog

DEADLINE = 2.0


def stand_still() -> None:
    """What a rank is stuck in."""
    threading.Event().wait()


def train_stuck(config: Config, place: str) -> None:
    """Rank 1 gets stuck in its second loss, or in the loader's threads; the others wait for it in a collective."""
    calls = 0
    if os.environ["RANK"] == "1":
        owner, name = {"loss": (Classification, "loss"), "read": (SyntheticSource, "read")}[place]
        original = getattr(owner, name)

        def stuck(self: Any, *args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > {"loss": 2, "read": 6}[place]:
                stand_still()
            return original(self, *args)

        setattr(owner, name, stuck)

    def announce(text: str) -> None:
        (config.run_dir / f"announced-{os.environ['RANK']}").write_text(text)

    train(config, Interruption(announce_hang=announce))


@pytest.mark.parametrize("place", ["loss", "read"])
def test_ranks_that_hang_in_a_collective_or_in_the_loader_leave_all_stacks_and_end(tmp_path: Path, place: str) -> None:
    config = small_config(tmp_path, guard=GuardConfig(hang_seconds=DEADLINE * 5))
    results = run_ranks(2, train_stuck, config, place, check=False, kill_others=False)
    assert [result.exitcode for result in results] == [HUNG, HUNG]
    (folder,) = (config.run_dir / "hangs").iterdir()
    waiting, stuck = [(folder / f"rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert "in stand_still" in stuck
    assert "in stand_still" not in waiting
    assert " in train_step\n" in waiting, "it waits for the gradients"
    assert "nothing done for" in waiting + stuck
    assert f"process {os.getpid()}" not in waiting
    for rank in (0, 1):
        told = (config.run_dir / f"announced-{rank}").read_text()
        assert told.endswith(f"stacks of all ranks: {folder}")


def hold_the_interpreter(folder: Path) -> None:
    """A call into C that does not let go of the interpreter."""
    with Watchdog(folder, 0, 1, 1.0):
        time.sleep(0.5)  # the watchdog has looked at least once
        ctypes.PyDLL(None).sleep(600)


def test_a_rank_whose_interpreter_is_held_is_ended_all_the_same(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (result,) = run_ranks(1, hold_the_interpreter, tmp_path, check=False)
    assert result.exitcode == 1
    assert result.value is None


def beat_now_and_then(folder: Path, seconds: float, doing: Callable[[Watchdog], None]) -> str:
    """What is left of a process that does something under a watchdog."""
    with Watchdog(folder, 0, 1, seconds) as watchdog:
        doing(watchdog)
    return "alive"


def beat_for_long(watchdog: Watchdog) -> None:
    """Signs of life for three times the deadline."""
    end = time.monotonic() + 3 * watchdog.seconds
    while time.monotonic() < end:
        watchdog.beat("beating")
        time.sleep(watchdog.seconds / 50)


def wait_unwatched(watchdog: Watchdog) -> None:
    """Longer than any deadline here."""
    assert not watchdog.thread.is_alive()
    time.sleep(0.5)


@pytest.mark.parametrize(("seconds", "doing"), [(1.0, beat_for_long), (0.0, wait_unwatched)])
def test_a_rank_that_gives_signs_of_life_or_is_not_watched_goes_on(
    tmp_path: Path, seconds: float, doing: Callable[[Watchdog], None]
) -> None:
    (result,) = run_ranks(1, beat_now_and_then, tmp_path / "hangs", seconds, doing)
    assert result.value == "alive"
    assert not (tmp_path / "hangs").exists()
