"""The index beside each tar shard (`shard-000000.idx`): where each sample lies, and how to know that it is undamaged.

    header   magic, version, number of samples, bytes of keys, entries of the row table, size and SHA-256 of the tar,
             CRC-32 of the header
    records  one of fixed size per sample (RECORD)
    keys     UTF-8, one after the other
    rows     the row table: for each JPEG with restart rows (data_pipeline.restart_rows) where its pieces begin (ROW)
    CRC-32   of everything before

All numbers are little-endian. A reader finds a sample with two or three small reads at computed places, so that a data
set of any size opens at once and takes no memory; each record has a checksum of its own for that reason. Version 1 had
neither targets nor orientation nor rows; it is refused.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipeline.shards.source import DataError

MAGIC = b"TARINDEX"
VERSION = 2
SUFFIX = ".idx"

_MAGIC_AND_VERSION = struct.Struct("<8sI")
HEADER = struct.Struct("<8sIIQQQ32sI")
_CHECKSUM = struct.Struct("<I")

RECORD = np.dtype(
    [
        ("offset", "<u8"),  # of the image's bytes in the tar
        ("size", "<u4"),  # of the image, in bytes
        ("crc32", "<u4"),  # of the image's bytes
        ("header", "<u4"),  # bytes of tar header in front of the image: the sample begins at offset - header
        ("label", "<u4"),  # NO_LABEL where the sample has none
        ("width", "<u4"),  # as stored, before a rotation noted in EXIF
        ("height", "<u4"),
        ("key_start", "<u4"),  # within the keys
        ("key_size", "<u2"),
        ("subsampling", "<u2"),  # place in SUBSAMPLINGS
        ("target_gap", "<u4"),  # bytes from the image's end to the beginning of the target (mask, annotation)
        ("target_size", "<u4"),  # of the target, in bytes; 0 where there is none
        ("target_crc32", "<u4"),  # of the target's bytes
        ("rows_start", "<u4"),  # the sample's first entry in the row table
        ("rows_count", "<u2"),  # its entries there; 0 where the image has no restart rows
        ("orientation", "<u2"),  # as EXIF notes it, 1 (upright) to 8
        ("record_crc32", "<u4"),  # of the fields above, the key and the entries in the row table
    ]
)
RECORD_STRUCT = struct.Struct("<QIIIIIIIHHIIIIHHI")
_CHECKED_BYTES = RECORD.itemsize - 4
_MOST_IN_U2 = 0xFFFF

ROW = np.dtype(
    [
        ("offset", "<u4"),  # of the piece, from the image's first byte
        ("crc32", "<u4"),  # of the image's bytes up to the end of the piece
    ]
)
"""A piece of a JPEG: the first holds everything up to the pixels (SOS included), each further one a row of MCUs, or an
even part of it, with the marker that ends it; the last runs to the end of the file. One checksum, begun with that of
the piece before, proves any run of pieces."""

NO_LABEL = 0xFFFFFFFF
"""Stands in the index for the label -1: the sample has none."""

SUBSAMPLINGS = ("not a JPEG", "444", "422", "420", "Gray", "440", "411", "441", "other")
"""Chroma subsampling of the JPEG, by the number that stands in the index."""

Records = npt.NDArray[np.void]
Rows = npt.NDArray[np.void]


@dataclass(frozen=True)
class Header:
    """What the index says about its shard as a whole."""

    samples: int
    key_bytes: int
    row_entries: int
    tar_bytes: int
    tar_sha256: bytes

    @property
    def keys_offset(self) -> int:
        """Where the keys begin in the index file, in bytes."""
        return HEADER.size + self.samples * RECORD.itemsize

    @property
    def rows_offset(self) -> int:
        """Where the row table begins in the index file, in bytes."""
        return self.keys_offset + self.key_bytes

    @property
    def file_bytes(self) -> int:
        """Size of the index file."""
        return self.rows_offset + self.row_entries * ROW.itemsize + _CHECKSUM.size


@dataclass(frozen=True)
class ShardIndex:
    """The whole index of one shard. `records` has dtype RECORD, one per sample in the order of the tar; `rows`, the row
    table, has dtype ROW."""

    header: Header
    records: Records
    keys: tuple[str, ...]
    rows: Rows

    def rows_of(self, number: int) -> Rows:
        """The entries of a sample in the row table, (pieces,); none where its image has no restart rows."""
        start = int(self.records["rows_start"][number])
        return self.rows[start : start + int(self.records["rows_count"][number])]


def pack(records: Records, keys: list[str], rows: list[Rows], tar_bytes: int, tar_sha256: bytes) -> bytes:
    """The bytes of an index file; `rows`: each sample's entries of the row table (ROW), or none.

    Fills in the columns key_start, key_size, rows_start, rows_count and record_crc32 of `records`. Raises ValueError
    for a key of more than 65,535 bytes or an image of more pieces than that.
    """
    encoded = [key.encode() for key in keys]
    records = records.copy()
    for name, lengths in (("key", [len(key) for key in encoded]), ("rows", [len(entries) for entries in rows])):
        sizes = np.array(lengths, dtype=np.int64)
        if sizes.size and sizes.max() > _MOST_IN_U2:
            raise ValueError(f"the key '{keys[int(sizes.argmax())][:80]}' has {name} of a length above {_MOST_IN_U2}")
        records["key_size" if name == "key" else "rows_count"] = sizes
        records[f"{name}_start"] = np.cumsum(sizes) - sizes
    for number, (key, entries) in enumerate(zip(encoded, rows, strict=True)):
        fields = records[number : number + 1].tobytes()[:_CHECKED_BYTES]
        records["record_crc32"][number] = zlib.crc32(entries.tobytes(), zlib.crc32(key, zlib.crc32(fields)))
    blob, table = b"".join(encoded), b"".join(entries.tobytes() for entries in rows)
    header = Header(len(keys), len(blob), len(table) // ROW.itemsize, tar_bytes, tar_sha256)
    body = _pack_header(header) + records.tobytes() + blob + table
    return body + _CHECKSUM.pack(zlib.crc32(body))


def _pack_header(header: Header) -> bytes:
    counts = (header.samples, header.key_bytes, header.row_entries, header.tar_bytes)
    unchecked = HEADER.pack(MAGIC, VERSION, *counts, header.tar_sha256, 0)[: -_CHECKSUM.size]
    return unchecked + _CHECKSUM.pack(zlib.crc32(unchecked))


def parse_header(data: bytes) -> Header:
    """Read the header from the first HEADER.size bytes of an index; raises ValueError saying what is wrong."""
    if len(data) < _MAGIC_AND_VERSION.size:
        raise ValueError(f"it ends after {len(data)} bytes")
    magic, version = _MAGIC_AND_VERSION.unpack_from(data)
    if magic != MAGIC:
        raise ValueError("it is no shard index")
    if version != VERSION:
        raise ValueError(f"it has format version {version}, and this program reads version {VERSION}: prepare anew")
    if len(data) < HEADER.size:
        raise ValueError(f"it ends after {len(data)} bytes")
    _, _, samples, key_bytes, row_entries, tar_bytes, tar_sha256, checksum = HEADER.unpack_from(data)
    if zlib.crc32(data[: HEADER.size - _CHECKSUM.size]) != checksum:
        raise ValueError("its header is damaged (checksum differs)")
    return Header(samples, key_bytes, row_entries, tar_bytes, tar_sha256)


def load(path: Path) -> ShardIndex:
    """Read and check a whole index file; raises DataError naming the file where anything is wrong with it."""
    try:
        return unpack(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} cannot be used: {error}") from error


def unpack(data: bytes) -> ShardIndex:
    """Read and check the bytes of a whole index file; raises ValueError saying what is wrong."""
    header = parse_header(data)
    if len(data) != header.file_bytes:
        raise ValueError(f"it has {len(data)} bytes instead of {header.file_bytes}")
    if zlib.crc32(data[: -_CHECKSUM.size]) != _CHECKSUM.unpack(data[-_CHECKSUM.size :])[0]:
        raise ValueError("it is damaged (checksum differs)")
    records = np.frombuffer(data, RECORD, count=header.samples, offset=HEADER.size)
    blob = data[header.keys_offset : header.rows_offset]
    bounds = zip(records["key_start"].tolist(), records["key_size"].tolist(), strict=True)
    keys = tuple(blob[start : start + size].decode() for start, size in bounds)
    rows = np.frombuffer(data, ROW, count=header.row_entries, offset=header.rows_offset)
    return ShardIndex(header, records, keys, rows)


def upright_sizes(records: Records) -> npt.NDArray[np.int32]:
    """(height, width) of each image as a viewer shows it, (samples, 2)."""
    stored = np.stack([records["height"], records["width"]], axis=1).astype(np.int32)
    turned = records["orientation"] >= 5  # EXIF: rows and columns change places
    stored[turned] = stored[turned, ::-1]
    return stored


class Record(NamedTuple):
    """One sample's entry in the index."""

    offset: int
    size: int
    crc32: int
    label: int
    """-1 where the sample has none"""

    key: str
    target_offset: int
    target_size: int
    """0 where the sample has no target"""

    target_crc32: int
    orientation: int
    row_offsets: tuple[int, ...]
    """Where the pieces of a JPEG with restart rows begin, from the image's first byte; empty without them."""

    row_crc32s: tuple[int, ...]
    """CRC-32 of the image's bytes up to the end of each piece."""


