"""The logs of a run: their end, and what is appended to them, over all restarts."""

from __future__ import annotations

import codecs
import sys
import time
from collections.abc import Callable
from pathlib import Path

from launch import status
from launch.runs import LaunchError

POLL_SECONDS = 0.5
"""How often a followed log is looked at."""
ASK_SECONDS = 10.0
"""How often Slurm is asked whether the run goes on; a change in the run's events is a reason to ask at once."""
BLOCK_BYTES = 1 << 16


def log_file(run: Path, rank: int | None) -> Path:
    """The log of a rank, or of the batch script for None."""
    return run / "logs" / ("batch.log" if rank is None else f"rank-{rank}.log")


def check_exists(log: Path) -> None:
    """Raises LaunchError where there is no such log; the message names those that there are."""
    if log.is_file():
        return
    ranks = sorted(int(n) for path in log.parent.glob("rank-*.log") if (n := path.stem.removeprefix("rank-")).isdigit())
    known = (
        [f"those of ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"that of rank {ranks[0]}"] if ranks else []
    )
    known += ["that of the batch script (--batch)"] if (log.parent / "batch.log").is_file() else []
    raise LaunchError(
        f"there is no log {log}; " + (f"there is {' and '.join(known)}" if known else "there is none yet")
    )


def last_lines(log: Path, count: int | None) -> tuple[bytes, int]:
    """The last `count` lines of a log (None: all), and where in the file they end; nothing where there is no file."""
    try:
        with log.open("rb") as file:
            end = file.seek(0, 2)
            begin, found = end, b""
            # one more than wanted: the first may begin before the block, and one that the file ends with has no next
            while begin > 0 and (count is None or found.count(b"\n") <= count):
                begin = max(begin - BLOCK_BYTES, 0)
                file.seek(begin)
                found = file.read(end - begin)
    except FileNotFoundError:
        return b"", 0
    lines = found.splitlines(keepends=True)
    return b"".join(lines if count is None else lines[len(lines) - min(count, len(lines)) :]), end


def follow(log: Path, begin: int, has_ended: Callable[[], bool]) -> None:
    """Prints what is appended to a log after byte `begin` until the run has ended; a log may begin to exist later."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    while True:
        is_last = has_ended()  # asked first, so that what was written until then is shown
        try:
            with log.open("rb") as file:
                if file.seek(0, 2) < begin:  # it was emptied by hand
                    begin = 0
                file.seek(begin)
                new = file.read()
        except FileNotFoundError:
            new = b""
        begin += len(new)
        sys.stdout.write(decoder.decode(new))
        sys.stdout.flush()
        if is_last:
            return
        time.sleep(POLL_SECONDS)


class Watch:
    """Whether a run has ended, asking Slurm only now and then."""

    def __init__(self, run: Path):
        self.run = run
        self.seen: int | None = None
        self.next_question = 0.0
        self.state = ""
        """As of the last answer."""

    def has_ended(self) -> bool:
        """False while its job waits, runs, or is requeued, and while Slurm does not answer."""
        events = self.run / "events.jsonl"
        size = events.stat().st_size if events.exists() else 0
        if size == self.seen and time.monotonic() < self.next_question:
            return False
        self.seen, self.next_question = size, time.monotonic() + ASK_SECONDS
        found = status.collect([self.run])[0]
        is_leaving = found.story.is_final and found.entry is not None  # only its batch script is still there
        self.state = str(found.story.end) if is_leaving else found.state
        return is_leaving or found.is_active is False
