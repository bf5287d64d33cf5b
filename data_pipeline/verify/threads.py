"""Running checks in threads: decoding, digests and reading let go of Python's lock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Work = TypeVar("Work")
Result = TypeVar("Result")
Advance = Callable[[int], None]


class StoppedError(Exception):
    """Nobody waits for the result any more."""


def in_threads(
    check: Callable[[Work, Advance], Result], works: Iterable[Work], jobs: int, advance: Advance
) -> Iterator[Result]:
    """check(work, advance) of all works, in their order. When the consumer stops early, or is interrupted, the checks
    end at their next call of `advance`."""
    stop = threading.Event()

    def advance_unless_stopped(count: int) -> None:
        if stop.is_set():
            raise StoppedError
        advance(count)

    with ThreadPoolExecutor(jobs, "verify") as pool:
        try:
            yield from pool.map(lambda work: check(work, advance_unless_stopped), works)
        finally:
            stop.set()
