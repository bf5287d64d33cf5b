"""Random access to the samples of tar shards, through their index, from any number of threads."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.config import DataConfig
from data_pipeline.restart_rows import RestartRows
from data_pipeline.shards import set_index, shard_index
from data_pipeline.shards.forking import renew_after_fork
from data_pipeline.shards.open_shard import OpenShard, Stored
from data_pipeline.shards.set_index import SplitIndex
from data_pipeline.shards.source import DamagedSampleError, DataError, RawSample
from data_pipeline.shards.storage import LocalFolder, SetFile, Storage, open_storage
from data_pipeline.shards.working_set import check_budget, shards_at_once

IDLE_SECONDS = 20.0
"""A remote set's shards are closed when nothing was read for so long: others may need their room in the cache, such as
the evaluation while training stands still."""

_MAX_OPEN_SHARDS = 512
# A larger set is opened without looking for its files: a million of them take a shared file system minutes.
_MOST_SHARDS_LOOKED_AT = 20_000


def open_source(config: DataConfig, split: str, kind: str = "classification") -> TarSource:
    """Open one split of the prepared shards in `config.path`, which must teach what `kind` says (SetIndex.kind).

    The path is a folder or a URL. In a folder, every shard must be there with the size that the index states (in a set
    of more than 20,000 shards what is missing is found out when it is to be read). A URL is asked for its index alone,
    and the cache must have room for what is read at once. The number of classes must be `config.num_classes`. Raises
    DataError saying what is wrong and what to do.
    """
    if not config.path:
        raise DataError(
            "No data set was named: set the data path to a folder made by `python -m data_pipeline.prepare`."
        )
    storage = open_storage(config.path, config.cache)
    where = storage.shown()
    index = set_index.load(storage)
    if split not in index.splits:
        raise DataError(f"{where} has no split '{split}'; it has {', '.join(sorted(index.splits))}.")
    if index.kind != kind:
        raise DataError(f"{where} is a set for {index.kind}, and one for {kind} is needed.")
    if len(index.classes) != config.num_classes:
        raise DataError(f"{where} has {len(index.classes)} classes, but the configuration says {config.num_classes}.")
    shards = index.splits[split]
    if isinstance(storage, LocalFolder):
        if len(shards) <= _MOST_SHARDS_LOOKED_AT:
            check_files(storage.folder / split, shards)
        return TarSource(storage, split, index)
    check_budget(config, split, shards, where)
    fetch_all = split == config.train_split and config.order == "global"
    return TarSource(storage, split, index, shards_at_once(config, split, len(shards)), fetch_all)


def read_index(config: DataConfig) -> set_index.SetIndex:
    """What the set at `config.path` says of itself; nothing stays open. Raises DataError where it cannot be read."""
    storage = open_storage(config.path, config.cache)
    try:
        return set_index.load(storage)
    finally:
        storage.close()


def check_files(folder: Path, split: SplitIndex) -> None:
    """Check that every shard and its index exist with the stated sizes; one DataError names those that do not."""
    problems = file_problems(folder, split)
    if not problems:
        return
    listed = "; ".join(f"{folder / name} {what}" for name, what in problems[:5])
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    raise DataError(
        f"{listed}{more}. Run the prepare command that made {folder.parent} again (it rebuilds only what is missing), "
        "or copy the files anew."
    )


def file_problems(folder: Path, split: SplitIndex) -> list[tuple[str, str]]:
    """(file name, what is wrong) of every shard or index in `folder` that is missing or has another size.

    Raises DataError where the folder cannot be looked into.
    """
    try:
        with os.scandir(folder) as entries:
            sizes = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    except FileNotFoundError:
        sizes = {}
    except OSError as error:
        raise DataError(f"{error.filename or folder} cannot be read: {error.strerror}") from error
    problems = []
    for name, tar_bytes, index_bytes in zip(split.names, split.tar_bytes, split.index_bytes, strict=True):
        for file_name, expected in ((name, tar_bytes), (_index_name(name), index_bytes)):
            size = sizes.get(file_name)
            if size is None:
                problems.append((file_name, "is missing"))
            elif size == 0:
                problems.append((file_name, "is empty"))
            elif size < expected:
                problems.append((file_name, f"is cut short ({size:,} of {expected:,} bytes)"))
            elif size > expected:
                problems.append((file_name, f"has {size:,} bytes instead of {expected:,}"))
    return problems


class TarSource:
    """One split of prepared shards; a data_pipeline.shards.source.Source.

    Nothing is held per sample: a read finds its place in the shard's index file, then reads the image's bytes, except
    those of an image with restart rows: its rows are read, and proved, when they are asked for. At most a bounded
    number of shards is open at a time; the least recently used are closed first.
    """

    def __init__(
        self,
        storage: Storage,
        split: str,
        index: set_index.SetIndex,
        most_open: int | None = None,
        fetch_all: bool = False,
    ) -> None:
        """`most_open`: shards kept open, which no cache removes; None for as many as the process may open.
        `fetch_all`: expect all shards from the first read on."""
        self._storage, self._split = storage, split
        self._most_open, self._fetch_all = most_open, fetch_all
        self._shards = index.splits[split]
        self._first = np.concatenate(([0], np.cumsum(self._shards.samples)))
        self._classes, self._meaning = index.classes, index.targets
        self._fingerprint = index.fingerprint(split)
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False
        self._last_read = 0.0
        self._ending: threading.Event | None = None  # of the thread that closes idle shards
        renew_after_fork(self)

    @property
    def num_classes(self) -> int:
        return len(self._classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._classes

    @property
    def meaning(self) -> Mapping[str, Any]:
        """What index.json says of the targets of a dense task (data_pipeline.targets); empty where there are none."""
        return self._meaning

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def shard_sizes(self) -> npt.NDArray[np.int64]:
        """Number of samples in each shard, (shards,); sample ids count through the shards in this order."""
        return self._shards.samples

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, index: int) -> RawSample:
        """The sample at `index`, its bytes (of image and target) proved to be those that were written.

        Raises DamagedSampleError where they are not, IndexError out of range, DataError for a shard whose files were
        taken away or replaced. An image with restart rows comes as RestartRows, whose `read` raises the same.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self._storage.shown(self._split)}")
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        row = index - int(self._first[number])
        name = f"{self._split}/{self._shards.names[number]}"
        shard = self._shard(number)
        try:
            record = shard_index.read_record(shard.read_index, shard.header, row)
        except ValueError as error:
            raise DamagedSampleError(name, f"number {row}", str(error)) from error
        except OSError as error:
            raise DataError(f"shard {shard.where} cannot be read: {error}") from error
        stored = Stored(shard, name, record)
        image: bytes | RestartRows
        if record.row_offsets:
            image = RestartRows(record.row_offsets, stored.pieces)
        else:
            image = stored.proved(record.offset, record.size, record.crc32, "image")
        target = None
        if record.target_size:
            target = stored.proved(record.target_offset, record.target_size, record.target_crc32, "target")
        return RawSample(record.key, image, record.label, name, target, verified=True)

    def sizes(self) -> npt.NDArray[np.int32]:
        """(height, width) of every upright image, (samples, 2), read from the shards' indexes, one read for each.

        Raises DataError for a shard whose index is damaged or was replaced.
        """
        return np.concatenate([self._sizes_of(number) for number in range(len(self._shards))])

    def _sizes_of(self, number: int) -> npt.NDArray[np.int32]:
        index = self._files(number)[1]
        where = self._storage.shown(index.name)
        with contextlib.closing(self._storage.hold(index, self._let_go)) as held:
            found = shard_index.load(Path(held.path))
        if found.header.tar_sha256.hex() != self._shards.sha256[number]:
            raise DataError(f"{where} belongs to another shard: prepare or copy the data set anew.")
        sizes = shard_index.upright_sizes(found.records)
        if not sizes.all():
            raise DataError(f"{where} does not say how large its images are: prepare the data set anew.")
        return sizes

    def expect(self, shards: Sequence[int]) -> None:
        """These shards are read next, soonest first; a remote set fetches them ahead of need. Returns at once."""
        self._storage.expect([self._files(number) for number in shards])

    def stats(self) -> dict[str, float]:
        """What the storage did since the last call; nothing for a folder."""
        return self._storage.stats()

    def close(self) -> None:
        """Close all files and end all fetches. Reading afterwards is an error."""
        with self._lock:
            self._closed = True
            self._open.clear()
            if self._ending is not None:
                self._ending.set()
        self._storage.close()

    def after_fork(self) -> None:
        """In a child process: the thread that may have held the lock is not there to release it. What is open is
        opened anew, so that the child keeps no file of a cache in use that it does not read."""
        self._lock = threading.Lock()
        self._open = OrderedDict()
        self._ending = None

    def _shard(self, number: int) -> OpenShard:
        with self._lock:
            if self._closed:
                raise ValueError("the source was closed")
            self._last_read = time.monotonic()
            shard = self._open.get(number)
            if shard is not None:
                self._open.move_to_end(number)
                return shard
            self._keep_open(self._most() - 1)  # before another is opened, because a cache may need the room
            fetch_all, self._fetch_all = self._fetch_all, False
        if fetch_all:
            self.expect([number, *range(number), *range(number + 1, len(self._shards))])
        shard = self._open_shard(number)
        with self._lock:
            if not self._closed:
                shard = self._open.setdefault(number, shard)
                self._keep_open(self._most())
                if self._most_open is not None and self._ending is None:
                    self._ending = threading.Event()
                    work = functools.partial(_close_idle_shards, weakref.ref(self), self._ending)
                    threading.Thread(target=work, name="close idle", daemon=True).start()
        return shard

    def _close_if_idle(self) -> bool:
        with self._lock:
            idle = time.monotonic() - self._last_read >= IDLE_SECONDS
            if idle:
                self._open.clear()
                self._ending = None
        return idle

    def _most(self) -> int:
        return min(self._most_open or max_open_shards(), max_open_shards())

    def _keep_open(self, count: int) -> None:
        while len(self._open) > max(count, 0):
            self._open.popitem(last=False)

    def _let_go(self) -> bool:
        """Close the shard that was not used for longest; False where none is open."""
        with self._lock:
            count = len(self._open)
            self._keep_open(count - 1)
        return count > 0

    def _files(self, number: int) -> tuple[SetFile, SetFile]:
        """A shard's tar and its index."""
        name, sha256 = self._shards.names[number], self._shards.sha256[number]
        return (
            SetFile(f"{self._split}/{name}", int(self._shards.tar_bytes[number]), sha256),
            SetFile(f"{self._split}/{_index_name(name)}", int(self._shards.index_bytes[number]), sha256),
        )

    def _open_shard(self, number: int) -> OpenShard:
        tar, index = self._files(number)
        where = self._storage.shown(tar.name)
        with contextlib.ExitStack() as undo:
            held = []
            for file in (index, tar):  # the small one first: who waits for room in a cache keeps little of it
                held.append(self._storage.hold(file, self._let_go))
                undo.callback(held[-1].close)
            try:
                shard = OpenShard(where, held[1], held[0])
            except (OSError, ValueError) as error:
                raise DataError(
                    f"shard {where} cannot be used: {error}. Copy it anew, or run the prepare command that made it "
                    "again."
                ) from error
            undo.pop_all()  # from here on the shard closes them
        header = shard.header
        stated = (int(self._shards.samples[number]), self._shards.sha256[number])
        if (header.samples, header.tar_sha256.hex()) != stated:
            raise DataError(
                f"{self._storage.shown(index.name)} belongs to another shard than {where}: it does not fit "
                f"{self._storage.shown(set_index.FILE_NAME)}. Prepare or copy the data set anew."
            )
        return shard


def _close_idle_shards(reference: weakref.ref[TarSource], ending: threading.Event) -> None:
    """The work of a thread that ends with the source, or once its shards are closed."""
    while not ending.wait(IDLE_SECONDS / 4):
        source = reference()
        if source is None or source._close_if_idle():
            return
        del source  # it must not live on through the pause


def _index_name(tar_name: str) -> str:
    return str(Path(tar_name).with_suffix(shard_index.SUFFIX))


@functools.cache
def max_open_shards() -> int:
    """How many shards (of two files each) a source keeps open: a fraction of what the process may open."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if allowed == resource.RLIM_INFINITY:
        return _MAX_OPEN_SHARDS
    return max(8, min(_MAX_OPEN_SHARDS, allowed // 8))
