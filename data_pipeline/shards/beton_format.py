"""The layout of a .beton file, as the ffcv package writes it (format version 2), read with bounds checked everywhere.

    header       format version, number of fields, page size, number of samples, where the allocation table is
    fields       1,041 bytes each: type, name, arguments
    metadata     one record per sample: integers and floats themselves; of an image its size and where its data is
    pages        the data; what one allocation holds never crosses the end of a page
    allocations  sample, place and size in bytes of every piece of data, to the end of the file

All numbers are little-endian. The length of a JPEG stands in the allocation table alone. Nothing in a file is trusted:
a count or a place that does not fit the file is an error before anything is read or allocated for it. The format has
no checksums.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SUFFIX = ".beton"
VERSION = 2
JPEG, RAW = 0, 1
"""How an image is stored."""

HEADER = struct.Struct("<HHIQQ")
_FIELD = struct.Struct("<B16s1024s")
_IMAGE_STRUCT = struct.Struct("<BHHQ")
_LABEL_STRUCT = struct.Struct("<q")
ALLOCATION = np.dtype([("sample", "<u8"), ("offset", "<u8"), ("size", "<u8")])

_IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("offset", "<u8")])
_BYTES = np.dtype([("offset", "<u8"), ("size", "<u8")])
# By type number: what a sample's record holds of such a field. 255 is a class of the writer's own.
_INT_TYPE, _IMAGE_TYPE, _CUSTOM_TYPE = 1, 2, 255
_TYPES = {
    0: ("FloatField", np.dtype("<f8")),
    _INT_TYPE: ("IntField", np.dtype("<i8")),
    _IMAGE_TYPE: ("RGBImageField", _IMAGE),
    3: ("BytesField", _BYTES),
    4: ("NDArrayField", np.dtype("<u8")),
    5: ("JSONField", _BYTES),
    6: ("TorchTensorField", np.dtype("<u8")),
}
_LABEL_NAME = "label"
_CHUNK_BYTES = 1 << 24
# Pages that lie together and are shuffled as one unit have about this many bytes, as tar shards have.
_RUN_BYTES = 1 << 26

Pread = Callable[[int, int], bytes]
"""pread(size, offset): the bytes, fewer at the end of the file."""


@dataclass(frozen=True)
class Layout:
    """Where everything is in one file, and which of its fields are the image and the label."""

    samples: int
    page_size: int
    record: np.dtype[np.void]
    """Of a sample's metadata; field i of the file is its field i."""

    image_field: str
    """Name, within `record`, of the first image."""

    label_field: str
    """Name, within `record`, of the label."""

    metadata_offset: int
    allocations_offset: int
    file_bytes: int

    @property
    def data_offset(self) -> int:
        """Where metadata ends; no data lies before it."""
        return self.metadata_offset + self.samples * self.record.itemsize


@dataclass(frozen=True)
class Contents:
    """What is known of all samples after metadata and allocations were read once."""

    sizes: npt.NDArray[np.uint32]
    """Bytes of each sample's image, (samples,); 0 where metadata and allocation table do not agree on a place."""

    runs: npt.NDArray[np.int64]
    """Lengths of the runs of consecutive samples that lie together in the file, (runs,)."""

    lowest_label: int
    highest_label: int
    digest: str
    """SHA-256 of everything but the pages, and of the file's size."""


@dataclass(frozen=True)
class Record:
    """One sample's metadata."""

    mode: int
    """JPEG, RAW, or a damaged value."""

    height: int
    width: int
    offset: int
    """Of the image's data in the file."""

    label: int


def read_layout(pread: Pread, file_bytes: int) -> Layout:
    """Read header and fields; raises ValueError saying what is wrong with them."""
    header = pread(HEADER.size, 0)
    if len(header) < HEADER.size:
        raise ValueError(f"it ends after {len(header)} bytes")
    version, num_fields, page_size, samples, allocations_offset = HEADER.unpack(header)
    if version != VERSION:
        raise ValueError(f"it is no .beton of format version {VERSION} (its version number is {version})")
    if allocations_offset == 0:
        raise ValueError("writing it was never finished (it has no allocation table)")
    metadata_offset = HEADER.size + num_fields * _FIELD.size
    if metadata_offset > file_bytes:
        raise ValueError(f"it is cut short or its header is damaged ({num_fields} fields in {file_bytes:,} bytes)")
    if page_size == 0 or page_size & (page_size - 1):
        raise ValueError(f"its header is damaged (a page size of {page_size} is no power of 2)")
    record, image_field, label_field = _record_type(pread(num_fields * _FIELD.size, HEADER.size))
    layout = Layout(
        samples, page_size, record, image_field, label_field, metadata_offset, allocations_offset, file_bytes
    )
    if not layout.data_offset <= allocations_offset <= file_bytes:
        raise ValueError(
            f"it is cut short or its header is damaged ({samples:,} samples, allocation table at byte "
            f"{allocations_offset:,}, in {file_bytes:,} bytes)"
        )
    entries, rest = divmod(file_bytes - allocations_offset, ALLOCATION.itemsize)
    if rest or entries < samples:
        raise ValueError(f"it is cut short: its allocation table has {entries:,} entries for {samples:,} images")
    return layout


