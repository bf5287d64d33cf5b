"""What every rank of a run executes: under torchrun, under `launch/submit.py`, under srun, or alone.

Exit status: 0 when training is complete or was stopped as planned (SIGTERM, SIGUSR2), 130 after Ctrl-C (both with a
checkpoint), 2 with one sentence for an error that is understood, 75 after a hang (dgt/training/watchdog.py), 1 with a
traceback for any other.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

if not __package__:  # started as a file: what is imported must come from beside it, and `launch` is a package
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if entry != str(here))]

from launch import program, runs
from launch.signals import Noted

if TYPE_CHECKING:
    from dgt.config import Config
    from dgt.training.interrupt import Interruption
    from dgt.training.state import Outcome

log = logging.getLogger("launch")

DEADLINE_QUESTIONS, DEADLINE_SECONDS = 10, 1.0
"""How often, and how far apart, Slurm is asked until when it lets a job run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Trains as the configuration says; returns the exit status."""
    early = Noted().install()
    stop_with_parent()
    options = parser().parse_intermixed_args(argv)
    from launch.cluster import rank_variables

    os.environ.update(rank_variables(os.environ))
    rank = int(os.environ.get("RANK", 0))
    set_up_logging(rank)
    from launch.checks import known_errors, would_repeat

    try:
        outcome = run(options, early, rank)
    except known_errors() as error:
        log.error("%s", error)
        if would_repeat(error) and rank == 0:  # where another rank alone meets it, its node may be the cause
            mark("failed", {"reason": str(error)})
        return program.KNOWN_ERROR
    return conclude(outcome, rank)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="dgt-train",
        description="Train as one rank: alone, or as one of the processes that torchrun, srun or "
        "launch/submit.py start. A run that was stopped goes on from its newest checkpoint.",
    )
    result.add_argument("--config", required=True, metavar="FILE", help="configuration, YAML")
    result.add_argument("overrides", nargs="*", metavar="key=value", help="such as steps.epochs=10 or name=trial")
    return result


def run(options: argparse.Namespace, early: Noted, rank: int) -> Outcome:
    """Loads the configuration, guards the run's folder where nobody else does, and trains."""
    import dgt
    from dgt.config import load
    from dgt.training.interrupt import Interruption
    from dgt.training.trainer import train
    from launch import checks

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    log.info(
        "rank %d of %d on %s, process %d, dgt from %s",
        rank, world_size, socket.gethostname(), os.getpid(), Path(dgt.__file__).parent,
    )  # fmt: skip
    config = load(options.config, options.overrides)
    network = checks.network(config)
    checks.batches(config, world_size)
    checks.engine(config, network, world_size)
    checks.gpu(config)
    checks.evaluation(config, world_size)
    checks.teacher(config)  # the weights to start from are verified once, where they are read
    checks.augmentation(config)
    with contextlib.closing(Announcement()) as announcement:
        prefix = os.environ.get(runs.MARKER_VARIABLE)
        interruption = Interruption(
            deadline_of(os.environ),
            announce=lambda number: announcement.make(number, interruption.longest_save),
            is_current=lambda: prefix is None or runs.is_claimed_by(prefix),
            announce_hang=lambda text: mark("hung", {"text": text}),
        )
        interruption.install()
        for number in early.received:
            interruption.note(number, None)
        if rank or runs.LOCK_VARIABLE in os.environ:
            return train(config, interruption)
        return train_guarded(config, interruption)


def train_guarded(config: Config, interruption: Interruption) -> Outcome:
    """Trains while this process holds the run's lock, unless a job of the run is active in Slurm."""
    from dgt.training.trainer import train
    from launch import checks

    checks.output_folder(config)
    with runs.locked(config.run_dir, int(config.output_mode, 8)):
        checks.not_active(config.run_dir, own_job=os.environ.get("SLURM_JOB_ID"))
        return train(config, interruption)


def deadline_of(environment: Mapping[str, str]) -> float | None:
    """When the job ends, in seconds since the epoch, as its batch script has found out; None where it has not."""
    try:
        found = float(environment[runs.DEADLINE_VARIABLE])
    except (KeyError, ValueError):
        return None
    return found if math.isfinite(found) else None


