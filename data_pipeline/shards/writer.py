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
    """A sample as it goes into a tar: KEY.EXTENSION with the image file's bytes, KEY.cls with the label in decimal."""

    key: str
    """Unique within the split, without a dot (webdataset takes the extension from the first dot on)."""

    extension: str
    """Of the image, in lower case and without the dot."""

    image: bytes
    label: int
    width: int
    height: int
    subsampling: str
    """One of shard_index.SUBSAMPLINGS."""


@dataclass(frozen=True)
class WrittenShard:
    """What the set-level index says about a shard."""

    samples: int
    tar_bytes: int
    index_bytes: int
    sha256: str


def write_shard(path: Path, samples: Iterable[EncodedSample], sha256: str | None = None) -> WrittenShard:
    """Write the tar `path` and, after it, its index; each appears whole or not at all.

    Raises OSError where writing fails, ValueError for a key with a dot or a repeated one, and OtherContentError where
    the tar's SHA-256 would not be `sha256`; whatever was at `path` then stays.
    """
    keys: list[str] = []
    rows: list[tuple[int, ...]] = []
    digest = hashlib.sha256()
    position = 0
    with atomic_write(path) as file:
        for sample in samples:
            header, body = _member(f"{sample.key}.{sample.extension}", sample.image)
            block = header + body + b"".join(_member(f"{sample.key}.{LABEL_EXTENSION}", str(sample.label).encode()))
            file.write(block)
            digest.update(block)
            rows.append(_row(sample, position + len(header), len(header)))
            keys.append(_checked(sample.key))
            position += len(block)
        end = bytes(_end_of_archive(position))
        file.write(end)
        digest.update(end)
        position += len(end)
        if len(set(keys)) != len(keys):
            raise ValueError(f"{path}: a key occurs twice")
        if sha256 not in (None, digest.hexdigest()):
            raise OtherContentError(f"{path} would have the SHA-256 {digest.hexdigest()}, not {sha256}")
    packed = shard_index.pack(np.array(rows, dtype=shard_index.RECORD), keys, position, digest.digest())
    with atomic_write(path.with_suffix(shard_index.SUFFIX)) as file:
        file.write(packed)
    return WrittenShard(len(keys), position, len(packed), digest.hexdigest())


def member_bytes(size: int) -> int:
    """Bytes that a sample with an image of `size` bytes takes in a tar (when its name is not overlong)."""
    return 3 * tarfile.BLOCKSIZE + size + -size % tarfile.BLOCKSIZE


def _checked(key: str) -> str:
    if not key or "." in key:
        raise ValueError(f"the key '{key}' is empty or has a dot, from which webdataset would take the extension")
    return key


def _row(sample: EncodedSample, offset: int, header: int) -> tuple[int, ...]:
    checksum = zlib.crc32(sample.image)
    subsampling = shard_index.SUBSAMPLINGS.index(sample.subsampling)
    size = len(sample.image)
    return (offset, size, checksum, header, sample.label, sample.width, sample.height, 0, 0, subsampling, 0)


def _member(name: str, data: bytes) -> tuple[bytes, bytes]:
    """Tar header and padded content."""
    return tar_header(name, len(data)), data + bytes(-len(data) % tarfile.BLOCKSIZE)


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
