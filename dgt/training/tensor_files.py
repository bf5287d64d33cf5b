"""Tensors in files: each rank writes one safetensors file of its pieces, any number of ranks reads them back.

A file holds its pieces one-dimensional under the keys NAME:START; the checkpoint's manifest says each whole tensor's
shape and dtype. Nothing is pickled, and any tool that knows safetensors can look inside.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dgt.training.pieces import Piece

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Names of dtypes in the safetensors format."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

CHUNK = 1 << 22
"""Bytes written, hashed or read at a time."""


class TensorFileError(ValueError):
    """A file or what it holds does not fit what is asked for; the message says which and why."""


def describe(pieces: Mapping[str, Piece]) -> dict[str, Any]:
    """Dtype and shape of each whole tensor, for the manifest."""
    return {
        name: {"dtype": DTYPE_NAMES[piece.local.dtype], "shape": list(piece.shape)} for name, piece in pieces.items()
    }


def write(path: Path, pieces: Mapping[str, Piece]) -> dict[str, Any]:
    """Writes this rank's share of `pieces` to a new file and waits until it is on the disk.

    Returns its size in bytes and SHA-256. Raises OSError.
    """
    shares = {f"{name}:{share.start}": share.local for name, piece in pieces.items() if (share := piece.share())}
    shares = {key: tensor for key, tensor in shares.items() if tensor.numel()}
    # Larger elements first, so that each tensor is aligned to its element size.
    order = sorted(shares, key=lambda key: -shares[key].element_size())
    header, offset = {}, 0
    for key in order:
        tensor = shares[key]
        end = offset + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": [tensor.numel()], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    parts = [memoryview(len(text).to_bytes(8, "little") + text), *(as_bytes(shares[key]) for key in order)]
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for part in parts:
            for chunk in chunks(part):
                digest.update(chunk)
                file.write(chunk)
                size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a tensor's elements in row-major order; copied first where it lies elsewhere or otherwise."""
    return tensor.detach().contiguous().cpu().view(torch.uint8).numpy().data.cast("B")


def chunks(data: memoryview) -> Iterator[memoryview]:
    """`data` in parts, so that a thread that writes never keeps the interpreter for long."""
    for first in range(0, len(data), CHUNK):
        yield data[first : first + CHUNK]


@dataclass(frozen=True)
class Stored:
    """Where a range of a tensor's elements lies."""

    start: int
    stop: int
    file: Path
    offset: int
    """Of its first byte in the file."""


class TensorFiles:
    """The tensors in some files, readable by ranges.

    `tensors` is what `describe` gave. Raises TensorFileError for a file that is no safetensors file, OSError.
    """

    def __init__(self, files: Sequence[Path], tensors: Mapping[str, Any]):
        self.tensors = tensors
        self.stored: dict[str, list[Stored]] = {}
        for path in files:
            for key, entry, first in header_of(path):
                name, _, start = key.rpartition(":")
                begin, count = int(start), math.prod(entry["shape"])
                place = Stored(begin, begin + count, path, first + entry["data_offsets"][0])
                self.stored.setdefault(name, []).append(place)
        for places in self.stored.values():
            places.sort(key=lambda place: place.start)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a whole tensor."""
        return tuple(self.tensors[name]["shape"])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The elements [start, stop) of a tensor, one-dimensional, in its own dtype, on the CPU.

        Raises KeyError where there is none of that name, TensorFileError where elements are missing, OSError.
        """
        dtype = DTYPES[self.tensors[name]["dtype"]]
        stop = math.prod(self.shape(name)) if stop is None else stop
        elements = torch.empty(stop - start, dtype=dtype)
        buffer, size = as_bytes(elements), elements.element_size()
        done = start
        for place in self.stored.get(name, ()):
            first, last = max(place.start, start), min(place.stop, stop)
            if first >= last:
                continue
            if first != done:
                break
            with place.file.open("rb", buffering=0) as file:
                file.seek(place.offset + (first - place.start) * size)
                fill(file, buffer[(first - start) * size : (last - start) * size])
            done = last
        if done != stop:
            raise TensorFileError(f"{name}: the elements from {done:,} on are in none of the files")
        return elements

    def whole(self, name: str) -> Tensor:
        """A whole tensor; raises as `read` does."""
        return self.read(name).view(self.shape(name))

    def fill(self, pieces: Mapping[str, Piece]) -> None:
        """Reads `pieces` in place. Raises TensorFileError where names, shapes or dtypes are not those of the files."""
        for name, piece in pieces.items():
            if name not in self.tensors:
                raise TensorFileError(f"{name} is not in it")
            if self.shape(name) != piece.shape:
                raise TensorFileError(f"{name} has the shape {self.shape(name)} there and {piece.shape} here")
            if DTYPES[self.tensors[name]["dtype"]] != piece.local.dtype:
                raise TensorFileError(f"{name} is {self.tensors[name]['dtype']} there and {piece.local.dtype} here")
        for name, piece in pieces.items():
            piece.copy_from(self.read(name, piece.start, piece.stop))


def header_of(path: Path) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Key, entry, and the place of the data in the file, of each tensor in a safetensors file."""
    with path.open("rb") as file:
        try:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        except (ValueError, MemoryError, OverflowError):
            raise TensorFileError(f"{path}: is no safetensors file") from None
    for key, entry in header.items():
        if key != "__metadata__":
            yield key, entry, 8 + size


def fill(file: BinaryIO, buffer: memoryview) -> None:
    """Reads exactly as many bytes as `buffer` has. Raises TensorFileError at the end of the file."""
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])  # type: ignore[attr-defined]
        if not count:
            raise TensorFileError(f"{file.name}: ends too early")
        done += count
