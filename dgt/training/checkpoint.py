"""Checkpoints: saved beside, committed by one rename, verified before they are trusted.

    RUN/checkpoints/
        step_00001200/           complete: the rename that made it was the last act of the save
            rank-00000.safetensors ...   each rank's pieces of the tensors (dgt/training/tensor_files.py)
            manifest.json        step, progress, configuration, tensors; size and SHA-256 of every file
        step_00001300.0f3a96c2.saving/   a save under way, or one that was cut off; removed by the next attempt
        step_00001100.damaged/   failed verification; the newest such one is kept for inspection
        step_00001000.abandoned/ what the run went back behind because of bad steps; the newest is kept, too

What has such a suffix is never read.

Any number of ranks, under any engine, loads what any other has saved: tensors are stored by parameter name. What may
be relied upon on which file system is said in dgt/training/files.py; what is kept, in dgt/training/retention.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar

from dgt.training import tensor_files
from dgt.training.files import (
    SHORT_PATIENCE,
    await_sizes,
    described,
    free_space,
    patiently,
    rename,
    sync_folder,
    write_durably,
)
from dgt.training.interrupt import SupersededError
from dgt.training.pieces import Pieces
from dgt.training.tensor_files import TensorFileError, TensorFiles
from dgt.training.world import World

Result = TypeVar("Result")

FORMAT = 2
MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint could not be loaded or written; the message says which and why."""


class DamagedError(CheckpointError):
    """A checkpoint is not what was saved: a file is missing, cut or changed."""


class UnreadableError(CheckpointError):
    """The disk does not answer, so that a checkpoint cannot be judged now; it may be whole."""


class SaveError(CheckpointError):
    """A checkpoint that had to be written could not be; what was there before is untouched."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every_steps: int = 1000
    """Save after every this many optimizer steps (and at the end, after a better evaluation, at an interruption)."""
    keep_last: int = 3
    """How many of the newest are kept; what each of them calls the best is kept besides."""
    keep_every_steps: int = 0
    """Keep for good those of every this many optimizer steps, too; 0 = none."""
    asynchronous: bool = True
    """Train on while a thread copies the tensors to host memory, which then holds them once more, and writes them; else
    wait for the disk."""
    on_error: Literal["continue", "stop"] = "continue"
    """What to do when a save fails, for instance on a full disk: train on with the previous one, or stop."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.keep_every_steps < 0:
            raise ValueError(f"keep_every_steps: must be 0 (none) or more, got {self.keep_every_steps}")


@dataclass(frozen=True)
class Checkpoint:
    """One committed checkpoint."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done when it was saved."""
        return self.manifest["step"]

    @property
    def best_step(self) -> int | None:
        """Step of the best result until then; None where nothing was evaluated."""
        return progress_in(self.manifest).get("best_step")


def save(
    folder: Path,
    step: int,
    pieces: Pieces,
    facts: dict[str, Any],
    world: World,
    permit: Callable[[], None] = lambda: None,
) -> str | None:
    """Writes one checkpoint with every rank's `pieces`; all ranks call it and get the same answer.

    `permit` is called on rank 0 before anything is written and just before the commit; it raises SupersededError where
    the run is another attempt's, and then so does this, on all ranks.

    `facts` goes into the manifest (JSON). Where the step has a checkpoint, which then is of the same tensors because it
    was resumed from, only the manifest is replaced. Returns None when committed, else one sentence saying what went
    wrong; what was there before is untouched either way.
    """
    final = folder / f"step_{step:08d}"
    try:
        is_there = world.on_main(final.exists)
    except OSError as error:  # raised on all ranks alike
        return f"{final} cannot be looked for: {error}"
    if is_there:

        def replace() -> None:
            if world.is_main:
                permit()
                replace_facts(final, facts)

        failure = attempt(replace, world)
        return failure and f"the manifest of {final} could not be replaced: {failure}"

    # A name of its own: an attempt that does not know yet that another has taken over must not meet that one's files.
    temporary = final.with_suffix(f".{world.on_main(lambda: secrets.token_hex(4))}.saving")
    try:
        failure = write_new(temporary, final, {"format": FORMAT, "step": step, **facts}, pieces, world, permit)
        free = world.on_main(lambda: free_space(folder)) if failure else ""
    finally:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
    return failure and f"the checkpoint of step {step} could not be written to {folder} ({free}): {failure}"


