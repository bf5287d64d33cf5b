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
    """Something that is not as it was written."""

    shard: str
    """Path of the shard within the data set."""

    key: str
    """Of the damaged sample; empty where the damage concerns the shard as a whole."""

    what: str

    def __str__(self) -> str:
        return f"{self.shard}: '{self.key}': {self.what}" if self.key else f"{self.shard}: {self.what}"


def load_matching_index(path: Path, sha256: str) -> ShardIndex:
    """The index beside the tar `path`, which must be the one of the shard with that digest; raises DataError."""
    index_path = path.with_suffix(shard_index.SUFFIX)
    index = shard_index.load(index_path)
    if index.header.tar_sha256.hex() != sha256:
        raise DataError(f"{index_path} belongs to another shard (it does not fit the data set's index)")
    return index


def verify_shard(path: Path, index: ShardIndex, advance: Callable[[int], None]) -> Iterator[Damage]:
    """Read the tar `path` once and yield every damage: of the whole, of tar headers, images, labels and targets.

    `advance(n)` is told of every n samples checked.
    """
    shard = f"{path.parent.name}/{path.name}"
    begins = (index.records["offset"] - index.records["header"]).tolist()
    begins.append(index.header.tar_bytes)
    digest = hashlib.sha256()
    found = 0
    with open(path, "rb") as file:
        digest.update(file.read(begins[0]))
        for row, key in enumerate(index.keys):
            span = _read_span(file, begins[row + 1] - begins[row], digest.update)
            what = _sample_damage(span, index, row)
            if what:
                found += 1
                yield Damage(shard, key, what)
            advance(1)
        digest.update(file.read())
    if digest.digest() != index.header.tar_sha256 and not found:
        yield Damage(
            shard, "", "bytes outside of the images, labels, targets and tar headers were changed (SHA-256 differs)"
        )


def _read_span(file: BinaryIO, size: int, update: Callable[[bytes], None]) -> bytes:
    span = file.read(size)
    update(span)
    return span


def _sample_damage(span: bytes, index: ShardIndex, number: int) -> str | None:
    """What is wrong with a sample, given its piece of the tar: tar header and content of image, label and target."""
    record, key = index.records[number], index.keys[number]
    header, size = int(record["header"]), int(record["size"])
    image = span[header : header + size]
    if len(image) < size:
        return "lost: the shard ends before it"
    if zlib.crc32(image) != record["crc32"]:
        return "the image's bytes were changed (checksum differs)"
    try:
        with tarfile.open(fileobj=io.BytesIO(span), mode="r:") as tar:
            members = tar.getmembers()
    except tarfile.TarError as error:
        return f"the tar header of the image is damaged ({error})"
    if (
        not members
        or members[0].name.split(".")[0] != key
        or members[0].offset_data != header
        or members[0].size != size
    ):
        return "the tar header of the image is damaged"
    others = [(member.name, span[member.offset_data :][: member.size], member.offset_data) for member in members[1:]]
    return _label_damage(others, key, int(record["label"])) or _target_damage(others, key, record)


def _label_damage(others: list[tuple[str, bytes, int]], key: str, label: int) -> str | None:
    """What is wrong with a sample's label, if it has one, which is taken out of `others` (name, content, place)."""
    if label == shard_index.NO_LABEL:
        return None
    if not others or others[0][0] != f"{key}.{LABEL_EXTENSION}":
        return "the tar header of the label is damaged"
    content = others.pop(0)[1]
    if content != str(label).encode():
        return f"the label is {content!r} in the tar and {label} in the index"
    return None


def _target_damage(others: list[tuple[str, bytes, int]], key: str, record: np.void) -> str | None:
    """What is wrong with a sample's target, given all members of the tar after the label."""
    size = int(record["target_size"])
    if not size:
        return "the tar header of the label is damaged" if others else None
    place = int(record["header"]) + int(record["size"]) + int(record["target_gap"])
    if len(others) != 1 or not others[0][0].startswith(f"{key}.") or others[0][2] != place or len(others[0][1]) != size:
        return "the tar header of the target is damaged"
    if zlib.crc32(others[0][1]) != record["target_crc32"]:
        return "the target's bytes were changed (checksum differs)"
    return None
