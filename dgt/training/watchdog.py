"""Ends an attempt that hangs, and writes where each rank stood.

    RUN/hangs/BEGIN/rank-N.txt    the stacks of all threads of rank N; BEGIN: when the attempt began
    RUN/hangs/BEGIN/nccl-N        NCCL's flight recorder, where there is NCCL

One thread per rank watches whether the loop shows signs of life. The first that misses them writes its stacks, which
the others' threads see, so that they write theirs before anyone ends. It counts its looks, not the time: while a
process is suspended (SIGSTOP, Ctrl-Z, a scheduler's suspension) nothing is missed.

Where a rank's interpreter is held, so that its thread does not run either, faulthandler's own thread writes the stacks
to the rank's log, and an alarm ends it (SIGALRM) if nobody else does. Neither can tell that from a suspension: one that
is longer than the alarm costs the attempt.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from dgt.training.files import PATIENCE
from dgt.training.run_folder import RunFolder
from dgt.training.world import World

if TYPE_CHECKING:
    from dgt.config import Config

log = logging.getLogger("dgt")

HUNG = 75
"""Exit status of a rank that was ended because of a hang (EX_TEMPFAIL of sysexits.h: try again)."""
LOOKS = 10
"""How often within the deadline the thread looks, but at least every LONGEST_PERIOD."""
LONGEST_PERIOD = 30.0
"""Seconds; each look of each rank asks the file system once."""
SECONDS_FOR_OTHERS = PATIENCE + LONGEST_PERIOD
"""How long a rank waits for the others' stacks before it ends; a network file system shows them late."""
ALARM = 3
"""After how many deadlines a process whose interpreter is held ends."""


class Watchdog:
    """Watches one rank from `__enter__` to `__exit__`; between two beats no more than `seconds` may pass."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        world_size: int,
        seconds: float,
        announce: Callable[[str], None] = lambda text: None,
    ):
        """`folder`: the attempt's, the same for all ranks; `announce` is told of a hang, on the rank that meets it."""
        self.folder, self.rank, self.world_size, self.seconds = folder, rank, world_size, seconds
        self.announce = announce
        self.period = min(LONGEST_PERIOD, seconds / LOOKS)
        self.beats, self.doing = 0, "starting"
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self.watch, name="watchdog", daemon=True)

    @classmethod
    def of_run(cls, config: Config, world: World, announce: Callable[[str], None]) -> Watchdog:
        """That of this rank in the attempt that begins now; all ranks call it."""
        begun = world.on_main(lambda: f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        folder = RunFolder(config.run_dir).hangs / begun
        return cls(folder, world.rank, world.size, config.guard.hang_seconds, announce)

    def __enter__(self) -> Watchdog:
        if self.seconds:
            self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.is_over.set()
        if self.thread.is_alive():
            self.thread.join()

    def beat(self, doing: str) -> None:
        """A sign of life; `doing`: what comes next, in words."""
        self.beats, self.doing = self.beats + 1, doing

    def watch(self) -> None:
        """The thread: looks now and then whether this rank or another hangs."""
        seen, looks = self.beats, 0
        try:
            while not self.is_over.wait(self.period):
                seen, looks = self.beats, looks + 1 if self.beats == seen else 0
                if looks * self.period > self.seconds:
                    self.end(f"rank {self.rank} has got nothing done for {self.seconds:g} s, while {self.doing}")
                elif self.folder.exists():
                    self.end(f"another rank hangs; rank {self.rank} stood still while {self.doing}")
                faulthandler.dump_traceback_later(self.seconds, file=2)  # standard error; for this thread
                signal.setitimer(signal.ITIMER_REAL, ALARM * self.seconds)
        finally:
            faulthandler.cancel_dump_traceback_later()
            signal.setitimer(signal.ITIMER_REAL, 0)

    def written(self) -> list[Path]:
        """Files of the ranks that have written their stacks."""
        return list(self.folder.glob("rank-*.txt"))

    def end(self, why: str) -> None:
        """Writes this rank's stacks, gives the others time for theirs, and ends the process."""
        text = f"{why}; stacks of all ranks: {self.folder}"
        log.error("hang: %s", text)
        try:
            for act in (lambda: self.write_stacks(why), lambda: self.announce(text), self.write_flight_record):
                try:
                    act()
                except Exception as error:  # a full disk must not keep the process from ending
                    log.error("not everything about the hang could be written: %s", error)
            patience = time.monotonic() + SECONDS_FOR_OTHERS
            while len(self.written()) < self.world_size and time.monotonic() < patience:
                time.sleep(min(1.0, self.period))
        finally:
            os._exit(HUNG)  # whatever this rank is stuck in, it is not asked

    def write_stacks(self, why: str) -> None:
        """Says what all threads of this process are doing, in a file that appears with all its content."""
        path = self.folder / f"rank-{self.rank}.txt"
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".new")
        with unfinished.open("w") as file:
            file.write(f"{why}\nprocess {os.getpid()} on node {socket.gethostname()}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            os.fsync(file.fileno())
        unfinished.rename(path)

    def write_flight_record(self) -> None:
        """The last collectives of NCCL, as `torchfrtrace` reads them; nothing where there is no NCCL."""
        dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
        if dump is not None and torch.cuda.is_available():
            (self.folder / f"nccl-{self.rank}").write_bytes(dump())
