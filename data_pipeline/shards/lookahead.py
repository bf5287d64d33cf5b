"""Threads that do work ahead of need, soonest first, and that nothing has to wait for."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")

CLOSE_SECONDS = 5.0
"""How long `close` waits for its threads; one that is stuck in a call ends later, by itself, or with the process."""


class LookAhead(Generic[Item]):
    """Runs `work(item)` for what is expected, in at most `threads` daemon threads that live while there is work.

    `work` must return soon once its owner has called the work off, and must not raise: what goes wrong ahead of need
    is met again when the need comes.
    """

    def __init__(self, work: Callable[[Item], None], threads: int) -> None:
        self._work, self._most = work, threads
        self._lock = threading.Lock()
        self._waiting: deque[Item] = deque()
        self._threads: set[threading.Thread] = set()
        self._closed = False

    def expect(self, items: Sequence[Item]) -> None:
        """Replace what waits to be done. Returns at once."""
        with self._lock:
            if self._closed:
                return
            self._waiting = deque(items)
            for _ in range(min(len(self._waiting), self._most - len(self._threads))):
                thread = threading.Thread(target=self._run, name="fetch ahead", daemon=True)
                self._threads.add(thread)
                thread.start()

    def close(self) -> None:
        """Forget what waits, and wait (a bounded time) for the work under way, which its owner has called off."""
        with self._lock:
            self._closed = True
            self._waiting.clear()
            threads = list(self._threads)
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads.discard(threading.current_thread())
                    return
                item = self._waiting.popleft()
            try:
                self._work(item)
            except BaseException:
                with self._lock:
                    self._threads.discard(threading.current_thread())
                raise
