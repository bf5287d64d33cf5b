"""Asking Slurm to start a job again, from inside the job.

    python launch/requeue.py JOB    asks, and waits to be ended; returns only where it was refused, with status 1

"Incomplete" keeps a job that was cancelled meanwhile from coming back. The controller may be away for a while.
"""

from __future__ import annotations

import os
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
FINAL = ("Invalid job id", "disabled", "not permitted", "denied", "not authorized")
"""In refusals that asking again does not change; whatever else Slurm says may be a controller that changes over."""


def request(job: str, restarts: int) -> str:
    """Asks for the job to be requeued; returns why it is not, in words, or nothing where it is.

    `restarts`: how often it was started again until now. Slurm grants a request for a job that is ending, and does
    nothing; so what counts is that the job has been started once more, or waits to be.
    """
    answer = patiently(lambda: attempt_request(job, restarts))
    return "the controller does not answer" if answer is None else answer


def attempt_request(job: str, restarts: int) -> str | None:
    """One request: nothing where the job comes back, why it does not, or None where to ask again."""
    said = cluster.ask("scontrol", "requeue", "Incomplete", job)
    fields = cluster.job_fields(job)
    if said is None or fields is None:
        return None
    state, words = fields["JobState"], " ".join((said.stdout + said.stderr).split())
    if int(fields.get("Restarts", 0)) > restarts or state in ("PENDING", "REQUEUED", "REQUEUE_HOLD"):
        return ""
    if state != "RUNNING" or any(word in words for word in FINAL):
        return words or "it is ending"
    return None


def exclude(job: str, node: str) -> str:
    """Keeps a job that waits off one more node; returns the refusal, or nothing where it is granted.

    Nodes can be excluded only while a job waits, so this comes after the requeue, and before the end that follows it.
    """
    nodes = dict.fromkeys([*excluded(job), node])
    answer = scontrol("update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}")
    return "the controller does not answer" if answer is None else answer


def excluded(job: str) -> list[str]:
    """The nodes that a job does not use."""
    fields = patiently(lambda: cluster.job_fields(job)) or {}
    return cluster.hostnames(fields.get("ExcNodeList", ""))


def scontrol(*words: str) -> str | None:
    """Nothing where a request was granted, else the refusal in Slurm's words; None where there is no answer."""
    answer = cluster.ask("scontrol", *words)
    if answer is None:
        return None
    if answer.returncode == 0:
        return ""
    return " ".join((answer.stdout + answer.stderr).split()) or "refused"


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
    refusal = request(sys.argv[1], int(os.environ.get("SLURM_RESTART_COUNT", 0)))
    if refusal:
        print(f"not requeued: {refusal}; submit again to go on", flush=True)
    else:
        wait_to_be_ended()
    return 1


if __name__ == "__main__":
    sys.exit(main())
