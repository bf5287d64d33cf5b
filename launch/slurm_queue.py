"""What Slurm says of the jobs of many runs: one question to its queue, and one to its accounting where it keeps any."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from launch.cluster import ENDED
from launch.runs import JobRecord

ANSWER_SECONDS = 20
"""A person waits for the answer."""
FIELDS = "%i|%T|%r|%N|%S|%k"
"""Of squeue: number, state, reason, nodes, start (also an expected one), comment, which may hold a | of its own."""
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
    """When it started, or is expected to; empty where that is unknown."""
    comment: str

    @property
    def is_active(self) -> bool:
        """Whether it waits or runs; Slurm shows ended jobs for some minutes."""
        return self.state not in ENDED


@dataclass(frozen=True)
class Queue:
    """Slurm's answer."""

    entries: tuple[Entry, ...] = ()
    problem: str = ""
    """Why there is no answer; empty where there is one."""

    def find(self, record: JobRecord) -> Entry | None:
        """The job of a record: by its token where it has no number, as a submission can be cut off before that.

        A number that Slurm gave again belongs to another token; the jobs of an array share one.
        """
        for entry in self.entries:
            if not record.job and entry.comment == record.token:
                return entry
            if record.job and entry.number == record.job:
                other = TOKEN.fullmatch(entry.comment) and entry.comment != record.token and "_" not in record.job
                return None if other else entry
        return None


def ask(users: Iterable[int]) -> Queue:
    """All jobs of these users (their numbers), those that have just ended included."""
    if shutil.which("squeue") is None:
        return Queue(problem="there is no squeue on this machine, so the state of Slurm jobs is not known here")
    names = ",".join(str(user) for user in sorted(set(users)))
    command = ["squeue", "--noheader", "--states=all", "--array", f"--user={names}", f"--format={FIELDS}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        return Queue(problem=f"Slurm does not answer: squeue has said nothing for {ANSWER_SECONDS} s")
    if answer.returncode:
        return Queue(problem=f"Slurm does not answer: {' '.join(answer.stderr.split()) or 'squeue failed'}")
    return Queue(tuple(entry_of(line) for line in answer.stdout.splitlines() if line.count("|") >= FIELDS.count("|")))


def entry_of(line: str) -> Entry:
    """One line of squeue's answer."""
    number, state, reason, nodes, start, comment = (known(part) for part in line.split("|", FIELDS.count("|")))
    return Entry(number, state, reason, nodes, start, comment)


def known(text: str) -> str:
    """A field without Slurm's words for nothing."""
    return "" if text.strip() in ("None", "(null)", "N/A", "Unknown") else text.strip()


def accounted(numbers: Iterable[str]) -> dict[str, str]:
    """State of ended jobs in Slurm's accounting, such as TIMEOUT or `CANCELLED by 1000`; empty where it keeps none."""
    wanted = ",".join(sorted(set(numbers)))
    if not wanted or shutil.which("sacct") is None:
        return {}
    command = ["sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID,State", f"--jobs={wanted}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        return {}
    if answer.returncode:  # without slurmdbd: "Slurm accounting storage is disabled"
        return {}
    rows = (line.split("|") for line in answer.stdout.splitlines())
    return {row[0]: row[1] for row in rows if len(row) == 2 and row[1]}