def read_record(pread: Callable[[int, int], bytes], header: Header, row: int) -> Record:
    """Read one sample's entry with `pread(size, offset)`; raises ValueError where it is damaged."""
    data = pread(RECORD.itemsize, HEADER.size + row * RECORD.itemsize)
    if len(data) != RECORD.itemsize:
        raise ValueError("the shard's index ends before its record")
    fields = RECORD_STRUCT.unpack(data)
    offset, size, crc32, _, label, _, _, key_start, key_size, _ = fields[:10]
    target_gap, target_size, target_crc32, rows_start, rows_count, orientation, checksum = fields[10:]
    key = pread(key_size, header.keys_offset + key_start)
    found = zlib.crc32(key, zlib.crc32(data[:_CHECKED_BYTES]))
    rows: tuple[int, ...] = ()
    if rows_count:
        table = pread(rows_count * ROW.itemsize, header.rows_offset + rows_start * ROW.itemsize)
        found = zlib.crc32(table, found)
        rows = struct.unpack(f"<{len(table) // 4}I", table[: len(table) & -4])
    if found != checksum:
        raise ValueError("its record in the shard's index is damaged (checksum differs)")
    return Record(
        offset,
        size,
        crc32,
        -1 if label == NO_LABEL else label,
        key.decode(),
        offset + size + target_gap,
        target_size,
        target_crc32,
        orientation,
        rows[::2],
        rows[1::2],
    )
