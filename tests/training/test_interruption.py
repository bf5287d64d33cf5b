"""Requests to stop: who may make them, how ranks agree, and that no end leaves work behind unsaved."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from ranks import kill_self, run_ranks
from small import small_config

from dgt.config import Config
from dgt.training import checkpoint, interrupt
from dgt.training.checkpoint import CheckpointConfig, SaveError
from dgt.training.interrupt import SECONDS_BEFORE_DEADLINE, SECONDS_BETWEEN_LOOKS, Interruption, SupersededError
from dgt.training.monitor import MonitorConfig
from dgt.training.steps import StepsConfig
from dgt.training.trainer import Trainer, train
from dgt.training.world import World, joined


@pytest.fixture
def world() -> Iterator[World]:
    with joined() as joined_world:
        yield joined_world


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def time(self) -> float:
        """Seconds since the epoch."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    result = Clock()
    monkeypatch.setattr(interrupt, "time", result)
    return result


def test_the_first_signal_counts_and_later_ones_change_nothing(world: World) -> None:
    announced: list[int] = []
    interruption = Interruption(announce=announced.append)
    assert interruption.agreed(world) == 0
    interruption.note(signal.SIGTERM, None)
    interruption.note(signal.SIGUSR2, None)
    interruption.note(signal.SIGINT, None)
    assert interruption.agreed(world) == signal.SIGTERM
    interruption.note(signal.SIGUSR2, None)
    assert interruption.agreed(world) == signal.SIGTERM
    assert announced == [signal.SIGTERM]


def send_myself(signals: Sequence[int]) -> str:
    """What is left of a process after these signals."""
    Interruption().install()
    for number in signals:
        os.kill(os.getpid(), number)
    return "alive"


INT, TERM, USR2 = signal.SIGINT, signal.SIGTERM, signal.SIGUSR2


@pytest.mark.parametrize(
    ("signals", "status", "left"),
    [([INT, INT], -INT, None), ([TERM, INT, INT], -INT, None), ([TERM, USR2, TERM, INT], 0, "alive")],
)
def test_a_second_ctrl_c_ends_the_process_at_once_and_nothing_else_does(
    signals: list[int], status: int, left: str | None
) -> None:
    (process,) = run_ranks(1, send_myself, signals, check=False)
    assert (process.exitcode, process.value) == (status, left)


def wait_in_c() -> None:
    """Gets a Ctrl-C, and another one in a call into C that does not return."""
    Interruption().install()
    os.kill(os.getpid(), signal.SIGINT)
    signal.siginterrupt(signal.SIGINT, False)  # as where gloo and NCCL wait: no signal cuts the call short
    subprocess.Popen(["sh", "-c", f"sleep 1; kill -INT {os.getpid()}"])  # earlier would prove less, but never fail
    ctypes.CDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)


def test_a_second_ctrl_c_ends_a_process_that_waits_in_a_call_into_c() -> None:
    (process,) = run_ranks(1, wait_in_c, check=False)
    assert process.exitcode == -signal.SIGINT


def test_the_last_save_begins_three_saves_and_ten_seconds_before_the_deadline(clock: Clock, world: World) -> None:
    interruption = Interruption(deadline=clock.now + 3600)
    for seconds in (50.0, 100.0, 20.0):
        interruption.note_save(seconds)
    clock.now += 3600 - 311
    assert interruption.agreed(world) == 0
    clock.now += 1
    assert interruption.agreed(world) == signal.SIGUSR2
    clock.now -= 1000
    assert interruption.agreed(world) == signal.SIGUSR2, "the decision stays"


def test_before_any_save_was_measured_the_deadline_leaves_ten_seconds(clock: Clock, world: World) -> None:
    interruption = Interruption(deadline=clock.now + 3600)
    clock.now += 3600 - SECONDS_BEFORE_DEADLINE - 1
    assert interruption.agreed(world) == 0
    clock.now += 1
    assert interruption.agreed(world) == signal.SIGUSR2


def test_a_job_shorter_than_its_saves_trains_for_half_of_its_time(clock: Clock, world: World) -> None:
    interruption = Interruption(deadline=clock.now + 60)
    interruption.note_save(100.0)
    clock.now += 29
    assert interruption.agreed(world) == 0
    clock.now += 1
    assert interruption.agreed(world) == signal.SIGUSR2
    assert Interruption(deadline=clock.now - 5).agreed(world) == signal.SIGUSR2, "a deadline that is over"


