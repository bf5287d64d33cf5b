"""The code and the resolved configuration that a job runs, copied into the run's folder when it is submitted.

    RUN/code/DIGEST/
        dgt/ data_pipeline/ launch/ slurm/    what git tracks or would track, with uncommitted changes; nothing ignored
        config.yaml                           the resolved configuration
        snapshot.json                         where it came from: folder, commit, whether there were changes

A requeued job must not see later edits, so jobs start the program inside the snapshot. The folder gets its name, the
digest of its content, by one rename when it is whole; the same code and configuration are copied once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

from launch.runs import LaunchError

PACKAGES = ("dgt", "data_pipeline", "launch", "slurm")
CONFIG, FACTS = "config.yaml", "snapshot.json"
"""What a snapshot holds besides the code."""
DIGEST_LENGTH = 12
"""Hexadecimal digits of the folder's name: 48 bits, far beyond the number of snapshots of one run."""


def take(run: Path, config_yaml: str, root: Path | None = None) -> Path:
    """Copies the code under `root` (default: what is running now) and the configuration; returns the snapshot.

    The caller holds the run's lock. Raises LaunchError where the folder cannot be written, or where the snapshot that
    is there is not to be trusted.
    """
    root = root or Path(__file__).resolve().parents[1]
    files = code_files(root)
    folder = run / "code"
    known = folder / digest_of(root, files, config_yaml)
    if known.is_dir():
        check_unchanged(known)
        return known
    temporary = folder / f".{known.name}.new"
    try:
        for left in folder.glob(".*.new"):  # by a submission that was killed; the run's lock says that none is alive
            shutil.rmtree(left, ignore_errors=True)
        for name in files:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, temporary / name)
        (temporary / CONFIG).write_text(config_yaml)
        (temporary / FACTS).write_text(json.dumps({"source": str(root), **git_state(root)}, indent=1) + "\n")
        final = folder / digest_of(temporary, files, config_yaml)  # of what was copied: the source can change meanwhile
        if not final.is_dir():
            temporary.rename(final)
    except OSError as error:
        raise LaunchError(f"the code could not be copied to {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def digest_of(root: Path, files: list[str], config_yaml: str) -> str:
    """The name of a snapshot of these files and this configuration."""
    digest = hashlib.sha256(config_yaml.encode())
    for name in files:
        digest.update(f"\0{name}\0".encode())
        digest.update((root / name).read_bytes())
    return digest.hexdigest()[:DIGEST_LENGTH]


def check_unchanged(snapshot: Path) -> None:
    """Raises LaunchError where a snapshot that is to be run is somebody else's, or no longer what its name says."""
    try:
        if snapshot.stat().st_uid != os.getuid():
            raise LaunchError(f"{snapshot} belongs to another user, whose code would run as you; choose another name")
        paths = (path for path in snapshot.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        files = sorted({str(path.relative_to(snapshot)) for path in paths} - {CONFIG, FACTS})
        found = digest_of(snapshot, files, (snapshot / CONFIG).read_text())
    except OSError as error:
        found = error.strerror or str(error)
    if found != snapshot.name:
        raise LaunchError(f"{snapshot} has been changed since it was made ({found}); remove it, and submit again")


def code_files(root: Path) -> list[str]:
    """Names, relative to `root` and sorted, of the files that make up the program.

    Raises LaunchError for a checkout that git cannot list: files that it ignores may hold secrets.
    """
    listed = git(root, "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *PACKAGES)
    names = [name for name in (listed or "").split("\0") if name and (root / name).is_file()]
    if "launch/train.py" not in names and (root / ".git").exists():
        raise LaunchError(
            f"git cannot list the files of {root}, so it is not known which of them belong to the code: "
            f"see `git -C {root} status`"
        )
    if "launch/train.py" not in names:  # an installed package, or a snapshot
        paths = (path for package in PACKAGES for path in (root / package).rglob("*"))
        names = [str(p.relative_to(root)) for p in paths if p.is_file() and "__pycache__" not in p.parts]
    return sorted(names)


def git_state(root: Path) -> dict[str, object]:
    """The commit that `root` stands at and the files that differ from it; None where there is no git."""
    commit = git(root, "rev-parse", "HEAD")
    changed = git(root, "status", "--porcelain", "--", *PACKAGES)
    return {"commit": commit and commit.strip(), "changed": None if changed is None else changed.splitlines()}


def git(root: Path, *arguments: str) -> str | None:
    """What git prints; None where it fails or is not installed."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
