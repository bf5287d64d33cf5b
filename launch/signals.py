"""The signals that ask a run to stop, noted from the first moment of a process."""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
"""A scheduler's TERM and its notice before the time limit, and Ctrl-C."""


class Noted:
    """Handlers that remember which signals came, and do nothing else.

    Needs no torch, so a process can have it before its imports, which take seconds.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self.earlier: dict[int, signal._HANDLER] = {}

    def install(self) -> Noted:
        """Takes over the signals, then lets in those that the parent process has blocked until now."""
        for number in STOP_SIGNALS:
            self.earlier[number] = signal.signal(number, self.note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def note(self, number: int, _frame: FrameType | None) -> None:
        """The handler."""
        self.received.append(number)

    def restore(self) -> None:
        """Gives the signals back to whoever had them before `install`."""
        for number, handler in self.earlier.items():
            signal.signal(number, handler)
