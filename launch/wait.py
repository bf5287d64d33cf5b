"""Following submitted jobs to their end: `launch/submit.py --wait`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from launch import events, runs
from launch.cluster import job_state
from launch.local import Mirror
from launch.runs import LaunchError

FILES_SECONDS, QUEUE_SECONDS = 0.5, 5.0
"""How often files are looked at, and how often Slurm is asked, whose controller serves everybody."""


def until_ended(followed: Sequence[Path]) -> int:
    """Shows what happens to the runs until none has a job in the queue; a single one's rank 0 log, too.

    Returns 0 where all are complete, 1 where one is not, 130 after Ctrl-C, which leaves the jobs alone.
    """
    told = dict.fromkeys(followed, 0)
    log = followed[0] / "logs" / "rank-0.log"
    console = Mirror(log, log.stat().st_size if log.exists() else 0) if len(followed) == 1 else None
    active, asked = True, time.monotonic()
    try:
        while True:
            for run in followed:
                told[run] = show_events(run, told[run], f"{run.name}: " if len(followed) > 1 else "")
            if console and log.exists():
                console.show()
            if not active:
                return 0 if all(is_complete(run) for run in followed) else 1
            time.sleep(FILES_SECONDS)
            if time.monotonic() > asked + QUEUE_SECONDS:
                active, asked = any(is_active(run) for run in followed), time.monotonic()
    except KeyboardInterrupt:
        print("no longer waiting; the job goes on (launch/jobs.py status, cancel)")
        return 130


def show_events(run: Path, told: int, prefix: str) -> int:
    """Prints the events after the first `told`; returns how many there are."""
    story = events.read(run)
    for event in story[told:]:
        print(f"{prefix}{event['time']}  {event['event']}: {event['text']}", flush=True)
    return len(story)


def is_active(run: Path) -> bool:
    """Whether the run's job waits or runs; a controller that is away for a while says nothing against it."""
    record = runs.read_record(run)
    try:
        return record is not None and job_state(record) is not None
    except LaunchError:
        return True


def is_complete(run: Path) -> bool:
    """Whether the last job has finished training."""
    record = runs.read_record(run)
    return record is not None and any((run / "jobs").glob(f"{record.token}.*.finished"))
