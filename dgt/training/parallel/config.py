"""What can be chosen about an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EngineConfig:
    """How the network is spread over the ranks and in which precision it computes."""

    name: Literal["ddp", "fsdp"] = "ddp"
    """"ddp": every rank holds the whole network; "fsdp": each holds a shard of it (FSDP2, block by block)."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """"bf16": bfloat16 arithmetic, float32 weights, gradients reduced in float32; under ddp norms and sums of branches
    stay float32 (autocast), under fsdp they are bfloat16 too. "fp32": float32, with torch's default of TF32 in a GPU's
    convolutions."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What a block recomputes in the backward pass; the grouping is kept in any case, never recomputed."""
    threads: int = 0
    """CPU threads of one rank's arithmetic; 0 = its share of the cores that it may use."""
    deterministic: bool = False
    """On GPUs: only operations that repeat bit for bit, at some cost of speed. On CPUs all of them do anyway."""

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ValueError(f"threads: must not be negative, got {self.threads}")
