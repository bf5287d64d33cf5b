"""Which samples made up every optimizer step, so that anyone can prove that an epoch used each of them once.

    RUN/samples/rank-N.jsonl    {"step": 7, "epoch": 0, "consumed": 56, "ids": [12, 3, 44, 8], "used": true}

One line per batch: rank N's share of step 7, with the loader's position after it. `used` is false where the step was
bad and skipped, or was lost when the run returned to an earlier checkpoint; these batches do not come again in their
epoch. A resume drops what comes after its position, so the lines always tell the history that the weights have.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dgt.training import json_lines
from dgt.training.files import write_durably
from dgt.training.run_folder import RunFolder
from dgt.training.state import Progress, position
from dgt.training.world import World

log = logging.getLogger("dgt")


class SampleLog:
    """One rank's file; all ranks make theirs, because earlier lines are forgotten even where no more are written."""

    def __init__(self, folder: Path, world: World, resumed: Progress, enabled: bool):
        """Forgets what comes after `resumed`; rank 0 also in the files of ranks that there are no more."""
        self.path = folder / f"rank-{world.rank}.jsonl"
        self.enabled = enabled
        self.has_failed = False
        try:
            if enabled:
                folder.mkdir(parents=True, exist_ok=True)
            mine = [self.path] if self.path.exists() else []
            orphans = [path for path in files(folder) if rank_of(path) >= world.size] if world.is_main else []
            for path in mine + orphans:
                bring_to(path, resumed)
        except OSError as error:
            self.failed("earlier sample ids could not be read or written", error)

    def step(self, step: int, data: Mapping[str, Any], ids: Sequence[int], used: bool) -> None:
        """Appends one line; `data`: the loader's state after the batch. A full disk costs lines, not the run."""
        if not self.enabled:
            return
        epoch, consumed = position(data)
        row = {"step": step, "epoch": epoch, "consumed": consumed, "ids": list(ids), "used": used}
        try:
            json_lines.append(self.path, row)
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


def bring_to(path: Path, resumed: Progress) -> None:
    """Drops, at once, the lines of later batches and those that a kill or full disk has cut off.

    Batches that were served before, but whose steps `resumed` does not have, were not used.
    """
    reached = position(resumed.data)
    kept = [
        json.dumps({**row, "used": row["used"] and row["step"] <= resumed.step}) + "\n"
        for row in rows(path)
        if position(row) <= reached
    ]
    write_durably(path, "".join(kept))


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of one file."""
    for row in json_lines.read(path, "step", "epoch", "consumed", "used"):
        if isinstance(row.get("ids"), list):
            yield row


def surviving_samples(run: Path) -> dict[int, list[int]]:
    """Step -> sample ids of its global batch, in the order of ranks, of a run with monitor.log_samples."""
    found: dict[int, list[int]] = {}
    for path in files(RunFolder(run).samples):
        for row in rows(path):
            if row["used"]:
                found.setdefault(row["step"], []).extend(row["ids"])
    return dict(sorted(found.items()))


def served_samples(run: Path) -> dict[int, list[int]]:
    """Epoch -> ids of all samples that were served in it, whether their steps were used, skipped or lost."""
    found: dict[int, list[int]] = {}
    for path in files(RunFolder(run).samples):
        for row in rows(path):
            found.setdefault(row["epoch"], []).extend(row["ids"])
    return dict(sorted(found.items()))