class Announcement:
    """What rank 0 says when all ranks have agreed to stop: in the log, and for the launcher in a marker.

    How long Slurm still gives them is found out beside the save, which does not wait for the answer.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.is_closed = False

    def make(self, number: int, longest_save: float) -> None:
        """Leaves the marker `stopping` and says so; then asks Slurm, where this is a job. `longest_save` in seconds."""
        name = signal.Signals(number).name
        facts: dict[str, object] = {"signal": name, "time": utc(time.time())}
        log.info("all ranks have agreed to stop because of %s; they save what is not saved yet", name)
        self.leave(facts)
        job = os.environ.get("SLURM_JOB_ID")
        if job:
            threading.Thread(target=self.find_deadline, args=(job, facts, longest_save), daemon=True).start()

    def find_deadline(self, job: str, facts: Mapping[str, object], longest_save: float) -> None:
        """Adds to the marker until when Slurm lets the job run, and says how long that is."""
        from launch.cluster import job_fields, seconds

        for _ in range(DEADLINE_QUESTIONS):  # a preempted job without a time limit gets its end only a moment later
            fields = job_fields(job) or {}
            deadline = seconds(fields.get("EndTime", ""))
            if deadline is not None or self.is_closed:
                break
            time.sleep(DEADLINE_SECONDS)
        if deadline is None:
            return
        preempted, start = fields.get("PreemptTime", ""), fields.get("StartTime", "")
        is_preempted = seconds(preempted) is not None and preempted >= start  # not in an attempt before this one
        remaining = deadline - time.time()
        told = self.leave({**facts, "deadline": utc(deadline), "preempted": is_preempted})
        if told and remaining < longest_save:
            log.warning("Slurm ends the job in %.0f s; the longest save took %.0f s", remaining, longest_save)
        elif told:
            log.info("Slurm ends the job in %.0f s", remaining)

    def leave(self, facts: dict[str, object]) -> bool:
        """Replaces the marker; False where the ranks have left already, so that nothing half-written stays behind."""
        with self.lock:
            if self.is_closed:
                return False
            try:
                mark("stopping", facts)
            except OSError as error:
                log.error("the launcher cannot be told that this job stops: %s", error)
            return True

    def close(self) -> None:
        """Nothing is written or said after this; a marker that is being written is finished first."""
        with self.lock:
            self.is_closed = True


def utc(moment: float) -> str:
    """Seconds since the epoch in ISO 8601."""
    return datetime.datetime.fromtimestamp(moment, datetime.timezone.utc).isoformat(timespec="seconds")


def conclude(outcome: Outcome, rank: int) -> int:
    """Leaves the marker, says how it ended, and gives the exit status."""
    stopped_by = signal.Signals(outcome.signal).name if outcome.signal else None
    if rank == 0:
        mark(outcome.status, {"step": outcome.step, "signal": stopped_by, "metrics": outcome.metrics})
        if outcome.status == "finished":
            log.info("training is complete after step %d", outcome.step)
        else:
            log.info("stopped by %s after step %d; the same command goes on from there", stopped_by, outcome.step)
    return 128 + signal.SIGINT if outcome.signal == signal.SIGINT else 0


def mark(end: runs.End | Literal["stopping", "hung"], facts: dict[str, object]) -> None:
    """Leaves a marker where a launcher waits for one."""
    prefix = os.environ.get(runs.MARKER_VARIABLE)
    if prefix:
        runs.leave_marker(prefix, end, facts)


def set_up_logging(rank: int, stream: TextIO | None = None) -> None:
    """Rank 0 says everything on `stream` (standard output), other ranks only who they are and what is wrong."""
    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    log.setLevel(logging.INFO)
    for name in ("dgt", "data_pipeline"):
        logging.getLogger(name).setLevel(logging.INFO if rank == 0 else logging.WARNING)


class Formatter(logging.Formatter):
    """Puts the level in front of a message where it is more than information."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.levelno > logging.INFO:
            record.message = f"{record.levelname}: {record.message}"
        return super().formatMessage(record)


def stop_with_parent() -> None:
    """Asks Linux for a SIGTERM when the launcher that started this rank dies, so that no rank outlives it for long."""
    launcher = os.environ.get("DGT_LAUNCHER_PID")
    if launcher is None or not sys.platform.startswith("linux"):
        return
    import ctypes

    set_death_signal = 1  # PR_SET_PDEATHSIG, see prctl(2)
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)
    if os.getppid() != int(launcher):  # it died before the request
        signal.raise_signal(signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
