"""Objects with threads, locks or connections, in a process that was forked from the one that made them."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Renewable(Protocol):
    """Something that can begin anew in a child process, where only the thread that forked goes on."""

    def after_fork(self) -> None: ...


def renew_after_fork(thing: Renewable) -> None:
    """Call `thing.after_fork()` in every child that this process forks while the thing exists."""
    reference = weakref.ref(thing)

    def renew() -> None:
        alive = reference()
        if alive is not None:
            alive.after_fork()

    os.register_at_fork(after_in_child=renew)