def write_new(
    temporary: Path, final: Path, facts: dict[str, Any], pieces: Pieces, world: World, permit: Callable[[], None]
) -> str | None:
    """Writes the folder `temporary` and gives it its name `final`; returns and raises as `save` does."""

    def prepare() -> None:
        if world.is_main:
            permit()
            temporary.mkdir(parents=True)

    written: dict[str, dict[str, Any]] = {}

    def write() -> None:
        name = f"rank-{world.rank:05d}.safetensors"
        patiently(temporary.stat)
        written[name] = tensor_files.write(temporary / name, pieces)
        sync_folder(temporary)

    def commit() -> None:
        if world.is_main:
            await_sizes(temporary, {name: entry["size"] for name, entry in files.items()})
            write_manifest(temporary, facts | {"tensors": tensor_files.describe(pieces), "files": files})
            permit()
            rename(temporary, final)

    error = attempt(prepare, world) or attempt(write, world)
    files = {name: entry for part in world.gather(written) for name, entry in part.items()}
    return error or attempt(commit, world)


def attempt(act: Callable[[], None], world: World) -> str | None:
    """Runs `act` on every rank; the first rank's failure in words, the same on all ranks, or None.

    Raises SupersededError on every rank where one did.
    """
    failure, superseded = None, None
    try:
        act()
    except SupersededError as error:
        superseded = error
    except Exception as error:  # of any kind: the other ranks wait for this one's answer
        failure = f"{type(error).__name__}: {error}"
    told = world.gather((failure, superseded))
    if lost := next((e for _, e in told if e), None):
        raise lost
    return next((f for f, _ in told if f), None)


def write_manifest(path: Path, body: dict[str, Any]) -> None:
    """Writes the manifest of the checkpoint in `path`, with a checksum of itself."""
    write_durably(path / MANIFEST, json.dumps({"sha256": digest(body), **body}, indent=1))


