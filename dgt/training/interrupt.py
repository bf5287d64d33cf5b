"""Requests to stop: signals set a flag, and all ranks act on it together at the next safe point."""

from __future__ import annotations

import signal
from types import FrameType

from dgt.training.world import World

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class Interruption:
    """Notes SIGTERM, SIGUSR2 (a scheduler's notice) and SIGINT (Ctrl-C); a second SIGINT ends the process at once."""

    def __init__(self) -> None:
        self.received = 0

    def install(self) -> None:
        """Takes over the signals from here on."""
        for number in SIGNALS:
            signal.signal(number, self.note)

    def note(self, number: int, _frame: FrameType | None) -> None:
        """The handler: remembers the signal and does nothing else."""
        if number == signal.SIGINT and self.received == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        self.received = number

    def agreed(self, world: World) -> int:
        """The signal any rank has received, the same answer on every rank; 0 where there is none."""
        return world.agree_max(self.received)
