"""What a run knows of itself: the progress that a checkpoint carries, and how a call of the loop ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


class DivergedError(RuntimeError):
    """Training went bad again and again, and rolling back did not help; the message is the report."""


@dataclass
class Progress:
    """All that decides the next step beside the tensors; the manifest of a checkpoint carries it."""

    step: int = 0
    """Optimizer steps taken; learning rate, averages, draws and reports go by it. A bad step is none."""
    bad_in_a_row: int = 0
    """Batches since the last step that was taken."""
    rollbacks: int = 0
    """How often the run went back to a checkpoint because of bad steps."""
    returned_to: int | None = None
    """Step of the checkpoint that it went back to last."""
    recent_losses: list[float] = field(default_factory=list)
    """Losses of the last steps, by which a spike is known; empty where nobody looks for one."""
    evaluated_at: int = 0
    """Step after which the last complete evaluation ran."""
    metrics: dict[str, float] | None = None
    """What it gave."""
    best_metric: float | None = None
    """Best value of the task's metric so far."""
    best_step: int | None = None
    """Step at which it was reached."""
    data: dict[str, Any] = field(default_factory=dict)
    """Position of the training loader; it moves on with every batch, bad ones included."""


def position(data: Mapping[str, Any]) -> tuple[int, int]:
    """Where in the data a loader is: epoch, and samples of it that were handed over. It only ever grows."""
    return data.get("epoch", 0), data.get("consumed", 0)


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    status: Literal["finished", "interrupted"]
    step: int
    signal: int = 0
    """The signal that interrupted it."""
    metrics: dict[str, float] | None = None
    """Metrics of the last evaluation, where the run has finished."""
