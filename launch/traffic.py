"""What a step moves and how long it must take: bytes between ranks and from storage, bounds from speeds.

Volumes are what one rank sends (and as much receives) in one optimizer step. Ring collectives over n ranks move
(n - 1) / n of a tensor for an all-gather or a reduce-scatter, twice that for an all-reduce (Patarasu and Yuan, J.
Parallel Distrib. Comput. 69, 2009). What the engines do of these: FSDP and ZeRO, arXiv 1910.02054, section 7.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dgt.config import Config
    from launch.layout import Layout
    from launch.profiles import Hardware

FLOAT32, HALF = 4, 2
"""Bytes of a number."""


@dataclass(frozen=True)
class Volume:
    """Bytes that one rank sends in a step."""

    within: float
    """To ranks of its own group: of its copy of the network (fsdp with shard_size), or else of all."""
    between: float = 0.0
    """To its counterparts in the other groups."""

    @property
    def total(self) -> float:
        """The sum."""
        return self.within + self.between


def volume(config: Config, parameters: int, ranks: int) -> Volume:
    """The bytes of a step; gradients travel in float32, gathered weights in the type they compute in."""
    engine, micro_batches = config.engine, config.steps.accumulation(ranks)
    once, part = FLOAT32 * parameters, (ranks - 1) / ranks
    if engine.name == "ddp":
        return Volume(2 * part * once)
    if engine.name == "deepspeed":
        if engine.deepspeed.stage < 3:  # gradients are scattered, updated weights gathered
            scatters = 1 if engine.deepspeed.stage == 1 else micro_batches
            return Volume((scatters + 1) * part * once)
        return Volume(3 * micro_batches * part * once)
    group = engine.fsdp.shard_size or ranks
    copies = ranks // group
    weights = parameters * (HALF if engine.precision in ("bf16", "fp16") else FLOAT32)
    gathers = micro_batches * (2 if engine.fsdp.reshard_after_forward else 1)
    within = (group - 1) / group * (gathers * weights + once)
    return Volume(within, 2 * (copies - 1) / copies * once / group)


def flops(config: Config, macs: int, samples: int) -> float:
    """Operations of one rank's step on `samples` images of `macs`: backward is twice forward, and what is recomputed.

    Full recomputation repeats the forward pass in every n-th block; selective repeats no products.
    """
    repeated = 1 / config.engine.activation_checkpointing_every
    passes = 3 + (repeated if config.engine.activation_checkpointing == "full" else 0)
    return 2 * passes * macs * samples


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step; None where a speed is unknown."""

    peak: float | None
    """Arithmetic at the GPU's peak."""
    stated: float | None
    """Arithmetic at the stated share of it."""
    exchange: float | None
    """Communication at full bandwidth."""
    reading: float | None
    """Shards, at the node's bandwidth."""

    @property
    def lower(self) -> float | None:
        """No step is faster: everything at its peak, and all at the same time."""
        known = [value for value in (self.peak, self.exchange, self.reading) if value is not None]
        return max(known) if self.peak is not None else None

    @property
    def upper(self) -> float | None:
        """Arithmetic at the stated share, with no communication behind it; reading goes on beside."""
        if self.stated is None or self.exchange is None:
            return None
        return max(self.stated + self.exchange, self.reading or 0.0)


def step_time(config: Config, layout: Layout, hardware: Hardware, macs: int | None, sent: Volume) -> StepTime:
    """Bounds for a step of `layout`, as far as the `hardware` is known."""
    tflops = hardware.peak(config.engine.precision)
    work = flops(config, macs, config.steps.share(layout.ranks)) if macs else None
    peak = work / (tflops * 1e12) if work and tflops else None
    stated = peak / hardware.reached_share if peak is not None else None
    rate = config.steps.share(layout.ranks) * layout.processes_per_node * hardware.image_kb * 1e3
    reading = rate / (hardware.read_gb_s * 1e9) if hardware.read_gb_s else None
    return StepTime(peak, stated, exchange_seconds(config, layout, hardware, sent), reading)


def exchange_seconds(config: Config, layout: Layout, hardware: Hardware, sent: Volume) -> float | None:
    """Seconds for `sent`; None where a bandwidth that it needs is unknown."""
    inside, across = hardware.intra_node_gb_s, hardware.inter_node_gb_s
    group = config.engine.fsdp.shard_size if config.engine.name == "fsdp" else 0
    stays = layout.nodes == 1 or 0 < group <= layout.processes_per_node
    seconds = 0.0
    for size, speed in (
        (sent.within, inside if stays else across),
        (sent.between, inside if layout.nodes == 1 else across),
    ):
        if size:
            seconds += size / (speed * 1e9) if speed else math.nan
    return None if math.isnan(seconds) else seconds
