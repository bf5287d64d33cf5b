"""Saving while training goes on: copy, write and commit beside the loop, report at a point that all ranks share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgt.training import checkpoint
from dgt.training.pieces import Pieces
from dgt.training.world import World


@dataclass(frozen=True)
class Saved:
    """How one save ended."""

    step: int
    error: str | None
    """What went wrong, the same words on every rank; None = the checkpoint is committed."""
    seconds: float
    """From the first tensor to the commit."""
    stall: float
    """Seconds for which training stood still."""


class Saver:
    """One rank's part of the saves of a run, one at a time."""

    def __init__(self, folder: Path, world: World, permit: Callable[[], None]):
        """`permit` is called on rank 0 just before a commit, and raises where there must be none."""
        self.folder, self.world, self.permit = folder, world, permit
        self.ended: Saved | None = None

    def begin(self, step: int, pieces: Pieces, facts: dict[str, Any]) -> None:
        """Starts to save; all ranks call it, after `finish`. `pieces` and `facts` may change once it has returned."""
        started = time.perf_counter()
        error = checkpoint.save(self.folder, step, pieces, facts, self.world, self.permit)
        seconds = time.perf_counter() - started
        self.ended = Saved(step, error, seconds, seconds)

    def finish(self) -> Saved | None:
        """Waits for the save under way; how it ended, once and on all ranks alike. None where there is none."""
        ended, self.ended = self.ended, None
        return ended
