"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then a decay."""

    decay: Literal["cosine", "polynomial", "steps"] = "cosine"
    """"cosine": half a cosine down to `min_lr`; "polynomial": down to it with the remaining share to `power`; "steps":
    times `gamma` at each of the `milestones`, never below `min_lr`."""
    warmup_epochs: float = 20.0
    """Epochs over which the learning rate climbs from `warmup_lr` to `optimizer.lr`."""
    warmup_steps: int = 0
    """The same in optimizer steps; above 0 it takes the place of `warmup_epochs`."""
    warmup_lr: float = 1e-6
    """Learning rate of step 0 (where there is a warm-up)."""
    min_lr: float = 1e-5
    """Learning rate at the end of the schedule."""
    power: float = 1.0
    """Exponent of "polynomial"; 1 = a straight line."""
    milestones: tuple[float, ...] = ()
    """Of "steps": epochs after which the learning rate falls."""
    gamma: float = 0.1
    """Of "steps": the factor."""

    def __post_init__(self) -> None:
        for name in ("warmup_epochs", "warmup_steps", "warmup_lr", "min_lr"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative, got {getattr(self, name)}")
        if not self.power > 0:
            raise ValueError(f"power: must be above 0, got {self.power}")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma: must lie in (0, 1], got {self.gamma}")
        if list(self.milestones) != sorted(set(self.milestones)) or any(epoch <= 0 for epoch in self.milestones):
            raise ValueError(f"milestones: must be epochs above 0 that rise, got {list(self.milestones)}")
        if bool(self.milestones) != (self.decay == "steps"):
            raise ValueError("milestones: are for decay: steps, which needs at least one")


def learning_rate(step: int, *, peak: float, total_steps: int, steps_per_epoch: int, config: ScheduleConfig) -> float:
    """Learning rate of optimizer step `step` in [0, total_steps).

    Linear from `warmup_lr` at step 0 to `peak` at the end of the warm-up, then, with t running from 0 there to 1 at
    `total_steps`, min_lr + (peak - min_lr) (1 + cos(pi t)) / 2 (Loshchilov and Hutter, SGDR, eq. 5, without restarts)
    or min_lr + (peak - min_lr) (1 - t)^power; or peak gamma^m after the m-th milestone.
    """
    warmup = config.warmup_steps or round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.warmup_lr + (peak - config.warmup_lr) * step / warmup
    if config.decay == "steps":
        passed = sum(step >= round(epoch * steps_per_epoch) for epoch in config.milestones)
        return max(peak * config.gamma**passed, config.min_lr)
    t = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    share = (1 - t) ** config.power if config.decay == "polynomial" else 0.5 * (1.0 + math.cos(math.pi * t))
    return config.min_lr + (peak - config.min_lr) * share
