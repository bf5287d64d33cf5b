"""Checking every byte of a shard against its index, and naming what is damaged."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipeline.shards import shard_index
from data_pipeline.shards.shard_index import ShardIndex
from data_pipeline.shards.source import DataError
from data_pipeline.shards.writer import LABEL_EXTENSION


@dataclass(frozen=True)
class Damage:
    """Something that is not as it was written, or was never as it should be."""

    shard: str
    """Path of the shard within the data set."""

    key: str
    """Of the damaged sample; empty where the damage concerns the shard as a whole."""

    what: str

    def __str__(self) -> str:
        return f"{self.shard}: '{self.key}': {self.what}" if self.key else f"{self.shard}: {self.what}"


@dataclass(frozen=True)
class StoredSample:
    """A sample whose bytes are those that were written."""

    key: str
    extension: str
    """Of the image, by its name in the tar."""

    image: bytes
    target: bytes | None
    target_extension: str
    record: np.void
    """Its shard_index.RECORD."""


Look = Callable[[StoredSample], str | None]
"""What is wrong with the content of a sample, if anything; may be called from several threads at once."""


def pass_over(sample: StoredSample) -> None:
    """Look at no content: bytes that are right will do."""


class _DamagedError(Exception):
    """What is wrong with a sample's bytes."""


def load_matching_index(path: Path, sha256: str) -> ShardIndex:
    """The index beside the tar `path`, which must be the one of the shard with that digest; raises DataError."""
    index_path = path.with_suffix(shard_index.SUFFIX)
    index = shard_index.load(index_path)
    if index.header.tar_sha256.hex() != sha256:
        raise DataError(f"{index_path} belongs to another shard (it does not fit the data set's index)")
    return index


def verify_shard(
    path: Path, index: ShardIndex, advance: Callable[[int], None], look: Look = pass_over
) -> Iterator[Damage]:
    """Read the tar `path` once and yield every damage: of the whole, of tar headers, images, labels and targets, of the
    index's row table, and what `look` finds in undamaged samples.

    `advance(n)` is told of every n samples checked.
    """
    shard = f"{path.parent.name}/{path.name}"
    begins = (index.records["offset"] - index.records["header"]).tolist()
    begins.append(index.header.tar_bytes)
    if begins != sorted(begins):
        yield Damage(shard, "", "its index places the samples in another order than they are in, or beyond the end")
        advance(len(index.keys))
        return
    digest = hashlib.sha256()
    changed = False
    with open(path, "rb") as file:
        digest.update(file.read(begins[0]))
        for number, key in enumerate(index.keys):
            span = _read_span(file, begins[number + 1] - begins[number], digest.update)
            try:
                what = look(_stored(span, index, number))
            except _DamagedError as error:
                what, changed = str(error), True
            if what:
                yield Damage(shard, key, what)
            advance(1)
        digest.update(file.read())
    if digest.digest() != index.header.tar_sha256 and not changed:
        yield Damage(
            shard, "", "bytes outside of the images, labels, targets and tar headers were changed (SHA-256 differs)"
        )


def _read_span(file: BinaryIO, size: int, update: Callable[[bytes], None]) -> bytes:
    span = file.read(size)
    update(span)
    return span


def _stored(span: bytes, index: ShardIndex, number: int) -> StoredSample:
    """A sample from its piece of the tar: tar header and content of image, label and target. Raises _DamagedError."""
    record, key = index.records[number], index.keys[number]
    header, size = int(record["header"]), int(record["size"])
    image = span[header : header + size]
    if len(image) < size:
        raise _DamagedError("lost: the shard ends before it")
    if zlib.crc32(image) != record["crc32"]:
        raise _DamagedError("the image's bytes were changed (checksum differs)")
    try:
        with tarfile.open(fileobj=io.BytesIO(span), mode="r:") as tar:
            members = tar.getmembers()
    except tarfile.TarError as error:
        raise _DamagedError(f"the tar header of the image is damaged ({error})") from error
    name, _, extension = members[0].name.partition(".") if members else ("", "", "")
    if not extension or name != key or members[0].offset_data != header or members[0].size != size:
        raise _DamagedError("the tar header of the image is damaged")
    _check_rows(image, index, number)
    others = [(member.name, span[member.offset_data :][: member.size], member.offset_data) for member in members[1:]]
    _take_label(others, key, int(record["label"]))
    target, target_extension = _take_target(others, key, record)
    return StoredSample(key, extension, image, target, target_extension, record)


def _check_rows(image: bytes, index: ShardIndex, number: int) -> None:
    """Prove that the entries in the row table divide the image; raises _DamagedError."""
    rows = index.rows_of(number)
    if len(rows) != index.records["rows_count"][number]:
        raise _DamagedError("the index's row table ends before its entries")
    starts = [*rows["offset"].tolist(), len(image)]
    if len(rows) and starts[0] != 0:
        raise _DamagedError("the restart rows in the index do not begin with the image")
    found = 0
    for start, end, crc32 in zip(starts, starts[1:], rows["crc32"].tolist(), strict=False):
        found = zlib.crc32(image[start:end], found)
        if start >= end or found != crc32:
            raise _DamagedError("the restart rows in the index are not those of the image")


def _take_label(others: list[tuple[str, bytes, int]], key: str, label: int) -> None:
    """Take a sample's label, if it has one, out of `others` (name, content, place); raises _DamagedError."""
    if label == shard_index.NO_LABEL:
        return
    if not others or others[0][0] != f"{key}.{LABEL_EXTENSION}":
        raise _DamagedError("the tar header of the label is damaged")
    content = others.pop(0)[1]
    if content != str(label).encode():
        raise _DamagedError(f"the label is {content!r} in the tar and {label} in the index")


def _take_target(others: list[tuple[str, bytes, int]], key: str, record: np.void) -> tuple[bytes | None, str]:
    """A sample's target and its extension, given all members of the tar after the label; raises _DamagedError."""
    size = int(record["target_size"])
    if not size:
        if others:
            raise _DamagedError("the tar header of the label is damaged")
        return None, ""
    place = int(record["header"]) + int(record["size"]) + int(record["target_gap"])
    if len(others) != 1 or not others[0][0].startswith(f"{key}.") or others[0][2] != place or len(others[0][1]) != size:
        raise _DamagedError("the tar header of the target is damaged")
    if zlib.crc32(others[0][1]) != record["target_crc32"]:
        raise _DamagedError("the target's bytes were changed (checksum differs)")
    return others[0][1], others[0][0].removeprefix(f"{key}.")
