"""What is known of runs, collected from their folders, from Slurm, and from this machine's locks. Changes nothing.

The state of a run is Slurm's word for its job (PENDING, RUNNING, ...) while that waits or runs; `running` for a job of
this machine; and once it has ended one of these, or Slurm's word where the run's own files do not say:

    finished, failed, gave up, cancelled    as events.jsonl says
    stopped                                 it left as planned, and can be resumed
    vanished                                it started and is gone, and nothing says how it ended
    unknown                                 Slurm does not answer
"""

from __future__ import annotations

import difflib
import fcntl
import getpass
import math
import os
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch import progress, runs, slurm_queue, story
from launch.progress import Progress
from launch.runs import JobRecord, LaunchError
from launch.slurm_queue import Entry, Queue
from launch.story import Story

SIGNS = ("config.yaml", "job.json", "events.jsonl")
"""A folder with one of these is a run's."""
SIGNS_OF_LIFE = ("metrics.jsonl", "events.jsonl", "job.json", "checkpoints", "logs/rank-0.log", "logs/batch.log")
SHOWN = ("cluster", "token", "nodes", "processes_per_node", "submitted", "host")
"""What of a record is shown; the rest is how to submit it again."""
NEAR_NAMES = 3


@dataclass(frozen=True)
class RunStatus:
    """All that is known of one run."""

    path: Path
    state: str
    is_active: bool | None
    """Whether its job waits or runs; None where Slurm does not answer."""
    detail: str
    """Why it waits, who runs it, or how it ended; may be empty."""
    record: JobRecord | None
    entry: Entry | None
    """Its job in Slurm's queue, just after its end too."""
    story: Story
    progress: Progress
    idle_seconds: float | None
    """Since the last sign of life."""
    problems: tuple[str, ...] = ()
    """What could not be found out."""

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def job(self) -> str:
        """Slurm's number, or `local`; empty where the run was never submitted."""
        if self.record is None or self.record.cluster == "local":
            return "local" if self.record else ""
        return self.record.job or (self.entry.number if self.entry else "")

    @property
    def nodes(self) -> str:
        """The nodes that it runs on, or last ran on."""
        if self.record is not None and self.record.cluster == "local":
            return self.record.host
        return (self.entry.nodes if self.entry else "") or ",".join(self.story.nodes)

    def facts(self) -> dict[str, Any]:
        """Everything as JSON has it; a number that is not finite becomes null."""
        plain = {
            "name": self.name,
            "path": str(self.path),
            "state": self.state,
            "active": self.is_active,
            "detail": self.detail,
            "job": self.job,
            "nodes": self.nodes,
            "record": {name: getattr(self.record, name) for name in SHOWN} if self.record else None,
            "slurm": asdict(self.entry) if self.entry else None,
            "story": asdict(self.story),
            "progress": asdict(self.progress),
            "seconds_left": self.progress.seconds_left,
            "idle_seconds": self.idle_seconds,
            "problems": self.problems,
        }
        return finite(plain)


def finite(value: Any) -> Any:
    """The value with None in place of numbers that JSON cannot say."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's; one that may not be read is none."""
    return any(os.path.exists(folder / name) for name in SIGNS)


def all_runs(folder: Path) -> list[Path]:
    """The runs in a folder, by name. Raises LaunchError where there is no such folder."""
    try:
        return sorted(path for path in folder.iterdir() if is_run(path))
    except OSError as error:
        raise LaunchError(
            f"{folder}, the folder of all runs: {error.strerror or error}; name another with --runs"
        ) from None


def find(runs_folder: Path, wanted: str) -> Path:
    """The run of this name in the folder, or at this path. Raises LaunchError with near names where there is none."""
    for path in (runs_folder / wanted, Path(wanted)):
        if is_run(path):
            return path.resolve() if path.name in ("", "..") else path
    for path in (runs_folder / wanted, Path(wanted)):
        if path.exists():
            raise LaunchError(f"{path} is no run: it has none of {', '.join(SIGNS)}")
    known = [path.name for path in all_runs(runs_folder)] if runs_folder.is_dir() else []
    near = difflib.get_close_matches(wanted, known, n=NEAR_NAMES) or known[:NEAR_NAMES]
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else f"there are no runs in {runs_folder}; name another with --runs"
    )
    raise LaunchError(f"there is no run {wanted}; {hint}")


