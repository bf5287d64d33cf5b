"""What a dry run prints: everything that the job would be, in plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from launch.layout import Layout

if TYPE_CHECKING:
    from torch import nn

    from dgt.config import Config

WIDTH = 100


def describe(
    config: Config, layout: Layout, network: nn.Module, samples: int | None, job: str, warnings: Sequence[str]
) -> str:
    """The whole text. `samples`: size of the training split, None where unknown; `job`: what would be executed."""
    from dgt.config import to_yaml

    sections = [
        ("configuration", to_yaml(config).rstrip()),
        ("job", job.rstrip()),
        ("processes", table(processes(config, layout))),
        ("network", table(size(config, network))),
        ("memory of one rank (estimate)", table(memory(config, layout, network)) + "\n" + MEMORY_NOTE),
        ("length", table(length(config, samples))),
        ("checkpoints", table(checkpoints(config, network))),
        ("warnings", "\n".join(f"- {warning}" for warning in warnings) or "none"),
    ]
    return "\n\n".join(f"{f'== {title} ':=<{WIDTH}}\n{body}" for title, body in sections)


MEMORY_NOTE = """\
Weights, gradients, moments and average by their number; activations by passing one micro-batch forward and backward
as shapes without numbers, with the operations of the CPU. The CUDA context, NCCL and unused rests of the allocator
come on top, 1 to 2 GB as a rule."""


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
    from launch.memory import parameters

    side = config.data.largest_image_size
    rows = [("model", config.model.name), ("parameters", f"{parameters(network):,}")]
    if hasattr(network, "macs"):
        macs = network.macs(side, side)  # type: ignore[operator]
        rows.append((f"GMACs at {side} x {side}", f"{macs / 1e9:.3g}"))
    return rows


def memory(config: Config, layout: Layout, network: nn.Module) -> list[tuple[str, str]]:
    """The estimate, part by part."""
    from launch.memory import estimate

    found = estimate(config, network, layout.ranks)
    whole = config.engine.name == "ddp"
    rows = [
        ("weights" if whole else "weights (shard)", found.weights),
        ("gradients", found.gradients),
        ("AdamW moments", found.moments),
        ("EMA", found.average),
        ("casts of weights" if whole else "gathered weights", found.gathered),
        (f"activations (checkpointing: {config.engine.activation_checkpointing})", found.activations),
        ("images", found.inputs),
        ("sum", found.total),
    ]
    return [(name, gigabytes(value)) for name, value in rows]


def length(config: Config, samples: int | None) -> list[tuple[str, str]]:
    """Epochs and steps."""
    steps = config.steps
    rows = [("epochs", f"{steps.epochs}")]
    if samples is None:
        limit = f" (at most {steps.max_steps:,}, by steps.max_steps)" if steps.max_steps else ""
        return [*rows, ("training samples", "unknown, the data is not here"), ("steps", f"unknown{limit}")]
    per_epoch = samples // steps.global_batch_size
    total = steps.epochs * per_epoch
    rows += [
        ("training samples", f"{samples:,}"),
        ("steps per epoch", f"{per_epoch:,}"),
        ("steps", f"{min(total, steps.max_steps or total):,}"),
    ]
    return rows


def checkpoints(config: Config, network: nn.Module) -> list[tuple[str, str]]:
    """How large, how often, how many."""
    from launch.memory import checkpoint_bytes

    one, kept = checkpoint_bytes(config, network), config.checkpoint.keep_last + 1
    return [
        ("size of one", gigabytes(one)),
        ("every", f"{config.checkpoint.every_steps:,} steps, at a better evaluation, at an interruption, at the end"),
        ("kept", f"the last {config.checkpoint.keep_last} and the best, {gigabytes(kept * one)}"),
        ("folder", str(config.run_dir / "checkpoints")),
    ]


def gigabytes(value: int) -> str:
    """Bytes in words."""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
