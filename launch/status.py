"""What is known of runs, collected from their folders, from Slurm, and from this machine's locks. Changes nothing.

The state of a run is Slurm's word for its job (PENDING, RUNNING, ...) while that waits or runs; `running` for a job of
this machine; and once it has ended one of these, or Slurm's word where the run's own files do not say:

    finished, failed, gave up, cancelled    as events.jsonl says, also while Slurm's word is COMPLETING
    stopped                                 it left as planned, and can be resumed
    vanished                                it started and is gone, and nothing says how it ended
    never started                           it is gone, and nothing says that it started
    unknown                                 Slurm does not answer, or may not show it, or a file cannot be read
    damaged                                 job.json, which names its job, cannot be read
"""

from __future__ import annotations

import difflib
import fcntl
import getpass
import math
import os
import re
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

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
Value = TypeVar("Value")


@dataclass(frozen=True)
class RunStatus:
    """All that is known of one run."""

    path: Path
    state: str
    is_active: bool | None
    """Whether its job waits, runs or is leaving; None where that is not known."""
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

    @property
    def has_left(self) -> bool:
        """Whether nothing more comes from its job: at most its batch script is still there.

        A job that was cancelled may still save.
        """
        is_told = self.story.is_final and self.story.end != story.CANCELLED
        return self.is_active is False or (self.entry is not None and self.entry.state != "PENDING" and is_told)

    @property
    def end(self) -> str:
        """How it ended where it has left, else its state."""
        return self.story.end if self.has_left and self.story.is_final and self.story.end else self.state

    @property
    def seconds_left(self) -> float | None:
        """Until training is complete; None where it does not train now, or where that cannot be told yet."""
        return self.progress.seconds_left if self.state in ("RUNNING", "running") else None

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
            "seconds_left": self.seconds_left,
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


@dataclass
class Look:
    """What is found out of one run, piece by piece; a file that cannot be read is a problem of this run alone."""

    run: Path
    record: JobRecord | None = None
    story: Story = field(default_factory=Story)
    entry: Entry | None = None
    word: str = ""
    """Slurm's for the state of the job, from its accounting where that is not in the queue."""
    trouble: str = ""
    """Why Slurm has none."""
    blind: str = ""
    """The state of a run whose own files do not tell it; empty where they do."""
    problems: list[str] = field(default_factory=list)

    def read(self, what: Callable[..., Value], otherwise: Value, *given: object) -> Value:
        """The answer of a function that reads files; `otherwise` where they cannot be read."""
        try:
            return what(*given)
        except LaunchError as error:
            self.problems.append(str(error))
        except OSError as error:
            self.problems.append(f"{error.filename or self.run}: {error.strerror or error}")
        return otherwise

    def read_record(self) -> None:
        """The last job."""
        self.record = self.read(runs.read_record, None, self.run)
        self.blind = "damaged" if self.problems else ""

    def read_story(self) -> None:
        """What the run has noted."""
        before = len(self.problems)
        self.story = self.read(story.read, Story(), self.run, self.record)
        if len(self.problems) > before:
            self.blind = self.blind or "unknown"

    @property
    def is_in_slurm(self) -> bool:
        """Whether its last job is Slurm's."""
        return self.record is not None and self.record.cluster == "slurm"

    @property
    def job(self) -> tuple[str, str]:
        """Number and name of the job."""
        return (self.record.job if self.record else "", self.run.name)


def collect(folders: Sequence[Path], thoroughly: bool = False) -> list[RunStatus]:
    """The status of these runs, with one question to Slurm for all; `thoroughly`: with all evaluations.

    What cannot be read of a run is told among its problems, and hides no other.
    """
    looks = [Look(run) for run in dict.fromkeys(folders)]
    for look in looks:
        look.read_record()
    in_slurm = [look for look in looks if look.is_in_slurm]
    owners = {look.run: look.read(owner, os.getuid(), look.run) for look in in_slurm}
    # oneself too: where the owner's name is unknown here, squeue would take no heed of it, and show everybody's jobs
    queue = slurm_queue.ask([*owners.values(), os.getuid()]) if in_slurm else Queue()
    for look in looks:
        look.read_story()  # after the queue: what ends in between has noted it
        look.entry = queue.find(look.record, look.run.name) if look.record and look.is_in_slurm else None
    gone = [look for look in in_slurm if not (look.entry or look.story.is_final or queue.problem)]
    accounted = slurm_queue.accounted(look.job for look in gone if look.job[0])
    for look in in_slurm:
        look.word = look.entry.state if look.entry else accounted.get(look.job, "")
        look.trouble = queue.problem
        if look in gone and not look.word and os.getuid() not in (0, owners[look.run]):
            look.trouble = "Slurm may not show jobs of other users here, so the state of theirs is not always known"
    return [concluded(look, thoroughly) for look in looks]


def concluded(look: Look, thoroughly: bool) -> RunStatus:
    """The status of a run of which Slurm was asked."""
    state, is_active, detail = judge(look)
    how_far = look.read(progress.read, Progress(), look.run, thoroughly)
    problems = tuple(dict.fromkeys([*([look.trouble] if look.trouble else []), *look.problems]))
    return RunStatus(
        look.run, state, is_active, detail, look.record, look.entry, look.story, how_far, idle(look.run), problems
    )


def judge(look: Look) -> tuple[str, bool | None, str]:
    """State, whether it is active, and the detail."""
    record, told, entry = look.record, look.story, look.entry
    if entry and entry.is_active:
        if entry.state == "COMPLETING" and told.end and told.is_final:
            return told.end, True, told.why
        return entry.state, True, entry.reason if entry.state != "RUNNING" else ""
    holder = lock_holder(look.run)
    if holder is not None:
        if record is None or record.cluster == "local":
            return "running", True, holder
        return "locked", True, f"{holder} submits it, or trains it without Slurm"
    if look.blind:
        return look.blind, None, ""
    if told.end and told.is_final:
        return told.end, False, told.why
    if look.trouble:
        return "unknown", None, told.why
    if look.word:
        return look.word.split()[0], False, f"as Slurm says ({look.word}); {told.why or 'the job itself noted no end'}"
    if told.end:
        return told.end, False, told.why
    if record is None:
        return "stopped", False, "how it ended is not known: it was not started by launch/submit.py"
    where = f"; it was submitted on {record.host}" if record.cluster == "local" and record.host != this_host() else ""
    if told.started is None:
        return "never started", False, f"no start is noted, and {gone_from(record)}{where}"
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