def digest(body: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content, whatever its layout."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def replace_facts(path: Path, facts: dict[str, Any]) -> None:
    """Replaces what the manifest says beside the tensors' files."""
    manifest = verify(path).manifest
    kept = {key: manifest[key] for key in ("format", "step", "tensors", "files")}
    write_manifest(path, kept | facts)


def committed(folder: Path) -> list[Path]:
    """Folders of the committed checkpoints, newest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if re.fullmatch(r"step_\d{8,}", p.name)), reverse=True)


def verify(path: Path) -> Checkpoint:
    """Reads the manifest and checks it and every file against it.

    Raises DamagedError naming what is missing or changed, UnreadableError where the disk does not answer, and
    CheckpointError where another version wrote it.
    """
    manifest = read_manifest(path)
    for name, expected in manifest["files"].items():
        file = path / name
        found = patiently_read(file, described)
        if found["size"] != expected["size"]:
            raise DamagedError(f"{file}: {found['size']} bytes, the manifest says {expected['size']}")
        if found["sha256"] != expected["sha256"]:
            raise DamagedError(f"{file}: its checksum is not the manifest's, so its content has changed")
    return Checkpoint(path, manifest)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint in `path`, checked against its own checksum; raises as `verify` does."""
    file = path / MANIFEST
    text = patiently_read(file, Path.read_bytes)
    try:
        body = json.loads(text)
        stated, version, own = body.pop("sha256"), body["format"], digest(body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedError(f"{file}: is no manifest") from None
    if stated != own:
        raise DamagedError(f"{file}: its checksum is not its own, so its content has changed")
    if version != FORMAT:
        raise CheckpointError(f"{file}: is of checkpoint format {version}, this version reads {FORMAT}")
    match body:
        case {"step": int(), "files": dict(files)} if type(progress_in(body).get("best_step")) in (int, NoneType):
            pass
        case _:
            raise CheckpointError(f"{file}: says other things than a save writes; it is not read")
    if foreign := [name for name in files if not re.fullmatch(r"rank-\d{5,}\.safetensors", name)]:
        raise CheckpointError(f"{file}: names {foreign[0]!r}, a file that no save writes; it is not read")
    return body


def progress_in(manifest: dict[str, Any]) -> dict[str, Any]:
    """The progress that a manifest tells of; empty where it tells of none."""
    progress = manifest.get("progress")
    return progress if isinstance(progress, dict) else {}


def patiently_read(file: Path, read: Callable[[Path], Result]) -> Result:
    """What `read` gives; raises DamagedError where the file is missing, UnreadableError where the disk is silent."""

    def look() -> Result:
        os.listdir(file.parent)  # an NFS client that remembers too much of the folder then asks for it anew
        return read(file)

    try:
        return patiently(look, SHORT_PATIENCE)
    except FileNotFoundError:
        raise DamagedError(f"{file}: is missing") from None
    except OSError as error:
        raise UnreadableError(f"{file}: cannot be read now: {error.strerror or error}") from None


def newest(folder: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies; None where there is none at all. Called on one rank.

    Damaged ones are reported, set aside under the suffix .damaged, and passed over. Raises CheckpointError where
    there are checkpoints but none is whole, or where one cannot be judged: training never starts afresh silently.
    """
    candidates = committed(folder)
    for path in candidates:
        try:
            return verify(path)
        except DamagedError as error:
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


def find(folder: Path, which: str, report: Callable[[str], None]) -> Checkpoint:
    """The checkpoint "newest" or "best" in `folder`, or the one at the path `which`, verified. It changes nothing.

    "newest" passes over damaged ones, saying so. Raises CheckpointError where there is none, where the one that was
    named has gone or is damaged, or where the disk does not answer.
    """
    if which not in ("newest", "best"):
        if not Path(which).is_dir():
            raise CheckpointError(f"{which}: there is no such checkpoint; name a step_* folder, 'best' or 'newest'")
        return verify(Path(which))
    for path in committed(folder):
        try:
            newest = verify(path)
        except DamagedError as error:
            report(f"checkpoint passed over: {error}")
            continue
        if which == "best" and newest.best_step is None:
            raise CheckpointError(f"{folder}: nothing was evaluated before {path.name}, so none is the best")
        return newest if which == "newest" else best_of(newest)
    raise CheckpointError(f"there is no whole checkpoint in {folder}; has the run saved one?")


def best_of(newest: Checkpoint) -> Checkpoint:
    """The best checkpoint as `newest` knows it, verified; itself where it knows of none.

    Raises CheckpointError where it has gone or is damaged.
    """
    if newest.best_step in (None, newest.step):
        return newest
    path, instead = newest.path.with_name(f"step_{newest.best_step:08d}"), "name 'newest' or another step_* folder"
    if not path.is_dir():
        raise CheckpointError(f"the best checkpoint, {path}, is not there any more; {instead}")
    try:
        return verify(path)
    except DamagedError as error:
        raise CheckpointError(f"the best checkpoint is damaged ({error}); {instead}") from None


@contextmanager
def wording(checkpoint: Checkpoint) -> Iterator[None]:
    """Turns what reading a checkpoint's files can raise into UnreadableError or CheckpointError."""
    try:
        yield
    except OSError as error:
        raise UnreadableError(f"{checkpoint.path}: cannot be read now: {error}") from None
    except TensorFileError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from None


def tensors_in(checkpoint: Checkpoint) -> TensorFiles:
    """The tensors of a verified checkpoint, readable by name. Raises TensorFileError, OSError; see `wording`."""
    files = [checkpoint.path / name for name in checkpoint.manifest["files"]]
    return TensorFiles(files, checkpoint.manifest["tensors"])


def read_pieces(checkpoint: Checkpoint, pieces: Pieces, world: World) -> None:
    """Fills `pieces` in place, whatever ranks and engine have saved them; all ranks call it, and all raise alike.

    Raises CheckpointError where names or shapes are not those that were saved, UnreadableError where the disk does not
    answer.
    """
    unreadable = ""

    def read() -> None:
        nonlocal unreadable
        try:
            stored = tensors_in(checkpoint)
            if foreign := sorted(stored.tensors.keys() - pieces.keys()):
                raise CheckpointError(f"it also holds {foreign[0]} and {len(foreign) - 1} others, not known here")
            stored.fill(pieces)
        except OSError as error:
            unreadable = str(error)

    failure = attempt(read, world)
    if any_unreadable := next((u for u in world.gather(unreadable) if u), ""):
        raise UnreadableError(f"{checkpoint.path}: cannot be read now: {any_unreadable}")
    if failure:
        raise CheckpointError(f"{checkpoint.path}: does not fit this network or optimizer: {failure}")
