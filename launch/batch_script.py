"""The Slurm job: what sbatch is asked for, what runs before the ranks, and what is decided after them.

submitit writes and submits the script. The ranks save on a signal and leave a marker (see launch/runs.py); the lines
after srun read it, because srun's exit status says nothing dependable: with --kill-on-bad-exit it is 143 or 137 for
many reasons. Where the run should go on, they ask Slurm to requeue the job, and wait to be ended for it. "Incomplete"
keeps that from bringing back a job that its user has cancelled meanwhile.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.layout import Layout
from launch.profiles import Profile
from launch.runs import LOCK_VARIABLE, MARKER_VARIABLE, LaunchError

BEFORE = r"""
rm -f "$DGT_MARKER".*  # left by an older job of the same number
echo "$(date '+%F %T')  attempt ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST"
newest_checkpoint() { ls "$run/checkpoints" 2>/dev/null | grep -E '^step_[0-9]+$' | sort | tail -n 1; }
before=$(newest_checkpoint)
export MASTER_PORT=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
"""

AFTER = r"""
srun_status=$?
crashes_file=$run/jobs/$SLURM_JOB_ID.crashes
say() { echo "$(date '+%F %T')  $*"; }
field() { scontrol show job "$SLURM_JOB_ID" 2>/dev/null | grep -oP "(?<=\b$1=)\S+"; }
requeue() {
  say "$1: asking for a requeue"
  for try in $(seq 30); do  # the controller may be away for a while
    if scontrol requeue Incomplete "$SLURM_JOB_ID"; then sleep 600; fi  # Slurm ends this script meanwhile
    sleep 10
  done
  say "the requeue was refused; submit the run again to go on"
  exit 1
}
if [ -e "$DGT_MARKER.finished" ]; then say "finished"; exit 0; fi
if [ -e "$DGT_MARKER.failed" ]; then say "failed in a way that would repeat, see $run/logs"; exit 2; fi
if grep -qs SIGINT "$DGT_MARKER.interrupted"; then say "stopped by SIGINT: not requeued"; exit 130; fi
if [ -e "$DGT_MARKER.interrupted" ]; then requeue "stopped as planned, $(cat "$DGT_MARKER.interrupted")"; fi
preempted=$(field PreemptTime)
if [[ "$preempted" == [0-9]* && ! "$preempted" < "$(field StartTime)" ]]; then requeue "preempted before a save"; fi
crashes=$(cat "$crashes_file" 2>/dev/null || echo 0)
if [ "$(newest_checkpoint)" != "$before" ]; then crashes=0; fi  # it got further, so it is worth another try
crashes=$((crashes + 1))
echo "$crashes" > "$crashes_file"
if [ "$crashes" -gt "$max_retries" ]; then
  say "giving up after $crashes crashes in a row without a new checkpoint (srun: $srun_status), see $run/logs"
  exit 1
fi
requeue "crash $crashes of at most $max_retries (srun: $srun_status)"
"""


@dataclass(frozen=True)
class SlurmJob:
    """What is to be submitted."""

    run: Path
    """The run's folder, absolute and seen by every node."""
    command: tuple[str, ...]
    """What every rank executes."""
    workdir: Path
    """Where relative paths of the configuration start."""
    layout: Layout
    profile: Profile


def text(job: SlurmJob) -> str:
    """The batch script as it would be submitted; needs no Slurm."""
    return executor(job)._make_submission_file_text(shlex.join(job.command), "")


def submit(job: SlurmJob) -> str:
    """Submits the job and returns its number. Raises LaunchError with Slurm's own words where it is refused."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    (job.run / "logs").mkdir(parents=True, exist_ok=True)
    (job.run / "jobs").mkdir(parents=True, exist_ok=True)
    try:
        number = executor(job)._submit_command(shlex.join(job.command)).job_id
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        raise LaunchError(f"sbatch did not take the job: {' '.join(str(error).split())}") from None
    finally:
        for link in (job.run / "jobs").glob(".submission_file_*.sh"):  # the script itself stays, under the job's number
            link.unlink()
    return number


def executor(job: SlurmJob) -> Any:
    """submitit's executor with all parameters set."""
    submitit_slurm = import_submitit()

    class Executor(submitit_slurm.SlurmExecutor):  # type: ignore[name-defined]
        """submitit's, which also writes the script of a dry run where there is no Slurm."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    if "%" in str(job.run):
        raise LaunchError(f"output_dir: Slurm reads the % in {job.run} as a pattern; use another folder")
    result = Executor(folder=job.run / "jobs")
    result.update_parameters(**parameters(job))
    return result


def import_submitit() -> Any:
    """submitit's Slurm module. Raises LaunchError where submitit is not installed."""
    try:
        from submitit.slurm import slurm
    except ImportError:
        raise LaunchError("submitting to Slurm needs submitit: pip install submitit") from None
    return slurm


def parameters(job: SlurmJob) -> dict[str, Any]:
    """What submitit is told: sbatch's options, srun's, and the lines around srun."""
    layout, profile = job.layout, job.profile
    facts = [
        f"run={shlex.quote(str(job.run))} python={shlex.quote(sys.executable)} max_retries={profile.max_retries}",
        f"export {LOCK_VARIABLE}=1 PYTHONUNBUFFERED=1",
        f'export {MARKER_VARIABLE}="$run/jobs/$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}"',
    ]
    environment = [f"export {name}={shlex.quote(str(value))}" for name, value in profile.environment.items()]
    cpus = [f"--cpus-per-task={profile.cpus_per_task}"] if profile.cpus_per_task else []  # srun does not take sbatch's
    asked = {
        "partition": profile.partition, "account": profile.account, "qos": profile.qos, "time": profile.time,
        "constraint": profile.constraint, "cpus_per_task": profile.cpus_per_task, "mem": profile.mem,
        "exclude": profile.exclude, "exclusive": profile.exclusive or None,
        "gpus_per_node": layout.processes_per_node if layout.use_gpus else None,
    }  # fmt: skip
    return asked | {
        "job_name": job.run.name,
        "nodes": layout.nodes,
        "ntasks_per_node": layout.processes_per_node,
        "wckey": None,
        "stderr_to_stdout": True,
        "additional_parameters": {
            "chdir": str(job.workdir),
            "output": str(job.run / "logs" / "batch.log"),
            "requeue": True,
            # to the ranks, not to the batch shell (no B:)
            "signal": f"USR2@{profile.signal_lead}",
            **profile.sbatch,
        },
        "srun_args": ["--kill-on-bad-exit=1", f"--output={job.run}/logs/rank-%t.log", "--open-mode=append", *cpus],
        "setup": [*environment, *profile.setup, *facts, *BEFORE.strip().splitlines()],
        "teardown": AFTER.strip().splitlines(),
    }
