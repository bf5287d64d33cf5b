"""Which samples made up every optimizer step, so that anyone can prove that an epoch used each of them once.

    RUN/samples/rank-N.jsonl    {"step": 7, "ids": [12, 3, 44, 8]}: rank N's share of step 7, one line per step

A resume at step s drops what comes later, so the lines always tell the history that the weights have.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from dgt.training.checkpoint import write_durably
from dgt.training.run_folder import RunFolder
from dgt.training.world import World

log = logging.getLogger("dgt")


class SampleLog:
    """One rank's file; all ranks make theirs, because earlier lines are forgotten even where no more are written."""

    def __init__(self, folder: Path, world: World, resumed_step: int, enabled: bool):
        """Forgets what comes after `resumed_step`; rank 0 also in the files of ranks that there are no more."""
        self.path = folder / f"rank-{world.rank}.jsonl"
        self.enabled = enabled
        self.has_failed = False
        try:
            if enabled:
                folder.mkdir(parents=True, exist_ok=True)
            mine = [self.path] if self.path.exists() else []
            orphans = [path for path in files(folder) if rank_of(path) >= world.size] if world.is_main else []
            for path in mine + orphans:
                forget_after(path, resumed_step)
        except OSError as error:
            self.failed("earlier sample ids could not be read or written", error)

    def step(self, step: int, ids: Sequence[int]) -> None:
        """Appends one line; a full disk costs lines, not the run."""
        if not self.enabled:
            return
        line = json.dumps({"step": step, "ids": list(ids)}) + "\n"
        try:
            # opened anew each time: what was closed survives the death of this node on a network file system
            with self.path.open("a") as file:
                file.write("\n" + line if self.has_failed else line)  # the failed line may have left its beginning
            self.has_failed = False
        except OSError as error:
            self.failed(f"the sample ids of step {step} could not be written", error)

    def failed(self, what: str, error: OSError) -> None:
        """Says what is missing; of failures in a row only the first is reported."""
        if not self.has_failed:
            log.error("%s to %s: %s; the run goes on, and so do its attempts to write", what, self.path, error)
        self.has_failed = True


def files(folder: Path) -> list[Path]:
    """The files of all ranks that ever were, by rank."""
    return sorted(folder.glob("rank-[0-9]*.jsonl"), key=rank_of)


def rank_of(path: Path) -> int:
    """The rank that a file belongs to."""
    return int(path.stem.removeprefix("rank-"))


def forget_after(path: Path, step: int) -> None:
    """Drops, at once, the lines of later steps and those that a kill or full disk has cut off."""
    write_durably(path, "".join(json.dumps({"step": s, "ids": ids}) + "\n" for s, ids in lines(path) if s <= step))


def lines(path: Path) -> Iterator[tuple[int, list[int]]]:
    """The whole lines of one file: step and sample ids."""
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
            yield row["step"], row["ids"]
        except (ValueError, KeyError, TypeError):
            continue


def surviving_samples(run: Path) -> dict[int, list[int]]:
    """Step -> sample ids of its global batch, in the order of ranks, of a run with monitor.log_samples."""
    found: dict[int, list[int]] = {}
    for path in files(RunFolder(run).samples):
        for step, ids in lines(path):
            found.setdefault(step, []).extend(ids)
    return dict(sorted(found.items()))
