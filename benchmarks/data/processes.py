"""CPU time and memory of this process and of all processes below it (Linux)."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path


def descendants() -> list[int]:
    """Ids of the living processes below this one."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):  # it has just ended
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, pending = [], [os.getpid()]
    while pending:
        below = children.get(pending.pop(), [])
        found += below
        pending += below
    return found


def cpu_seconds() -> float:
    """User and system time so far, to the nanosecond: own, of ended children, of living descendants."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for process in descendants():
        try:
            total += time.clock_gettime(_cpu_clock(process))
        except OSError:  # it has just ended
            continue
    return total


def _cpu_clock(process: int) -> int:
    """The id of a process's CPU clock, as clock_getcpuclockid(3) computes it on Linux."""
    return (~process << 3) | 2


def anonymous_bytes() -> int:
    """Memory that is not the page cache of files: anonymous and shared pages in RAM.

    Mapped files are left out: they belong to the page cache, whoever maps them.
    """
    kilobytes = 0
    for process in [os.getpid(), *descendants()]:
        try:
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        kilobytes += sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem") if name in fields)
    return 1024 * kilobytes
