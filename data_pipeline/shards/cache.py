"""A folder of whole, verified files on a node's own disk, shared by its processes and kept within a number of bytes.

    FOLDER/SHA256.tar              a shard; the name is the digest of its content
    FOLDER/SHA256-BYTES.idx        the index of the shard with that digest
    FOLDER/NAME.BYTES.part         one of these in the making; BYTES is what it will have, and counts as used
    FOLDER/.lock                   held for the moment in which names are made, changed or removed

Who uses a file holds a shared flock on the file itself, who makes one an exclusive flock on its part. Such locks end
with their process, however it ends, so nothing has to be cleaned up after one that was killed: its part is gone on with
or makes room. Files leave in the order of their modification times, which every use sets anew. Files with other
names are never touched.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.shards.files import sync_folder
from data_pipeline.shards.source import DataError

_NAME = re.compile(r"[0-9a-f]{64}(\.tar|-\d+\.idx)")
_PART = re.compile(rf"(?P<name>{_NAME.pattern})\.(?P<size>\d+)\.part")
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REMOTE_KINDS = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "smb3", "ceph", "9p", "afs", "glusterfs")


class NoRoomError(DataError):
    """The files in use and in the making leave no room for another. `state` changes whenever one of the files does."""

    def __init__(self, message: str, state: int) -> None:
        super().__init__(message)
        self.state = state


class Held:
    """A whole file that stays where it is until it is closed (or the process ends)."""

    def __init__(self, path: Path, descriptor: int = -1) -> None:
        """`descriptor`: of the open file with its lock, owned from now on; none where nothing removes the file."""
        self.path, self._descriptor = path, descriptor

    def close(self) -> None:
        """Let go of it. May be called more than once."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            _note_use(descriptor)
            os.close(descriptor)


@dataclass(frozen=True)
class _Entry:
    path: Path
    name: str
    """Of the whole file that it is or will be."""

    reserved: int
    """Bytes it has or will have."""

    size: int
    used: int
    """When, in nanoseconds."""


