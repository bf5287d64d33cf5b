"""The index beside each tar shard (`shard-000000.idx`): where each sample lies, and how to know that it is undamaged.

    header   magic, version, number of samples, bytes of keys, size and SHA-256 of the tar, CRC-32 of the header
    records  one of fixed size per sample (RECORD)
    keys     UTF-8, one after the other
    CRC-32   of everything before

All numbers are little-endian. A reader finds a sample with two small reads at computed places, so that a data set of
any size opens at once and takes no memory; each record has a checksum of its own for that reason. A later version may
put further arrays, such as the offsets of restart rows, between the keys and the checksum.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_pipeline.shards.source import DataError

MAGIC = b"TARINDEX"
VERSION = 1
SUFFIX = ".idx"

HEADER = struct.Struct("<8sIIQQ32sI")
_CHECKSUM = struct.Struct("<I")

RECORD = np.dtype(
    [
        ("offset", "<u8"),  # of the image's bytes in the tar
        ("size", "<u4"),  # of the image, in bytes
        ("crc32", "<u4"),  # of the image's bytes
        ("header", "<u4"),  # bytes of tar header in front of the image: the sample begins at offset - header
        ("label", "<u4"),
        ("width", "<u4"),  # as stored, before a rotation noted in EXIF
        ("height", "<u4"),
        ("key_start", "<u4"),  # within the keys
        ("key_size", "<u2"),
        ("subsampling", "<u2"),  # place in SUBSAMPLINGS
        ("record_crc32", "<u4"),  # of the fields above and the key
    ]
)
RECORD_STRUCT = struct.Struct("<QIIIIIIIHHI")
_CHECKED_BYTES = RECORD.itemsize - 4

SUBSAMPLINGS = ("not a JPEG", "444", "422", "420", "Gray", "440", "411", "441", "other")
"""Chroma subsampling of the JPEG, by the number that stands in the index."""

Records = npt.NDArray[np.void]


@dataclass(frozen=True)
class Header:
    """What the index says about its shard as a whole."""

    samples: int
    key_bytes: int
    tar_bytes: int
    tar_sha256: bytes

    @property
    def keys_offset(self) -> int:
        """Where the keys begin in the index file, in bytes."""
        return HEADER.size + self.samples * RECORD.itemsize

    @property
    def file_bytes(self) -> int:
        """Size of the index file."""
        return self.keys_offset + self.key_bytes + _CHECKSUM.size


@dataclass(frozen=True)
class ShardIndex:
    """The whole index of one shard. `records` has dtype RECORD, one per sample in the order of the tar."""

    header: Header
    records: Records
    keys: tuple[str, ...]


def pack(records: Records, keys: list[str], tar_bytes: int, tar_sha256: bytes) -> bytes:
    """The bytes of an index file. Fills in the columns key_start, key_size and record_crc32 of `records`."""
    encoded = [key.encode() for key in keys]
    sizes = np.array([len(key) for key in encoded], dtype=np.int64)
    records = records.copy()
    records["key_size"] = sizes
    records["key_start"] = np.cumsum(sizes) - sizes
    for row, key in enumerate(encoded):
        records["record_crc32"][row] = zlib.crc32(key, zlib.crc32(records[row : row + 1].tobytes()[:_CHECKED_BYTES]))
    blob = b"".join(encoded)
    body = _pack_header(Header(len(keys), len(blob), tar_bytes, tar_sha256)) + records.tobytes() + blob
    return body + _CHECKSUM.pack(zlib.crc32(body))


def _pack_header(header: Header) -> bytes:
    fields = (MAGIC, VERSION, header.samples, header.key_bytes, header.tar_bytes, header.tar_sha256)
    unchecked = HEADER.pack(*fields, 0)[: -_CHECKSUM.size]
    return unchecked + _CHECKSUM.pack(zlib.crc32(unchecked))


def parse_header(data: bytes) -> Header:
    """Read the header from the first HEADER.size bytes of an index; raises ValueError saying what is wrong."""
    if len(data) < HEADER.size:
        raise ValueError(f"it ends after {len(data)} bytes")
    magic, version, samples, key_bytes, tar_bytes, tar_sha256, checksum = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise ValueError("it is no shard index")
    if version != VERSION:
        raise ValueError(f"it has format version {version}, and this program reads version {VERSION}")
    if zlib.crc32(data[: HEADER.size - _CHECKSUM.size]) != checksum:
        raise ValueError("its header is damaged (checksum differs)")
    return Header(samples, key_bytes, tar_bytes, tar_sha256)


def load(path: Path) -> ShardIndex:
    """Read and check a whole index file; raises DataError naming the file where anything is wrong with it."""
    try:
        return _unpack(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} cannot be used: {error}") from error


def _unpack(data: bytes) -> ShardIndex:
    header = parse_header(data)
    if len(data) != header.file_bytes:
        raise ValueError(f"it has {len(data)} bytes instead of {header.file_bytes}")
    if zlib.crc32(data[: -_CHECKSUM.size]) != _CHECKSUM.unpack(data[-_CHECKSUM.size :])[0]:
        raise ValueError("it is damaged (checksum differs)")
    records = np.frombuffer(data, RECORD, count=header.samples, offset=HEADER.size)
    blob = data[header.keys_offset : header.keys_offset + header.key_bytes]
    bounds = zip(records["key_start"].tolist(), records["key_size"].tolist(), strict=True)
    return ShardIndex(header, records, tuple(blob[start : start + size].decode() for start, size in bounds))


@dataclass(frozen=True)
class Record:
    """One sample's entry in the index."""

    offset: int
    size: int
    crc32: int
    label: int
    key: str


def read_record(pread: Callable[[int, int], bytes], header: Header, row: int) -> Record:
    """Read one sample's entry with `pread(size, offset)`; raises ValueError where it is damaged."""
    data = pread(RECORD.itemsize, HEADER.size + row * RECORD.itemsize)
    if len(data) != RECORD.itemsize:
        raise ValueError("the shard's index ends before its record")
    offset, size, crc32, _, label, _, _, key_start, key_size, _, checksum = RECORD_STRUCT.unpack(data)
    key = pread(key_size, header.keys_offset + key_start)
    if zlib.crc32(key, zlib.crc32(data[:_CHECKED_BYTES])) != checksum:
        raise ValueError("its record in the shard's index is damaged (checksum differs)")
    return Record(offset, size, crc32, label, key.decode())
