"""The Slurm job: what sbatch is asked for, and the batch script around the ranks.

submitit writes and submits the script. The ranks save on a signal and leave a marker (launch/runs.py); what is decided
before and after them is in launch/attempt.py, of the job's own snapshot of the code. Nothing is pickled.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.layout import Layout
from launch.profiles import Profile
from launch.runs import LOCK_VARIABLE, MARKER_VARIABLE, LaunchError

BEFORE = r"""
set +eu +o pipefail  # whatever the profile's lines have set
trap : TERM  # Slurm's TERM ends the ranks; this script stays to say what becomes of the job
# what a shell inside another job, or under torchrun, has left in the environment says nothing about these ranks
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT DGT_LAUNCHER_PID DGT_DEADLINE
attempt=("$python" "$code/launch/attempt.py" --run "$run" --token "$token" --lead "$lead" --max-retries "$max_retries")
begun=
eval "$("${attempt[@]}" begin)"
if [ -z "$begun" ]; then
  echo "this node cannot run $code with $python, see above"
  if [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ] && scontrol requeue Incomplete "$SLURM_JOB_ID"; then sleep 600; fi
  exit 1
fi
"""
CHECK_NODES = r"""
health=$run/jobs/$token.${SLURM_RESTART_COUNT:-0}.health
timeout --kill-after=10 "$health_timeout" srun %s "$python" "$code/slurm/health_check.py" \
  --report "$health" --now "$(date +%%s.%%N)" --limit "$health_timeout" %s
judged=$("${attempt[@]}" nodes)
[ $? -lt 128 ] || exit 1  # Slurm has ended it, and this job with it
eval "$judged"
"""
WATCH = r"""
"${attempt[@]}" watch & watcher=$!
"""
AFTER = r"""
kill "$watcher" 2>/dev/null
"${attempt[@]}" end
"""


@dataclass(frozen=True)
class SlurmJob:
    """What is to be submitted."""

    run: Path
    """The run's folder, absolute and seen by every node."""
    token: str
    """Names the submission."""
    code: Path
    """The snapshot."""
    command: tuple[str, ...]
    """What every rank executes."""
    workdir: Path
    """Where relative paths of the configuration start."""
    layout: Layout
    profile: Profile
    lead: int
    """Seconds before the time limit at which the ranks are told to save and leave."""


def text(job: SlurmJob) -> str:
    """The batch script as it would be submitted; needs no Slurm."""
    return executor(job.run, parameters(job))._make_submission_file_text(shlex.join(job.command), "")


def submit(job: SlurmJob) -> str:
    """Submits the job and returns its number. Raises LaunchError with Slurm's own words where it is refused."""
    return sbatch(job.run, parameters(job), shlex.join(job.command))


