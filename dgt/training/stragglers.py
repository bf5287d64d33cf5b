"""Which rank holds the others up: each measures the part of a step that it does not spend waiting for them.

That part is the wait for its batch and the computation up to the last micro-batch's loss, after which gradients meet.
On a GPU it is the device's time between two events. Where weights are sharded, ranks meet in the forward pass as well:
a slow loader is found as surely, a slow device only as far as the others are not waiting for its shards.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Pace:
    """How fast one rank was since the last report."""

    own_seconds: float
    """A step's seconds without the wait for other ranks."""
    waited: float
    """Those of them that were spent waiting for the batch."""
    host: str = field(default_factory=socket.gethostname)


class Stopwatch:
    """Measures one rank's own part of its steps."""

    def __init__(self, device: torch.device):
        self.device = device
        self.own = self.waited = 0.0
        self.steps = 0
        self.begun = self.computed = self.now()

    def now(self) -> float | torch.cuda.Event:
        """This moment: of the device where it is a GPU, else of the clock."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self) -> None:
        """A step begins; its batch is there."""
        self.begun = self.computed = self.now()

    def lap(self) -> None:
        """A micro-batch's loss is computed."""
        self.computed = self.now()

    def end(self, waited: float) -> None:
        """The step has ended, and the device has done its work; `waited`: seconds it took its batch to come."""
        if isinstance(self.begun, float) and isinstance(self.computed, float):
            self.own += self.computed - self.begun
        elif isinstance(self.begun, torch.cuda.Event) and isinstance(self.computed, torch.cuda.Event):
            self.own += self.begun.elapsed_time(self.computed) / 1e3
        self.waited += waited
        self.steps += 1

    def pace(self) -> Pace:
        """The means since the last call."""
        steps = max(self.steps, 1)
        found = Pace((self.own + self.waited) / steps, self.waited / steps)
        self.own = self.waited = 0.0
        self.steps = 0
        return found


def slowest(seconds: Sequence[float]) -> tuple[int, float]:
    """The slowest rank, and how many times as long it takes as the others' median; (0, 1.0) where it is alone."""
    rank = max(range(len(seconds)), key=lambda r: seconds[r])
    others = [s for r, s in enumerate(seconds) if r != rank]
    usual = statistics.median(others) if others else 0.0
    return (rank, seconds[rank] / usual) if usual > 0 else (0, 1.0)


class Stragglers:
    """Names a rank that was slow in several reports in a row."""

    def __init__(self, factor: float, reports: int):
        """Slow: `factor` times the others' median, in `reports` reports in a row; factor 0 = nobody is named."""
        self.factor, self.reports = factor, reports
        self.suspect, self.times = -1, 0

    def judge(self, paces: Sequence[Pace]) -> tuple[dict[str, float], str]:
        """Scalars for the report, and the sentence that names a slow rank when it is time to, else nothing.

        `paces`: of all ranks. One sentence per slow spell: the rank must have been faster meanwhile to be named again.
        """
        rank, ratio = slowest([pace.own_seconds for pace in paces])
        scalars = {"speed/slowest_rank": float(rank), "speed/slowest_ratio": ratio} if len(paces) > 1 else {}
        is_slow = self.factor > 0 and ratio >= self.factor
        self.times = (self.times + 1 if rank == self.suspect else 1) if is_slow else 0
        self.suspect = rank if is_slow else -1
        if self.times != self.reports:
            return scalars, ""
        pace = paces[rank]
        return scalars, (
            f"rank {rank} on node {pace.host} is slow: {1e3 * pace.own_seconds:.0f} ms a step, "
            f"{1e3 * pace.waited:.0f} of them waiting for data, {ratio:.1f} times as long as the others, "
            f"in {self.reports} reports in a row"
        )
