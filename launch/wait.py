"""Following submitted jobs to their end: `launch/submit.py --wait`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from launch import events, story
from launch.follow import POLL_SECONDS, Log, Watch, size


def until_ended(followed: Sequence[Path]) -> int:
    """Shows what happens to the runs until the jobs of all have left; a single one's rank 0 log, too.

    Returns 0 where all are complete, 1 where one is not, 130 after Ctrl-C, which leaves the jobs alone.
    """
    watch = Watch(followed)
    told = dict.fromkeys(followed, 0)
    paths = [run / "logs" / "rank-0.log" for run in followed]
    logs = [Log(path, size(path)) for path in paths] if len(paths) == 1 else []  # several would mix their lines
    try:
        while True:
            has_ended = watch.has_ended()  # asked first, so that what was noted until then is shown
            tell(told, logs)
            if has_ended:
                return 0 if all(one.story.end == story.FINISHED for one in watch.found) else 1
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        print("no longer waiting; the job goes on (launch/jobs.py status, cancel)")
        return 130


def tell(told: dict[Path, int], logs: Iterable[Log]) -> None:
    """Prints what is new: the events of the runs after those that were `told`, and the logs."""
    try:
        for run in told:
            told[run] = show_events(run, told[run], f"{run.name}: " if len(told) > 1 else "")
        for log in logs:
            log.show()
    except BrokenPipeError:  # the exit status still matters where nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # such as a file server that is away for a moment
        print(f"{error.filename or 'a file'} cannot be read now: {error.strerror or error}", file=sys.stderr)


def show_events(run: Path, told: int, prefix: str) -> int:
    """Prints the events after the first `told`; returns how many there are."""
    noted = events.read(run)
    for event in noted[told:]:
        print(f"{prefix}{event['time']}  {event['event']}: {event['text']}", flush=True)
    return len(noted)
