"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then half a cosine."""

    warmup_epochs: float = 20.0
    """Epochs over which the learning rate climbs from `warmup_lr` to `optimizer.lr`."""
    warmup_lr: float = 1e-6
    """Learning rate of step 0 (where there is a warm-up)."""
    min_lr: float = 1e-5
    """Learning rate at the end of the last epoch."""

    def __post_init__(self) -> None:
        for name in ("warmup_epochs", "warmup_lr", "min_lr"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative, got {getattr(self, name)}")


def learning_rate(step: int, *, peak: float, total_steps: int, warmup_steps: int, config: ScheduleConfig) -> float:
    """Learning rate of optimizer step `step` in [0, total_steps).

    Linear from `warmup_lr` at step 0 to `peak` at step `warmup_steps`, then
    min_lr + (peak - min_lr) (1 + cos(pi t)) / 2 with t running from 0 there to 1 at `total_steps`
    (Loshchilov and Hutter, SGDR, eq. 5, without restarts).
    """
    if step < warmup_steps:
        return config.warmup_lr + (peak - config.warmup_lr) * step / warmup_steps
    t = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return config.min_lr + (peak - config.min_lr) * 0.5 * (1.0 + math.cos(math.pi * t))
