"""Start a run, or go on with one: on this machine or through Slurm. Everything is checked before anything starts."""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # started as a file: what is imported must come from beside it, and `launch` is a package
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if entry != str(here))]

from launch import batch_script, checks, layout, local, profiles, program, runs, snapshot
from launch.layout import Cluster, Layout, Wish
from launch.profiles import Profile

if TYPE_CHECKING:
    from torch import nn

    from dgt.config import Config

FROM_COMMAND_LINE = (
    "partition", "account", "qos", "constraint", "exclude", "mem", "time", "cpus_per_task", "signal_lead",
    "max_retries",
)  # fmt: skip
"""Options that go before what the profile says."""


def main(argv: Sequence[str] | None = None) -> int:
    """Checks, then shows (--dry-run) or starts the job; returns the exit status."""
    options = parser().parse_intermixed_args(argv)
    return program.guarded("dgt-submit", lambda: submit(options))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="dgt-submit",
        description="Start a training run on this machine or through Slurm. Naming a run that has ended goes on from "
        "its newest checkpoint; naming an active one is refused.",
    )
    result.add_argument("--config", required=True, metavar="FILE", help="configuration, YAML")
    result.add_argument("overrides", nargs="*", metavar="key=value", help="such as steps.epochs=10")
    result.add_argument("--name", help="the run's name, in place of the configuration's")
    result.add_argument("--dry-run", action="store_true", help="show what would be started, and start nothing")
    result.add_argument(
        "--cluster", choices=("auto", "slurm", "local"), default="auto", help="auto: Slurm where sbatch is"
    )
    result.add_argument("--nodes", type=int, metavar="N", help="number of nodes (default: 1)")
    result.add_argument(
        "--gpus-per-node", type=int, metavar="M", help="one process per GPU (default: all here, the profile's in Slurm)"
    )
    result.add_argument("--processes-per-node", type=int, metavar="P", help="run on CPU with this many processes")
    result.add_argument(
        "--max-retries", type=int, metavar="R",
        help="crashes in a row without a new checkpoint after which a run is still started again (default: 0 here, "
        "the profile's in Slurm)",
    )  # fmt: skip
    slurm = result.add_argument_group("Slurm", "each goes before what the profile says")
    slurm.add_argument("--profile", metavar="NAME", help="slurm/profiles/NAME.yaml, or a path (default: generic)")
    for option in ("partition", "account", "qos", "constraint", "exclude", "mem"):
        slurm.add_argument(f"--{option}", help="as of sbatch")
    slurm.add_argument("--time", help="limit of one attempt, as of sbatch; the run goes on after it")
    slurm.add_argument("--cpus-per-task", type=int, metavar="N", help="CPU cores of one process")
    slurm.add_argument("--signal-lead", type=int, metavar="S", help="seconds before the limit at which ranks save")
    return result


def submit(options: argparse.Namespace) -> int:
    """Loads the configuration, checks everything, and hands the job to where it runs."""
    from dgt.config import load, to_yaml

    name = [f"name={options.name}"] if options.name else []
    config = load(options.config, [*options.overrides, *name])
    profile = profiles.load(options.profile, {name: getattr(options, name) for name in FROM_COMMAND_LINE})
    wish = Wish(options.cluster, options.nodes, options.gpus_per_node, options.processes_per_node, options.dry_run)
    where = layout.choose(wish, profile.gpus_per_node)
    network = checks.network(config)
    checks.batches(config, where.ranks)
    checks.augmentation(config)
    found = checks.problems(lambda: checks.samples(config), lambda: checks.output_folder(config))
    if options.dry_run:
        return show(config, where, profile, network, found)
    if found:
        return program.refuse("dgt-submit", *found)
    with runs.locked(config.run_dir) as lock:
        checks.not_active(config.run_dir)
        code = snapshot.take(config.run_dir, to_yaml(config)).absolute()
        if where.cluster == "slurm":
            return start_in_slurm(slurm_job(config, where, profile, code))
        return start_here(config.run_dir, where, code, options.max_retries or 0, lock)


def show(config: Config, where: Layout, profile: Profile, network: nn.Module, found: list[str]) -> int:
    """Prints what would be started."""
    from launch import plan

    try:
        samples = checks.samples(config)[0]
    except checks.known_errors():  # it is among the problems found
        samples = None
    code = config.run_dir.absolute() / "code" / "DIGEST"
    if where.cluster == "slurm":
        job = batch_script.text(slurm_job(config, where, profile, code))
    else:
        job = f"{where.processes_per_node} x  {shlex.join(rank_command(code))}"
    if where.cluster == "slurm" and not profile.cpus_per_task:
        found = [*found, "no --cpus-per-task: Slurm gives each process one core, which decodes images slowly"]
    print(plan.describe(config, where, network, samples, job, found))
    return 0


def rank_command(code: Path) -> tuple[str, ...]:
    """What every rank executes: the program of the snapshot, with the snapshot's configuration."""
    return sys.executable, str(code / "launch" / "train.py"), "--config", str(code / "config.yaml")


def slurm_job(config: Config, where: Layout, profile: Profile, code: Path) -> batch_script.SlurmJob:
    """The job as sbatch is to get it."""
    return batch_script.SlurmJob(config.run_dir.absolute(), rank_command(code), Path.cwd(), where, profile)


def start_in_slurm(job: batch_script.SlurmJob) -> int:
    """Submits the job and says where to look."""
    number = batch_script.submit(job)
    record(job.run, "slurm", number, job.layout, job.command)
    print(f"run {job.run}: Slurm job {number}, {job.layout}")
    print(f"  logs    {job.run / 'logs'} (batch.log, rank-*.log)")
    print(f"  state   squeue --jobs={number}")
    print(f"  curves  tensorboard --logdir {job.run / 'tensorboard'}")
    print(f"  stop    scancel {number}; submitting the same name again goes on")
    return 0


def start_here(run: Path, where: Layout, code: Path, max_retries: int, lock: int) -> int:
    """Runs the job on this machine to its end."""
    name = f"local-{datetime.datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    command = rank_command(code)
    record(run, "local", name, where, command)
    local.say(f"run {run}: {where}; curves: tensorboard --logdir {run / 'tensorboard'}")
    job = local.LocalJob(name, run, command, where.processes_per_node, where.use_gpus, max_retries)
    return local.run(job, lock)


def record(run: Path, where: Cluster, job: str, size: Layout, command: tuple[str, ...]) -> None:
    """Notes the job in the run's folder."""
    now = datetime.datetime.now().isoformat(timespec="seconds")
    runs.write_record(run, runs.JobRecord(where, job, size.nodes, size.processes_per_node, shlex.join(command), now))


if __name__ == "__main__":
    sys.exit(main())
