"""The logs of a run: their end, and what is appended to them, over all restarts."""

from __future__ import annotations

import codecs
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from launch import events, status
from launch.runs import LaunchError
from launch.status import RunStatus

POLL_SECONDS = 0.5
"""How often a followed log is looked at."""
ASK_SECONDS = 10.0
"""How often Slurm is asked whether a run goes on; a change in its events is a reason to ask at once."""
LEAVING_SECONDS = 2.0
"""The same while a job is leaving."""
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


def last_lines(log: Path, count: int | None) -> int:
    """The byte of a log at which its last `count` lines begin (None: all lines); 0 where there is no file."""
    if count is None:
        return 0
    try:
        with log.open("rb") as file:
            return end_of_file(file) if count == 0 else start_of_lines(file, count)
    except FileNotFoundError:
        return 0


def end_of_file(file: BinaryIO) -> int:
    """Its size in bytes."""
    return file.seek(0, 2)


def start_of_lines(file: BinaryIO, count: int) -> int:
    """The byte at which the last `count` lines begin, one or more; the file is read from its end, every byte once."""
    position = end_of_file(file)
    if position == 0:
        return 0
    file.seek(position - 1)
    needed = count + (file.read(1) == b"\n")  # line ends that are passed; the last line need not have one
    while position > 0:
        size = min(BLOCK_BYTES, position)
        position = file.seek(position - size)
        block = file.read(size)
        ends = block.count(b"\n")
        if ends >= needed:
            at = len(block)
            for _ in range(needed):
                at = block.rindex(b"\n", 0, at)
            return position + at + 1
        needed -= ends
    return 0


class Log:
    """Prints a log from byte `begin`, and later what was appended; it may begin to exist later."""

    def __init__(self, path: Path, begin: int = 0):
        self.path, self.shown = path, begin
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def show(self) -> None:
        """Prints what has come since the last call, in pieces: a log can be larger than memory."""
        try:
            with self.path.open("rb") as file:
                end = end_of_file(file)
                if end < self.shown:  # it was emptied by hand
                    self.shown = 0
                file.seek(self.shown)
                while self.shown < end and (block := file.read(min(BLOCK_BYTES, end - self.shown))):
                    self.shown += len(block)
                    sys.stdout.write(self.decoder.decode(block))
        except FileNotFoundError:
            pass
        sys.stdout.flush()


def follow(log: Log, has_ended: Callable[[], bool]) -> None:
    """Prints what is appended to a log until the run has ended."""
    while True:
        is_last = has_ended()  # asked first, so that what was written until then is shown
        log.show()
        if is_last:
            return
        time.sleep(POLL_SECONDS)


class Watch:
    """Whether runs have ended, asking Slurm only now and then."""

    def __init__(self, folders: Sequence[Path]):
        self.folders = folders
        self.found: list[RunStatus] = []
        """As of the last answer; empty before the first question."""
        self.sizes: list[int] = []
        self.next_question = 0.0

    def has_ended(self) -> bool:
        """Whether nothing more comes from any of them.

        False while a job waits, runs, is requeued or saves after a cancellation, and while Slurm does not answer.
        """
        sizes = [size(run / events.FILE) for run in self.folders]
        if sizes != self.sizes or time.monotonic() >= self.next_question:
            self.sizes, self.found = sizes, status.collect(self.folders)
            is_leaving = any(one.story.is_final or one.state == "COMPLETING" for one in self.found)
            self.next_question = time.monotonic() + (LEAVING_SECONDS if is_leaving else ASK_SECONDS)
        return all(one.has_left for one in self.found)

    @property
    def problems(self) -> list[str]:
        """What could not be found out."""
        return list(dict.fromkeys(problem for one in self.found for problem in one.problems))


def size(path: Path) -> int:
    """Of a file, in bytes; 0 where it cannot be asked."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
