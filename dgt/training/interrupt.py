"""Requests to stop: signals and the deadline are noted, and all ranks act on them together at the next safe point."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from types import FrameType

from dgt.training.world import World

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)

SAVES_BEFORE_DEADLINE = 3.0
"""Longest saves that must fit before the deadline: the step and the save under way come first, and a shared file system
is slower when many jobs end at once."""
SECONDS_BEFORE_DEADLINE = 10.0
"""Seconds besides, in which the processes of all ranks end."""
SECONDS_BETWEEN_LOOKS = 5.0
"""How often rank 0 looks whether the run is still this attempt's."""
SUPERSEDED = 1 << 16
"""What ranks agree on where it is not; larger than any signal."""
SHARE_BEFORE_DEADLINE = 0.5
"""Share of the time until the deadline that both take at most; else a job shorter than that would never train."""


class SupersededError(RuntimeError):
    """Another attempt has taken the run over; this one must not write to it any more."""


class Interruption:
    """Notes SIGTERM, SIGUSR2 (a scheduler's notice) and SIGINT (Ctrl-C).

    Once a SIGINT is noted, which can be only between two calls into C, the next one ends the process at once.

    `deadline`: when the scheduler ends the job, as of time.time(); some time before it the ranks stop as if SIGUSR2 had
    come, because that notice can be late or missing. `announce` is called with the signal, once and on rank 0 alone,
    as soon as all ranks have agreed to stop. `is_current` says whether the run is still this attempt's: a scheduler
    that has lost sight of a node starts the job again although its processes live on. `announce_hang` is told, on each
    rank, why it is ended where ranks hang.
    """

    def __init__(
        self,
        deadline: float | None = None,
        announce: Callable[[int], None] | None = None,
        is_current: Callable[[], bool] = lambda: True,
        announce_hang: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.deadline, self.announce, self.is_current = deadline, announce, is_current
        self.announce_hang = announce_hang
        self.looked = time.time()
        self.allowance = 0.0 if deadline is None else max(0.0, SHARE_BEFORE_DEADLINE * (deadline - time.time()))
        self.received = 0
        """The first signal that came to this process."""
        self.longest_save = 0.0
        """Seconds that the longest save took."""
        self.decided = 0
        """The signal that all ranks have agreed to obey; later ones change nothing."""

    def install(self) -> None:
        """Takes over the signals from here on."""
        for number in SIGNALS:
            signal.signal(number, self.note)

    def note(self, number: int, _frame: FrameType | None) -> None:
        """The handler: remembers the signal; a second SIGINT is left to the kernel, which no call into C delays."""
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        self.received = self.received or number

    def note_save(self, seconds: float) -> None:
        """Learns how long a save took; the last one before the deadline may take as long."""
        self.longest_save = max(self.longest_save, seconds)

    def is_time_to_save(self) -> bool:
        """Whether the deadline is so near that the last save should begin."""
        if self.deadline is None:
            return False
        needed = SAVES_BEFORE_DEADLINE * self.longest_save + SECONDS_BEFORE_DEADLINE
        return time.time() >= self.deadline - min(needed, self.allowance)

    def check_current(self) -> None:
        """Raises SupersededError where the run is not this attempt's any more."""
        self.looked = time.time()
        if not self.is_current():
            raise SupersededError("another attempt has taken this run over; this one leaves without saving")

    def look_next(self) -> None:
        """Has the next agreement look whether the run is still this attempt's, however short ago the last look was."""
        self.looked = -math.inf

    def is_superseded(self) -> bool:
        """Whether it is another's, as of a look every few seconds."""
        if time.time() < self.looked + SECONDS_BETWEEN_LOOKS:
            return False
        self.looked = time.time()
        return not self.is_current()

    def agreed(self, world: World) -> int:
        """The signal that all ranks obey, the same answer on every rank; 0 where nobody has asked them to stop.

        Raises SupersededError on every rank where the run is not theirs any more.
        """
        if not self.decided:
            wish = self.received or (int(signal.SIGUSR2) if self.is_time_to_save() else 0)
            if world.is_main and self.is_superseded():
                wish = SUPERSEDED
            self.decided = world.agree_max(wish)
            if 0 < self.decided < SUPERSEDED and self.announce and world.is_main:
                self.announce(self.decided)
        if self.decided == SUPERSEDED:
            raise SupersededError("another attempt has taken this run over; this one leaves without saving")
        return self.decided
