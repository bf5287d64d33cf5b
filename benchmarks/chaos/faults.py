"""The faults: what each does to a run, and how it is known that it really happened."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.chaos.moments import BYTES, Order
from benchmarks.chaos.ranks import Attempt
from dgt.training import checkpoint

EARLY = 5
"""Faults come in this first part of an attempt, so that a run takes several attempts."""

Deed = Callable[[Attempt], bool]
"""Does something to a running attempt; returns whether it could."""


@dataclass(frozen=True)
class Scene:
    """Where faults are planned."""

    world_size: int
    seconds: float
    """How long an undisturbed attempt takes."""
    counts: tuple[Mapping[str, int], ...]
    """How often each moment comes in each rank of an undisturbed run."""
    run: Path
    checkpoint_bytes: int
    """Of one rank's file."""


@dataclass
class Fault:
    """One planned fault."""

    name: str
    orders: list[Order] = field(default_factory=list)
    """Carried out by the ranks themselves."""
    deeds: list[tuple[float, Deed]] = field(default_factory=list)
    """Carried out from outside, so many seconds after the start."""
    may_end: bool = True
    """The attempt may end with an error or a dead rank."""
    may_stop: bool = False
    """The attempt may end as interrupted."""
    victim: int | None = None
    """The rank that dies where the fault happens."""
    happened: bool = False


def send(number: int, rank: int) -> Deed:
    """A deed: one signal to one rank."""

    def deed(attempt: Attempt) -> bool:
        process = attempt.processes[rank]
        if not process.is_alive():
            return False
        os.kill(process.pid, number)
        return True

    return deed


