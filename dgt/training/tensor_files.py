"""Tensors in files: each rank writes one safetensors file of its pieces, any number of ranks reads them back.

A file holds its pieces one-dimensional under the keys NAME:START; the checkpoint's manifest says each whole tensor's
shape and dtype. Nothing is pickled, and any tool that knows safetensors can look inside. What a file's header says is
believed only where it fits the file and the manifest.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dgt.training.files import patiently, write_new
from dgt.training.pieces import Piece

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Names of dtypes in the safetensors format."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

HEADER_BYTES = 100_000_000
"""The longest header that the safetensors format allows."""

Layout = Mapping[str, tuple[torch.dtype, Sequence[int]]]
"""Dtype and shape of the tensors of a file, by key."""


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
    shares = {f"{name}:{share.start}": share.local for name, share in ((n, p.share()) for n, p in pieces.items())}
    layout = {key: (tensor.dtype, (tensor.numel(),)) for key, tensor in shares.items() if tensor.numel()}
    return write_file(path, layout, shares.__getitem__)


def write_file(
    path: Path, layout: Layout, tensor_of: Callable[[str], Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Writes a new safetensors file and waits until it is on the disk, holding one tensor at a time.

    `tensor_of` gives the tensor of a key when it is about to be written. Returns the file's size in bytes and SHA-256.
    Raises OSError, and whatever `tensor_of` does.
    """
    # Larger elements first, so that each tensor is aligned to its element size.
    order = sorted(layout, key=lambda key: -layout[key][0].itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for key in order:
        dtype, shape = layout[key]
        end = offset + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterator[memoryview]:
        yield memoryview(len(text).to_bytes(8, "little") + text)
        for key in order:
            yield as_bytes(tensor_of(key))

    return write_new(path, parts())


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a tensor's elements in row-major order; copied first where it lies elsewhere or otherwise."""
    # The type is changed in one dimension: a tensor without dimensions has none that could grow.
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data.cast("B")


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

    `tensors` is what `describe` gave. Raises TensorFileError for a file that is no safetensors file or contradicts
    itself or `tensors`, or where the files together do not hold each element of each tensor once; OSError.
    """

    def __init__(self, files: Sequence[Path], tensors: Mapping[str, Any]):
        self.tensors = tensors
        self.stored: dict[str, list[Stored]] = {name: [] for name in tensors}
        for name, whole in tensors.items():
            check_whole(name, whole)
        for path in files:
            for name, place in stored_in(path, tensors):
                self.stored[name].append(place)
        for name, places in self.stored.items():
            places.sort(key=lambda place: (place.start, place.stop))
            done = 0
            for place in places:
                if place.start < done:
                    raise TensorFileError(f"{place.file}: holds elements of {name} that another place holds, too")
                if place.start > done:
                    break
                done = place.stop
            if done != math.prod(self.shape(name)):
                raise TensorFileError(f"{name}: the elements from {done:,} on are in none of the files")

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a whole tensor."""
        return tuple(self.tensors[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        return DTYPES[self.tensors[name]["dtype"]]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The elements [start, stop) of a tensor, one-dimensional, in its own dtype, on the CPU.

        Raises KeyError where there is none of that name, TensorFileError where a file has been cut since, OSError.
        """
        stop = math.prod(self.shape(name)) if stop is None else stop
        elements = torch.empty(stop - start, dtype=self.dtype(name))
        buffer, size = as_bytes(elements), elements.element_size()
        for place in self.stored[name]:
            first, last = max(place.start, start), min(place.stop, stop)
            if first < last:
                with place.file.open("rb", buffering=0) as file:
                    file.seek(place.offset + (first - place.start) * size)
                    fill(file, buffer[(first - start) * size : (last - start) * size])
        return elements

    def whole(self, name: str) -> Tensor:
        """A whole tensor; raises as `read` does."""
        return self.read(name).view(self.shape(name))

    def check(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Raises TensorFileError where there is no such tensor of that shape and dtype."""
        if name not in self.tensors:
            raise TensorFileError(f"{name} is not in it")
        if self.shape(name) != tuple(shape):
            raise TensorFileError(f"{name} has the shape {self.shape(name)} there and {tuple(shape)} here")
        if self.dtype(name) != dtype:
            raise TensorFileError(f"{name} is {self.tensors[name]['dtype']} there and {DTYPE_NAMES[dtype]} here")

    def fill(self, pieces: Mapping[str, Piece]) -> None:
        """Reads `pieces` in place. Raises TensorFileError where names, shapes or dtypes are not those of the files."""
        for name, piece in pieces.items():
            self.check(name, piece.shape, piece.local.dtype)
        for name, piece in pieces.items():
            piece.copy_from(self.read(name, piece.start, piece.stop))


def check_whole(name: str, whole: Any) -> None:
    """Raises TensorFileError unless `whole` says a dtype and a shape."""
    match whole:
        case {"dtype": str(dtype), "shape": [*sizes]} if dtype in DTYPES and all(is_count(size) for size in sizes):
            return
    raise TensorFileError(f"{name}: {whole!r} is not a known dtype and a shape")


def is_count(value: object) -> bool:
    """Whether it is a whole number from 0 on."""
    return type(value) is int and value >= 0


def stored_in(path: Path, tensors: Mapping[str, Any]) -> Iterator[tuple[str, Stored]]:
    """Name and place of each piece that a file holds, checked against the file's size and the whole `tensors`.

    Raises TensorFileError, OSError.
    """
    header, begin, size = header_of(path)
    expected = 0
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        name, _, text = key.rpartition(":")
        if name not in tensors or not re.fullmatch(r"[0-9]{1,18}", text):
            raise TensorFileError(f"{path}: {key!r} is no piece of a tensor that the manifest names")
        whole, (offset, end) = tensors[name], entry["data_offsets"]
        start, count = int(text), math.prod(entry["shape"])
        if entry["dtype"] != whole["dtype"] or start + count > math.prod(whole["shape"]):
            raise TensorFileError(f"{path}: {key!r} does not lie within {name} of the manifest")
        if offset != expected or end - offset != count * DTYPES[entry["dtype"]].itemsize or begin + end > size:
            raise TensorFileError(f"{path}: the place of {key!r} in the file contradicts its shape or its neighbours")
        expected = end
        yield name, Stored(start, start + count, path, begin + offset)


def header_of(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header of a safetensors file by key, where its data begin, and its size in bytes.

    Raises TensorFileError where it is none, OSError.
    """
    with patiently(lambda: path.open("rb")) as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, HEADER_BYTES):
            raise TensorFileError(f"{path}: is no safetensors file: its header does not end within it")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise TensorFileError(f"{path}: is no safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise TensorFileError(f"{path}: is no safetensors file: its header names no tensors")
    header.pop("__metadata__", None)
    for key, entry in header.items():
        check_whole(f"{path}: {key}", entry)
        match entry:
            case {"data_offsets": [first, last]} if is_count(first) and is_count(last):
                continue
        raise TensorFileError(f"{path}: {key!r} has no place in it")
    return header, 8 + length, size


def fill(file: BinaryIO, buffer: memoryview) -> None:
    """Reads exactly as many bytes as `buffer` has. Raises TensorFileError at the end of the file."""
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])  # type: ignore[attr-defined]
        if not count:
            raise TensorFileError(f"{file.name}: ends too early")
        done += count