class Cache:
    """The folder, as one process sees it. All methods may be called from several threads at once."""

    def __init__(self, folder: str, max_bytes: int) -> None:
        """Environment variables in `folder` are filled in by `prepare`, which comes before all else: the machine that
        submits a job need not have them."""
        self._named, self._folder = folder, Path()
        self._max_bytes = max_bytes
        self._ready = False
        self._making = threading.Lock()
        self._locked: set[int] = set()

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self._folder

    def prepare(self) -> str:
        """Make the folder and prove that it can be written and locked; a warning where it is on remote storage.

        Raises DataError saying what is wrong. Done once; the text is empty from then on.
        """
        with self._making:
            if self._ready:
                return ""
            filled = os.path.expanduser(os.path.expandvars(self._named))
            if "$" in filled:
                raise DataError(f"data.cache.folder: {self._named} names an environment variable that is not set")
            self._folder = Path(filled).absolute()
            with self._as_data_error():
                self._folder.mkdir(parents=True, exist_ok=True)
                with self._names():
                    pass
            self._ready = True
        kind = file_system_kind(self._folder)
        if kind not in _REMOTE_KINDS and not kind.startswith("fuse."):
            return ""
        return (
            f"data.cache.folder {self._folder} is on a file system of kind {kind}: use a disk of the node's own. Every "
            "node needs a cache of its own, and locks and speed are worth little over a network"
        )

    def hold(self, name: str, size: int) -> Held | None:
        """The whole file of that name, kept from being removed; None where there is none. Counts as a use."""
        path = self._folder / name
        with self._as_data_error():
            while True:
                try:
                    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError:
                    return None
                try:
                    self._lock(descriptor, fcntl.LOCK_SH)  # waits for the moment of a removal at most
                    found = os.fstat(descriptor)
                    if _is_at(path, found):
                        if found.st_size == size:
                            _note_use(descriptor)
                            held, descriptor = Held(path, descriptor), -1
                            return held
                        self._remove_stale(path, found)
                finally:
                    if descriptor >= 0:
                        os.close(descriptor)

    def claim(self, name: str, size: int, wanted: Mapping[str, int], rank: int) -> Claim | None:
        """The right to make a file, and room for it; None where another makes it or where it is there by now.

        `wanted`: files that are needed soon, numbered soonest first; they leave last, those that come before `rank`
        not at all. Raises NoRoomError, DataError.
        """
        part = self._folder / f"{name}.{size}.part"
        with self._as_data_error(), self._names():
            if (self._folder / name).exists():
                return None
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._locked.add(descriptor)
            try:
                self._lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._close(descriptor)
                return None
            length = os.fstat(descriptor).st_size
            try:
                self._make_room(part, size - length, wanted, rank)
            except BaseException:
                if not length:
                    part.unlink()
                self._close(descriptor)
                raise
            if length > size:
                os.ftruncate(descriptor, 0)
        return Claim(self, name, part, size, descriptor)

    def after_fork(self) -> None:
        """In a child process: drop what the parent's threads were doing. A lock belongs to all who have it open, so
        that the parent's would not end with the parent otherwise."""
        for descriptor in self._locked:
            os.close(descriptor)
        self._locked.clear()
        self._making = threading.Lock()

    def _remove_stale(self, path: Path, found: os.stat_result) -> None:
        with self._names():
            if _is_at(path, found):
                path.unlink()

    def _make_room(self, part: Path, missing: int, wanted: Mapping[str, int], rank: int) -> None:
        """Remove files until `part` fits: within the budget, and `missing` bytes on the disk. Names must be locked."""
        entries = self._entries()
        used = sum(entry.reserved for entry in entries)
        free = _free_bytes(self._folder)
        state = hash(tuple(sorted((entry.path.name, entry.size) for entry in entries)))
        candidates = [entry for entry in entries if entry.path != part and wanted.get(entry.name, rank) >= rank]
        candidates.sort(key=lambda entry: (entry.name in wanted, -wanted.get(entry.name, 0), entry.used))
        for entry in candidates:
            if used <= self._max_bytes and missing <= free:
                return
            if self._remove_unused(entry.path):
                used -= entry.reserved
                free = _free_bytes(self._folder)
        if used > self._max_bytes:
            raise NoRoomError(
                f"no room for {missing / 1e9:,.3f} GB in {self._folder}: the files that are being read or fetched take "
                f"up data.cache.max_gb = {self._max_bytes / 1e9:g}. Set it higher, or use fewer shards at "
                "once (order 'block' with lower data.block_shards)",
                state,
            )
        if missing > free:
            raise NoRoomError(self._disk_full(missing, free), state)

    def _remove_unused(self, path: Path) -> bool:
        """Remove a file, or the remains of one, that no process uses or makes."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        self._locked.add(descriptor)
        try:
            self._lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        except BlockingIOError:
            return False
        finally:
            self._close(descriptor)
        return True

    def _entries(self) -> list[_Entry]:
        entries = []
        with os.scandir(self._folder) as found:
            for item in found:
                part = _PART.fullmatch(item.name)
                if part is None and not _NAME.fullmatch(item.name):
                    continue
                try:
                    status = item.stat(follow_symlinks=False)
                except FileNotFoundError:  # taken away by someone who knows nothing of locks
                    continue
                name, reserved = (part["name"], int(part["size"])) if part else (item.name, status.st_size)
                entries.append(_Entry(Path(item.path), name, reserved, status.st_size, status.st_mtime_ns))
        return entries

    @contextlib.contextmanager
    def _names(self) -> Iterator[None]:
        """Be the only one, of all threads and processes, who makes, changes or removes names."""
        descriptor = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._locked.add(descriptor)
        try:
            self._lock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            self._close(descriptor)

    def _lock(self, descriptor: int, how: int) -> None:
        try:
            fcntl.flock(descriptor, how)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise DataError(
                f"data.cache.folder {self._folder} is on a file system without file locks ({error.strerror}), which "
                "keep its files from being removed while they are read: use a disk of the node's own"
            ) from error

    def _close(self, descriptor: int) -> None:
        """Unlock, also where a child process has inherited the descriptor, and close."""
        self._locked.discard(descriptor)
        with contextlib.suppress(OSError):  # a file system without locks was reported when one was asked for
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)

    def _disk_full(self, missing: int, free: int) -> str:
        return (
            f"the disk of data.cache.folder {self._folder} is full: {missing / 1e9:,.3f} GB more are needed, "
            f"{free / 1e9:,.3f} GB are free, and no unused file is left to remove. Lower data.cache.max_gb to what the "
            "disk can give, or free space on it"
        )

    @contextlib.contextmanager
    def _as_data_error(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno in _FULL:
                raise DataError(self._disk_full(0, _free_bytes(self._folder))) from error
            raise DataError(
                f"data.cache.folder: {error.filename or self._folder} cannot be used: {error.strerror}. It must be a "
                "folder on the node's own disk in which this user may write"
            ) from error


class Claim:
    """A file in the making. Ends with `commit`, or with `close`, which leaves what is there for the next try."""

    def __init__(self, cache: Cache, name: str, part: Path, size: int, descriptor: int) -> None:
        self._cache, self._name, self._part, self._descriptor = cache, name, part, descriptor
        self.size = size
        self.length = os.lseek(descriptor, 0, os.SEEK_END)
        """Bytes that are there."""

    def write(self, data: bytes) -> None:
        """Append. Raises NoRoomError, after removing what can be removed, where the disk is full."""
        view = memoryview(data)
        while view:
            try:
                written = os.write(self._descriptor, view)
            except OSError as error:
                if error.errno not in _FULL:
                    raise DataError(f"{self._part} cannot be written: {error.strerror}") from error
                self._free_disk()
                continue
            view = view[written:]
            self.length += written

    def read(self) -> Iterator[bytes]:
        """What is there, in pieces."""
        at = 0
        while piece := os.pread(self._descriptor, 1 << 20, at):
            at += len(piece)
            yield piece

    def restart(self) -> None:
        """Throw away what is there."""
        os.ftruncate(self._descriptor, 0)
        self.length = os.lseek(self._descriptor, 0, os.SEEK_SET)

    def commit(self) -> Held:
        """Give the file its name: it is whole and verified. The bytes are on the disk before the name is."""
        cache, descriptor = self._cache, self._descriptor
        with cache._as_data_error():
            os.fsync(descriptor)
            with cache._names():
                os.replace(self._part, cache.folder / self._name)
                cache._lock(descriptor, fcntl.LOCK_SH)  # nobody can remove it in between: that takes the names' lock
            sync_folder(cache.folder)
        self._descriptor = -1
        cache._locked.discard(descriptor)
        return Held(cache.folder / self._name, descriptor)

    def close(self) -> None:
        """Give up the claim where it was not committed; the part stays."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            self._cache._close(descriptor)

    def _free_disk(self) -> None:
        cache = self._cache
        before = _free_bytes(cache.folder)
        try:
            with cache._names():
                cache._make_room(self._part, max(self.size - self.length, before + 1), {}, 0)
        except NoRoomError:
            if _free_bytes(cache.folder) <= before:
                with cache._names():
                    self._part.unlink()  # it would only keep the disk full
                raise
            # something was removed: the rest is worth a try


def _note_use(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # such as of another user's file, which can be read all the same
        os.utime(descriptor)


def _is_at(path: Path, found: os.stat_result) -> bool:
    """Whether an open file still has this name."""
    try:
        now = os.stat(path)
    except FileNotFoundError:
        return False
    return (now.st_dev, now.st_ino) == (found.st_dev, found.st_ino)


def _free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def file_system_kind(folder: Path) -> str:
    """The kind of the file system that holds a folder, such as "ext4"; empty where it cannot be told."""
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return ""
    mounts = [line.split() for line in lines]
    place = folder.resolve()
    inside = [fields for fields in mounts if place.is_relative_to(fields[1].replace("\\040", " "))]
    return max(inside, key=lambda fields: len(fields[1]), default=["", "", ""])[2]