def agree_in_two_ranks(folder: Path) -> list[int]:
    """Rank 1 knows of a deadline, then rank 0 gets a signal; the announcements go into a file."""

    def announce(number: int) -> None:
        with (folder / "announced").open("a") as file:
            file.write(f"rank {rank}: {number}\n")

    rank = int(os.environ["RANK"])
    with joined() as world:
        interruption = Interruption(announce=announce)
        answers = [interruption.agreed(world)]
        if rank == 1:
            interruption.deadline = time.time()
        answers.append(interruption.agreed(world))
        if rank == 0:
            interruption.note(signal.SIGTERM, None)
        return [*answers, interruption.agreed(world)]


def test_one_ranks_deadline_stops_all_and_rank_0_alone_announces_it_once(tmp_path: Path) -> None:
    for result in run_ranks(2, agree_in_two_ranks, tmp_path):
        assert result.value == [0, signal.SIGUSR2, signal.SIGUSR2]
    assert (tmp_path / "announced").read_text() == f"rank 0: {int(signal.SIGUSR2)}\n"


def committed(config: Config) -> list[str]:
    """Names of the checkpoints, newest first."""
    return [path.name for path in checkpoint.committed(config.run_dir / "checkpoints")]


class StopsAtCall(Interruption):
    """Has a signal from the given question on."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.left = call

    def agreed(self, world: World) -> int:
        self.left -= 1
        if self.left <= 0:
            self.received = signal.SIGTERM
        return super().agreed(world)


def test_whenever_a_signal_comes_the_end_is_saved(tmp_path: Path) -> None:
    """At every question that the loop asks: in and between epochs, after a save, in an evaluation."""
    statuses = []
    for call in range(1, 100):
        config = small_config(tmp_path / str(call), checkpoint=CheckpointConfig(every_steps=3, keep_last=9),
                              steps=StepsConfig(epochs=2, global_batch_size=16, micro_batch_size=8,
                                               evaluate_every_epochs=0))  # fmt: skip
        outcome = train(config, StopsAtCall(call))
        statuses.append((outcome.status, outcome.step))
        assert outcome.step == 0 or committed(config)[0] == f"step_{outcome.step:08d}", call
        if outcome.status == "finished":
            break
        assert outcome.signal == signal.SIGTERM
    assert statuses[0] == ("interrupted", 0)
    assert statuses[-1] == ("finished", 4)
    steps = [step for _, step in statuses]
    assert steps == sorted(steps)
    assert set(steps) == {0, 1, 2, 3, 4}


def train_with_signal_while_saving(config: Config, at_step: int, fails: bool) -> tuple[str, int, int, list[int]]:
    """SIGTERM and then SIGUSR2 reach the last rank alone while a checkpoint is written; it may be written in vain."""
    interruption, saves, save = Interruption(), [], checkpoint.save
    is_last = int(os.environ.get("RANK", 0)) + 1 == int(os.environ.get("WORLD_SIZE", 1))

    def disturbed_save(folder: Path, step: int, *rest: Any) -> str | None:
        saves.append(step)
        if step == at_step and is_last:
            interruption.note(signal.SIGTERM, None)
            interruption.note(signal.SIGUSR2, None)
        return "disk full" if step == at_step and fails else save(folder, step, *rest)

    checkpoint.save = disturbed_save  # type: ignore[assignment]
    try:
        outcome = train(config, interruption)
    finally:
        checkpoint.save = save
    return outcome.status, outcome.step, outcome.signal, saves


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_signal_during_a_save_costs_neither_a_step_nor_a_second_save(tmp_path: Path, asynchronous: bool) -> None:
    config = small_config(tmp_path, checkpoint=CheckpointConfig(every_steps=2, asynchronous=asynchronous))
    first, second = (result.value for result in run_ranks(2, train_with_signal_while_saving, config, 2, False))
    assert first == second
    # While a thread saves, the next step can have begun before the signal comes; it is saved, too.
    assert first in [("interrupted", 2, signal.SIGTERM, [2])] + asynchronous * [
        ("interrupted", 3, signal.SIGTERM, [2, 3])
    ]
    assert committed(config)[0] == f"step_{first[1]:08d}"


def test_a_save_that_failed_when_the_signal_came_is_tried_again(tmp_path: Path) -> None:
    config = small_config(tmp_path, checkpoint=CheckpointConfig(every_steps=2))
    assert train_with_signal_while_saving(config, 2, True) == ("interrupted", 3, signal.SIGTERM, [2, 3])
    assert committed(config) == ["step_00000003"]


def test_a_save_that_fails_after_a_signal_is_no_planned_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "save", lambda *_: "disk full")
    with pytest.raises(SaveError, match="disk full"):
        train(small_config(tmp_path), StopsAtCall(2))


def train_beside_a_dying_rank(config: Config, folder: Path) -> str:
    """Rank 1 dies after the second step; rank 0 gets a SIGTERM for it, as srun sends one to the others."""
    interruption = Interruption(announce=lambda number: (folder / "announced").touch())
    original = Trainer.step

    def step(self: Trainer, batch: Any, waited: float) -> bool:
        taken = original(self, batch, waited)
        if self.progress.step == 2:
            if self.world.rank == 1:
                kill_self()
            interruption.note(signal.SIGTERM, None)
        return taken

    Trainer.step = step  # type: ignore[method-assign]
    return train(config, interruption).status


def test_the_sigterm_that_follows_a_peers_crash_is_no_planned_stop(tmp_path: Path) -> None:
    config = small_config(tmp_path, checkpoint=CheckpointConfig(every_steps=1))
    survivor, dead = run_ranks(2, train_beside_a_dying_rank, config, tmp_path, check=False, kill_others=False)
    assert dead.exitcode == -signal.SIGKILL
    assert survivor.value is None
    assert "in agree_max" in survivor.error
    assert not (tmp_path / "announced").exists()
    assert committed(config) == ["step_00000001"]


def test_saves_are_measured_reported_and_remembered_by_the_next_attempt(tmp_path: Path) -> None:
    config = small_config(tmp_path, checkpoint=CheckpointConfig(every_steps=2))
    first, second = StopsAtCall(7), Interruption()
    assert train(config, first).status == "interrupted"
    assert first.longest_save > 0
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    seconds = {row["step"]: row["speed/save_seconds"] for row in rows if "speed/save_seconds" in row}
    assert max(seconds.values()) == first.longest_save
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, max(seconds) + 1))
    second.note(signal.SIGTERM, None)
    assert train(config, second).step == max(seconds)
    assert second.longest_save == first.longest_save


def test_attempt_that_another_has_replaced_leaves_within_seconds_and_announces_nothing(
    clock: Clock, world: World
) -> None:
    owners, announced = ["me"], []
    interruption = Interruption(announce=announced.append, is_current=lambda: owners[-1] == "me")
    clock.now += SECONDS_BETWEEN_LOOKS
    assert interruption.agreed(world) == 0
    owners.append("another")
    clock.now += SECONDS_BETWEEN_LOOKS - 1
    assert interruption.agreed(world) == 0, "it looks only now and then"
    clock.now += 1
    for _ in range(2):
        with pytest.raises(SupersededError, match="another attempt has taken this run over"):
            interruption.agreed(world)
    assert announced == []


def test_attempt_that_another_has_replaced_commits_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupt, "SECONDS_BETWEEN_LOOKS", 1e9)
    saves = CheckpointConfig(every_steps=2, on_error="stop")
    config = small_config(tmp_path, checkpoint=saves, monitor=MonitorConfig(log_every=1000))
    looks: list[int] = []

    def is_current() -> bool:
        looks.append(len(committed(config)))
        return looks[-1] < 1

    with pytest.raises(SupersededError, match="another attempt has taken this run over"):
        train(config, Interruption(is_current=is_current))
    assert committed(config) == ["step_00000002"], "the first save is its own, and the second one is not"
    assert not list((config.run_dir / "checkpoints").glob("*.saving"))
    assert looks[0] == 0


def replaced_after_step_3(config: Config) -> int:
    """How a rank leaves a run that is another's once its third step is reported; at which step."""
    rows, steps, step = config.run_dir / "metrics.jsonl", [], Trainer.step

    def noted(self: Trainer, batch: Any, waited: float) -> bool:
        steps.append(self.progress.step + 1)
        return step(self, batch, waited)

    def is_current() -> bool:
        return not (rows.exists() and '"step": 3' in rows.read_text())

    Trainer.step = noted  # type: ignore[method-assign]
    with pytest.raises(SupersededError, match="another attempt has taken this run over"):
        train(config, Interruption(is_current=is_current))
    return steps[-1]


def test_attempt_that_another_has_replaced_reports_nothing_more_and_all_ranks_leave_alike(tmp_path: Path) -> None:
    config = small_config(tmp_path, steps=StepsConfig(epochs=1, global_batch_size=8, micro_batch_size=2))
    rows = config.run_dir / "metrics.jsonl"
    assert [result.value for result in run_ranks(2, replaced_after_step_3, config)] == [3, 3]
    assert max(json.loads(row)["step"] for row in rows.read_text().splitlines()) == 3
