"""What a submission is: checked before anything starts, recorded before Slurm hears of it, repeated by `resume`."""

from __future__ import annotations

import datetime
import os
import shlex
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch import batch_script, checks, events, limits, local, profiles, runs, secret_words, snapshot
from launch.layout import Layout
from launch.profiles import Profile
from launch.runs import JobRecord, LaunchError

if TYPE_CHECKING:
    from torch import nn

    from dgt.config import Config


@dataclass(frozen=True)
class Request:
    """A run as it is asked for."""

    config: Config
    layout: Layout
    profile: Profile

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.config.run_dir


@dataclass(frozen=True)
class Checked:
    """What was found out about a request before it is started."""

    network: nn.Module
    """Without memory for its weights."""
    problems: list[str]
    """What stands against starting it, one sentence each."""
    warnings: list[str]
    """What does not, but should be known."""


def check(request: Request) -> Checked:
    """Everything that can be found out beforehand. Raises what makes the request meaningless, such as ConfigError."""
    config, where, profile = request.config, request.layout, request.profile
    network = checks.network(config)
    checks.batches(config, where.ranks)
    checks.engine(config, network, where.ranks)
    checks.evaluation(config, where.ranks)
    checks.beginning(config)
    checks.augmentation(config)
    secret_words.no_secrets(config)
    found = checks.problems(lambda: checks.samples(config), lambda: checks.output_folder(config))
    warnings = checks.sizes_to_compile(config)
    if where.cluster == "slurm":
        lead = limits.signal_lead(profile, request.run)
        found += checks.problems(
            lambda: limits.time_allows_lead(profile, lead),
            lambda: limits.memory(config, where, network, profile),
        )
        if shutil.which("scontrol"):  # a dry run needs no Slurm
            found += checks.problems(
                lambda: limits.partition(where, profile, lead), lambda: warnings.extend(limits.preemption(profile))
            )
        warnings += [warning for warning in (limits.shared_folder(request.run, where.nodes),) if warning]
        if not profile.cpus_per_task:
            warnings.append("no --cpus-per-task: Slurm gives each process one core, which decodes images slowly")
    return Checked(network, found, warnings)


def start(request: Request) -> int:
    """Takes the snapshot and starts the job: submits it to Slurm, or runs it here to its end. Returns the exit status.

    Raises LaunchError where the run is active.
    """
    from dgt.config import to_yaml

    with runs.locked(request.run, int(request.config.output_mode, 8)) as lock:
        checks.not_active(request.run)
        code = snapshot.take(request.run, to_yaml(request.config)).absolute()
        record = new_record(request, batch_script.rank_command(code, request.profile))
        return launch(request.run, record, lock)


def resume(run: Path) -> int:
    """Starts the last job of a run again, exactly as it was: its snapshot, its size, its profile.

    Raises LaunchError where there is none, or where it is active.
    """
    with runs.locked(run) as lock:
        record = runs.read_record(run)
        if record is None:
            raise LaunchError(f"{run} has no job.json: nothing was submitted there; use launch/submit.py")
        checks.not_active(run)
        if (run / "job.json").stat().st_uid != os.getuid():
            raise LaunchError(f"the last job of {run} is another user's, whose command would run as you")
        snapshot.check_unchanged(code_of(record))
        if record.cluster == "slurm":
            profile = profiles.from_plain(record.profile)
            lead = limits.signal_lead(profile, run)  # saves may have grown slower
            limits.time_allows_lead(profile, lead)
            limits.partition(layout_of(record), profile, lead)
        return launch(run, renewed(record), lock)


def new_record(request: Request, command: tuple[str, ...]) -> JobRecord:
    """The record of a job that is about to be started."""
    where = request.layout
    return JobRecord(
        cluster=where.cluster,
        token=runs.new_token(where.cluster),
        job="",
        nodes=where.nodes,
        processes_per_node=where.processes_per_node,
        use_gpus=where.use_gpus,
        command=command,
        workdir=str(Path.cwd()),
        profile=profiles.to_plain(request.profile),
        submitted=now(),
        host=socket.gethostname(),
    )


def renewed(record: JobRecord) -> JobRecord:
    """The same job as a new submission."""
    changes = {"token": runs.new_token(record.cluster), "job": "", "submitted": now(), "host": socket.gethostname()}
    return JobRecord(**(vars(record) | changes))


def now() -> str:
    """This moment, ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def code_of(record: JobRecord) -> Path:
    """The snapshot that a job runs."""
    return Path(record.command[record.command.index("--config") + 1]).parent


def launch(run: Path, record: JobRecord, lock: int) -> int:
    """Starts a recorded job.

    The record is written before Slurm hears of the job: where this program dies in between, the next one finds the job
    in the queue by its token, and does not start a second.
    """
    earlier = runs.read_record(run)
    runs.write_record(run, record)
    if record.cluster == "local":
        return launch_here(run, record, lock)
    job = slurm_job(run, record)
    try:
        number = batch_script.submit(job)
    except LaunchError:
        if earlier:
            runs.write_record(run, earlier)
        else:
            (run / "job.json").unlink()
        raise
    record = JobRecord(**(vars(record) | {"job": number}))
    runs.write_record(run, record)
    events.note(
        run, "submitted", f"Slurm job {number}: {job.layout}, code {job.code.name}", job=number, token=record.token
    )
    print(f"run {run}: Slurm job {number}, {job.layout}")
    print(f"  state   python launch/jobs.py status {run}")
    print(f"  logs    {run / 'logs'} (batch.log, rank-*.log; python launch/jobs.py logs -f {run})")
    print(f"  curves  tensorboard --logdir {run / 'tensorboard'}")
    print(f"  stop    python launch/jobs.py cancel {run}; submitting the same name again goes on")
    return 0


def slurm_job(run: Path, record: JobRecord) -> batch_script.SlurmJob:
    """A recorded job as sbatch is to get it."""
    profile = profiles.from_plain(record.profile)
    return batch_script.SlurmJob(
        run.absolute(),
        record.token,
        code_of(record),
        record.command,
        Path(record.workdir),
        layout_of(record),
        profile,
        limits.signal_lead(profile, run),
    )


def layout_of(record: JobRecord) -> Layout:
    """How many processes run where."""
    return Layout(record.cluster, record.nodes, record.processes_per_node, record.use_gpus)


def launch_here(run: Path, record: JobRecord, lock: int) -> int:
    """Runs a recorded job on this machine to its end."""
    layout = layout_of(record)
    events.note(run, "submitted", f"job on {record.host}: {layout}", token=record.token, process=os.getpid())
    local.say(f"run {run}: {layout}; curves: tensorboard --logdir {run / 'tensorboard'}")
    retries = record.profile["max_retries"]
    job = local.LocalJob(record.token, run, record.command, layout.processes_per_node, layout.use_gpus, retries)
    os.chdir(record.workdir)
    return local.run(job, lock)


def described(request: Request) -> str:
    """What would be executed, for a dry run."""
    code = request.run.absolute() / "code" / "DIGEST"
    record = new_record(request, batch_script.rank_command(code, request.profile))
    if request.layout.cluster == "slurm":
        return batch_script.text(slurm_job(request.run, record))
    return f"{request.layout.processes_per_node} x  {shlex.join(record.command)}"
