"""The output folder: whose it is, who may write into it at this moment, and what an unfinished run has left there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.prepare.options import COMMON_OPTIONS
from data_pipeline.shards.files import TEMPORARY_PREFIX, atomic_write, sync_folder
from data_pipeline.shards.source import DataError

RECORD_FILE = "prepare.json"
PROGRESS_FOLDER = ".progress"
"""What runs in progress know about finished shards; deleted when the set is complete."""

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


def claim(out: Path, record: dict[str, Any]) -> None:
    """Make `out` ours, or see that it is; raises DataError where it holds anything else.

    Several processes, on several hosts, may do so at once: one record is kept, and each compares its own with that.
    """
    path = out / RECORD_FILE
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        names = [name for name in sorted(os.listdir(out)) if not name.startswith(TEMPORARY_PREFIX)]
        if names and RECORD_FILE not in names:
            raise DataError(f"{out} is not empty (it holds {', '.join(names[:3])}); choose a new folder for --out.")
        create_once(path, json_bytes(record))
    differences = _differences(read_record(out), record)
    if differences:
        raise DataError(
            f"{out} was made differently: {'; '.join(differences)}. "
            "Run with the same source and options to continue it, choose another --out, or delete it first."
        )


def read_record(out: Path) -> dict[str, Any]:
    """prepare.json of the folder; raises DataError where it is damaged."""
    path = out / RECORD_FILE
    try:
        record = json.loads(path.read_bytes())
        return {
            **{name: record[name] for name in ("converter", "images", "source")},
            "options": dict(record["options"]),
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}); delete {out} and prepare it again.") from error


def require_options(out: Path, converter: str, options: dict[str, str]) -> None:
    """Check that `out` is being made by a converter with these options common to all; raises DataError."""
    if not (out / RECORD_FILE).exists():
        raise DataError(f"There is nothing to merge in {out}: no part was made there. Run the parts (--part) first.")
    record = read_record(out)
    common = {name: value for name, value in record["options"].items() if name in COMMON_OPTIONS}
    found = option_differences(common, options)
    if record["converter"] != converter:
        found = [f"with '{record['converter']}', not '{converter}'"]
    if found:
        raise DataError(f"{out} was made differently: {'; '.join(found)}. Merge with the options of the parts.")


def _differences(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    if earlier["converter"] != now["converter"]:
        return [f"with '{earlier['converter']}', not '{now['converter']}'"]
    found = option_differences(earlier["options"], now["options"])
    if not found and earlier["source"] != now["source"]:
        found.append(f"from a source of {earlier['images']:,} images; this one has {now['images']:,}, or other names")
    return found


def option_differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What was chosen otherwise, in words."""
    return [
        f"{name.replace('_', '-')} was {before.get(name, 'not given')}, now {after.get(name, 'not given')}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


@contextlib.contextmanager
def locked(path: Path, shared: bool, whose: str) -> Iterator[None]:
    """Hold the lock of a claimed folder, or of a file that is made for it; DataError says that `whose` run holds it.

    The lock goes with the process, however it ends. A folder's lock is on its record, which is never replaced.
    """
    descriptor = _open_to_lock(path / RECORD_FILE, 0) if path.is_dir() else _open_to_lock(path, os.O_CREAT)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(descriptor)
            raise DataError(f"{whose} at this moment; wait for it to end.") from error
        # A network file system without locks: shards are still written whole, under names of their own.
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _open_to_lock(path: Path, more: int) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | more, 0o666)  # NFS locks only what is open for writing
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # a finished set that may only be read


def require_space(out: Path, needed: int, exact: bool) -> None:
    """Raises DataError where the disk of `out`, which need not be there yet, has less than `needed` bytes free.

    `exact`: the number is that of the files to be written, and not the least that they can take.
    """
    there = next((path for path in (out, *out.absolute().parents) if path.exists()), out)
    free = shutil.disk_usage(there).free
    if needed > free:
        raise DataError(
            f"The disk of {out} has {free / 1e6:,.1f} MB free; {'' if exact else 'more than '}{needed / 1e6:,.1f} MB "
            "are needed."
        )


def create_once(path: Path, content: bytes) -> None:
    """Write a file unless it is there. Of several processes one wins; whoever reads it then sees it whole."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{socket.gethostname()}-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike a rename, it replaces nothing, on network file systems too
        except FileExistsError:
            return
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            if not path.exists():
                os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_if_changed(path: Path, content: bytes) -> None:
    """Write the file, or remove it where there is nothing to say."""
    if (path.read_bytes() if path.exists() else b"") == content:
        return
    if not content:
        path.unlink()
        return
    with atomic_write(path) as file:
        file.write(content)


def json_bytes(content: Any) -> bytes:
    """JSON as it lies in the output folder."""
    return (json.dumps(content, indent=1) + "\n").encode()


def why_not_used(out: Path, error: OSError) -> str:
    """Why the output folder cannot be used."""
    path = Path(error.filename) if error.filename else out
    if error.errno in _DISK_FULL:
        return why_not_written(path, error)
    return f"{path} cannot be used: {error.strerror or error}."


def why_not_written(path: Path, error: OSError) -> str:
    """Why a file of the output could not be written, and what to do."""
    if error.errno in _DISK_FULL:
        return (
            f"The disk is full: {path} could not be written ({error.strerror}). Free some space and run the same "
            "command again: finished shards are kept."
        )
    return f"{path} could not be written: {error.strerror or error}."
