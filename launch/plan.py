"""What a run will need, before it is started: memory, time, traffic, checkpoints. docs/planning.md explains it.

As a program it prints the plan of a configuration on a cluster, the memory of every engine and precision, and what to
expect on 1 to 4,096 nodes; `launch/submit.py --dry-run` prints the first of these beside the job.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # started as a file: what is imported must come from beside it, and `launch` is a package
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if entry != str(here))]

from launch import checks, goodput, profiles, program, traffic
from launch.layout import Layout
from launch.profiles import Profile
from launch.wording import UNKNOWN, gigabytes, grid, seconds, table

if TYPE_CHECKING:
    from torch import nn

    from dgt.config import Config
    from dgt.training.parallel import EngineConfig

WIDTH = 100
LONGEST_RUN = 30 * 86400.0
"""Seconds of the runs that are simulated, and the longest time between checkpoints that is recommended."""


@dataclass(frozen=True)
class Plan:
    """What is planned."""

    config: Config
    layout: Layout
    profile: Profile
    network: nn.Module
    """Without memory for its weights."""

    @property
    def macs(self) -> int | None:
        """As the function of this name."""
        return macs(self.config, self.network)

    @property
    def sent(self) -> traffic.Volume:
        """What a rank sends in a step."""
        trained = parameters(self.network, only_trained=True)
        return traffic.volume(self.config, parameters(self.network), self.layout.ranks, trained)

    def step_time(self) -> traffic.StepTime:
        """Bounds of a step."""
        return traffic.step_time(self.config, self.layout, self.profile.hardware, self.macs, self.sent)


def parameters(network: nn.Module, only_trained: bool = False) -> int:
    """Number of weights, or of those that are not frozen."""
    from launch import memory

    return memory.parameters(network, only_trained)


def macs(config: Config, network: nn.Module) -> int | None:
    """Multiply-accumulates of one of the largest images; None where the network does not say."""
    from dgt.tasks import build_task

    return build_task(config.task, config.model, config.data).macs(network, *traffic.image_size(config))


def describe(plan: Plan, samples: int | None, job: str, warnings: Sequence[str]) -> str:
    """What a dry run prints. `samples`: size of the training split, None: unknown; `job`: what would be started."""
    from dgt.config import to_yaml

    config = plan.config
    return in_words(
        [
            ("configuration", to_yaml(config).rstrip()),
            ("job", job.rstrip()),
            *needs(plan),
            ("length", table(length(config, samples))),
            ("checkpoints", table(checkpoints(config, plan.network))),
            ("warnings", "\n".join(f"- {warning}" for warning in warnings) or "none"),
        ]
    )


def needs(plan: Plan) -> Iterator[tuple[str, str]]:
    """The sections that are the same for a dry run and for the program."""
    yield "processes", table(processes(plan.config, plan.layout))
    yield "network", table(size(plan.config, plan.network))
    yield "memory of one rank (estimate)", table(memory(plan.config, plan.layout, plan.network)) + "\n" + MEMORY_NOTE
    yield "a step (bounds)", table(step(plan)) + "\n" + STEP_NOTE


def in_words(sections: Sequence[tuple[str, str]]) -> str:
    """Titles and bodies as one text."""
    return "\n\n".join(f"{f'== {title} ':=<{WIDTH}}\n{body}" for title, body in sections)


MEMORY_NOTE = """\
Found by taking one optimizer step with shapes without numbers, with the operations of the CPU. The CUDA context, NCCL
and unused rests of the allocator come on top, 1 to 2 GB as a rule."""

STEP_NOTE = """\
Bounds from the profile's hardware section, not measurements: at least the longest of arithmetic at the GPU's peak,
communication and reading; about at most arithmetic at the stated share of the peak, and communication after it."""


def processes(config: Config, layout: Layout) -> list[tuple[str, str]]:
    """Who computes what."""
    steps, ranks = config.steps, layout.ranks
    accumulation, share = steps.accumulation(ranks), steps.share(ranks)
    micro = min(steps.micro_batch_size, share)
    last = share - (accumulation - 1) * micro
    cut = f"{accumulation} x {micro}" if last == micro else f"{accumulation - 1} x {micro} + {last}"
    return [
        ("where", layout.cluster),
        ("layout", f"{layout} = {ranks} ranks" if ranks > 1 else f"{layout}"),
        ("engine", f"{config.engine.name}, {config.engine.precision}"),
        ("global batch", f"{steps.global_batch_size} = {ranks} ranks x {share} samples"),
        ("a rank's share", f"{share} = {cut} (micro-batches, accumulated)"),
    ]


def size(config: Config, network: nn.Module) -> list[tuple[str, str]]:
    """Parameters and arithmetic."""
    height, width = traffic.image_size(config)
    count, trained = parameters(network), parameters(network, only_trained=True)
    frozen = f", {count - trained:,} of them frozen" if trained < count else ""
    rows = [("model", config.model.name), ("parameters", f"{count:,}{frozen}")]
    if counted := macs(config, network):
        rows.append((f"GMACs at {height} x {width}", f"{counted / 1e9:.3g}"))
    return rows


def memory(config: Config, layout: Layout, network: nn.Module) -> list[tuple[str, str]]:
    """The estimate, part by part."""
    from launch.memory import UnplannedError, estimate, state_bytes

    try:
        found = estimate(config, network, layout.ranks)
    except UnplannedError as error:
        state = ("weights, gradients, moments, EMA", f"{gigabytes(state_bytes(config, network))}, uncut")
        return [state, ("the rest", str(error))]
    rows = [
        ("weights", found.weights),
        ("gradients", found.gradients),
        (f"moments ({config.optimizer.name})", found.moments),
        ("EMA", found.average),
        (f"buffers of {config.engine.name}", found.buffers),
        (f"activations (checkpointing: {config.engine.activation_checkpointing})", found.activations),
        ("images", found.inputs),
        *([("teacher", found.teacher)] if found.teacher else []),
        ("sum", found.total),
        *([("in host memory, beside it", found.host)] if found.host else []),
    ]
    return [(name, gigabytes(value)) for name, value in rows]


def step(plan: Plan) -> list[tuple[str, str]]:
    """What one step computes, sends and reads, and how long it takes at least and about at most."""
    config, layout, hardware = plan.config, plan.layout, plan.profile.hardware
    sent, times = plan.sent, plan.step_time()
    share = config.steps.share(layout.ranks)
    work = f"{traffic.flops(config, plan.macs, share) / 1e12:.3g} Tflop" if plan.macs else UNKNOWN
    rows = [
        ("arithmetic of a rank", f"{work}; at peak {seconds(times.peak)}, at {hardware.reached_share:g} of it "
         f"{seconds(times.stated)}"),
        ("sent by a rank", f"{gigabytes(round(sent.total))}; {seconds(times.exchange)}"),
        ("read by a node", f"{gigabytes(round(node_bytes(plan)))}; "
         + ("from its own disk, once fetched" if traffic.is_cached(config) else seconds(times.reading))),
        ("a step takes", f"{seconds(times.lower)} to {seconds(times.upper)}"),
    ]  # fmt: skip
    if times.lower and times.upper:
        size = config.steps.global_batch_size
        rows.append(("images/s", f"{size / times.upper:,.0f} to {size / times.lower:,.0f}"))
        needed = [gigabytes(round(node_bytes(plan) / t)) for t in (times.upper, times.lower)]
        rows.append(("shards/s of a node", f"{needed[0]} to {needed[1]} ({hardware.image_kb:g} kB an image)"))
    missing = [f"hardware.{name}" for name in unknown(plan)]
    return [*rows, ("not in the profile", ", ".join(missing))] if missing else rows


def node_bytes(plan: Plan) -> float:
    """Bytes of encoded images that a node reads in a step."""
    share = plan.config.steps.share(plan.layout.ranks)
    return share * plan.layout.processes_per_node * plan.profile.hardware.image_kb * 1e3


def unknown(plan: Plan) -> list[str]:
    """Fields of the hardware that bounds and goodput need and the profile does not give."""
    hardware = plan.profile.hardware
    names = ["intra_node_gb_s", "inter_node_gb_s", "host_copy_gb_s", "read_gb_s", "write_gb_s", "node_mtbf_hours"]
    absent = [name for name in [*names, "restart_seconds"] if getattr(hardware, name) is None]
    return (["gpu"] if hardware.peak(plan.config.engine.precision) is None else []) + absent


def length(config: Config, samples: int | None) -> list[tuple[str, str]]:
    """Epochs and steps."""
    steps = config.steps
    if samples is None:
        limit = f" (at most {steps.max_steps:,}, by steps.max_steps)" if steps.max_steps else ""
        known = min(steps.total_steps, steps.max_steps or steps.total_steps)
        return [
            ("epochs", UNKNOWN if steps.total_steps else f"{steps.epochs}"),
            ("training samples", f"{UNKNOWN}, the data is not here"),
            ("steps", f"{known:,}" if known else f"{UNKNOWN}{limit}"),
        ]
    per_epoch = samples // steps.global_batch_size
    total = steps.scheduled(per_epoch)
    return [
        ("epochs", f"{total / max(per_epoch, 1):.1f}" if steps.total_steps else f"{steps.epochs}"),
        ("training samples", f"{samples:,}"),
        ("steps per epoch", f"{per_epoch:,}"),
        ("steps", f"{min(total, steps.max_steps or total):,}"),
    ]


def checkpoints(config: Config, network: nn.Module) -> list[tuple[str, str]]:
    """How large, how often, how many."""
    from launch.memory import checkpoint_bytes

    one, kept = checkpoint_bytes(config, network), config.checkpoint.keep_last + 1
    forever = config.checkpoint.keep_every_steps
    return [
        ("size of one", f"{gigabytes(one)} (float32 weights, moments{', EMA' if config.ema.enabled else ''})"),
        ("every", f"{config.checkpoint.every_steps:,} steps, at a better evaluation, at an interruption, at the end"),
        ("kept", f"the last {config.checkpoint.keep_last} and the best"),
        ("disk", f"{gigabytes((kept + 1) * one)}, one that is being written included"
         + (f", and {gigabytes(one)} for every {forever:,} steps" if forever else "")),
        ("folder", str(config.run_dir / "checkpoints")),
    ]  # fmt: skip


def modes(plan: Plan) -> str:
    """Memory of a rank for every engine, precision and kind of recomputation, as a table."""
    from dgt.training.optim import NEEDS_WHOLE_TENSORS
    from launch import memory

    config, network, ranks = plan.config, plan.network, plan.layout.ranks
    found: list[tuple[str, EngineConfig, memory.Memory]] = []
    stages = () if config.optimizer.name in NEEDS_WHOLE_TENSORS else (1, 2, 3)
    names = ("ddp",) if ranks % (config.engine.fsdp.shard_size or 1) else ("ddp", "fsdp")
    kinds = ("none", "selective", "full") if hasattr(network, "set_grad_checkpointing") else ("none",)
    for precision, kind, name in itertools.product(("fp32", "bf16"), kinds, names):
        changes: dict[str, Any] = {"name": name, "precision": precision, "activation_checkpointing": kind}
        engine = replace(config.engine, **changes)
        try:
            one = memory.estimate(replace(config, engine=engine), network, ranks)
        except memory.UnplannedError as error:
            return str(error)
        found.append((name, engine, one))
        for stage in stages if name == "ddp" else ():  # what operations make is the same there
            cut: dict[str, Any] = {"stage": stage}
            staged = replace(engine, deepspeed=replace(engine.deepspeed, **cut))
            zero = memory.zero(replace(config, engine=staged), network, ranks, one)
            found.append((f"ZeRO {stage}", staged, zero))
    parts = {"weights": "weights", "gradients": "gradients", "moments": "moments", "average": "EMA",
             "buffers": "buffers", "activations": "activations", "teacher": "teacher", "total": "sum",
             "host": "host"}  # fmt: skip
    shown = [part for part in parts if part not in ("teacher", "host") or any(getattr(m, part) for *_, m in found)]
    rows = [("engine", "precision", "checkpointing", *(parts[part] for part in shown))]
    for label, engine, one in found:
        numbers = (f"{getattr(one, part) / 1e9:.2f}" for part in shown)
        rows.append((label, engine.precision, engine.activation_checkpointing, *numbers))
    return grid(rows) + "\nGB (10^9 bytes) of one rank. ZeRO's are computed from the paper's formulas, not measured."


def scale(plan: Plan, runs: int = 200, seed: int = 0) -> str:
    """Recommended checkpoint interval and expected goodput on 1 to 4,096 nodes, as a table; an estimate."""
    found = cluster(plan)
    step_seconds = plan.step_time().upper
    if isinstance(found, str) or step_seconds is None:
        return str(found)
    rows = [
        ("nodes", "GPUs", "MTBF h", "stall s", "every min", "steps", "Young min", "goodput", "+-", "5 to 95 %", "input")
    ]
    for row in goodput.at_scale(found, LONGEST_RUN, runs=runs, seed=seed):
        faults, good = found.faults(row.nodes), row.goodput
        rows.append((
            f"{row.nodes:,}", f"{row.nodes * plan.layout.processes_per_node:,}",
            f"{1 / faults.failure_rate / 3600:,.1f}", f"{faults.stall:.2g}", f"{row.interval / 60:,.1f}",
            f"{max(1, round(row.interval / step_seconds)):,}", f"{row.young / 60:,.1f}", f"{good.mean:.4f}",
            f"{goodput.Z95 * good.error:.4f}", f"{good.low:.3f} to {good.high:.3f}", f"{row.input_share:.2f}",
        ))  # fmt: skip
    return grid(rows) + "\n" + SCALE_NOTE.format(runs=runs, step=seconds(step_seconds))


SCALE_NOTE = """\
An estimate: {runs} simulated runs of 30 days a row, each rank with the work of this plan ({step} a step, so the
global batch grows with the nodes), the profile's node MTBF, restart and storage. +- holds the mean with 95 %; "input"
is the share of the speed that the storage can feed, by which goodput is multiplied."""


def cluster(plan: Plan) -> goodput.Cluster | str:
    """What goodput depends on, or which of it is not in the profile."""
    from launch.memory import checkpoint_bytes

    hardware, upper = plan.profile.hardware, plan.step_time().upper
    copy, write, mtbf, restart = (
        hardware.host_copy_gb_s, hardware.write_gb_s, hardware.node_mtbf_hours, hardware.restart_seconds,
    )  # fmt: skip
    if upper is None or copy is None or write is None or mtbf is None or restart is None:
        return f"unknown: the profile does not say {', '.join(f'hardware.{name}' for name in unknown(plan))}"
    return goodput.Cluster(
        node_mtbf=mtbf * 3600,
        checkpoint=checkpoint_bytes(plan.config, plan.network),
        copy_per_node=copy * 1e9 * plan.layout.processes_per_node,
        write_per_node=write * 1e9,
        restart=restart,
        bytes_per_node=0.0 if traffic.is_cached(plan.config) else node_bytes(plan) / upper,
        read_per_node=hardware.read_gb_s * 1e9 if hardware.read_gb_s else None,
        storage=hardware.storage_gb_s * 1e9 if hardware.storage_gb_s else None,
        asynchronous=plan.config.checkpoint.asynchronous,
    )


def parser() -> argparse.ArgumentParser:
    """All options."""
    result = argparse.ArgumentParser(prog="dgt-plan", description=__doc__.splitlines()[0] if __doc__ else None)
    result.add_argument("--config", required=True, metavar="FILE", help="configuration, YAML")
    result.add_argument("overrides", nargs="*", metavar="key=value", help="such as steps.micro_batch_size=256")
    result.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes (default: %(default)s)")
    result.add_argument("--gpus-per-node", type=int, metavar="M", help="default: the profile's")
    result.add_argument(
        "--profile", metavar="NAME", help="slurm/profiles/NAME.yaml, or a path (default: this cluster's)"
    )
    result.add_argument("--modes", action="store_true", help="also the memory of every engine and precision")
    result.add_argument("--seed", type=int, default=0, help="of the simulated failures (default: %(default)s)")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the plan; returns the exit status."""
    chosen = parser().parse_intermixed_args(argv)
    return program.guarded("dgt-plan", lambda: show(chosen))


