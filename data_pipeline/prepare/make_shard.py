"""Making one shard, in whatever process: keep it if it is there and right, else write it."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipeline.prepare.examine import UnreadableImageError
from data_pipeline.prepare.folder import why_not_written
from data_pipeline.prepare.left_out import LeftOut, stopped_by
from data_pipeline.prepare.listing import Item
from data_pipeline.prepare.load import Loaded, Loading, checksum, load, read_files, usable
from data_pipeline.prepare.notes import Note, SourceDigest, read_note, source_now
from data_pipeline.shards import shard_index
from data_pipeline.shards.files import sha256_of_file
from data_pipeline.shards.shard_index import ShardIndex
from data_pipeline.shards.source import DataError
from data_pipeline.shards.writer import EncodedSample, OtherContentError, WrittenShard, write_shard


@dataclass(frozen=True)
class ShardJob:
    """Everything a process needs to make one shard."""

    path: Path
    """Of the tar."""

    items: list[Item]
    loading: Loading

    finished_sha256: str | None
    """Of the tar, where the data set was finished before: the shard must be that one, and the source unchanged."""

    stop_on_error: bool
    """An unreadable image is an error instead of being left out."""

    note: Path
    """Where an unfinished run remembers what it knows about this shard."""


@dataclass(frozen=True)
class ShardResult:
    """What became of a ShardJob."""

    shard: WrittenShard
    left_out: list[LeftOut]
    kept: bool
    """It was there already."""

    counts: dict[str, int] | None
    """How many of its images have which traits (load.Loaded.traits); None where that is not known any more."""


@dataclass
class _Reading:
    """Loads the images of a job, and remembers what was found."""

    job: ShardJob
    advance: Callable[[int], None]
    left_out: list[LeftOut] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    digest: SourceDigest = field(default_factory=SourceDigest)

    def samples(self) -> Iterator[EncodedSample]:
        for item in self.job.items:
            loaded = self.load(item)
            if loaded is not None:
                self.counts.update(loaded.traits)
                yield _encoded(item, loaded, self.job.loading)
            self.advance(1)

    def load(self, item: Item) -> Loaded | None:
        """The item as it goes into the shard, or None after noting that it is left out."""
        crc32 = None
        try:
            files = read_files(item, self.job.loading)
            crc32 = checksum(files)
            return usable(files, self.job.loading)
        except UnreadableImageError as error:
            reason = str(error)
        finally:
            self.digest.add(item, crc32)
        if self.job.stop_on_error:
            raise stopped_by(item.name, reason)
        self.left_out.append(LeftOut(self.job.path.parent.name, item.name, reason))
        return None


def _encoded(item: Item, loaded: Loaded, loading: Loading) -> EncodedSample:
    facts = loaded.facts
    return EncodedSample(
        key=item.key,
        extension=facts.extension,
        image=loaded.files.image,
        label=item.label,
        width=facts.width,
        height=facts.height,
        subsampling=facts.subsampling,
        orientation=facts.orientation,
        target=loaded.files.target,
        target_extension=loading.target_extension,
        restart_rows=loaded.rows,
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
    path = job.path
    try:
        shard = write_shard(path, reading.samples(), job.finished_sha256)
        if job.finished_sha256 is None:
            path = job.note
            left_out = [(entry.path, entry.reason) for entry in reading.left_out]
            Note(shard.sha256, reading.digest.hexdigest(), left_out, dict(reading.counts)).write(path)
    except OtherContentError as error:
        raise _source_changed(job) from error
    except OSError as error:
        raise DataError(why_not_written(path, error)) from error
    return ShardResult(shard, reading.left_out, kept=False, counts=dict(reading.counts))


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
    written = WrittenShard(header.samples, header.tar_bytes, header.file_bytes, header.tar_sha256.hex())
    if job.finished_sha256 is None:
        note = read_note(job.note)
        if note is not None and note.sha256 == written.sha256:
            return _kept_by_note(job, written, note)
        if job.loading.recode.changes_bytes:
            return None  # only making it again would tell
    reading = _Reading(job, lambda count: None)
    if not _same_source(reading, index, written=status.st_mtime):
        if job.finished_sha256:
            raise _source_changed(job)
        return None
    if not job.finished_sha256 and sha256_of_file(job.path) != header.tar_sha256:
        return None
    return ShardResult(written, reading.left_out, kept=True, counts=None)


def _kept_by_note(job: ShardJob, written: WrittenShard, note: Note) -> ShardResult | None:
    if note.left_out and job.stop_on_error:
        return None  # making it again says which image stops it
    if note.source != source_now(job.items, job.loading) or sha256_of_file(job.path).hex() != written.sha256:
        return None
    left_out = [LeftOut(job.path.parent.name, path, reason) for path, reason in note.left_out]
    return ShardResult(written, left_out, kept=True, counts=note.counts)


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
    job = reading.job
    compare_all = job.finished_sha256 is None
    copied = not job.loading.recode.changes_bytes
    rows = {key: row for row, key in enumerate(index.keys)}
    for item in job.items:
        row = rows.pop(item.key, None)
        if row is None:
            if reading.load(item) is not None:  # it was unreadable once, and no longer is
                return False
            continue
        record = index.records[row]
        if record["label"] != (item.label if item.label >= 0 else shard_index.NO_LABEL):
            return False
        if not item.modified:
            continue
        if copied and record["size"] != item.size:
            return False
        if (compare_all or item.modified > written) and _crc32s_now(job, item) != _crc32s(record):
            return False
    return not rows


def _crc32s(record: np.void) -> tuple[int, int]:
    """Of a sample's image and target, by its record in the shard's index."""
    return int(record["crc32"]), int(record["target_crc32"])


def _crc32s_now(job: ShardJob, item: Item) -> tuple[int, int] | None:
    """Of an item's image and target as they would go into the shard; None where they would not."""
    try:
        if job.loading.recode.changes_bytes:
            files = load(item, job.loading).files
        else:
            files = read_files(item, job.loading)
    except UnreadableImageError:
        return None
    return zlib.crc32(files.image), zlib.crc32(files.target or b"")
