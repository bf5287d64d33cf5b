"""Making one shard, in whatever process: keep it if it is there and right, else write it."""

from __future__ import annotations

import errno
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.prepare.examine import UnreadableImageError
from data_pipeline.prepare.listing import Item
from data_pipeline.prepare.load import Loaded, Read, load, read_files
from data_pipeline.shards import shard_index
from data_pipeline.shards.files import sha256_of_file
from data_pipeline.shards.shard_index import ShardIndex
from data_pipeline.shards.source import DataError
from data_pipeline.shards.writer import EncodedSample, OtherContentError, WrittenShard, write_shard

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class ShardJob:
    """Everything a process needs to make one shard."""

    path: Path
    """Of the tar."""

    items: list[Item]
    read: Read

    finished_sha256: str | None
    """Of the tar, where the data set was finished before: the shard must be that one, and the source unchanged."""

    stop_on_error: bool
    """An unreadable image is an error instead of being left out."""


@dataclass(frozen=True)
class LeftOut:
    """An image that could not be read."""

    split: str
    path: str
    reason: str


@dataclass(frozen=True)
class ShardResult:
    """What became of a ShardJob."""

    shard: WrittenShard
    left_out: list[LeftOut]
    kept: bool
    """It was there already."""


@dataclass
class _Reading:
    """Reads and examines the images of a job, and remembers those that cannot be used."""

    job: ShardJob
    advance: Callable[[int], None]
    left_out: list[LeftOut] = field(default_factory=list)

    def samples(self) -> Iterator[EncodedSample]:
        for item in self.job.items:
            usable = self.load(item)
            if usable is not None:
                yield _encoded(item, usable)
            self.advance(1)

    def load(self, item: Item) -> Loaded | None:
        """The item's files and facts, or None after noting that it is left out."""
        try:
            return load(item, self.job.read)
        except UnreadableImageError as error:
            reason = str(error)
        if self.job.stop_on_error:
            raise DataError(
                f"{printable(item.name)} cannot be used: {reason}. Repair it, or leave such images out with "
                "--on-error skip; then run the same command again (finished shards are kept)."
            )
        self.left_out.append(LeftOut(self.job.path.parent.name, item.name, reason))
        return None


def _encoded(item: Item, loaded: Loaded) -> EncodedSample:
    facts = loaded.facts
    return EncodedSample(
        item.key, facts.extension, loaded.files.image, item.label, facts.width, facts.height, facts.subsampling
    )


def make_shard(job: ShardJob, advance: Callable[[int], None]) -> ShardResult:
    """Make sure that the shard is there; `advance(n)` is told of every n images dealt with.

    Raises DataError where writing fails or where the source of a finished data set has changed.
    """
    kept = _kept_shard(job)
    if kept is not None:
        advance(len(job.items))
        return kept
    reading = _Reading(job, advance)
    try:
        shard = write_shard(job.path, reading.samples(), job.finished_sha256)
    except OtherContentError as error:
        raise _source_changed(job) from error
    except OSError as error:
        raise DataError(_why_not_written(job.path, error)) from error
    return ShardResult(shard, reading.left_out, kept=False)


def _kept_shard(job: ShardJob) -> ShardResult | None:
    """The shard that is there already, or None where there is none, or not the one that would be written."""
    try:
        index = shard_index.load(job.path.with_suffix(shard_index.SUFFIX))
        status = job.path.stat()
    except (DataError, FileNotFoundError):
        return None
    header = index.header
    if status.st_size != header.tar_bytes or job.finished_sha256 not in (None, header.tar_sha256.hex()):
        return None
    reading = _Reading(job, lambda count: None)
    if not _same_source(reading, index, written=status.st_mtime):
        if job.finished_sha256:
            raise _source_changed(job)
        return None
    if not job.finished_sha256 and sha256_of_file(job.path) != header.tar_sha256:
        return None
    written = WrittenShard(header.samples, header.tar_bytes, header.file_bytes, header.tar_sha256.hex())
    return ShardResult(written, reading.left_out, kept=True)


def _source_changed(job: ShardJob) -> DataError:
    return DataError(
        f"The source of {job.path.parent.parent} has changed since that was finished (images of {job.path.parent.name}/"
        f"{job.path.name}). Prepare it into another folder, or delete that one first."
    )


def _same_source(reading: _Reading, index: ShardIndex, written: float) -> bool:
    """Whether the shard holds the job's images.

    In a finished set, files changed after the shard was `written` are compared by content. In one that is not, all are:
    a file copied with its old time is no older for that, and no index would give the difference away later.
    """
    compare_all = reading.job.finished_sha256 is None
    rows = {key: row for row, key in enumerate(index.keys)}
    for item in reading.job.items:
        row = rows.pop(item.key, None)
        if row is None:
            if reading.load(item) is not None:  # it was unreadable once, and no longer is
                return False
            continue
        record = index.records[row]
        if (record["label"], record["size"]) != (item.label, item.size):
            return False
        if (compare_all or item.modified > written) and _checksum_now(reading.job, item) != record["crc32"]:
            return False
    return not rows


def _checksum_now(job: ShardJob, item: Item) -> int | None:
    try:
        return zlib.crc32(read_files(item, job.read).image)
    except UnreadableImageError:
        return None


def _why_not_written(path: Path, error: OSError) -> str:
    if error.errno in _DISK_FULL:
        return (
            f"The disk is full: {path} could not be written ({error.strerror}). Free some space and run the same "
            "command again: finished shards are kept."
        )
    return f"{path} could not be written: {error.strerror or error}."


def printable(name: str) -> str:
    """A file name as text that every terminal takes (names need not be valid UTF-8)."""
    return name.encode(errors="backslashreplace").decode()
