"""What is known of the machines: whether there is a Slurm, what it says of a job, who a rank is, which port is free.

Needs no more than Python itself: batch scripts ask here too.
"""

from __future__ import annotations

import datetime
import os
import shutil
import socket
import subprocess
from collections.abc import Iterable, Mapping

from launch.runs import JobRecord, LaunchError

SLURM_TIMEOUT = 60
"""Seconds that a question to Slurm may take; the controller answers slowly when it is busy."""
CHANGES_ANSWERS = ("SQUEUE_", "SINFO_", "SACCT_", "SCONTROL_", "SCANCEL_", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")
"""Beginnings of the names of variables that filter and format what Slurm's commands say."""
ENDED = frozenset(
    (
        "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
        "REVOKED", "TIMEOUT",
    )
)  # fmt: skip
"""Slurm's words for jobs that will not run again by themselves."""


def has_slurm() -> bool:
    """Whether this machine can submit to a Slurm."""
    return shutil.which("sbatch") is not None


def job_state(record: JobRecord) -> str | None:
    """Slurm's word for the state of a job that waits or runs, such as PENDING or RUNNING; None once it has ended.

    A submission that was cut off before its number was noted is looked up by its token. Raises LaunchError where Slurm
    does not answer.
    """
    if shutil.which("squeue") is None:
        raise LaunchError(
            f"the last job of this run is {record.name}, and there is no squeue here to ask whether it has ended. "
            "Submit from a machine of that cluster, or remove job.json in the run's folder if you know that it has"
        )
    wanted = [f"--jobs={record.job}"] if record.job else []
    answer = ask("squeue", "--noheader", "--states=all", "--format=%T %k", *wanted)
    if answer is None:
        raise LaunchError(f"squeue gave no answer about {record.name} within {SLURM_TIMEOUT} s; try again later")
    if answer.returncode and "Invalid job id" not in answer.stderr:
        raise LaunchError(f"squeue failed, so it is not known whether {record.name} has ended: {answer.stderr.strip()}")
    rows = [line.split(" ", 1) for line in answer.stdout.splitlines()]
    return next((state for state, *comment in rows if state not in ENDED and is_job_of(record, "".join(comment))), None)


def is_job_of(record: JobRecord, comment: str) -> bool:
    """Whether a job in the queue, found by its number where that is known, is the recorded one.

    Slurm may give a number again; and a cluster may put a comment of its own in place of the token.
    """
    return comment == record.token or (bool(record.job) and not comment.startswith("slurm-"))


def job_fields(job: str) -> dict[str, str] | None:
    """What `scontrol show job` says of a job, by its names for it; None where it does not answer or knows no such."""
    answer = ask("scontrol", "show", "job", "--oneliner", job)
    if answer is None or not answer.stdout.startswith("JobId="):
        return None
    return dict(word.split("=", 1) for word in answer.stdout.split() if "=" in word)


def hostnames(nodes: str) -> list[str]:
    """The names that a list such as n[1-3,7] stands for; the list itself where Slurm cannot be asked."""
    if not nodes or nodes == "(null)":
        return []
    answer = ask("scontrol", "show", "hostnames", nodes)
    return answer.stdout.split() if answer is not None and answer.returncode == 0 else nodes.split(",")


def node_states(partition: str) -> dict[str, str]:
    """State of every node of a partition, such as idle, alloc or down*; empty where Slurm does not answer."""
    answer = ask("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N %T")
    rows = [line.split() for line in answer.stdout.splitlines()] if answer is not None else []
    return {row[0]: row[1] for row in rows if len(row) == 2}


def is_lost(state: str) -> bool:
    """Whether a node in this state of `node_states` runs nothing for now: down, drained, or not answering."""
    return state.startswith(("down", "drain", "fail", "unk")) or state.endswith("*")


def spare(states: Mapping[str, str], excluded: Iterable[str]) -> int:
    """How many nodes of a partition could still serve a job that excludes some."""
    return sum(not is_lost(state) for node, state in states.items() if node not in set(excluded))


def ask(*command: str, timeout: float = SLURM_TIMEOUT) -> subprocess.CompletedProcess[str] | None:
    """Runs one of Slurm's commands; None where it is not installed or hangs longer than `timeout` seconds.

    Whatever the user's shell has set to change what such commands print does not reach them.
    """
    variables = {name: value for name, value in os.environ.items() if not name.startswith(CHANGES_ANSWERS)}
    variables |= {"SLURM_TIME_FORMAT": "standard", "TZ": "UTC", "LC_ALL": "C"}
    try:
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=timeout, env=variables
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None


def seconds(time: str) -> float | None:
    """A time in an answer to `ask`, such as 2026-01-31T12:00:00 (UTC), in seconds since the epoch; None for Unknown."""
    try:
        return datetime.datetime.strptime(time, "%Y-%m-%dT%H:%M:%S").replace(tzinfo=datetime.timezone.utc).timestamp()
    except ValueError:
        return None


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE and the like for a task that srun has started; empty where RANK is set or srun did not.

    SLURM_PROCID alone proves nothing: a batch script has it too. The port only needs to differ between jobs of one
    node; a batch script that has looked for a free one passes it in MASTER_PORT.
    """
    if "RANK" in environment or "SLURM_STEP_NUM_TASKS" not in environment or "SLURM_PROCID" not in environment:
        return {}
    on_nodes = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")
    port = 20000 + (int(environment["SLURM_JOB_ID"]) * 7 + int(environment.get("SLURM_RESTART_COUNT", 0))) % 10000
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": on_nodes.split(",")[0].split("(")[0],
        # a node's name need not resolve on the others
        "MASTER_ADDR": environment.get("MASTER_ADDR") or environment.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
    }


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))
