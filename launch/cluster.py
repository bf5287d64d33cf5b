"""What is known of the machines: whether there is a Slurm, what it says of a job, who a rank is, which port is free."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Mapping

from launch.runs import LaunchError

SLURM_TIMEOUT = 60
"""Seconds that a question to Slurm may take; the controller answers slowly when it is busy."""


def has_slurm() -> bool:
    """Whether this machine can submit to a Slurm."""
    return shutil.which("sbatch") is not None


def job_state(job: str) -> str | None:
    """Slurm's word for the state of a job that waits or runs, such as PENDING or RUNNING; None once it has ended.

    Raises LaunchError where Slurm does not answer.
    """
    if shutil.which("squeue") is None:
        raise LaunchError(
            f"the last job of this run is Slurm's {job}, and there is no squeue here to ask whether it has ended. "
            "Submit from a machine of that cluster, or remove job.json in the run's folder if you know that it has"
        )
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SLURM_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise LaunchError(f"squeue gave no answer about job {job} within {SLURM_TIMEOUT} s; try again later") from None
    if answer.returncode and "Invalid job id" not in answer.stderr:
        raise LaunchError(f"squeue failed, so it is not known whether job {job} has ended: {answer.stderr.strip()}")
    states = answer.stdout.split()
    return states[0] if states else None


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
