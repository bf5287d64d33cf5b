"""Writing one tar shard and its index. The same samples always give the same bytes."""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.shards import shard_index
from data_pipeline.shards.files import atomic_write

LABEL_EXTENSION = "cls"

_TEMPLATE = tarfile.TarInfo("").tobuf(tarfile.GNU_FORMAT)
_NAME_BYTES = 100
_LARGEST_OCTAL = 8**11


class OtherContentError(Exception):
    """A shard would not get the content that it must have."""


@dataclass(frozen=True)
class EncodedSample:
    """A sample as it goes into a tar: KEY.EXTENSION with the image file's bytes; KEY.cls with the label in decimal,
    where it has one; KEY.TARGET_EXTENSION with the target of a dense task, where it has one."""

    key: str
    """Unique within the split, without a dot (webdataset takes the extension from the first dot on)."""

    extension: str
    """Of the image, in lower case and without the dot."""

    image: bytes
    label: int
    """Class index; -1: the sample has none."""

    width: int
    """As stored, before a rotation noted in EXIF; so is `height`."""

    height: int
    subsampling: str
    """One of shard_index.SUBSAMPLINGS."""

    orientation: int = 1
    """As EXIF notes it, 1 (upright) to 8."""

    target: bytes | None = None
    """What a dense task is to learn: the file of a mask or of annotations, not empty."""

    target_extension: str = ""
    """Of the target, such as "seg.png" or "json"."""

    restart_rows: tuple[int, ...] = ()
    """Where the pieces of a JPEG with restart rows begin, as data_pipeline.restart_rows gives them; empty without."""


@dataclass(frozen=True)
class WrittenShard:
    """What the set-level index says about a shard."""

    samples: int
    tar_bytes: int
    index_bytes: int
    sha256: str


def write_shard(path: Path, samples: Iterable[EncodedSample], sha256: str | None = None) -> WrittenShard:
    """Write the tar `path` and, after it, its index; each appears whole or not at all.

    Raises OSError where writing fails, ValueError for a key with a dot or a repeated one and for fields that contradict
    each other, and OtherContentError where the tar's SHA-256 would not be `sha256`; whatever was at `path` then stays.
    """
    keys: list[str] = []
    records: list[tuple[int, ...]] = []
    rows: list[shard_index.Rows] = []
    digest = hashlib.sha256()
    position = 0
    with atomic_write(path) as file:
        for sample in samples:
            keys.append(_checked(sample.key))
            members = _members(sample)
            block = b"".join(members)
            file.write(block)
            digest.update(block)
            records.append(_record(sample, position, members))
            rows.append(_rows(sample))
            position += len(block)
        end = bytes(_end_of_archive(position))
        file.write(end)
        digest.update(end)
        position += len(end)
        if len(set(keys)) != len(keys):
            raise ValueError(f"{path}: a key occurs twice")
        if sha256 not in (None, digest.hexdigest()):
            raise OtherContentError(f"{path} would have the SHA-256 {digest.hexdigest()}, not {sha256}")
    table = np.array(records, dtype=shard_index.RECORD)
    packed = shard_index.pack(table, keys, rows, position, digest.digest())
    with atomic_write(path.with_suffix(shard_index.SUFFIX)) as file:
        file.write(packed)
    return WrittenShard(len(keys), position, len(packed), digest.hexdigest())


def member_bytes(size: int, target_size: int | None = None) -> int:
    """Bytes that a sample with an image of `size` bytes takes in a tar (when its name is not overlong): with its label,
    or with a target of `target_size` bytes instead."""
    second = tarfile.BLOCKSIZE if target_size is None else target_size + -target_size % tarfile.BLOCKSIZE
    return 2 * tarfile.BLOCKSIZE + size + -size % tarfile.BLOCKSIZE + second


def _checked(key: str) -> str:
    if not key or "." in key:
        raise ValueError(f"the key '{key}' is empty or has a dot, from which webdataset would take the extension")
    return key


def _members(sample: EncodedSample) -> list[bytes]:
    """Tar header, padded content, tar header, padded content, ... of the image, then the label, then the target."""
    files = [(sample.extension, sample.image)]
    if sample.label >= 0:
        files.append((LABEL_EXTENSION, str(sample.label).encode()))
    if sample.target is not None:
        if not sample.target or not sample.target_extension:
            raise ValueError(f"the target of '{sample.key}' is empty or has no extension")
        files.append((sample.target_extension, sample.target))
    members: list[bytes] = []
    for extension, content in files:
        padding = bytes(-len(content) % tarfile.BLOCKSIZE)
        members += (tar_header(f"{sample.key}.{extension}", len(content)), content + padding)
    return members


def _record(sample: EncodedSample, position: int, members: list[bytes]) -> tuple[int, ...]:
    """The fields of shard_index.RECORD of a sample that begins at `position`; those that `pack` fills in are 0."""
    header, size = len(members[0]), len(sample.image)
    label = shard_index.NO_LABEL if sample.label < 0 else sample.label
    target_gap = target_size = target_crc32 = 0
    if sample.target is not None:
        target_gap = sum(map(len, members[:-1])) - header - size
        target_size, target_crc32 = len(sample.target), zlib.crc32(sample.target)
    subsampling = shard_index.SUBSAMPLINGS.index(sample.subsampling)
    return (
        *(
            position + header,
            size,
            zlib.crc32(sample.image),
            header,
            label,
            sample.width,
            sample.height,
            0,
            0,
            subsampling,
        ),
        *(target_gap, target_size, target_crc32, 0, 0, sample.orientation, 0),
    )


def _rows(sample: EncodedSample) -> shard_index.Rows:
    """The sample's entries of the row table."""
    starts = sample.restart_rows
    ends = (*starts[1:], len(sample.image)) if starts else ()
    if starts and (starts[0] != 0 or any(start >= end for start, end in zip(starts, ends, strict=True))):
        raise ValueError(f"the restart rows of '{sample.key}' do not divide its image")
    entries, crc32 = [], 0
    for start, end in zip(starts, ends, strict=True):
        crc32 = zlib.crc32(sample.image[start:end], crc32)
        entries.append((start, crc32))
    return np.array(entries, dtype=shard_index.ROW)


def tar_header(name: str, size: int) -> bytes:
    """The GNU tar header of a file with fixed owner (0), time (0) and mode (0644).

    The same bytes as TarInfo gives, in a tenth of the time where the name is not overlong: with small images, headers
    are a third of the work.
    """
    encoded = name.encode()
    if len(encoded) > _NAME_BYTES or size >= _LARGEST_OCTAL:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.GNU_FORMAT, "utf-8")
    before = encoded.ljust(_NAME_BYTES, b"\0") + _TEMPLATE[100:124] + b"%011o\0" % size + _TEMPLATE[136:148]
    after = _TEMPLATE[156:]
    checksum = sum(before) + sum(after) + 8 * ord(" ")  # its own field counts as spaces
    return before + b"%06o\0 " % checksum + after


def _end_of_archive(position: int) -> int:
    """Number of zero bytes that end a tar: two blocks, then up to a whole record, as tar itself does it."""
    end = 2 * tarfile.BLOCKSIZE
    return end + -(position + end) % tarfile.RECORDSIZE
