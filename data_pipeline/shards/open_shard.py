"""An open tar shard and its index, and the proved bytes of one of its samples."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.restart_rows import Span
from data_pipeline.shards import shard_index
from data_pipeline.shards.cache import Held
from data_pipeline.shards.shard_index import Record
from data_pipeline.shards.source import DamagedSampleError, DataError


@dataclass(frozen=True)
class Stored:
    """Where one sample's bytes lie. Keeps its shard open."""

    shard: OpenShard
    name: str
    """Of the shard within the data set."""

    record: Record

    def proved(self, offset: int, size: int, crc32: int, what: str) -> bytes:
        """Bytes of the tar whose checksum is known. Raises DamagedSampleError, DataError."""
        data = self._read(offset, size, what)
        if zlib.crc32(data) != crc32:
            raise DamagedSampleError(self.name, self.record.key, f"the {what}'s bytes were changed (checksum differs)")
        return data

    def pieces(self, spans: Sequence[Span]) -> bytes:
        """The pieces in these spans of an image with restart rows, proved by their checksums. One read fetches them,
        and what lies between them."""
        ends, crc32s = (*self.record.row_offsets, self.record.size), (*self.record.row_crc32s, 0)
        begin = ends[spans[0][0]]
        data = self._read(self.record.offset + begin, ends[spans[-1][1]] - begin, "image")
        view = memoryview(data)
        found = [view[ends[first] - begin : ends[stop] - begin] for first, stop in spans]
        for (first, stop), part in zip(spans, found, strict=True):
            # a checksum goes on from that of all pieces before (of piece -1: 0), so that one call proves many
            if zlib.crc32(part, crc32s[first - 1]) != crc32s[stop - 1]:
                raise DamagedSampleError(
                    self.name, self.record.key, "the image's bytes were changed (checksum of a restart row differs)"
                )
        return data if len(found) == 1 else b"".join(found)

    def _read(self, offset: int, size: int, what: str) -> bytes:
        try:
            data = self.shard.read_tar(size, offset)
        except OSError as error:
            raise DataError(f"shard {self.shard.where} cannot be read: {error}") from error
        if len(data) != size:
            raise DamagedSampleError(self.name, self.record.key, f"the shard ends within the {what}: it was cut short")
        return data


class OpenShard:
    """The two open files of a shard. They are closed when the last thread that reads from them lets go of this object,
    so that taking it out of the table of open shards never pulls a file from under a reader."""

    def __init__(self, where: str, tar: Held, index: Held) -> None:
        """`where`: the tar's place, for messages. The held files are closed with this object."""
        self.where = where
        self._held: tuple[Held, ...] = ()
        self._descriptors: list[int] = []
        for held in (tar, index):
            self._descriptors.append(os.open(held.path, os.O_RDONLY | os.O_CLOEXEC))
        self._tar, self._index = self._descriptors
        self.header = shard_index.parse_header(self.read_index(shard_index.HEADER.size, 0))
        self._held = (tar, index)

    def read_tar(self, size: int, offset: int) -> bytes:
        """`size` bytes of the tar, fewer where it ends before. Raises OSError."""
        return _pread(self._tar, size, offset)

    def read_index(self, size: int, offset: int) -> bytes:
        """`size` bytes of the index, fewer where it ends before. Raises OSError."""
        return _pread(self._index, size, offset)

    def __del__(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        for held in self._held:
            held.close()


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    """Read `size` bytes at `offset`, or what there is before the end of the file."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size:  # a network file system may return less than asked for
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data