def show(chosen: argparse.Namespace) -> int:
    """Makes the plan and prints it, section by section."""
    plan = planned(chosen)
    sections = [*needs(plan), ("checkpoints", table(checkpoints(plan.config, plan.network)))]
    if chosen.modes:
        sections.append(("memory of one rank, every mode (estimate)", modes(plan)))
    sections.append(("goodput on 1 to 4,096 nodes (estimate)", scale(plan, seed=chosen.seed)))
    print(in_words(sections))
    return 0


def planned(chosen: argparse.Namespace) -> Plan:
    """What the command line asks for. Raises LaunchError or ConfigError for what cannot be planned."""
    from dgt.config import load
    from launch.runs import LaunchError

    for option in ("nodes", "gpus_per_node"):
        value = getattr(chosen, option)
        if value is not None and value < 1:
            raise LaunchError(f"--{option.replace('_', '-')} must be at least 1, got {value}")
    profile = profiles.load(chosen.profile, {}, ask_slurm=False)
    layout = Layout("slurm", chosen.nodes, chosen.gpus_per_node or profile.gpus_per_node, use_gpus=True)
    config = load(chosen.config, chosen.overrides)
    network = checks.network(config)
    checks.batches(config, layout.ranks)
    checks.engine(config, network, layout.ranks)
    checks.teacher(config)
    return Plan(config, layout, profile, network)


if __name__ == "__main__":
    sys.exit(main())
