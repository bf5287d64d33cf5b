"""Saving while training goes on: a thread copies the state to host memory, writes and commits it.

The copy is made while the next gradients are computed, which change nothing of the state; the update waits for its end.
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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dgt.training import checkpoint, retention
from dgt.training.checkpoint import CheckpointConfig, CheckpointError
from dgt.training.pieces import Piece, Pieces
from dgt.training.world import COLLECTIVE_TIMEOUT, World

log = logging.getLogger("dgt")

SMALL = 1 << 14
"""Elements of tensors that are copied at once: a forward pass may change running statistics, a verdict the loss scale,
and the copy of them all takes a few milliseconds."""

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
    """Seconds for which training stood still: where the copy or the end was waited for."""


class HostMemory:
    """Buffers in host memory that each save's tensors are copied to; kept from save to save."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def copy(self, pieces: Pieces, ready: Callable[[], AbstractContextManager[Any]]) -> Pieces:
        """The shares of `pieces` that this rank saves, with memory of their own; `ready`: see `Saver.begin`."""
        copies = {}
        with ready():
            for name, piece in pieces.items():
                share = piece.share()
                copies[name] = Piece(self.buffer(name, share.local), piece.shape, share.start)
                copies[name].local.copy_(share.local, non_blocking=True)
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
        """`permit`: see `checkpoint.save`."""
        self.folder, self.world, self.permit, self.config = folder, world, permit, config
        self.writers = world
        if config.asynchronous and world.size > 1:
            group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
            self.writers = dataclasses.replace(world, control=group)
        self.host = HostMemory()
        self.thread: threading.Thread | None = None
        self.copied = threading.Event()
        self.stall = 0.0
        self.ended: Saved | None = None
        self.failure: BaseException | None = None

    def begin(self, step: int, pieces: Pieces, facts: dict[str, Any]) -> None:
        """Starts to save; called after `finish`.

        `facts` may change once it has returned, `pieces` once `let_change` has.
        """
        started = time.perf_counter()
        self.ended = Saved(step, copy.deepcopy(facts), None, 0.0, 0.0)
        if self.config.asynchronous:
            own = {name: piece.clone() if piece.local.numel() <= SMALL else piece for name, piece in pieces.items()}
            ready = side_stream() if any(piece.local.is_cuda for piece in pieces.values()) else nullcontext
            self.copied.clear()
            self.thread = threading.Thread(target=self.work, args=(own, started, ready), name="checkpoint", daemon=True)
            self.thread.start()
        else:
            self.work(pieces, started, nullcontext)
        self.stall = time.perf_counter() - started

    def let_change(self) -> None:
        """Waits until the tensors of the save under way are copied; called before any of them changes."""
        if self.thread is not None and not self.copied.is_set():
            waiting = time.perf_counter()
            self.copied.wait()
            self.stall += time.perf_counter() - waiting

    def work(self, pieces: Pieces, started: float, ready: Callable[[], AbstractContextManager[Any]]) -> None:
        """Copies, writes and commits what was begun, and lets go of older checkpoints."""
        begun = self.ended
        assert begun is not None

        def copy_all() -> None:
            nonlocal pieces
            try:
                pieces = self.host.copy(pieces, ready) if self.config.asynchronous else pieces
            finally:
                self.copied.set()

        try:
            error = checkpoint.attempt(copy_all, self.writers)
            if error:
                error = f"the checkpoint of step {begun.step} could not be copied to host memory: {error}"
            else:
                error = checkpoint.save(self.folder, begun.step, pieces, begun.facts, self.writers, self.permit)
            if not error and self.world.is_main:
                self.prune(begun)
        except BaseException as raised:  # such as a rank that was lost: raised where the loop waits for the save
            self.failure = raised
            return
        self.ended = dataclasses.replace(begun, error=error, seconds=time.perf_counter() - started)

    def prune(self, begun: Saved) -> None:
        """Lets go of older checkpoints; where that fails, `begun` is committed all the same."""
        best_step = begun.facts.get("progress", {}).get("best_step")
        try:
            # A run that has gone back to an older checkpoint saves that one again: not the newest, and in use.
            retention.prune(self.folder, self.config, (begun.step, best_step), log.warning)
        except (OSError, CheckpointError) as error:
            log.warning("older checkpoints in %s could not be looked through: %s", self.folder, error)

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
            self.stall += time.perf_counter() - waiting
        ended, failure = dataclasses.replace(self.ended, stall=self.stall), self.failure
        self.ended = self.failure = None
        if failure is not None:
            raise failure
        return ended

    def close(self) -> None:
        """Gives a save under way, which nobody will ask for any more, some seconds to end; called when a rank fails."""
        if self.thread is not None:
            self.thread.join(SECONDS_AT_EXIT)


def side_stream() -> Callable[[], AbstractContextManager[Any]]:
    """A context for copies from the GPU that begin after what it was asked so far, and that end with it."""
    asked = torch.cuda.Event()
    asked.record()
    stream = torch.cuda.Stream()

    @contextmanager
    def ready() -> Iterator[None]:
        stream.wait_event(asked)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            stream.synchronize()  # an error must not leave copies under way: their sources change next

    return ready
