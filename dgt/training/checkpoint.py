"""Checkpoints: saved beside, committed by one rename, verified before they are trusted.

    RUN/checkpoints/
        step_00001200/           complete: the rename that made it was the last act of the save
            __0_0.distcp ...     tensors, one file or more per rank (torch.distributed.checkpoint)
            .metadata            which tensor lies where
            manifest.json        step, progress, configuration; size and SHA-256 of every file
        step_00001300.saving/    a save under way, or one that was cut off; never read, removed by the next run
        step_00001100.damaged/   failed verification; kept for inspection, never read

Any number of ranks, under any engine, loads what any other has saved: tensors are stored by parameter name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from dgt.training.world import World

FORMAT = 1
MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """No checkpoint could be loaded although there are some, or one could not be written."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every_steps: int = 1000
    """Save after every this many optimizer steps (and at the end, after a better evaluation, at an interruption)."""
    keep_last: int = 3
    """How many of the newest are kept; the best one is kept besides."""
    on_error: Literal["continue", "stop"] = "continue"
    """What to do when a save fails, for instance on a full disk: train on with the previous one, or stop."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Checkpoint:
    """One committed checkpoint."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done when it was saved."""
        return self.manifest["step"]


def save(folder: Path, step: int, tensors: dict[str, Any], facts: dict[str, Any], world: World) -> str | None:
    """Writes one checkpoint with every rank's part of `tensors`; all ranks call it and get the same answer.

    `facts` goes into the manifest (JSON). Returns None when committed, else one sentence saying what went wrong; what
    was there before is untouched either way.
    """
    final = folder / f"step_{step:08d}"
    temporary = final.with_suffix(".saving")

    def prepare() -> None:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    written: dict[str, dict[str, Any]] = {}

    def write() -> None:
        dcp.save(tensors, checkpoint_id=temporary, process_group=world.control)
        mine = [p for p in temporary.iterdir() if p.name.startswith(f"__{world.rank}_")]
        mine += [temporary / ".metadata"] if world.is_main else []
        written.update({path.name: described(path) for path in mine})

    def commit() -> None:
        if world.is_main:
            manifest = {"format": FORMAT, "step": step, **facts, "files": files}
            write_durably(temporary / MANIFEST, json.dumps(manifest, indent=1))
            sync_folder(temporary)
            temporary.rename(final)
            sync_folder(folder)

    error = attempt(prepare, world) or attempt(write, world)
    files = {name: entry for part in world.gather(written) for name, entry in part.items()}
    error = error or attempt(commit, world)
    if not error:
        return None

    def clean_up() -> int:
        free = shutil.disk_usage(folder).free
        shutil.rmtree(temporary, ignore_errors=True)
        return free

    # torch reports a full disk as a mismatch of positions, so the free space belongs into the sentence.
    free = world.on_main(clean_up)
    return f"the checkpoint of step {step} could not be written to {folder} ({free / 1e6:.0f} MB free): {error}"


def attempt(act: Callable[[], None], world: World) -> str | None:
    """Runs `act` on every rank; the first rank's failure in words, the same on all ranks, or None."""
    failure = None
    try:
        act()
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        failure = f"{type(cause).__name__}: {cause}"
    except (OSError, RuntimeError) as error:
        failure = f"{type(error).__name__}: {error}"
    return next((f for f in world.gather(failure) if f), None)


def described(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file, which is made durable on the way."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def write_durably(path: Path, text: str) -> None:
    """Writes `text` and waits until it is on the disk."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def committed(folder: Path) -> list[Path]:
    """Folders of the committed checkpoints, newest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if re.fullmatch(r"step_\d{8,}", p.name)), reverse=True)


def verify(path: Path) -> Checkpoint:
    """Reads the manifest and checks every file against it. Raises CheckpointError naming what is damaged or missing."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: unreadable ({type(error).__name__}: {error})") from None
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {manifest['format']}, this version reads {FORMAT}")
    for name, expected in files.items():
        file = path / name
        try:
            found = described(file)
        except OSError as error:
            raise CheckpointError(f"{file}: {error.strerror or error}") from None
        if found["size"] != expected["size"]:
            raise CheckpointError(f"{file}: {found['size']} bytes, the manifest says {expected['size']}")
        if found["sha256"] != expected["sha256"]:
            raise CheckpointError(f"{file}: its checksum is not the manifest's, so its content has changed")
    return Checkpoint(path, manifest)


def newest(folder: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies; None where there is none at all. Called on one rank.

    Damaged ones are reported, set aside under the suffix .damaged, and passed over. Raises CheckpointError where
    there are checkpoints but none is whole: training never starts afresh silently.
    """
    candidates = committed(folder)
    for path in candidates:
        try:
            return verify(path)
        except CheckpointError as error:
            report(f"checkpoint passed over: {error}")
            aside = path.with_suffix(".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    if candidates or any(folder.glob("step_*.damaged")):
        raise CheckpointError(
            f"no checkpoint in {folder} is whole; the damaged ones are kept there under the suffix .damaged. Remove "
            "that folder to start afresh"
        )
    return None


def read_tensors(checkpoint: Checkpoint, tensors: dict[str, Any], world: World) -> None:
    """Fills `tensors`, of this rank's layout, in place. Raises CheckpointError where names or shapes do not match."""
    try:
        dcp.load(tensors, checkpoint_id=checkpoint.path, process_group=world.control)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{checkpoint.path}: does not fit this network or optimizer: {cause}") from None


def discard_unfinished(folder: Path) -> None:
    """Removes what saves that were cut off have left behind."""
    for path in folder.glob("step_*.saving"):
        shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, keep_last: int, best_step: int | None) -> None:
    """Removes all committed checkpoints but the `keep_last` newest and that of `best_step`.

    A folder loses its committed name first, so that a removal that is cut off leaves nothing that looks whole.
    """
    for path in committed(folder)[keep_last:]:
        if best_step is None or path.name != f"step_{best_step:08d}":
            doomed = path.with_suffix(".saving")
            path.rename(doomed)
            shutil.rmtree(doomed)
