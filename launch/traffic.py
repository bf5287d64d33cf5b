"""What a step moves and how long it must take: bytes between ranks and from storage, bounds from speeds.

Volumes are what one rank sends (and as much receives) in one optimizer step. Ring collectives over n ranks move
(n - 1) / n of a tensor for an all-gather or a reduce-scatter, twice that for an all-reduce (Patarasu and Yuan, J.
Parallel Distrib. Comput. 69, 2009). What the engines do of these: FSDP and ZeRO, arXiv 1910.02054, section 7; but
DeepSpeed (0.19) averages the gradients of ZeRO 1 and 2 by all-reduces, which are twice the paper's scatter.
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


def volume(config: Config, parameters: int, ranks: int, trained: int | None = None) -> Volume:
    """The bytes of a step; gradients travel in float32, gathered weights in the type they compute in.

    `trained`: how many of the `parameters` are not frozen, and have gradients; None: all.
    """
    engine, micro_batches = config.engine, config.steps.accumulation(ranks)
    gradients = FLOAT32 * (parameters if trained is None else trained)
    part = (ranks - 1) / ranks
    if engine.name == "ddp":
        return Volume(2 * part * gradients)
    if engine.name == "deepspeed":
        return Volume(part * zero_volume(config, gradients, FLOAT32 * parameters, micro_batches))
    group = engine.fsdp.shard_size or ranks
    copies = ranks // group
    weights = parameters * (HALF if engine.precision in ("bf16", "fp16") else FLOAT32)
    gathers = micro_batches * (2 if engine.fsdp.reshard_after_forward else 1)
    within = (group - 1) / group * (gathers * weights + gradients)
    return Volume(within, 2 * (copies - 1) / copies * gradients / group)


def zero_volume(config: Config, gradients: int, weights: int, micro_batches: int) -> int:
    """What a rank of very many sends under ZeRO, for `gradients` and `weights` of so many bytes.

    Stages 1 and 2 gather the weights that were updated; frozen ones are whole everywhere. Stage 3 gathers all, twice.
    """
    options = config.engine.deepspeed
    if options.stage == 3:
        return micro_batches * (2 * weights + gradients)
    zero = options.settings.get("zero_optimization", {})
    to_one_rank = zero.get("reduce_scatter", True) and not zero.get("use_multi_rank_bucket_allreduce", True)
    reductions = 1 if options.stage == 1 else micro_batches
    return ((1 if to_one_rank else 2) * reductions + 1) * gradients


def largest_image_size(config: Config) -> tuple[int, int]:
    """Height and width that no batch of training exceeds, in pixels: what memory must suffice for.

    In detection, where upright and wide images may come together, more than `image_size`.
    """
    from data_pipeline.aspect_order import largest_canvas

    return largest_canvas(config.data.detection) if config.task.name == "detection" else image_size(config)


def image_size(config: Config) -> tuple[int, int]:
    """Height and width of the largest images that are trained on, in pixels; in detection of landscape ones."""
    from dgt.tasks import build_task

    task = build_task(config.task, config.model, config.data)
    changes = [first for first, _ in config.data.image_size_schedule]
    # How many epochs a number of steps makes depends on the data, which need not be here.
    epochs = [epoch for epoch in changes if config.steps.total_steps or epoch < config.steps.epochs]
    return max((task.train_size(epoch) for epoch in epochs or [0]), key=math.prod)


def is_cached(config: Config) -> bool:
    """Whether shards come from a node's own disk once they have been fetched, which is so for all remote data."""
    return config.data.backend == "webdataset" and "://" in config.data.path


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
    """Shards, at the node's bandwidth; None, too, where they come from its own disk."""

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
    size = config.steps.share(layout.ranks) * layout.processes_per_node * hardware.image_kb * 1e3
    shared = hardware.read_gb_s and not is_cached(config)
    reading = size / (hardware.read_gb_s * 1e9) if shared and hardware.read_gb_s else None
    return StepTime(peak, stated, exchange_seconds(config, layout, hardware, sent), reading)


def exchange_seconds(config: Config, layout: Layout, hardware: Hardware, sent: Volume) -> float | None:
    """Seconds for `sent`; None where a bandwidth that it needs is unknown.

    A ring through several nodes visits each of them once, so that a node sends as much as a rank, by all its adapters.
    A group's counterparts in the other groups form as many rings as the group has ranks in a node, and share them.
    """
    here = layout.processes_per_node
    group = (config.engine.fsdp.shard_size if config.engine.name == "fsdp" else 0) or layout.ranks
    in_node = min(group, here)
    stays = layout.nodes == 1 or (group <= here and here % group == 0)
    within = ring_speed(hardware, here, in_node, 0 if stays else 1)
    between = ring_speed(hardware, here, -(-here // in_node), 0 if layout.nodes == 1 else in_node)
    seconds = 0.0
    for size, speed in ((sent.within, within), (sent.between, between)):
        if size:
            seconds += size / (speed * 1e9) if speed else math.nan
    return None if math.isnan(seconds) else seconds


def ring_speed(hardware: Hardware, processes: int, members: int, crossing: int) -> float | None:
    """10^9 bytes/s of a rank in a ring with so many `members` in each node; None where it is unknown.

    `crossing`: how many such rings leave a node and share the adapters of its `processes`; 0: this one stays inside.
    """
    inside, across = hardware.intra_node_gb_s, hardware.inter_node_gb_s
    if not crossing:
        return inside
    if across is None:
        return None
    shared = across * processes / crossing
    if members == 1:
        return shared
    return None if inside is None else min(inside, shared)
