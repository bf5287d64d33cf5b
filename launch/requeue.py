"""Asking Slurm to start a job again, from inside the job.

    python launch/requeue.py JOB    asks, and waits to be ended; returns only where it was refused, with status 1

"Incomplete" keeps a job that was cancelled meanwhile from coming back. The controller may be away for a while.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

if not __package__:  # started as a file: what is imported must come from beside it, and `launch` is a package
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if entry != str(here))]

from launch import cluster

Answer = TypeVar("Answer")

PATIENCE_SECONDS = 3600
"""How long the controller may be away."""
RETRY_SECONDS = 5
KILLED_SECONDS = 600
"""Slurm ends a job that it requeues within its KillWait, which is shorter."""
AWAY = ("Unable to contact", "ommunication", "timed out", "onnection")
"""In what Slurm's commands say where the controller is away."""


def request(job: str) -> str:
    """Asks for the job to be requeued; returns the refusal in Slurm's words, or nothing where it is granted."""
    answer = patiently(lambda: scontrol("requeue", "Incomplete", job))
    return "the controller does not answer" if answer is None else answer


def exclude(job: str, node: str) -> str:
    """Keeps a job that waits off one more node; returns the refusal, or nothing where it is granted.

    Nodes can be excluded only while a job waits, so this comes after the requeue, and before the end that follows it.
    """
    nodes = dict.fromkeys([*excluded(job), node])
    answer = scontrol("update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}")
    return "the controller does not answer" if answer is None else answer


def excluded(job: str) -> list[str]:
    """The nodes that a job does not use."""
    return cluster.hostnames((cluster.job_fields(job) or {}).get("ExcNodeList", ""))


def scontrol(*words: str) -> str | None:
    """Nothing where a request was granted, else the refusal in Slurm's words; None where the controller is away."""
    answer = cluster.ask("scontrol", *words)
    if answer is None:
        return None
    if answer.returncode == 0:
        return ""
    said = " ".join((answer.stdout + answer.stderr).split()) or "refused"
    return None if any(word in said for word in AWAY) else said


def patiently(question: Callable[[], Answer | None]) -> Answer | None:
    """Repeats a question until it has an answer other than None, or patience ends; then None."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        answer = question()
        if answer is not None or time.monotonic() > deadline:
            return answer
        time.sleep(RETRY_SECONDS)


def wait_to_be_ended() -> None:
    """What a batch script does after a requeue was granted: if it ended by itself, the job would count as complete."""
    time.sleep(KILLED_SECONDS)


def main() -> int:
    """Asks for the job on the command line."""
    refusal = request(sys.argv[1])
    if refusal:
        print(f"not requeued: {refusal}; submit again to go on", flush=True)
    else:
        wait_to_be_ended()
    return 1


if __name__ == "__main__":
    sys.exit(main())