def _record_type(descriptors: bytes) -> tuple[np.dtype[np.void], str, str]:
    """Type of a sample's metadata, and the names in it of the image and the label; raises ValueError."""
    types, names = [], []
    for number, name_bytes, _ in _FIELD.iter_unpack(descriptors):
        name = name_bytes.split(b"\0")[0].decode("ascii", "backslashreplace")
        if number not in _TYPES:
            what = "a custom class" if number == _CUSTOM_TYPE else f"of the unknown type {number}"
            raise ValueError(f"its field '{name}' is {what}, of which only its writer knows the size")
        types.append(number)
        names.append(name)
    described = ", ".join(f"{name} ({_TYPES[number][0]})" for name, number in zip(names, types, strict=True)) or "none"
    images = [place for place, number in enumerate(types) if number == _IMAGE_TYPE]
    integers = [place for place, number in enumerate(types) if number == _INT_TYPE]
    if not images:
        raise ValueError(f"it has no field of images (RGBImageField); its fields: {described}")
    if not integers:
        raise ValueError(f"it has no field of labels (IntField); its fields: {described}")
    label = next((place for place in integers if names[place] == _LABEL_NAME), integers[0])
    # The whole record is aligned as a C compiler does it, the parts of an image or of bytes are packed.
    record = np.dtype([(f"f{place}", _TYPES[number][1]) for place, number in enumerate(types)], align=True)
    return record, f"f{images[0]}", f"f{label}"


def read_contents(pread: Pread, layout: Layout) -> Contents:
    """Read metadata and allocation table once, in pieces; raises ValueError where the file ends within them.

    Holds about 60 bytes per sample for a moment.
    """
    digest = hashlib.sha256(pread(layout.metadata_offset, 0))
    offsets = np.empty(layout.samples, np.uint64)
    lowest = highest = place = 0
    for records in _read_array(pread, layout.record, layout.metadata_offset, layout.samples, digest.update):
        offsets[place : place + len(records)] = records[layout.image_field]["offset"]
        labels = records[layout.label_field]
        lowest, highest = min(lowest, int(labels.min())), max(highest, int(labels.max()))
        place += len(records)
    sizes = _image_sizes(pread, layout, offsets, digest.update)
    digest.update(str(layout.file_bytes).encode())
    return Contents(sizes, _runs(offsets, layout.page_size), lowest, highest, digest.hexdigest())


def _read_array(
    pread: Pread, dtype: np.dtype[np.void], offset: int, count: int, update: Callable[[bytes], None]
) -> Iterator[npt.NDArray[np.void]]:
    """`count` values of a type from the file, in pieces; each piece's bytes are given to `update`."""
    rows = max(1, _CHUNK_BYTES // dtype.itemsize)
    for start in range(0, count, rows):
        size = min(rows, count - start) * dtype.itemsize
        data = pread(size, offset + start * dtype.itemsize)
        if len(data) < size:
            raise ValueError("it has become shorter while it was read")
        update(data)
        yield np.frombuffer(data, dtype)


def _image_sizes(
    pread: Pread, layout: Layout, offsets: npt.NDArray[np.uint64], update: Callable[[bytes], None]
) -> npt.NDArray[np.uint32]:
    """Bytes allocated at each image's offset; 0 where nothing, or nothing possible, is allocated there for it."""
    count = (layout.file_bytes - layout.allocations_offset) // ALLOCATION.itemsize
    starts, sizes = np.empty(count, np.uint64), np.empty(count, np.uint32)
    owners = np.empty(count, np.int64)
    place = 0
    for entries in _read_array(pread, ALLOCATION, layout.allocations_offset, count, update):
        part = slice(place, place + len(entries))
        starts[part], owners[part] = entries["offset"], entries["sample"]
        # compared before anything is added, so that no sum of damaged numbers can wrap around
        room = layout.page_size - entries["offset"] % np.uint64(layout.page_size)
        sizes[part] = np.where(entries["size"] <= room, entries["size"], 0)
        place += len(entries)
    if (starts[1:] < starts[:-1]).any():  # several processes wrote it
        order = np.argsort(starts, kind="stable")
        starts, sizes, owners = starts[order], sizes[order], owners[order]
    if layout.samples == 0:
        return sizes[:0]
    # An empty piece of another field begins where the next piece does: of equal starts the last one counts.
    found = np.searchsorted(starts, offsets, side="right") - 1  # -1 is the last one, and does not begin there
    sound = (starts[found] == offsets) & (owners[found] == np.arange(layout.samples))
    return np.where(sound, sizes[found], 0).astype(np.uint32)


def _runs(offsets: npt.NDArray[np.uint64], page_size: int) -> npt.NDArray[np.int64]:
    """Lengths of the runs of consecutive samples in the same or following pages, cut at about _RUN_BYTES."""
    if len(offsets) == 0:
        return np.zeros(0, np.int64)
    pages = (offsets // np.uint64(page_size)).astype(np.int64)
    steps = np.diff(pages)
    jumps = np.flatnonzero((steps != 0) & (steps != 1)) + 1
    firsts = np.concatenate(([0], jumps))
    lengths = np.diff(firsts, append=len(pages))
    block = (pages - np.repeat(pages[firsts], lengths)) // max(1, _RUN_BYTES // page_size)
    starts = np.union1d(firsts, np.flatnonzero(np.diff(block)) + 1)
    return np.diff(starts, append=len(pages))


def read_record(pread: Pread, layout: Layout, index: int) -> Record:
    """One sample's metadata; raises ValueError where the file ends before it."""
    size = layout.record.itemsize
    data = pread(size, layout.metadata_offset + index * size)
    if len(data) < size:
        raise ValueError("the file ends before its metadata: it was cut short")
    fields = layout.record.fields
    assert fields is not None
    mode, width, height, offset = _IMAGE_STRUCT.unpack_from(data, fields[layout.image_field][1])
    (label,) = _LABEL_STRUCT.unpack_from(data, fields[layout.label_field][1])
    return Record(mode, height, width, offset, label)


def checksum(image: bytes | npt.NDArray[np.uint8]) -> int:
    """CRC-32 of an image as it is stored."""
    return zlib.crc32(image if isinstance(image, bytes) else image.data)
