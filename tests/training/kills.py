"""SIGKILL at a chosen call that changes a disk."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

TOUCHES_DISK = ("write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


def kill_at(call: int, when: str) -> None:
    """SIGKILL before, within or after the given call (from 1) of those functions of `os` that change a disk."""
    lock, calls = threading.Lock(), 0

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def act(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            with lock:
                calls += 1
                if calls != call:
                    return function(*args, **kwargs)
                try:
                    if when == "within":
                        function(args[0], args[1][: len(args[1]) // 2])
                    if when == "after":
                        function(*args, **kwargs)
                finally:
                    os.kill(os.getpid(), signal.SIGKILL)

        return act

    for name in ("write",) if when == "within" else TOUCHES_DISK:
        setattr(os, name, deadly(getattr(os, name)))
