"""Bad steps: what counts as one, and when to go back to a checkpoint."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from dgt.training.state import Progress


@dataclass(frozen=True)
class GuardConfig:
    """What is done when training goes wrong."""

    max_bad_in_a_row: int = 10
    """After this many bad steps in a row the run returns to its newest checkpoint, and goes on with later data."""
    max_rollbacks: int = 3
    """After this many times it stops with a report instead."""
    spike_factor: float = 0.0
    """A loss above this many times the median of the last `spike_window` losses is a bad step, too; 0 = never."""
    spike_window: int = 100
    """Steps whose losses the median is taken over; while there are fewer, no loss is a spike."""

    def __post_init__(self) -> None:
        for name in ("max_bad_in_a_row", "spike_window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.max_rollbacks < 0:
            raise ValueError(f"max_rollbacks: must not be negative, got {self.max_rollbacks}")
        if self.spike_factor and not 1 < self.spike_factor < math.inf:
            raise ValueError(f"spike_factor: must be 0 (off) or above 1, got {self.spike_factor}")


def fault(loss: float, grad_norm: float, progress: Progress, config: GuardConfig) -> str:
    """What is wrong with a step of this loss and gradient norm, in words; empty where nothing is."""
    if not math.isfinite(loss):
        return "its loss is not finite"
    if not math.isfinite(grad_norm):
        return "its gradient is not finite"
    if config.spike_factor and len(progress.recent_losses) >= config.spike_window:
        usual = statistics.median(progress.recent_losses)
        if loss > config.spike_factor * usual:
            return f"its loss of {loss:.4g} is more than {config.spike_factor:g} times the usual {usual:.4g}"
    return ""


def note_good(loss: float, progress: Progress, config: GuardConfig) -> None:
    """A step was taken."""
    progress.bad_in_a_row = 0
    if config.spike_factor:
        progress.recent_losses = [*progress.recent_losses, loss][-config.spike_window :]