def moment(rng: random.Random, scene: Scene, kinds: tuple[str, ...], action: str) -> list[Order]:
    """An order for a random one of these moments, early in a run, on a random rank."""
    rank = rng.randrange(scene.world_size)
    possible = [kind for kind in kinds if scene.counts[rank].get(kind)]
    if not possible:
        rank, possible = 0, [kind for kind in kinds if scene.counts[0].get(kind)]
    kind = rng.choice(possible)
    return [Order(kind, rng.randint(1, -(-scene.counts[rank][kind] // EARLY)), rank, action)]


def killed(rng: random.Random, scene: Scene) -> Fault:
    """SIGKILL of a random rank at a random time, start-up included."""
    rank, at = rng.randrange(scene.world_size), rng.uniform(0, scene.seconds / 3)
    return Fault("SIGKILL at a random time", deeds=[(at, send(signal.SIGKILL, rank))], victim=rank)


def killed_in_the_loop(rng: random.Random, scene: Scene) -> Fault:
    """SIGKILL in or after a training step, or in an evaluation."""
    orders = moment(rng, scene, ("loss", "step", "evaluation"), "kill")
    return Fault(f"SIGKILL at a moment of the loop: {orders[0].kind}", orders)


def killed_in_a_commit(rng: random.Random, scene: Scene) -> Fault:
    """SIGKILL where a checkpoint's files are made, made durable, renamed, removed, or read."""
    kinds = ("create", "fsync", "rename", "remove", "read", "save", "saved")
    orders = moment(rng, scene, kinds, "kill")
    return Fault(f"SIGKILL at a moment of a checkpoint: {orders[0].kind}", orders)


def killed_in_a_write(rng: random.Random, scene: Scene) -> Fault:
    """Death in the middle of writing a checkpoint's file."""
    order = Order(BYTES, rng.randint(1 << 16, scene.checkpoint_bytes - 1), rng.randrange(scene.world_size), "kill")
    return Fault("death in the middle of a write", [order])


def failing_write(rng: random.Random, scene: Scene) -> Fault:
    """A write that fails half way."""
    order = Order(BYTES, rng.randint(1 << 16, scene.checkpoint_bytes - 1), rng.randrange(scene.world_size), "fail")
    return Fault("a write that fails half way", [order])


def failing_operation(rng: random.Random, scene: Scene) -> Fault:
    """One error of the file system where a checkpoint's files are made, made durable, renamed, removed or read."""
    orders = moment(rng, scene, ("create", "fsync", "rename", "remove", "read"), "fail")
    return Fault(f"an error of the file system: {orders[0].kind}", orders)


def full_disk(rng: random.Random, scene: Scene) -> Fault:
    """The disk of the run is full for a while, but for less than a checkpoint."""
    left, filler = rng.randrange(scene.checkpoint_bytes), scene.run.parent / "filler"

    def fill(attempt: Attempt) -> bool:
        free = os.statvfs(filler.parent)
        size = free.f_bavail * free.f_frsize - left
        if size <= 0 or not attempt.running() or not filler.parent.is_mount():  # never fill the machine's own disk
            return False
        with filler.open("wb") as file, contextlib.suppress(OSError):  # a save may have taken the space meanwhile
            os.posix_fallocate(file.fileno(), 0, size)
            return True
        return False

    def free(_attempt: Attempt) -> bool:
        filler.unlink(missing_ok=True)
        return False

    at = rng.uniform(0, scene.seconds / 3)
    return Fault("a full disk", deeds=[(at, fill), (at + rng.uniform(0.3, 1.5), free)])


def damaged(rng: random.Random, scene: Scene) -> Fault:
    """The newest checkpoint is not what was written: a flipped bit, a cut or a missing file. Done before the start."""
    what = rng.choice(("a flipped bit", "a cut file", "a missing file"))
    share = rng.random()

    def harm(_attempt: Attempt) -> bool:
        found = checkpoint.committed(scene.run / "checkpoints")
        if len(found) < 2:  # the last whole one must stay
            return False
        path = rng.choice(sorted(found[0].iterdir()))
        place = int(share * path.stat().st_size)
        if what == "a missing file":
            path.unlink()
        elif what == "a cut file":
            os.truncate(path, place)
        else:
            with path.open("r+b") as file:
                file.seek(place)
                byte = file.read(1)[0]
                file.seek(place)
                file.write(bytes([byte ^ (1 << rng.randrange(8))]))
        return True

    return Fault(f"a damaged checkpoint: {what}", deeds=[(-1.0, harm)], may_end=False)


def signalled(rng: random.Random, scene: Scene) -> Fault:
    """SIGTERM or SIGUSR2 to one rank alone, once or twice, at a random time; SIGTERM before any handler kills."""
    rank, at = rng.randrange(scene.world_size), rng.uniform(0.3, scene.seconds / 2)
    numbers = rng.choice(
        ((signal.SIGTERM,), (signal.SIGUSR2,), (signal.SIGTERM, signal.SIGUSR2), (signal.SIGUSR2,) * 2)
    )
    deeds = [(at + i * rng.uniform(0, 0.2), send(number, rank)) for i, number in enumerate(numbers)]
    name = " and ".join(number.name for number in numbers)
    return Fault(f"signals to one rank: {name}", deeds=deeds, may_stop=True)


def signalled_at_a_moment(rng: random.Random, scene: Scene) -> Fault:
    """SIGTERM or SIGUSR2 in one rank in the middle of an evaluation or of a checkpoint."""
    orders = moment(rng, scene, ("evaluation", "save", "fsync", "rename"), rng.choice(("term", "usr2")))
    return Fault(f"a signal at a moment: {orders[0].kind}", orders, may_end=False, may_stop=True)


def delayed(rng: random.Random, scene: Scene) -> Fault:
    """One rank stands still for up to a second and a half."""
    rank, at = rng.randrange(scene.world_size), rng.uniform(0, scene.seconds / 3)
    deeds = [(at, send(signal.SIGSTOP, rank)), (at + rng.uniform(0.1, 1.5), send(signal.SIGCONT, rank))]
    return Fault("a rank that stands still", deeds=deeds, may_end=False)


ENDING = (killed, killed_in_the_loop, killed_in_a_commit, killed_in_a_commit, killed_in_a_write, signalled,
          signalled_at_a_moment)  # fmt: skip
"""After one of these the run must be started again."""
PASSING = (failing_write, failing_operation, full_disk, damaged, delayed)
"""One of these may leave the attempt alive."""


def plan(rng: random.Random, scene: Scene) -> list[Fault]:
    """One to three random faults for a round."""
    passing = rng.sample(PASSING, rng.choice((0, 1, 1, 2)))
    return [kind(rng, scene) for kind in (rng.choice(ENDING), *passing)]
