"""What can be chosen about an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dgt.training.parallel.precision import LossScaleConfig


@dataclass(frozen=True)
class FsdpConfig:
    """How `engine.name: fsdp` cuts the network; the other engines do not read it."""

    shard_size: int = 0
    """Ranks that share one copy of the network; 0 = all. With fewer, groups of that many hold a copy each (hybrid
    sharding): weights then travel within a group only, best within a node, and gradients between groups."""
    reshard_after_forward: bool = True
    """Free a block's whole weights after its forward pass and gather them again for the backward one; false = keep
    them, for more memory and less communication."""
    cpu_offload: bool = False
    """Keep the shards of weights, gradients and moments in host memory, and update them there."""

    def __post_init__(self) -> None:
        if self.shard_size < 0:
            raise ValueError(f"shard_size: must not be negative, got {self.shard_size}")


@dataclass(frozen=True)
class DeepSpeedConfig:
    """How `engine.name: deepspeed` cuts the training state; the other engines do not read it."""

    stage: Literal[1, 2, 3] = 2
    """What each rank holds a part of only. 1: the optimizer's state; 2: the gradients, too; 3: the weights, too."""
    offload: Literal["none", "cpu"] = "none"
    """"cpu": master weights and moments live in host memory and are updated there."""
    settings: dict[str, Any] = field(default_factory=dict)
    """DeepSpeed's own settings, laid over those made from this configuration: bucket sizes, overlap, thresholds of
    stage 3, and what it tells (`OPEN` in dgt/training/parallel/config.py); nothing that changes what is computed."""

    def __post_init__(self) -> None:
        if taken := not_open(self.settings):
            raise ValueError(
                f"settings: {', '.join(taken)} cannot be given to DeepSpeed; what this configuration decides is set in "
                "steps, optimizer, schedule and engine, and dgt/training/parallel/config.py lists what is left (OPEN)"
            )


OPEN = {
    "zero_optimization": {
        "contiguous_gradients": None,
        "reduce_scatter": None,
        "reduce_bucket_size": None,
        "use_multi_rank_bucket_allreduce": None,
        "allgather_partitions": None,
        "allgather_bucket_size": None,
        "overlap_comm": None,
        "sub_group_size": None,
        "stage3_prefetch_bucket_size": None,
        "stage3_param_persistence_threshold": None,
        "stage3_model_persistence_threshold": None,
        "stage3_max_live_parameters": None,
        "stage3_max_reuse_distance": None,
        "stage3_module_granularity_threshold": None,
        "stage3_use_all_reduce_for_fetch_params": None,
        "stage3_allgather_sequential": None,
        "offload_optimizer": {"pin_memory": None},
        "log_trace_cache_warnings": None,
        "enable_sanity_checks": None,
    },
    "wall_clock_breakdown": None,
    "memory_breakdown": None,
    "comms_logger": None,
    "flops_profiler": None,
    "dump_state": None,
}
"""Keys of DeepSpeed's configuration that may be given. They say when data travels and what is told about it; the others
repeat what this configuration decides, or change the numbers (precision of what travels, quantisation), where the state
lies, or how ranks are counted."""


def not_open(settings: Mapping[str, Any], allowed: Mapping[str, Any] = OPEN, prefix: str = "") -> list[str]:
    """Dotted names of the `settings` that are not the user's to give."""
    found = []
    for key, value in settings.items():
        below = allowed.get(key)
        if key not in allowed or (below is not None and not isinstance(value, Mapping)):
            found.append(prefix + key)
        elif below is not None:
            found += not_open(value, below, f"{prefix}{key}.")
    return found


@dataclass(frozen=True)
class EngineConfig:
    """How the network is spread over the ranks and in which precision it computes.

    Images are channels-last under every engine; ddp and evaluation programs keep the weights of convolutions so, too.
    """

    name: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    """"ddp": every rank holds the whole network; "fsdp": each holds a shard of it (FSDP2, block by block);
    "deepspeed": ZeRO, needs the extra dgt[deepspeed]."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "bf16"
    """"bf16", "fp16": arithmetic in 16 bits, float32 weights, gradients reduced in float32; under ddp and deepspeed
    norms and sums of branches stay float32 (autocast), under fsdp they are of 16 bits too. fp16 scales the loss.
    "fp32": float32 everywhere; "tf32": the same, with TF32 in a GPU's products and convolutions."""
    loss_scale: LossScaleConfig = field(default_factory=LossScaleConfig)
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What a block recomputes in the backward pass; the grouping is kept in any case, never recomputed."""
    activation_checkpointing_every: int = 1
    """Recompute in every this manieth block only: 2 = every other one."""
    compile: bool = False
    """Compile each block with torch.compile; the first steps take minutes, for each size of training images. Dense
    tasks evaluate uncompiled. Needs a C++ compiler on CPUs."""
    apex_layer_norm: bool = False
    """Replace LayerNorm in the blocks by apex's FusedLayerNorm, where apex is installed."""
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    collect_garbage_every: int = 1000
    """Python's garbage collector runs on all ranks after every this many steps, and at no other time: ranks that stop
    for it at different moments wait for each other. 0 = leave it to Python."""
    threads: int = 0
    """CPU threads of one rank's arithmetic; 0 = its share of the cores that it may use."""
    deterministic: bool = False
    """On GPUs: only operations that repeat bit for bit, at some cost of speed. On CPUs all of them do anyway."""

    def __post_init__(self) -> None:
        for name in ("threads", "collect_garbage_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative, got {getattr(self, name)}")
        if self.activation_checkpointing_every < 1:
            raise ValueError(
                f"activation_checkpointing_every: must be at least 1, got {self.activation_checkpointing_every}"
            )
