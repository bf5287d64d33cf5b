"""Python's garbage collector, run by the step count: a rank that stops for it alone stops all the others."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collected_by_hand(every: int) -> Iterator[None]:
    """Switches automatic collection off while it lasts; 0 = leaves everything to Python."""
    was_on = gc.isenabled()
    if every:
        gc.collect()
        gc.disable()
    try:
        yield
    finally:
        if every and was_on:
            gc.enable()


def collect_after(step: int, every: int) -> None:
    """Collects where `step`, counted alike on all ranks, is a multiple of `every`; 0 = never."""
    if every and step % every == 0:
        gc.collect()
