"""Bad steps: what counts as one, who is told, and when to go back to a checkpoint.

A step is bad where its loss or gradient is not finite on any rank, or its loss is a spike. It is not taken: weights,
moments, averages, schedule and loss scale stay as they are, and its batch is used up. RUN/bad_steps.jsonl lists them:

    {"step": 7, "epoch": 0, "consumed": 56, "why": "...", "loss": null, "grad_norm": 1.5, "ids": [...], "suspects": [3]}

`step` would have been its number; `epoch` and `consumed` are the loader's position after it; a loss or norm that is not
finite is null; `suspects` are the samples of micro-batches whose own loss was not finite.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dgt.training import json_lines
from dgt.training.files import write_durably
from dgt.training.state import Progress, position
from dgt.training.world import COLLECTIVE_TIMEOUT, World

log = logging.getLogger("dgt")


@dataclass(frozen=True)
class GuardConfig:
    """What is done when training goes wrong, hangs, or is held up by one rank."""

    max_bad_in_a_row: int = 10
    """After this many bad steps in a row the run returns to its newest checkpoint, and goes on with later data."""
    max_rollbacks: int = 3
    """After this many times it stops with a report instead."""
    spike_factor: float = 0.0
    """A loss above this many times the median of the last `spike_window` losses is a bad step, too; 0 = never."""
    spike_window: int = 100
    """Steps whose losses the median is taken over; while there are fewer, no loss is a spike."""
    hang_seconds: float = 1200.0
    """Where a rank gets nothing done for this long, the stacks of all ranks are written and the attempt is ended; 0 =
    never. A step, a batch of an evaluation, a save on the way out and the start must each take less."""
    straggler_factor: float = 1.5
    """A rank that computes or waits for data this many times as long as the others' median is named; 0 = never."""
    straggler_reports: int = 3
    """So many reports in a row it must have been slow."""

    def __post_init__(self) -> None:
        for name in ("max_bad_in_a_row", "spike_window", "straggler_reports"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.max_rollbacks < 0:
            raise ValueError(f"max_rollbacks: must not be negative, got {self.max_rollbacks}")
        longest = COLLECTIVE_TIMEOUT.total_seconds() - 60
        if not 0 <= self.hang_seconds <= longest:
            raise ValueError(
                f"hang_seconds: must lie in [0, {longest:g}], because collectives give up a minute later and leave no "
                f"stacks; got {self.hang_seconds}"
            )
        for name in ("spike_factor", "straggler_factor"):
            if getattr(self, name) and not 1 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: must be 0 (off) or above 1, got {getattr(self, name)}")


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


class Guard:
    """Judges every step of a run; the same answers on all ranks."""

    def __init__(self, config: GuardConfig, world: World, progress: Progress, path: Path):
        """`path`: where rank 0 lists bad steps."""
        self.config, self.world, self.progress, self.path = config, world, progress, path
        self.last_ids: list[int] = []
        self.last_fault = ""

    def accepts(self, loss: float, grad_norm: float) -> bool:
        """Whether a step of this loss and gradient norm is taken."""
        return not fault(loss, grad_norm, self.progress, self.config)

    def note_good(self, loss: float) -> None:
        """A step was taken."""
        self.progress.bad_in_a_row = 0
        if self.config.spike_factor:
            self.progress.recent_losses = [*self.progress.recent_losses, loss][-self.config.spike_window :]

    def note_bad(self, loss: float, grad_norm: float, ids: Sequence[Sequence[int]], losses: Sequence[Tensor]) -> None:
        """A step was not taken; `ids` and `losses`: of this rank's micro-batches. All ranks call it."""
        progress = self.progress
        progress.bad_in_a_row += 1
        suspects = [i for part, own in zip(ids, losses, strict=True) if not math.isfinite(float(own)) for i in part]
        told = self.world.gather(([i for part in ids for i in part], suspects))
        self.last_ids = [i for all_of_rank, _ in told for i in all_of_rank]
        self.last_fault = fault(loss, grad_norm, progress, self.config)
        row = {
            "step": progress.step + 1,
            "epoch": progress.data["epoch"],
            "consumed": progress.data["consumed"],
            "why": self.last_fault,
            "loss": loss if math.isfinite(loss) else None,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "ids": self.last_ids,
            "suspects": [i for _, of_rank in told for i in of_rank],
        }
        ranks = [rank for rank, (_, of_rank) in enumerate(told) if of_rank]
        on = f", on rank {', '.join(map(str, ranks))} from samples {row['suspects']}" if ranks else ""
        log.warning("step %d skipped: %s%s (sample ids %s)", row["step"], self.last_fault, on, self.last_ids)
        if self.world.is_main:
            self.write(row)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends to the list; a full disk costs the line, not the run."""
        try:
            json_lines.append(self.path, row)
        except OSError as error:
            log.error("a bad step could not be noted in %s: %s", self.path, error)

    def forget_later(self) -> None:
        """Drops what the list says of batches that an earlier attempt was served, and this one will be again."""
        reached = position(self.progress.data)
        try:
            if self.world.is_main and self.path.exists():
                write_durably(
                    self.path, "".join(json.dumps(r) + "\n" for r in read(self.path) if position(r) <= reached)
                )
        except OSError as error:
            log.error("the list of bad steps in %s could not be brought up to date: %s", self.path, error)

    def is_lost(self) -> bool:
        """Whether so many steps in a row were bad that the run must return to a checkpoint."""
        return self.progress.bad_in_a_row >= self.config.max_bad_in_a_row

    def report(self) -> str:
        """What has happened, in words."""
        progress = self.progress
        return f"{progress.bad_in_a_row} steps in a row were bad after step {progress.step} ({self.last_fault})"

    def advice(self) -> str:
        """Which samples it was, and what a person can try."""
        return (
            f"training stops. The last bad step was of the samples {self.last_ids}; {self.path} lists all. Where they "
            "are always the same, look at these samples. Else lower optimizer.lr or optimizer.clip_grad_norm, or "
            "choose a wider engine.precision, under another name=; a larger guard.max_rollbacks lets this run try "
            "again, from its newest checkpoint and with the data that followed it, these samples included"
        )


def read(path: Path) -> list[dict[str, Any]]:
    """All bad steps of the list at `path`, oldest first; lines that a kill or full disk has cut are passed over."""
    return list(json_lines.read(path, "step", "epoch", "consumed"))