def sbatch(folder: Path, asked: dict[str, Any], command: str) -> str:
    """Submits through submitit what is `asked` for, running `command`; scripts and logs are in `folder`."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "jobs").mkdir(parents=True, exist_ok=True)
    try:
        with without(misleading(asked)):
            return executor(folder, asked)._submit_command(command).job_id
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        raise LaunchError(f"sbatch did not take the job: {' '.join(str(error).split())}") from None
    finally:
        for link in (folder / "jobs").glob(".submission_file_*.sh"):  # the script itself stays, under the job's number
            link.unlink()


def misleading(asked: dict[str, Any]) -> list[str]:
    """Variables of the shell that sbatch would obey before the script, and those of a job that this shell runs in."""
    names = [name for name, value in (asked | asked["additional_parameters"]).items() if value is not None]
    others = {"time": "TIMELIMIT", "requeue": "NO_REQUEUE"}
    set_here = {f"SBATCH_{others.get(name, name.upper().replace('-', '_'))}" for name in [*names, "open_mode"]}
    never = {"SBATCH_EXPORT", "SBATCH_ARRAY_INX", "SBATCH_WAIT", "SBATCH_CLUSTERS"}
    of_a_job = {name for name in os.environ if name.startswith(("SLURM_", "SRUN_", "PMI_"))}
    return [name for name in os.environ if name in set_here | never | of_a_job - {"SLURM_CONF", "SLURM_JWT"}]


@contextmanager
def without(names: list[str]) -> Iterator[None]:
    """Takes variables out of the environment for a while."""
    taken = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(taken)


def executor(folder: Path, asked: dict[str, Any]) -> Any:
    """submitit's executor with all parameters set."""
    submitit_slurm = import_submitit()

    class Executor(submitit_slurm.SlurmExecutor):  # type: ignore[name-defined]
        """submitit's, which also writes the script of a dry run where there is no Slurm."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    if "%" in str(folder):
        raise LaunchError(f"output_dir: Slurm reads the % in {folder} as a pattern; use another folder")
    result = Executor(folder=folder / "jobs")
    result.update_parameters(**asked)
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
    cpus = [f"--cpus-per-task={profile.cpus_per_task}"] if profile.cpus_per_task else []  # srun does not take sbatch's
    return requested(profile) | {
        "job_name": job.run.name,
        "comment": job.token,
        "nodes": layout.nodes,
        "ntasks_per_node": layout.processes_per_node,
        "gpus_per_node": gpus(layout, profile),
        "exclusive": profile.exclusive or None,
        "stderr_to_stdout": True,
        "additional_parameters": options(profile)
        | {
            "chdir": str(job.workdir),
            "output": str(job.run / "logs" / "batch.log"),
            "requeue": True,
            # to the ranks, not to the batch shell (no B:)
            "signal": f"USR2@{job.lead}",
            **profile.sbatch,
        },
        "srun_args": [
            "--kill-on-bad-exit=1", "--export=ALL", f"--output={job.run}/logs/rank-%t.log", "--open-mode=append",
            *cpus, *in_container(profile.srun, profile),
        ],
        "setup": setup(job),
        "teardown": AFTER.strip().splitlines(),
    }  # fmt: skip


def gpus(layout: Layout, profile: Profile) -> str | None:
    """GPUs of a node as sbatch wants them named, with their type where the profile says one."""
    if not layout.use_gpus:
        return None
    return f"{profile.gpu_type}:{layout.processes_per_node}" if profile.gpu_type else str(layout.processes_per_node)


def requested(profile: Profile) -> dict[str, Any]:
    """What a profile asks of sbatch, by submitit's names; None leaves the cluster's default."""
    mail = {"mail_user": profile.mail, "mail_type": "END,FAIL,REQUEUE"} if profile.mail else {}
    return mail | {
        "partition": profile.partition, "account": profile.account, "qos": profile.qos, "time": profile.time,
        "constraint": profile.constraint, "cpus_per_task": profile.cpus_per_task, "mem": profile.mem,
        "exclude": profile.exclude, "wckey": None,
    }  # fmt: skip


def options(profile: Profile) -> dict[str, Any]:
    """The same for options that submitit has no name for."""
    result: dict[str, Any] = {}
    if profile.reservation:
        result["reservation"] = profile.reservation
    if profile.after:
        result |= {"dependency": f"afterok:{':'.join(profile.after)}", "kill-on-invalid-dep": "yes"}
    return result


def setup(job: SlurmJob) -> list[str]:
    """The lines before srun: the profile's, then the facts of this job, then what is decided before the ranks start."""
    profile = job.profile
    facts = {
        "run": job.run, "code": job.code, "token": job.token, "python": sys.executable, "lead": job.lead,
        "max_retries": profile.max_retries, "health_timeout": profile.health.timeout,
    }  # fmt: skip
    return [
        *environment(profile),
        *(f"{name}={shlex.quote(str(value))}" for name, value in facts.items()),
        f"export {LOCK_VARIABLE}=1 PYTHONUNBUFFERED=1",
        f'export {MARKER_VARIABLE}="$run/jobs/$token.${{SLURM_RESTART_COUNT:-0}}"',
        *BEFORE.strip().splitlines(),
        *(check_nodes(job).strip().splitlines() if profile.health.enabled else ()),
        *WATCH.strip().splitlines(),
    ]


def environment(profile: Profile) -> list[str]:
    """The profile's own lines."""
    return [
        *(f"export {name}={shlex.quote(str(value))}" for name, value in profile.environment.items()),
        *(f"module load {shlex.quote(module)}" for module in profile.modules),
        *profile.setup,
    ]


def check_nodes(job: SlurmJob) -> str:
    """The health check: one process per node, or per GPU where the speed of all of them together is to be measured."""
    health, layout = job.profile.health, job.layout
    measured = {"--matmul-tflops": health.matmul_tflops, "--allreduce-gb-s": health.allreduce_gb_s}
    asked = [word for name, value in measured.items() if value is not None for word in (name, str(value))]
    per_node = 1 if health.allreduce_gb_s is None else layout.processes_per_node
    step = [
        f"--nodes={layout.nodes}", f"--ntasks={layout.nodes * per_node}", f"--ntasks-per-node={per_node}",
        "--export=ALL", f"--output={job.run}/logs/health.log", "--open-mode=append", "--kill-on-bad-exit=0", "--wait=0",
    ]  # fmt: skip
    gpus = layout.processes_per_node if layout.use_gpus else 0
    asked += ["--gpus", str(gpus), "--shared", str(job.run), "--token", job.token]
    asked += ["--clock-skew", str(health.clock_skew)]
    asked += [word for path, free in job.profile.scratch.items() for word in ("--free", f"{path}={free}")]
    return CHECK_NODES % (shlex.join(step), shlex.join(asked))


def rank_command(code: Path, profile: Profile) -> tuple[str, ...]:
    """What every rank executes: the program of the snapshot, with the snapshot's configuration."""
    program = (str(code / "launch" / "train.py"), "--config", str(code / "config.yaml"))
    if not profile.container:
        return (sys.executable, *program)
    prefix = shlex.split(profile.container_command or "")
    return (*in_container(prefix, profile), profile.container_python, *program)


def in_container(words: Any, profile: Profile) -> list[str]:
    """Words of a command with the image's name filled in."""
    return [word.replace("{image}", profile.container or "") for word in words]
