"""What the launcher keeps in a run's folder: the lock, the record of the last job, the markers of its attempts.

    RUN/
        run.lock                        held (flock) while a job of this machine trains or a submission is under way
        job.json                        the last submitted job: where, its number, its size, its code
        code/DIGEST/                    one snapshot per different code or configuration, see launch/snapshot.py
        jobs/JOB.ATTEMPT.finished       how an attempt ended, written by its rank 0: training is complete,
        jobs/JOB.ATTEMPT.interrupted    or stopped as planned with a checkpoint, so that it should go on,
        jobs/JOB.ATTEMPT.failed         or failed in a way that another attempt would repeat
        logs/                           one file per rank, appended by every attempt

A lock on an open file ends with the last process that has it open, however that one dies; the ranks of a local job
inherit it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

End = Literal["finished", "interrupted", "failed"]

MARKER_VARIABLE = "DGT_MARKER"
"""Environment variable that tells a rank where to leave its marker: a path without the ending."""
LOCK_VARIABLE = "DGT_RUN_LOCKED"
"""Environment variable that tells a rank that whoever started it guards the run's folder."""


class LaunchError(RuntimeError):
    """A job cannot be started; the message says why and what to do."""


@dataclass(frozen=True)
class JobRecord:
    """The last job of a run."""

    cluster: Literal["slurm", "local"]
    job: str
    """Slurm's job number, or the local launcher's name for it."""
    nodes: int
    processes_per_node: int
    command: str
    """What every rank executes, with the snapshot's path."""
    submitted: str
    """Time of submission, ISO 8601."""
    host: str = ""
    """Machine that it was submitted from."""


def write_record(run: Path, record: JobRecord) -> None:
    """Replaces job.json atomically."""
    write_atomically(run / "job.json", json.dumps(asdict(record) | {"host": socket.gethostname()}, indent=1) + "\n")


def read_record(run: Path) -> JobRecord | None:
    """The last job; None where none was submitted. Raises LaunchError where job.json is not readable."""
    path = run / "job.json"
    try:
        return JobRecord(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise LaunchError(f"{path} cannot be read ({error}); it names the last job of this run. Remove it") from None


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` so that a reader sees the whole of it or what was there before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    temporary.write_text(text)
    os.replace(temporary, path)


@contextmanager
def locked(run: Path) -> Iterator[int]:
    """Holds the run's lock and gives its file descriptor, for processes that should hold it too.

    Raises LaunchError where another process has it, or where the folder cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run / "run.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise LaunchError(f"{run} cannot be written: {error.strerror or error}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            raise LaunchError(
                f"the run {run.name} is active: {holder} holds {run / 'run.lock'}. Wait for its end, stop it, or "
                "choose another --name"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def leave_marker(prefix: str, end: End, facts: dict[str, Any]) -> None:
    """Says how an attempt ended, for the launcher that waits for it."""
    path = Path(f"{prefix}.{end}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(facts) + "\n")


def read_marker(prefix: str) -> tuple[End, dict[str, Any]] | None:
    """How the attempt ended and what it said; None where it left no marker, that is, where it crashed."""
    ends: tuple[End, ...] = ("finished", "failed", "interrupted")
    for end in ends:
        path = Path(f"{prefix}.{end}")
        if path.exists():
            return end, json.loads(path.read_text())
    return None
