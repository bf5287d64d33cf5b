"""What a run knows of itself: the progress that a checkpoint carries, and how a call of the loop ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


class DivergedError(RuntimeError):
    """Gradients stayed non-finite for too many steps in a row."""


@dataclass
class Progress:
    """All that decides the next step beside the tensors; the manifest of a checkpoint carries it."""

    step: int = 0
    """Optimizer steps done (skipped ones included: they used up their batch)."""
    skipped_in_a_row: int = 0
    """Steps since the last one whose gradient was finite."""
    evaluated_at: int = 0
    """Step after which the last complete evaluation ran."""
    best_metric: float | None = None
    """Best value of the task's metric so far."""
    best_step: int | None = None
    """Step at which it was reached."""
    data: dict[str, Any] = field(default_factory=dict)
    """Position of the training loader."""


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    status: Literal["finished", "interrupted"]
    step: int
    signal: int = 0
    """The signal that interrupted it."""
    metrics: dict[str, float] | None = None
    """Metrics of the last evaluation in this call."""
