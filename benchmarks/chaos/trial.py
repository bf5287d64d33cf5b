"""One run from its beginning to its end under faults, and the comparison with the run that met none."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.chaos import ranks
from benchmarks.chaos.evidence import differences
from benchmarks.chaos.faults import Fault, Scene
from dgt.config import Config
from dgt.training import checkpoint

PATIENCE = 90.0
"""Seconds after which an attempt that goes on without end counts as lost; those in which other programs had the
processor do not count."""


@dataclass(frozen=True)
class Reference:
    """The undisturbed run."""

    run: Path
    scene: Scene
    steps: dict[tuple[str, str, int], dict[str, Any]]
    """What each rank reported of each step and evaluation."""


@dataclass
class Trial:
    """A run under faults, and what came of it."""

    config: Config
    reference: Reference
    records: Path
    sabotage: ranks.Sabotage | None = None
    rounds: list[list[Fault]] = field(default_factory=list)
    trouble: str = ""
    """Why the run is lost; empty while it is not."""
    finished: bool = False

    @property
    def met(self) -> list[Fault]:
        """All faults that happened."""
        return [fault for faults_of_round in self.rounds for fault in faults_of_round if fault.happened]

    def go_on(self, planned: list[Fault], rng: random.Random) -> None:
        """One round: an attempt under the planned faults, which must continue where the last one was saved."""
        self.rounds.append(planned)
        records = self.records / f"attempt-{len(self.rounds):03d}"
        deeds = sorted(((at, i, deed) for i, f in enumerate(planned) for at, deed in f.deeds), key=lambda d: d[0])
        nobody = ranks.Attempt([], records, time.monotonic())
        for _, i, deed in [d for d in deeds if d[0] < 0]:
            planned[i].happened = deed(nobody)
        saved = newest_whole(self.config.run_dir / "checkpoints")

        orders = [order for fault in planned for order in fault.orders]
        attempt = ranks.start(self.config, self.reference.scene.world_size, orders, records, self.sabotage)
        try:
            self.attend(attempt, planned, [d for d in deeds if d[0] >= 0], rng)
        finally:
            attempt.kill()
            (self.config.run_dir.parent / "filler").unlink(missing_ok=True)
        self.judge(attempt, planned, saved)
        for left in (self.config.run_dir / "checkpoints").glob("*.damaged"):
            shutil.rmtree(left)

    def attend(self, attempt: ranks.Attempt, planned: list[Fault], deeds: list[Any], rng: random.Random) -> None:
        """Does the deeds in time, and kills the other ranks some time after one has died, as a launcher does."""
        end = None
        while attempt.running():
            now = time.monotonic() - attempt.started
            while deeds and deeds[0][0] <= now:
                _, i, deed = deeds.pop(0)
                planned[i].happened = deed(attempt) or planned[i].happened
            if end is None and attempt.died():
                end = now + rng.choice((0.0, rng.uniform(0, 0.5), 5.0))
            if end is not None and now >= end:
                return
            if now > PATIENCE and now - attempt.waited() > PATIENCE:
                self.trouble = f"round {len(self.rounds)}: no end after {now:.0f} s"
                return
            time.sleep(0.005)

    def judge(self, attempt: ranks.Attempt, planned: list[Fault], saved: int) -> None:
        """Finds out which faults happened, whether they explain how the attempt ended, and compares every step."""
        reports = list(ranks.lines(attempt.records))
        fired = [tuple(line["fired"]) for _, line in reports if "fired" in line]
        died_writing = any(process.exitcode == -signal.SIGXFSZ for process in attempt.processes)
        for fault in planned:
            mine = [(order.kind, order.number, order.action) for order in fault.orders]
            fault.happened |= any(order in fired for order in mine)
            if fault.victim is not None:
                fault.happened &= attempt.processes[fault.victim].exitcode != 0
            fault.happened |= died_writing and fault.name == "death in the middle of a write"
        happened = [fault for fault in planned if fault.happened]
        round_ = f"round {len(self.rounds)}"
        self.compare(reports, saved, round_)
        ends = {line["status"]: line["at"] for _, line in reports if "status" in line}
        complete = all(process.exitcode == 0 for process in attempt.processes)
        if not complete and not any(fault.may_end for fault in happened):
            errors = [line["error"] for _, line in reports if "error" in line]
            codes = [process.exitcode for process in attempt.processes]
            self.trouble = self.trouble or f"{round_}: ended without a cause, exit codes {codes}: {errors}"
        if "interrupted" in ends:
            if not any(fault.may_stop for fault in happened):
                self.trouble = self.trouble or f"{round_}: interrupted although nobody asked for it"
            found = checkpoint.committed(self.config.run_dir / "checkpoints")
            if complete and ends["interrupted"] and [p.name for p in found[:1]] != [f"step_{ends['interrupted']:08d}"]:
                self.trouble = self.trouble or f"{round_}: step {ends['interrupted']} was not saved: {found[:1]}"
        self.finished = complete and "finished" in ends

    def compare(self, reports: list[tuple[str, dict[str, Any]]], saved: int, round_: str) -> None:
        """Every step must be the undisturbed run's, and the first one the next after the newest whole checkpoint."""
        first: dict[str, int] = {}
        for rank, line in reports:
            if (key := key_of(rank, line)) is None:
                continue
            if key[1] == "step" and first.setdefault(rank, key[2]) == key[2] != saved + 1:
                self.trouble = self.trouble or f"{round_}: {rank} began with step {key[2]}, after {saved} was saved"
            if line != self.reference.steps.get(key):
                wanted = self.reference.steps.get(key)
                self.trouble = self.trouble or f"{round_}: {rank} has {line} instead of {wanted}"

    def conclude(self) -> None:
        """Runs to the end without faults, and compares all that is left behind."""
        rng = random.Random(0)
        for _ in range(2):
            if not self.finished and not self.trouble:
                self.go_on([], rng)
        if not self.finished:
            self.trouble = self.trouble or "it did not finish"
        if not self.trouble:
            full = any(f.name.startswith(("a full disk", "a write that", "an error of the")) for f in self.met)
            self.trouble = "; ".join(differences(self.config.run_dir, self.reference.run, full)[:4])


def newest_whole(folder: Path) -> int:
    """The step that an attempt must go on from: damage of an earlier round may not have been met yet. 0 = the start."""
    for path in checkpoint.committed(folder):
        with contextlib.suppress(checkpoint.DamagedError):
            return checkpoint.verify(path).step
    return 0


def key_of(rank: str, line: dict[str, Any]) -> tuple[str, str, int] | None:
    """What of the run a line of a record tells."""
    return next(((rank, what, line[what]) for what in ("step", "evaluation") if what in line), None)


def undisturbed(config: Config, world_size: int, records: Path, target: Path) -> Reference:
    """Runs without faults; `target` is the folder of the disturbed runs that are to be compared with it."""
    attempt = ranks.start(config, world_size, [], records, None)
    for process in attempt.processes:
        process.join()
    seconds = time.monotonic() - attempt.started
    reports = list(ranks.lines(records))
    counts = [line["counts"] for _, line in reports if "counts" in line]
    if len(counts) != world_size:
        raise RuntimeError(f"the undisturbed run failed, see {records}")
    newest = checkpoint.committed(config.run_dir / "checkpoints")[0]
    size = min(path.stat().st_size for path in newest.glob("rank-*"))
    steps = {key: line for rank, line in reports if (key := key_of(rank, line))}
    return Reference(config.run_dir, Scene(world_size, seconds, tuple(counts), target, size), steps)
