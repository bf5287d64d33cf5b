"""Files that must survive a power failure, and be seen from other nodes: rules for local disks, NFS and Lustre alike.

A file is on the disk once its content and then its folder have been flushed (fsync), each by the node that wrote it. It
gets its final name by a rename, which all three make atomic; locks, whose meaning differs between them, are not used.
NFS shows another node's new file once it is opened after it was closed, except that a node may remember for some
seconds that there was none, or what was there before: hence `patiently`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")

CHUNK = 1 << 22
"""Bytes written, hashed or read at a time; a thread that works on one does not keep the interpreter."""
PATIENCE = 90.0
"""Seconds for which another node's file may be invisible: NFS clients remember folders for up to 60 by default."""
SHORT_PATIENCE = 2.0
"""Seconds for what was finished long ago, and is most likely gone where it cannot be seen."""
STALE = (errno.ENOENT, errno.ESTALE)
"""What a node meets that remembers too much."""


def chunks(data: memoryview) -> Iterator[memoryview]:
    """`data` in parts of at most CHUNK bytes."""
    for first in range(0, len(data), CHUNK):
        yield data[first : first + CHUNK]


def write_new(path: Path, parts: Iterable[memoryview]) -> dict[str, Any]:
    """Writes a file that must not be there yet, and waits until it is on the disk.

    Returns its size in bytes and SHA-256. Raises OSError.
    """
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for part in parts:
            for chunk in chunks(part):
                digest.update(chunk)
                size += len(chunk)
                while chunk:
                    chunk = chunk[os.write(descriptor, chunk) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"size": size, "sha256": digest.hexdigest()}


def write_durably(path: Path, text: str) -> None:
    """Replaces a file by `text` in one step and waits until it is on the disk."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    write_new(temporary, [memoryview(text.encode())])
    os.replace(temporary, path)
    sync_folder(path.parent)


def described(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file as this node reads it."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"size": size, "sha256": digest.hexdigest()}


def sync_folder(path: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def patiently(act: Callable[[], Result], patience: float | None = None) -> Result:
    """What `act` gives; done again for `patience` (PATIENCE) seconds while another node's file cannot be seen."""
    until, pause = time.monotonic() + (PATIENCE if patience is None else patience), 0.01
    while True:
        try:
            return act()
        except OSError as error:
            if error.errno not in STALE or time.monotonic() + pause > until:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 2.0)


def await_sizes(folder: Path, sizes: Mapping[str, int]) -> None:
    """Waits until this node sees files of so many bytes, PATIENCE seconds for all of them. Raises OSError."""
    until = time.monotonic() + PATIENCE
    for name, size in sizes.items():

        def look(path: Path = folder / name, size: int = size) -> None:
            with path.open("rb") as file:  # opening it, and nothing less, makes NFS ask its server
                if os.fstat(file.fileno()).st_size != size:
                    text = f"not seen here with the {size:,} bytes that another rank wrote"
                    raise OSError(errno.ESTALE, text, str(path))

        patiently(look, until - time.monotonic())


def rename(path: Path, final: Path) -> None:
    """Gives a folder its final name. Raises OSError."""
    try:
        path.rename(final)
    except FileNotFoundError:
        # An NFS server that has done it, but whose answer was lost, is asked again.
        if path.exists() or not final.is_dir():
            raise
    sync_folder(final.parent)


def free_space(folder: Path) -> str:
    """What is free on the disk of `folder`, in words."""
    try:
        return f"{shutil.disk_usage(folder).free / 1e6:.0f} MB free"
    except OSError as error:
        return f"free space unknown: {error.strerror or error}"
