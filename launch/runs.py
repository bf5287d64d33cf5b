"""What the launcher keeps in a run's folder: the lock, the record of the last job, the markers of its attempts.

    RUN/
        run.lock                          held (flock) while a job of this machine trains or a submission is under way
        job.json                          the last submitted job: where, its number, its size, its code
        events.jsonl                      the story, see launch/events.py
        code/DIGEST/                      one snapshot per different code or configuration, see launch/snapshot.py
        jobs/TOKEN.ATTEMPT.stopping       all ranks agreed to stop, and save
        jobs/TOKEN.ATTEMPT.hung           its ranks got nothing done, and have ended themselves
        jobs/TOKEN.ATTEMPT.interrupted    how an attempt ended, written by its rank 0: stopped as planned, and saved,
        jobs/TOKEN.ATTEMPT.finished       or training is complete,
        jobs/TOKEN.ATTEMPT.failed         or it failed in a way that another attempt would repeat
        jobs/owner                        the attempt that may write to the run
        jobs/TOKEN.tally                  crashes in a row, and on which nodes, see launch/verdict.py
        jobs/NUMBER_submission.sh         what sbatch was given
        logs/                             one file per rank, appended by every attempt; batch.log of the batch script

TOKEN names one submission for good, where Slurm may give a number again. A lock on an open file ends with the last
process that has it open, however that one dies; the ranks of a local job inherit it.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import re
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

End = Literal["finished", "interrupted", "failed"]
"""How an attempt can end in words of its own; one that crashed leaves none."""

MARKER_VARIABLE = "DGT_MARKER"
"""Environment variable that tells a rank where to leave its marker: a path without the ending."""
LOCK_VARIABLE = "DGT_RUN_LOCKED"
"""Environment variable that tells a rank that whoever started it guards the run's folder."""
OWNER = "owner"
"""File in RUN/jobs that names the attempt that may write to the run."""
CHECKPOINT = re.compile(r"step_\d{8,}")
"""Names of committed checkpoints, as of dgt/training/checkpoint.py, which cannot be imported here without torch."""
DEADLINE_VARIABLE = "DGT_DEADLINE"
"""Environment variable with the time, in seconds since the epoch, at which the scheduler will end the job."""


class LaunchError(RuntimeError):
    """A job cannot be started; the message says why and what to do."""


@dataclass(frozen=True)
class JobRecord:
    """The last job of a run, complete enough to be submitted again."""

    cluster: Literal["slurm", "local"]
    token: str
    """Names this submission; also the Slurm job's comment, by which it is found where no number was recorded."""
    job: str
    """Slurm's number; empty while sbatch has not answered, and for a local job."""
    nodes: int
    processes_per_node: int
    use_gpus: bool
    command: tuple[str, ...]
    """What every rank executes, with the snapshot's path."""
    workdir: str
    """Where relative paths of the configuration start."""
    profile: dict[str, Any]
    """Everything else that was asked for, see launch/profiles.py."""
    submitted: str
    """Time of submission, ISO 8601."""
    host: str
    """Machine that it was submitted from."""

    @property
    def name(self) -> str:
        """What a person calls the job."""
        return f"Slurm job {self.job or self.token}" if self.cluster == "slurm" else f"local job {self.token}"


def new_token(cluster: Literal["slurm", "local"]) -> str:
    """A name for a submission that no other of the run has; such names sort by time."""
    return f"{cluster}-{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def write_record(run: Path, record: JobRecord) -> None:
    """Replaces job.json atomically."""
    write_atomically(run / "job.json", json.dumps(asdict(record), indent=1) + "\n")


def read_record(run: Path) -> JobRecord | None:
    """The last job; None where none was submitted. Raises LaunchError where job.json is not readable."""
    path = run / "job.json"
    try:
        found = json.loads(path.read_text())
        return JobRecord(**(found | {"command": tuple(found["command"])}))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LaunchError(f"{path} cannot be read ({error}); it names the last job of this run. Remove it") from None


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` so that a reader sees the whole of it or what was there before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    temporary.write_text(text)
    os.replace(temporary, path)


@contextmanager
def locked(run: Path, mode: int = 0o700) -> Iterator[int]:
    """Holds the run's lock and gives its file descriptor, for processes that should hold it too.

    `mode`: permissions of the run's folder where it is made now. Raises LaunchError where another process has the
    lock, or where the folder cannot be written.
    """
    try:
        if not run.exists():
            run.mkdir(parents=True, exist_ok=True)
            run.chmod(mode)  # mkdir's own mode is subject to the umask
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
                "choose another name"
            ) from None
        except OSError as error:
            raise LaunchError(
                f"{run / 'run.lock'} cannot be locked ({error.strerror or error}), so a second job could write to the "
                "run: keep it on a file system with locks (Lustre: mounted with -o flock)"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def leave_marker(prefix: str, end: End | Literal["stopping", "hung"], facts: dict[str, Any]) -> None:
    """Says how an attempt ended, for the launcher that waits for it; or that it is about to."""
    path = Path(f"{prefix}.{end}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(facts) + "\n")


def claim(prefix: str) -> None:
    """Says that the run is now the attempt's whose markers begin with `prefix`; whatever lives on of another leaves."""
    path = Path(prefix)
    write_atomically(path.with_name(OWNER), f"{path.name}\n")


def is_claimed_by(prefix: str) -> bool:
    """Whether no other attempt has claimed the run since."""
    path = Path(prefix)
    return read_text(path.with_name(OWNER)).strip() in ("", path.name)


def read_marker(prefix: str) -> tuple[End, dict[str, Any]] | None:
    """How the attempt ended and what it said; None where it left no marker, that is, where it crashed."""
    ends: tuple[End, ...] = ("finished", "failed", "interrupted")
    for end in ends:
        path = Path(f"{prefix}.{end}")
        if path.exists():
            return end, json.loads(path.read_text())
    return None


def hang_of(prefix: str) -> str:
    """What a rank has said of a hang that has ended the attempt; empty where none has."""
    return str((read_json(f"{prefix}.hung") or {}).get("text", ""))


def newest_checkpoint(run: Path) -> str | None:
    """Name of the newest committed checkpoint; None where there is none."""
    names = [path.name for path in (run / "checkpoints").glob("step_*") if CHECKPOINT.fullmatch(path.name)]
    return max(names, key=lambda name: step_of(name) or 0, default=None)


def step_of(checkpoint: str | None) -> int | None:
    """The step in a checkpoint's name."""
    return int(checkpoint.removeprefix("step_")) if checkpoint else None


def read_text(path: str | Path) -> str:
    """A file's text; empty where there is none."""
    try:
        return Path(path).read_text(errors="replace")
    except FileNotFoundError:
        return ""


def read_json(path: str | Path) -> dict[str, Any] | None:
    """A file's JSON object; None where it is missing or cut off."""
    try:
        found = json.loads(read_text(path))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
