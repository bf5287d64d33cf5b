"""Which checkpoints of a run are kept, and what is removed or loses its name; called on one rank."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from dgt.training.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    UnreadableError,
    committed,
    progress_in,
    read_manifest,
)


def discard_unfinished(folder: Path) -> None:
    """Removes what saves that were cut off have left behind."""
    for path in folder.glob("step_*.saving"):
        shutil.rmtree(path, ignore_errors=True)


def abandon(folder: Path) -> None:
    """Takes the names from checkpoints of steps that the run went back behind, so that no attempt goes on from them.

    Each return is counted in the progress of the checkpoint that it leads to: what is of a later step and of fewer
    returns was left behind. Raises OSError, UnreadableError.
    """
    most = 0
    for path in reversed(committed(folder)):
        try:
            rollbacks = progress_in(read_manifest(path)).get("rollbacks", 0)
        except UnreadableError:
            raise
        except CheckpointError:  # damaged, or of another version: for `newest` to judge
            continue
        if rollbacks < most:
            aside = path.with_suffix(".abandoned")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        most = max(most, rollbacks)


def prune(
    folder: Path, config: CheckpointConfig, spared: Collection[int | None], report: Callable[[str], None]
) -> None:
    """Removes the committed checkpoints that `config` does not keep and whose step is not `spared`. For one rank.

    Spared, too, is what the newest ones call the best: a run may have to go on from any of them. Those that lack a file
    or a part of one count for nothing, and stay. A folder loses its committed name first, so that a removal that is cut
    off leaves nothing that looks whole. One that cannot be removed (somebody has it open on a network file system) is
    reported and left for the next attempt. Of the damaged and of the abandoned ones the newest is kept.
    """
    abandon(folder)
    kept, spared = 0, set(spared)
    for path in committed(folder):
        step = int(path.name.removeprefix("step_"))
        if kept < config.keep_last:
            if manifest := manifest_of_whole(path):
                kept += 1
                spared.add(progress_in(manifest).get("best_step"))
            continue
        if step in spared or (config.keep_every_steps and step % config.keep_every_steps == 0):
            continue
        doomed = path.with_suffix(".saving")
        try:
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            report(f"the old checkpoint {path} could not be removed whole: {error}")
    for suffix in ("damaged", "abandoned"):
        for path in sorted(folder.glob(f"step_*.{suffix}"))[:-1]:
            shutil.rmtree(path, ignore_errors=True)


def manifest_of_whole(path: Path) -> dict[str, Any] | None:
    """The manifest of a committed checkpoint; None where it is not its own or a file has another size than it says."""
    try:
        manifest = read_manifest(path)
        sizes = {name: (path / name).stat().st_size for name in manifest["files"]}
    except (CheckpointError, OSError):
        return None
    return manifest if all(sizes[name] == entry["size"] for name, entry in manifest["files"].items()) else None
