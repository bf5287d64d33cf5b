"""Saving while training goes on: training stops only for the copy to host memory; a thread writes and commits it.

The thread agrees with the other ranks' threads over a process group of its own, so that its collectives never meet the
loop's. All ranks conclude a save at the same point of the loop, and with the same words. Hashing and writing let go of
the interpreter for megabytes at a time; a process that ends with a save under way leaves an unfinished folder behind.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dgt.training import checkpoint
from dgt.training.checkpoint import CheckpointConfig
from dgt.training.pieces import Piece, Pieces
from dgt.training.world import COLLECTIVE_TIMEOUT, World

log = logging.getLogger("dgt")

SECONDS_AT_EXIT = 30.0
"""How long a rank that fails waits for its save under way, which the other ranks may still bring to its end."""


@dataclass(frozen=True)
class Saved:
    """How one save ended."""

    step: int
    facts: dict[str, Any]
    """What the manifest says beside the tensors, as of the beginning of the save."""
    error: str | None
    """What went wrong, the same words on every rank; None = the checkpoint is committed."""
    seconds: float
    """From the first tensor to the end of the save."""
    stall: float
    """Seconds for which training stood still: for the copy, and where the end was waited for."""


class HostMemory:
    """Buffers in host memory that each save's tensors are copied to; kept from save to save."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def copy(self, pieces: Pieces) -> Pieces:
        """The shares of `pieces` that this rank saves, with memory of their own."""
        copies = {}
        for name, piece in pieces.items():
            share = piece.share()
            copies[name] = Piece(self.buffer(name, share.local), piece.shape, share.start)
            copies[name].local.copy_(share.local, non_blocking=True)
        if any(piece.local.is_cuda for piece in pieces.values()):
            torch.cuda.synchronize()
        return copies

    def buffer(self, name: str, like: Tensor) -> Tensor:
        """Memory for a tensor; page-locked where it comes from a GPU, which then need not wait for the host."""
        known = self.buffers.get(name)
        if known is None or (known.shape, known.dtype) != (like.shape, like.dtype):
            known = self.buffers[name] = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
        return known


class Saver:
    """One rank's part of the saves of a run, one at a time; all ranks call the same methods in the same order."""

    def __init__(self, folder: Path, world: World, permit: Callable[[], None], config: CheckpointConfig):
        """`permit` is called on rank 0 just before a commit, and raises where there must be none."""
        self.folder, self.world, self.permit, self.config = folder, world, permit, config
        self.writers = world
        if config.asynchronous and world.size > 1:
            group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
            self.writers = dataclasses.replace(world, control=group)
        self.host = HostMemory()
        self.thread: threading.Thread | None = None
        self.ended: Saved | None = None
        self.failure: BaseException | None = None

    def begin(self, step: int, pieces: Pieces, facts: dict[str, Any]) -> None:
        """Starts to save; called after `finish`. `pieces` and `facts` may change once it has returned."""
        started, facts = time.perf_counter(), copy.deepcopy(facts)
        failure = None
        if self.config.asynchronous:
            try:
                pieces = self.host.copy(pieces)
            except Exception as error:  # the other ranks' threads wait for this one's to say so
                failure = error
        self.ended = Saved(step, facts, None, 0.0, time.perf_counter() - started)
        if self.config.asynchronous:
            self.thread = threading.Thread(
                target=self.work, args=(pieces, started, failure), name="checkpoint", daemon=True
            )
            self.thread.start()
        else:
            self.work(pieces, started, failure)

    def work(self, pieces: Pieces, started: float, failure: Exception | None) -> None:
        """Writes and commits what was begun, and lets go of older checkpoints."""
        begun = self.ended
        assert begun is not None
        working = time.perf_counter()

        def copied() -> None:
            if failure is not None:
                raise failure

        try:
            error = checkpoint.attempt(copied, self.writers)
            if error:
                error = f"the checkpoint of step {begun.step} could not be copied to host memory: {error}"
            else:
                error = checkpoint.save(self.folder, begun.step, pieces, begun.facts, self.writers, self.permit)
            if not error and self.world.is_main:
                best_step = begun.facts.get("progress", {}).get("best_step")
                # A run that has gone back to an older checkpoint saves that one again: not the newest, and in use.
                checkpoint.prune(self.folder, self.config, (begun.step, best_step), log.warning)
        except BaseException as raised:  # such as a rank that was lost: raised where the loop waits for the save
            self.failure = raised
            return
        now = time.perf_counter()
        stall = begun.stall if self.config.asynchronous else begun.stall + now - working
        self.ended = dataclasses.replace(begun, error=error, seconds=now - started, stall=stall)

    def is_done(self) -> bool:
        """Whether a save is under way that has ended on all ranks, so that `finish` will not wait; asks them all."""
        return self.ended is not None and not self.world.agree_max(self.thread is not None and self.thread.is_alive())

    def finish(self) -> Saved | None:
        """Waits for the save under way; how it ended, once and on all ranks alike. None where there is none.

        Raises what has kept the ranks from agreeing on how it ended.
        """
        if self.ended is None:
            return None
        waiting = time.perf_counter()
        if self.thread is not None:
            self.thread.join()
            self.thread = None
            self.ended = dataclasses.replace(self.ended, stall=self.ended.stall + time.perf_counter() - waiting)
        ended, failure = self.ended, self.failure
        self.ended = self.failure = None
        if failure is not None:
            raise failure
        return ended

    def close(self) -> None:
        """Gives a save under way, which nobody will ask for any more, some seconds to end; called when a rank fails."""
        if self.thread is not None:
            self.thread.join(SECONDS_AT_EXIT)
