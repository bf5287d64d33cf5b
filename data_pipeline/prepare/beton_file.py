"""Writing one .beton file with the parts of the ffcv package, in this process and one sample after the other."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.shards.beton_format import JPEG, RAW, checksum

LARGEST_PAGE = 1 << 30
"""Bytes; ffcv writes a page with one call, and Linux writes less than 2 GiB in one."""


@dataclass(frozen=True)
class Stored:
    """A sample as it goes into the file."""

    label: int
    image: bytes | npt.NDArray[np.uint8]
    """The bytes of a JPEG, or pixels (H, W, 3)."""

    height: int
    width: int
    traits: tuple[str, ...]
    """What is worth counting."""


class PageTooSmallError(Exception):
    """An image takes `needed` bytes, which is more than a page of the file has."""

    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


def write_beton(path: Path, samples: Iterable[Stored], most: int, page_bytes: int) -> npt.NDArray[np.uint32]:
    """Write `samples`, of which there are at most `most`, into the file `path`, in place of what it holds.

    Returns the CRC-32 of each image as it is stored, (samples,), little-endian.
    The number of samples is known only at the end, so that room for the metadata of `most` is kept at the beginning.
    Raises PageTooSmallError, and OSError where writing fails; what is at `path` is then of no use.
    """
    from ffcv.fields import IntField, RGBImageField
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.types import ALLOC_TABLE_TYPE
    from ffcv.writer import DatasetWriter, handle_sample

    fields = {"image": RGBImageField(), "label": IntField()}
    # Not a derived class: the writer would note that as unknown, and ffcv's reader asks for classes it does not know.
    fields["image"].encode = _store_image
    writer = DatasetWriter(str(path), fields, page_size=page_bytes, num_workers=1)
    writer.num_samples = most
    writer.prepare()
    # Shared memory is for several processes, and small in many containers.
    writer.metadata_sm.close()
    writer.metadata_sm.unlink()
    metadata = np.zeros(most, writer.metadata_type)
    allocator = MemoryAllocator(str(path), writer.data_region_start, page_bytes)
    allocator.__enter__()
    try:
        checksums: list[int] = []
        for count, sample in enumerate(samples):
            needed = len(sample.image) if isinstance(sample.image, bytes) else sample.image.nbytes
            if needed > page_bytes:
                raise PageTooSmallError(needed)
            handle_sample((sample, sample.label), count, metadata.dtype.names, metadata, allocator, fields)
            checksums.append(checksum(sample.image))
        allocator.flush_page()
    finally:
        allocator.fp.close()  # its own __exit__ would write once more, also after an error
    expected = allocator.offset + allocator.next_page_written.value * page_bytes
    if path.stat().st_size != expected:  # ffcv does not look at how much of a page was written
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    writer.header["num_samples"] = len(checksums)
    writer.metadata_sm = SimpleNamespace(buf=metadata.tobytes())
    writer.finalize([np.array(allocator.allocations, ALLOC_TABLE_TYPE)])
    return np.array(checksums, "<u4")


def _store_image(destination: Any, sample: Stored, malloc: Callable[[int], tuple[int, Any]]) -> None:
    """What RGBImageField.encode does, for images that are encoded already or stay pixels."""
    jpeg = isinstance(sample.image, bytes)
    data = np.frombuffer(sample.image, np.uint8) if jpeg else sample.image.reshape(-1)  # type: ignore[union-attr]
    destination["mode"] = JPEG if jpeg else RAW
    destination["height"], destination["width"] = sample.height, sample.width
    destination["data_ptr"], place = malloc(len(data))
    place[:] = data
