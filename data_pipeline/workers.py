"""Threads that decode, and how a consumer waits for them without ever hanging.

`concurrent.futures` joins its threads when the interpreter ends, however long that takes: one thread stuck in a read
from a dead file server would keep a failed job on its node. These threads are daemons that are asked to stop, waited
for briefly, and then left behind.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

# How long threads that were asked to stop are waited for: longer than a task takes, shorter than a person's patience.
_STOP_SECONDS = 5.0
# After an error others may still come, of which the first task's is to be raised, so that runs fail alike. But not if
# those tasks are stuck.
_ERROR_SECONDS = 5.0
# Waiting is counted in steps of this length, so that one in which the whole process was suspended counts as one step.
_STEP_SECONDS = 0.5


class StalledError(Exception):
    """Work was not done in time; the message holds the stacks of all threads."""


class Pending(Generic[T]):
    """Tasks that were given to threads, and later their results."""

    def __init__(self, tasks: Sequence[Callable[[], T]], in_threads: bool) -> None:
        self._tasks, self._in_threads = tasks, in_threads
        self._done: SimpleQueue[tuple[int, T | None, BaseException | None]] = SimpleQueue()

    def run(self, number: int) -> None:
        """Do one of the tasks; what it raises is kept for the consumer."""
        try:
            self._done.put((number, self._tasks[number](), None))
        except BaseException as error:
            self._done.put((number, None, error))

    def results(self, seconds: float, moves: Callable[[], bool] = lambda: False) -> list[T]:
        """All results, in the order of the tasks; the first task's error, if any has failed, is raised instead.

        Raises StalledError after `seconds` of waiting in which no task ended and `moves`, which is asked meanwhile,
        saw nothing go on that tasks may wait for. Without threads the tasks run now.
        """
        if not self._in_threads:
            return [task() for task in self._tasks]
        values: dict[int, T] = {}
        errors: dict[int, BaseException] = {}
        left = seconds
        while len(values) + len(errors) < len(self._tasks):
            step = min(_STEP_SECONDS, left)
            try:
                number, value, error = self._done.get(timeout=step)
            except Empty:
                left = seconds if moves() and not errors else left - step
                if left > 0:
                    continue
                if errors:
                    break
                raise StalledError(stacks_of_threads()) from None
            if error is not None:
                errors[number] = error
            else:
                values[number] = value  # type: ignore[assignment]  # None only where T has it
            left = min(left, _ERROR_SECONDS) if errors else seconds
        if errors:
            raise errors[min(errors)]
        return [values[number] for number in range(len(self._tasks))]


@dataclass
class _Shared:
    """What the threads of a pool know of it: not the pool, so that a forgotten pool can end."""

    queue: SimpleQueue[Callable[[], None] | None] = field(default_factory=SimpleQueue)  # its put is safe in a finalizer
    stopping: bool = False


class Workers:
    """A pool of daemon threads; with none, tasks run in the caller's thread when their results are asked for.

    The threads end when the pool is stopped, forgotten, or the interpreter exits. Tasks that have begun are finished
    unless they take too long; the others are dropped.
    """

    def __init__(self, count: int, name: str) -> None:
        """Starts `count` threads called `name`-0, `name`-1, ..."""
        self._shared = _Shared()
        self._threads = [
            threading.Thread(target=_work, args=(self._shared,), name=f"{name}-{number}", daemon=True)
            for number in range(count)
        ]
        self._finalizer = weakref.finalize(self, _stop, self._shared, self._threads)
        for thread in self._threads:
            thread.start()

    def start(self, tasks: Sequence[Callable[[], T]]) -> Pending[T]:
        """Give tasks to the threads, which take them in this order."""
        pending = Pending(tasks, bool(self._threads))
        if self._threads:
            for number in range(len(tasks)):
                self._shared.queue.put(functools.partial(pending.run, number))
        return pending

    def stop(self) -> None:
        """Drop what has not begun and end the threads. May be called more than once."""
        self._finalizer()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _work(shared: _Shared) -> None:
    while True:
        task = shared.queue.get()
        if task is None:
            return
        if not shared.stopping:
            task()
        del task  # or it would keep its batch in memory while this thread waits


def _stop(shared: _Shared, threads: Sequence[threading.Thread]) -> None:
    shared.stopping = True
    for _ in threads:
        shared.queue.put(None)
    deadline = time.monotonic() + _STOP_SECONDS
    for thread in threads:
        # The garbage collector may have called this from one of them. In a fork the parent's threads count as ended.
        if thread.ident is not None and thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))
    stuck = [thread.name for thread in threads if thread.is_alive() and thread is not threading.current_thread()]
    if stuck:
        logger.warning("left behind, as they did not stop within %g seconds: %s", _STOP_SECONDS, ", ".join(stuck))


def stacks_of_threads() -> str:
    """Where every thread of this process is, as tracebacks under the threads' names."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = (
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )
    return "\n".join(stacks)


def available_cores() -> int:
    """Cores that this process may use: by its affinity (Slurm, taskset) and by its control group (containers)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cores, _cgroup_cores())))


def _cgroup_cores() -> float:
    """The smallest CPU quota of this process's control group and those above it, in cores; infinite without one."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return float("inf")
    limits = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup", controllers)  # version 1 has a folder for its controllers, version 2 has not
        group = root / name.lstrip("/")
        limits += [_quota(folder) for folder in (group, *group.parents) if folder.is_relative_to(root)]
    return min(limits, default=float("inf"))


def _quota(folder: Path) -> float:
    """The CPU quota set in one control group's folder, in cores."""
    for read in (
        lambda: (folder / "cpu.max").read_text().split(),
        lambda: [(folder / f"cpu.cfs_{part}_us").read_text() for part in ("quota", "period")],
    ):
        try:
            quota, period = read()
            if float(quota) > 0:
                return float(quota) / float(period)
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return float("inf")
