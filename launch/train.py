"""What every rank of a run executes: under torchrun, under `launch/submit.py`, under srun, or alone.

Exit status: 0 when training is complete or was stopped as planned (SIGTERM, SIGUSR2), 130 after Ctrl-C (both with a
checkpoint), 2 with one sentence for an error that is understood, 1 with a traceback for any other.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if not __package__:  # started as a file: what is imported must come from beside it, and `launch` is a package
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if entry != str(here))]

from launch import program, runs
from launch.signals import Noted

if TYPE_CHECKING:
    from dgt.config import Config
    from dgt.training.state import Outcome

log = logging.getLogger("launch")


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
        if would_repeat(error):
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
    checks.network(config)
    checks.batches(config, world_size)
    checks.augmentation(config)
    interruption = Interruption()
    interruption.install()
    if early.received:
        interruption.received = interruption.received or early.received[-1]
    if rank or runs.LOCK_VARIABLE in os.environ:
        return train(config, interruption)
    return train_guarded(config, interruption)


def train_guarded(config: Config, interruption: object) -> Outcome:
    """Trains while this process holds the run's lock, unless a job of the run is active in Slurm."""
    from dgt.training.trainer import train
    from launch import checks

    checks.output_folder(config)
    with runs.locked(config.run_dir):
        checks.not_active(config.run_dir, own_job=os.environ.get("SLURM_JOB_ID"))
        return train(config, interruption)  # type: ignore[arg-type]


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


def mark(end: runs.End, facts: dict[str, object]) -> None:
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
