"""The command line of `launch/submit.py`."""

from __future__ import annotations

import argparse

FROM_COMMAND_LINE = (
    "partition", "account", "qos", "constraint", "exclude", "reservation", "mem", "time", "cpus_per_task",
    "signal_lead", "max_retries", "mail", "container", "after",
)  # fmt: skip
"""Options that go before what the profile says."""

TRAINING_ONLY = ("config", "name", "nodes", "gpus_per_node", "processes_per_node", "sweep", "wait", "signal_lead")
"""Options that say nothing to a preparation of data."""

EXAMPLES = """\
examples:
  launch/submit.py --nodes 8 --config configs/dgt_b_in1k.yaml --dry-run
  launch/submit.py --nodes 8 --config configs/dgt_b_in1k.yaml --partition gpu --time 12:00:00 --wait
  launch/submit.py --config configs/dgt_t_in1k.yaml --sweep optimizer.lr=5e-4,1e-3 --sweep seed=0,1
  launch/submit.py --prepare --parts 16 --partition cpu -- imagenet --src /raw --out /data/in1k
"""


def parser() -> argparse.ArgumentParser:
    """All options."""
    result = argparse.ArgumentParser(
        prog="dgt-submit",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Start a training run on this machine or through Slurm. Naming a run that has ended goes on from\n"
        "its newest checkpoint; naming an active one is refused.",
        epilog=EXAMPLES,
    )
    result.add_argument("--config", metavar="FILE", help="configuration, YAML")
    result.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="such as steps.epochs=10; with --prepare, the converter's line",
    )
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
        help="attempts in a row without a new checkpoint after which a run is still started again (default: 0 here, "
        "the profile's in Slurm)",
    )  # fmt: skip
    result.add_argument(
        "--sweep", "--array", action="append", default=[], metavar="key=a,b,c",
        help="one run per value, named after it; given twice, one per combination",
    )  # fmt: skip
    result.add_argument(
        "--wait", action="store_true", help="follow the job to its end; the exit status says whether it is complete"
    )
    add_slurm(result)
    add_prepare(result)
    return result


def add_slurm(result: argparse.ArgumentParser) -> None:
    """What a cluster is asked for."""
    slurm = result.add_argument_group("Slurm", "each goes before what the profile says")
    slurm.add_argument(
        "--profile",
        metavar="NAME",
        help="slurm/profiles/NAME.yaml, or a path (default: the one that knows this cluster)",
    )
    for option in ("partition", "account", "qos", "constraint", "exclude", "reservation", "mem"):
        slurm.add_argument(f"--{option}", help="as of sbatch")
    slurm.add_argument("--time", help="limit of one attempt, as of sbatch; the run goes on after it")
    slurm.add_argument("--cpus-per-task", type=int, metavar="N", help="CPU cores of one process")
    slurm.add_argument(
        "--signal-lead", type=int, metavar="S",
        help="seconds before the limit at which ranks save (default: a minute and what its saves took; at first 120)",
    )  # fmt: skip
    slurm.add_argument(
        "--after", action="append", metavar="JOBID", help="start when this job has ended well; may be given again"
    )
    slurm.add_argument("--mail", metavar="ADDRESS", help="tell this address of the end, a failure, a requeue")
    slurm.add_argument("--container", metavar="IMAGE", help="run the ranks in this image, as the profile says how")


def add_prepare(result: argparse.ArgumentParser) -> None:
    """Preparing data as a job array."""
    prepare = result.add_argument_group("data preparation", "shards from images, on many nodes")
    prepare.add_argument(
        "--prepare", action="store_true",
        help="run a converter of data_pipeline.prepare as a job array and merge its parts; its command line follows --",
    )  # fmt: skip
    prepare.add_argument("--parts", type=int, default=8, metavar="N", help="jobs that share the work (default: 8)")
