"""Start a run, or go on with one: on this machine or through Slurm. Everything is checked before anything starts."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # started as a file: what is imported must come from beside it, and `launch` is a package
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if entry != str(here))]

from launch import checks, cluster, layout, local, program, runs, snapshot
from launch.layout import Layout, Wish

if TYPE_CHECKING:
    from dgt.config import Config

DEFAULT_GPUS_PER_NODE = 8


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
    result.add_argument("--cluster", choices=("auto", "local"), default="auto", help="auto: Slurm where there is one")
    result.add_argument("--nodes", type=int, metavar="N", help="number of nodes (default: 1)")
    result.add_argument("--gpus-per-node", type=int, metavar="M", help="one process per GPU (default: all)")
    result.add_argument("--processes-per-node", type=int, metavar="P", help="run on CPU with this many processes")
    result.add_argument(
        "--max-retries", type=int, metavar="R",
        help="crashes in a row without a new checkpoint after which a run is still started again (default: 0 on this "
        "machine)",
    )  # fmt: skip
    return result


def submit(options: argparse.Namespace) -> int:
    """Loads the configuration, checks everything, and hands the job to where it runs."""
    from dgt.config import load

    name = [f"name={options.name}"] if options.name else []
    config = load(options.config, [*options.overrides, *name])
    wish = Wish(options.cluster, options.nodes, options.gpus_per_node, options.processes_per_node, options.dry_run)
    where = layout.choose(wish, DEFAULT_GPUS_PER_NODE)
    checks.network(config)
    checks.batches(config, where.ranks)
    found = checks.problems(lambda: checks.samples(config), lambda: checks.output_folder(config))
    if found:
        return program.refuse("dgt-submit", *found)
    with runs.locked(config.run_dir) as lock:
        refuse_active(config.run_dir)
        return start_here(config, where, options.max_retries or 0, lock)


def refuse_active(run: Path) -> None:
    """Raises LaunchError where the run's last job still waits or runs in Slurm."""
    record = runs.read_record(run)
    if record is None or record.cluster != "slurm":
        return
    state = cluster.job_state(record.job)
    if state is not None:
        raise runs.LaunchError(
            f"the run {run.name} is active: Slurm job {record.job} is {state}. Wait for its end, cancel it with "
            f"`scancel {record.job}`, or choose another --name"
        )


def start_here(config: Config, where: Layout, max_retries: int, lock: int) -> int:
    """Runs the job on this machine to its end."""
    from dgt.config import to_yaml

    code = snapshot.take(config.run_dir, to_yaml(config))
    now = datetime.datetime.now()
    name = f"local-{now:%Y%m%d-%H%M%S}-{os.getpid()}"
    record = runs.JobRecord("local", name, 1, where.processes_per_node, str(code), now.isoformat(timespec="seconds"))
    runs.write_record(config.run_dir, record)
    local.say(f"run {config.run_dir}: {where}; curves: tensorboard --logdir {config.run_dir / 'tensorboard'}")
    command = (sys.executable, str(code.absolute() / "launch" / "train.py"), "--config", str(code / "config.yaml"))
    job = local.LocalJob(
        name, config.run_dir, command, where.processes_per_node, use_gpus=where.use_gpus, max_retries=max_retries
    )
    return local.run(job, lock)


if __name__ == "__main__":
    sys.exit(main())
