"""Moments inside a rank at which something can be made to happen, counted as they come.

Nothing of this is in the product: `watch` wraps its functions and listens to the interpreter, in a process of its own.
"""

from __future__ import annotations

import errno
import functools
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE_MOMENTS = ("create", "read", "fsync", "rename", "remove")
"""Just before a file or folder of the checkpoints is made, opened, made durable, renamed, removed."""
LOOP_MOMENTS = ("loss", "step", "evaluation", "save", "saved")
"""Just before a micro-batch's forward pass; after a step; before an evaluation batch; around the call that saves."""
BYTES = "bytes"
"""A file of a checkpoint has reached as many bytes as the order's number says, in the middle of a write."""

ACTIONS = ("kill", "fail", "stop", "term", "usr2")
"""SIGKILL; an error of the file system; SIGSTOP; SIGTERM; SIGUSR2: each to the process itself."""


@dataclass(frozen=True)
class Order:
    """Do `action` on `rank` when the moment `kind` comes for the `number`-th time (from 1; bytes for BYTES)."""

    kind: str
    number: int
    rank: int
    action: str = "kill"


def kill_self() -> None:
    """What a crash, a power failure or the out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


SIGNALS = {"stop": signal.SIGSTOP, "term": signal.SIGTERM, "usr2": signal.SIGUSR2}


class Moments:
    """Counts the moments of this process and carries out its orders; `tell` is called just before each deed."""

    def __init__(self, orders: list[Order], tell: Callable[[Order], None] = lambda order: None):
        self.orders = orders
        self.tell = tell
        self.counts: dict[str, int] = {}
        self.lock = threading.RLock()

    def come(self, kind: str) -> None:
        """The moment is here."""
        with self.lock:
            self.counts[kind] = number = self.counts.get(kind, 0) + 1
            due = [order for order in self.orders if (order.kind, order.number) == (kind, number)]
        for order in due:
            self.act(order)

    def act(self, order: Order) -> None:
        """Carries out one order."""
        self.tell(order)
        if order.action == "kill":
            kill_self()
        elif order.action == "fail":
            number = errno.EIO if order.kind == "read" else errno.ENOSPC
            raise OSError(number, f"{os.strerror(number)} (injected)")
        else:
            os.kill(os.getpid(), SIGNALS[order.action])


def watch(moments: Moments, checkpoints: Path) -> None:
    """Lets `moments` know of all that happens in this process, for good: only for a process made for it."""
    from dgt.tasks.classification import Classification
    from dgt.training.saver import Saver
    from dgt.training.trainer import Trainer

    around(Classification, "loss", before=lambda: moments.come("loss"))
    around(Classification, "totals", before=lambda: moments.come("evaluation"))
    around(Trainer, "step", after=lambda: moments.come("step"))
    around(Saver, "begin", before=lambda: moments.come("save"), after=lambda: moments.come("saved"))
    prefix, fsync = str(checkpoints), os.fsync

    def counted_fsync(file: int) -> None:
        if os.readlink(f"/proc/self/fd/{file}").startswith(prefix):
            moments.come("fsync")
        fsync(file)

    os.fsync = counted_fsync  # type: ignore[assignment]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        kind = KIND_OF_EVENT.get(event)
        if kind and str(arguments[0]).startswith(prefix):
            moments.come(opening(*arguments) if kind == "open" else kind)

    sys.addaudithook(hook)
    for order in moments.orders:
        if order.kind == BYTES:
            limit_file_size(order, moments)


KIND_OF_EVENT = {"open": "open", "os.mkdir": "create", "os.rename": "rename", "os.remove": "remove",
                 "os.rmdir": "remove", "shutil.rmtree": "remove"}  # fmt: skip
"""Moments by the interpreter's audit events whose first argument is a path."""


def opening(_path: Any, mode: str | None, flags: int) -> str:
    """Which moment it is when a file is opened."""
    written = any(letter in mode for letter in "wxa+") if mode else bool(flags & (os.O_WRONLY | os.O_RDWR))
    return "create" if written else "read"


def around(
    owner: Any, name: str, before: Callable[[], None] = lambda: None, after: Callable[[], None] = lambda: None
) -> None:
    """Wraps a function so that `before` and `after` are called around it."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before()
        result = original(*args, **kwargs)
        after()
        return result

    setattr(owner, name, wrapped)


def limit_file_size(order: Order, moments: Moments) -> None:
    """Lets the first write beyond the order's number of bytes of any one file fail, or kill the process.

    The kernel writes up to the limit first, so that a part of the file is there. Death is by SIGXFSZ, which like
    SIGKILL leaves the process no time; an error lifts the limit, so that later saves succeed.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def lift(_number: int, _frame: Any) -> None:
        moments.tell(order)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if order.action == "kill" else lift)
    resource.setrlimit(resource.RLIMIT_FSIZE, (order.number, hard))