def collect(folders: Sequence[Path], thoroughly: bool = False) -> list[RunStatus]:
    """The status of these runs, with one question to Slurm for all; `thoroughly`: with all evaluations.

    A damaged record is a problem of its run, not of the others.
    """
    records: dict[Path, JobRecord | None] = {}
    problems: dict[Path, str] = {}
    for run in folders:
        try:
            records[run] = runs.read_record(run)
        except LaunchError as error:
            records[run], problems[run] = None, str(error)
    in_slurm = {run: record for run, record in records.items() if record and record.cluster == "slurm"}
    queue = slurm_queue.ask(owner(run) for run in in_slurm) if in_slurm else Queue()
    stories = {run: story.read(run, record) for run, record in records.items()}
    entries = {run: queue.find(record) for run, record in in_slurm.items()}
    gone = [run for run in in_slurm if not (entries[run] or stories[run].is_final or queue.problem)]
    accounted = slurm_queue.accounted(number for run in gone if (number := in_slurm[run].job))
    found = []
    for run in records:
        record, entry, damage = records[run], entries.get(run), problems.get(run, "")
        word = entry.state if entry else accounted.get(record.job, "") if record else ""
        trouble = queue.problem if run in in_slurm else ""
        state, is_active, detail = judge(run, record, stories[run], entry, word, trouble)
        if damage and not is_active:
            state, is_active, detail = "damaged", None, ""
        said = tuple(problem for problem in (damage, trouble) if problem)
        how_far = progress.read(run, thoroughly)
        found.append(RunStatus(run, state, is_active, detail, record, entry, stories[run], how_far, idle(run), said))
    return found


def judge(
    run: Path, record: JobRecord | None, told: Story, entry: Entry | None, word: str, trouble: str
) -> tuple[str, bool | None, str]:
    """State, whether it is active, and the detail. `word`: Slurm's for the job; `trouble`: why it has none."""
    if entry and entry.is_active:
        return entry.state, True, entry.reason if entry.state != "RUNNING" else ""
    holder = lock_holder(run)
    if holder is not None:
        if record is None or record.cluster == "local":
            return "running", True, holder
        return "locked", True, f"{holder} submits it, or trains it without Slurm"
    if told.end and told.is_final:
        return told.end, False, told.why
    if trouble:
        return "unknown", None, told.why
    if word:
        return word.split()[0], False, f"as Slurm says ({word}); {told.why or 'the job itself noted no end'}"
    if told.end:
        return told.end, False, told.why
    if record is None:
        return "stopped", False, "how it ended is not known: it was not started by launch/submit.py"
    where = f"; it was started on {record.host}" if record.cluster == "local" and record.host != this_host() else ""
    return "vanished", False, f"no end is noted, and {gone_from(record)}{where}"


def gone_from(record: JobRecord) -> str:
    """Where a job that has vanished is not."""
    return f"{record.name} is not in Slurm's queue" if record.cluster == "slurm" else "no process holds its lock"


def owner(run: Path) -> int:
    """Number of the user who submitted the run."""
    return (run / "job.json").stat().st_uid


def idle(run: Path) -> float | None:
    """Seconds since the run's last sign of life; None where there is none."""
    ages = [age for name in SIGNS_OF_LIFE if (age := progress.age(run / name)) is not None]
    return min(ages, default=None)


def this_host() -> str:
    """This machine's name, as records and locks have it."""
    return socket.gethostname()


def user() -> str:
    """The user's name, or what to replace by it."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container without a name for this user
        return "USER"


def lock_holder(run: Path) -> str | None:
    """Who holds the run's lock, such as `process 12 on node7`; None where nobody does, or where it may not be read.

    Linux lists locks, which disturbs nobody, but not those of another machine or container. So where it lists none, a
    shared lock is taken for an instant: it excludes no other look, and a submission only in that instant.
    """
    try:
        descriptor = os.open(run / "run.lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if not is_listed(descriptor):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
            except BlockingIOError:
                pass
            except OSError:  # a file system without locks
                return None
        return os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "a process"
    finally:
        os.close(descriptor)


def is_listed(descriptor: int) -> bool:
    """Whether Linux lists an exclusive lock on this file."""
    file = os.fstat(descriptor)
    wanted = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}:{file.st_ino}"
    lines = runs.read_text("/proc/locks").splitlines()
    return any(line.split()[1:4:2] == ["FLOCK", "WRITE"] and wanted in line.split() for line in lines)


def launcher_of(run: Path) -> int | None:
    """The process of this machine that holds the run's lock by its own word and in fact; None where it has gone.

    Ranks keep the lock for a moment after their launcher has died, and its number may be another process's by then.
    """
    match = re.fullmatch(r"process (\d+) on (\S+)", lock_holder(run) or "")
    if match is None or match[2] != this_host():
        return None
    return int(match[1]) if has_open(int(match[1]), run / "run.lock") else None


def has_open(process: int, path: Path) -> bool:
    """Whether a process has this file open; False where it may not be asked."""

    def same(descriptor: Path) -> bool:
        try:
            return os.path.samefile(descriptor, path)
        except OSError:  # closed meanwhile, or no file
            return False

    try:
        descriptors: Iterable[Path] = list(Path(f"/proc/{process}/fd").iterdir())
    except OSError:
        return False
    return any(same(descriptor) for descriptor in descriptors)
