"""What rank 0 tells the launcher when all ranks have agreed to stop."""

from __future__ import annotations

import datetime
import json
import logging
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small import small_config

from dgt.config import Config, to_yaml
from dgt.training import checkpoint, trainer
from dgt.training.interrupt import Interruption
from dgt.training.state import Outcome
from dgt.training.trainer import Trainer, train
from launch import cluster, runs
from launch import train as program
from launch.train import Announcement, deadline_of


@pytest.mark.parametrize(
    ("text", "deadline"), [("1795499517", 1795499517.0), (None, None), ("", None), ("soon", None), ("inf", None)]
)
def test_the_deadline_comes_from_the_batch_script_where_it_knows_one(text: str | None, deadline: float | None) -> None:
    assert deadline_of({} if text is None else {runs.DEADLINE_VARIABLE: text}) == deadline


def stopping(folder: Path) -> dict[str, Any]:
    """The marker."""
    return json.loads((folder / "jobs" / "t.0.stopping").read_text())


@pytest.fixture
def marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    """A folder whose markers are t.0; without a Slurm job."""
    caplog.set_level(logging.INFO, logger="launch")
    monkeypatch.setenv(runs.MARKER_VARIABLE, str(tmp_path / "jobs" / "t.0"))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return tmp_path


def join_threads(before: set[threading.Thread]) -> None:
    for thread in set(threading.enumerate()) - before:
        thread.join()


def local(moment: float) -> str:
    """As launch.cluster has Slurm print times."""
    return datetime.datetime.fromtimestamp(moment, datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")


def answering(fields: dict[str, str] | None, asked: list[str], when: threading.Event) -> Callable[[str], Any]:
    """A stand-in for cluster.job_fields that answers when it may."""

    def job_fields(job: str) -> dict[str, str] | None:
        when.wait()
        asked.append(job)
        return fields

    return job_fields


@pytest.mark.parametrize(
    ("preempt_time", "start", "grace", "preempted", "said"),
    [
        (0, -100, 15, True, ("WARNING", "Slurm ends the job in 15 s; the longest save took 20 s")),
        (None, -100, 60, False, ("INFO", "Slurm ends the job in 60 s")),
        (-200, -100, 60, False, ("INFO", "Slurm ends the job in 60 s")),  # in an earlier attempt
    ],
)
def test_the_marker_is_there_at_once_and_gets_slurms_deadline_when_slurm_answers(
    marked: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    preempt_time: int | None, start: int, grace: int, preempted: bool, said: tuple[str, str],
) -> None:  # fmt: skip
    now = 1_795_499_517
    fields = {
        "PreemptTime": "None" if preempt_time is None else local(now + preempt_time),
        "StartTime": local(now + start),
        "EndTime": local(now + grace),
    }
    asked, answer = [], threading.Event()
    monkeypatch.setattr(cluster, "job_fields", answering(fields, asked, answer))
    monkeypatch.setattr(time, "time", lambda: float(now))
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    before = set(threading.enumerate())
    Announcement().make(signal.SIGTERM, longest_save=20.0)
    expected = {"signal": "SIGTERM", "time": "2026-11-24T05:51:57+00:00"}
    assert stopping(marked) == expected
    answer.set()
    join_threads(before)
    assert asked == ["77"]
    deadline = datetime.datetime.fromtimestamp(now + grace, datetime.timezone.utc).isoformat()
    assert stopping(marked) == {**expected, "deadline": deadline, "preempted": preempted}
    assert "all ranks have agreed to stop because of SIGTERM" in caplog.messages[0]
    assert (caplog.records[-1].levelname, caplog.messages[-1]) == said


@pytest.mark.parametrize("fields", [None, {"EndTime": "Unknown", "PreemptTime": "None"}])
def test_the_marker_stays_as_it_is_where_slurm_knows_no_end(
    marked: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, str] | None
) -> None:
    asked, answer = [], threading.Event()
    answer.set()
    monkeypatch.setattr(cluster, "job_fields", answering(fields, asked, answer))
    monkeypatch.setattr(program, "DEADLINE_SECONDS", 0.0)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    before = set(threading.enumerate())
    Announcement().make(signal.SIGUSR2, longest_save=20.0)
    join_threads(before)
    assert asked == ["77"] * program.DEADLINE_QUESTIONS, "Slurm may know it a moment later"
    assert sorted(stopping(marked)) == ["signal", "time"]


def test_slurms_answer_after_the_ranks_have_left_changes_nothing(
    marked: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked, answer = [], threading.Event()
    monkeypatch.setattr(cluster, "job_fields", answering({"EndTime": local(time.time() + 60)}, asked, answer))
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    before = set(threading.enumerate())
    announcement = Announcement()
    announcement.make(signal.SIGTERM, longest_save=0.0)
    announcement.close()
    answer.set()
    join_threads(before)
    assert asked == ["77"]
    assert "deadline" not in stopping(marked)
    assert len(caplog.messages) == 1
    assert [path.name for path in (marked / "jobs").iterdir()] == ["t.0.stopping"]


def test_a_marker_that_cannot_be_written_does_not_keep_the_ranks_from_saving(
    marked: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (marked / "jobs").write_text("a file")
    config = small_config(marked)
    interruption = Interruption(announce=lambda number: Announcement().make(number, 0.0))

    def step(self: Trainer, batch: Any, waited: float) -> bool:
        taken = original(self, batch, waited)
        interruption.note(signal.SIGTERM, None)
        return taken

    original = Trainer.step
    monkeypatch.setattr(Trainer, "step", step)
    assert train(config, interruption).step == 1
    assert "the launcher cannot be told that this job stops" in caplog.text
    assert [path.name for path in checkpoint.committed(config.run_dir / "checkpoints")] == ["step_00000001"]


@pytest.fixture
def handlers() -> Iterator[None]:
    """Undoes what the program sets up for a whole process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
    root = list(logging.root.handlers)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    logging.root.handlers[:] = root
    logging.captureWarnings(False)


@pytest.mark.usefixtures("handlers")
def test_the_program_knows_the_deadline_announces_a_stop_and_makes_the_folder_as_configured(
    marked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float | None] = []

    def stopped(config: Config, interruption: Interruption) -> Outcome:
        assert interruption.announce is not None
        interruption.announce(signal.SIGUSR2)
        seen.append(interruption.deadline)
        return Outcome("interrupted", 0, signal=signal.SIGUSR2)

    monkeypatch.setattr(trainer, "train", stopped)
    monkeypatch.setenv(runs.DEADLINE_VARIABLE, "4000000000")
    config = small_config(marked / "runs")
    (marked / "small.yaml").write_text(to_yaml(config))
    assert program.main(["--config", str(marked / "small.yaml"), "output_mode=750"]) == 0
    assert seen == [4e9]
    assert stat.S_IMODE(config.run_dir.stat().st_mode) == 0o750
    assert stopping(marked)["signal"] == "SIGUSR2"
    left = runs.read_marker(str(marked / "jobs" / "t.0"))
    assert left == ("interrupted", {"step": 0, "signal": "SIGUSR2", "metrics": None})
