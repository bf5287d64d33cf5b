"""Hangs: every rank says where it stood, the process ends with a status of its own, and the launcher learns of it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
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
    os.dup2(os.open(folder / "log", os.O_WRONLY | os.O_CREAT), 2)
    with Watchdog(folder / "hangs", 0, 1, 1.0) as watchdog:
        await_looks(watchdog, 2)
        ctypes.PyDLL(None).sleep(600)


def await_looks(watchdog: Watchdog, number: int) -> None:
    """Returns when the watchdog has looked so often."""
    looks, wait = threading.Semaphore(0), watchdog.is_over.wait

    def counted(seconds: float | None = None) -> bool:
        looks.release()
        return wait(seconds)

    watchdog.is_over.wait = counted  # type: ignore[method-assign]
    for _ in range(number):
        looks.acquire()


def test_a_rank_whose_interpreter_is_held_says_where_and_is_ended_all_the_same(tmp_path: Path) -> None:
    (result,) = run_ranks(1, hold_the_interpreter, tmp_path, check=False)
    assert (result.exitcode, result.value) == (-signal.SIGALRM, None)
    told = (tmp_path / "log").read_text()
    assert "Timeout (0:00:01)!" in told
    assert "in hold_the_interpreter" in told


def test_a_suspended_process_has_missed_nothing_when_it_goes_on(tmp_path: Path) -> None:
    """SIGSTOP for longer than the deadline but not than the alarm; afterwards signs of life come again."""
    (result,) = run_ranks(1, be_suspended, tmp_path)
    assert result.value > DEADLINE
    assert not (tmp_path / "hangs").exists()


def be_suspended(folder: Path) -> float:
    """Seconds for which a process that is half-way to its deadline stood still."""
    with Watchdog(folder / "hangs", 0, 1, DEADLINE) as watchdog:
        await_looks(watchdog, 4)
        begun = time.monotonic()
        subprocess.Popen(["sh", "-c", f"sleep {1.5 * DEADLINE}; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
        seconds = time.monotonic() - begun
        await_looks(watchdog, 3)
        watchdog.beat("going on")
        await_looks(watchdog, 3)
    return seconds


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
