"""What Slurm says of the jobs of many runs: one question to its queue, and one to its accounting where it keeps any."""

from __future__ import annotations

import datetime
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass

from launch import cluster
from launch.runs import JobRecord

ANSWER_SECONDS = 20
"""A person waits for the answer."""
FIELDS = "%i|%T|%r|%N|%S|%k|%j"
"""Of squeue: number, state, reason, nodes, start (also an expected one), comment (which may hold a |), name."""
TOKEN = re.compile(r"slurm-\d{8}-\d{6}-[0-9a-f]+")


@dataclass(frozen=True)
class Entry:
    """One job as squeue tells it."""

    number: str
    state: str
    """Slurm's word, such as PENDING or RUNNING."""
    reason: str
    """Why it waits or how it ended; empty where there is none."""
    nodes: str
    """As Slurm abbreviates them, such as n[1-3]; empty where it has none."""
    start: str
    """When it started, or is expected to, ISO 8601 in UTC; empty where that is unknown."""
    comment: str
    name: str
    """As it was submitted; a job of this package has its run's name."""

    @property
    def is_active(self) -> bool:
        """Whether it waits or runs; Slurm shows ended jobs for some minutes."""
        return self.state not in cluster.ENDED


@dataclass(frozen=True)
class Queue:
    """Slurm's answer."""

    entries: tuple[Entry, ...] = ()
    problem: str = ""
    """Why there is no answer; empty where there is one."""

    def find(self, record: JobRecord, name: str) -> Entry | None:
        """The job of a record, of the run of this name; None where no entry is surely that job.

        It is found by its token where it has no number, as a submission can be cut off before that. Slurm may give a
        number again, to anybody's job; and a cluster may put a comment of its own in place of the token, so that only
        the name is left to know the job by. Whoever shows or cancels a job must not take a foreign one for it.
        `cluster.job_state`, which keeps a second job of a run from being started, takes the doubtful entry instead.
        """
        return next((entry for entry in self.entries if is_job_of(record, name, entry)), None)


def is_job_of(record: JobRecord, name: str, entry: Entry) -> bool:
    """Whether an entry of the queue is the recorded job, of the run of this name."""
    if not record.job:
        return entry.comment == record.token
    if entry.number != record.job:
        return False
    return entry.comment == record.token or (entry.name == name and TOKEN.fullmatch(entry.comment) is None)


def ask(users: Iterable[int]) -> Queue:
    """All jobs of these users (their numbers), those that have just ended included."""
    if shutil.which("squeue") is None:
        return Queue(problem="there is no squeue on this machine, so the state of Slurm jobs is not known here")
    names = ",".join(str(user) for user in sorted(set(users)))
    command = ("squeue", "--noheader", "--states=all", f"--user={names}", f"--format={FIELDS}")
    answer = cluster.ask(*command, timeout=ANSWER_SECONDS)
    if answer is None:
        return Queue(problem=f"Slurm does not answer: squeue has said nothing for {ANSWER_SECONDS} s")
    if answer.returncode:
        return Queue(problem=f"Slurm does not answer: {' '.join(answer.stderr.split()) or 'squeue failed'}")
    return Queue(tuple(entry_of(line) for line in answer.stdout.splitlines() if line.count("|") >= 5))


def entry_of(line: str) -> Entry:
    """One line of squeue's answer. Run names have no |, so whatever more of them there are belong to the comment."""
    number, state, reason, nodes, start, rest = line.split("|", 5)
    comment, _, name = rest.rpartition("|") if "|" in rest else (rest, "", "")
    seconds = cluster.seconds(start)
    when = "" if seconds is None else datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat()
    return Entry(known(number), known(state), known(reason), known(nodes), when, known(comment), known(name))


def known(text: str) -> str:
    """A field without Slurm's words for nothing."""
    return "" if text.strip() in ("None", "(null)", "N/A", "Unknown") else text.strip()


def accounted(jobs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """State of ended jobs by number and name in Slurm's accounting, such as TIMEOUT or `CANCELLED by 1000`.

    A number may have been another job's, whose name then differs. Empty where Slurm keeps no accounting.
    """
    numbers = ",".join(sorted({number for number, _ in jobs}))
    if not numbers:
        return {}
    command = (
        "sacct",
        "--noheader",
        "--allocations",
        "--parsable2",
        "--format=JobID,State,JobName",
        f"--jobs={numbers}",
    )
    answer = cluster.ask(*command, timeout=ANSWER_SECONDS)
    if answer is None or answer.returncode:  # without slurmdbd: "Slurm accounting storage is disabled"
        return {}
    rows = (line.split("|", 2) for line in answer.stdout.splitlines())
    found = {(row[0], row[2]): row[1] for row in rows if len(row) == 3}
    return {job: state for job, state in found.items() if state.split(" ")[0] in cluster.ENDED}
