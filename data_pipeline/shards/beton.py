"""Random access to the samples of .beton files, without the ffcv package, from any number of threads."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.config import DataConfig
from data_pipeline.shards import set_index
from data_pipeline.shards.beton_format import (
    JPEG,
    RAW,
    SUFFIX,
    Record,
    checksum,
    read_contents,
    read_layout,
    read_record,
)
from data_pipeline.shards.source import DamagedSampleError, DataError, RawSample

INDEX_VERSION = 1
CHECKSUM_SUFFIX = ".crc32"
_JPEG_START = b"\xff\xd8"
_REMEDY = "Write it again with the program that made it, or copy it anew."


@dataclass(frozen=True)
class SplitFile:
    """What index.json says about one split's file."""

    samples: int
    bytes: int
    sha256: str
    digest: str
    """Of everything but the images' data (beton_format.Contents.digest)."""

    left_out: int
    """Images of the source that could not be read and are therefore not in the file."""

    raw: int
    """Images that are stored as pixels, not as JPEG."""

    checksums: str
    """SHA-256 of SPLIT.crc32: the CRC-32 of every image as it is stored, 4 bytes each, little-endian."""


@dataclass(frozen=True)
class BetonIndex:
    """Everything that index.json holds about a folder of .beton files made by `python -m data_pipeline.prepare`."""

    classes: tuple[str, ...]
    splits: dict[str, SplitFile]


def index_to_bytes(index: BetonIndex) -> bytes:
    """The content of index.json."""
    splits = {name: vars(split) for name, split in index.splits.items()}
    content = {
        "format": set_index.BETON_FORMAT,
        "version": INDEX_VERSION,
        "kind": "classification",
        "classes": list(index.classes),
        "splits": splits,
    }
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def load_index(folder: Path) -> BetonIndex | None:
    """Read index.json; None where there is none, as beside files that the ffcv package itself wrote.

    Raises DataError where it is damaged or describes something else than .beton files.
    """
    path = folder / set_index.FILE_NAME
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}. Delete {folder} and prepare it again.") from error
    if not isinstance(content, dict) or content.get("format") != set_index.BETON_FORMAT:
        tar = isinstance(content, dict) and content.get("format") == set_index.FORMAT
        what = "holds tar shards: set data.backend to webdataset" if tar else f"is described by a foreign {path.name}"
        raise DataError(f"{folder} {what}, or give a folder of .beton files.")
    if content.get("version") != INDEX_VERSION:
        raise DataError(f"{path} has version {content.get('version')}; this program reads version {INDEX_VERSION}.")
    try:
        splits = {str(name): _split_from_json(split) for name, split in content["splits"].items()}
        return BetonIndex(tuple(map(str, content["classes"])), splits)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {error}). Delete {folder} and prepare it again."
        ) from error


def _split_from_json(split: dict[str, Any]) -> SplitFile:
    numbers = {name: int(split[name]) for name in ("samples", "bytes", "left_out", "raw")}
    texts = {name: str(split[name]) for name in ("sha256", "digest", "checksums")}
    return SplitFile(**numbers, **texts)  # type: ignore[arg-type]


def _read_checksums(path: Path, stated: SplitFile, samples: int) -> npt.NDArray[np.uint32]:
    """CRC-32 of every image of the .beton at `path`; raises DataError where they are not those of index.json."""
    path = path.with_suffix(CHECKSUM_SUFFIX)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. It belongs to the file beside it.") from error
    if len(data) != 4 * samples or hashlib.sha256(data).hexdigest() != stated.checksums:
        raise DataError(
            f"{path} is not the one that {path.with_name(set_index.FILE_NAME)} describes. Copy the folder anew, or "
            "delete it and prepare it again."
        )
    return np.frombuffer(data, "<u4")


def open_beton(config: DataConfig, split: str) -> BetonSource:
    """Open `config.path`/SPLIT.beton, made by `python -m data_pipeline.prepare ... --format ffcv` or by ffcv itself.

    Where there is an index.json it must fit the file, and give as many classes as `config.num_classes`; else classes
    are called class_0, class_1, ... Raises DataError saying what is wrong and what to do.
    """
    if not config.path:
        raise DataError("No data set was named: set the data path to a folder with .beton files.")
    if "://" in config.path:
        raise DataError(
            f"{config.path} is remote, and .beton files are read from a local folder only: copy them there, or prepare "
            "tar shards (data.backend: webdataset), which are fetched."
        )
    folder = Path(config.path)
    index = load_index(folder)
    if index is None:
        classes = tuple(f"class_{number}" for number in range(config.num_classes))
    elif len(index.classes) != config.num_classes:
        raise DataError(f"{folder} has {len(index.classes)} classes, but the configuration says {config.num_classes}.")
    else:
        classes = index.classes
    _require_file(folder, split)
    stated = index.splits.get(split) if index else None
    if index and stated is None:
        raise DataError(f"{folder / set_index.FILE_NAME} knows no split '{split}'; it has {', '.join(index.splits)}.")
    return BetonSource(folder / f"{split}{SUFFIX}", classes, stated)


def _require_file(folder: Path, split: str) -> None:
    if (folder / f"{split}{SUFFIX}").is_file():
        return
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}. Prepare one with `python -m data_pipeline.prepare --help`.")
    there = ", ".join(sorted(path.stem for path in folder.glob(f"*{SUFFIX}") if path.is_file())) or "none"
    raise DataError(f"{folder} has no {split}{SUFFIX}; its splits: {there}.")


class BetonSource:
    """One .beton file; a data_pipeline.shards.source.Source.

    Opening reads metadata and allocation table once; 8 bytes per sample stay in memory. A read finds the sample's
    record in the file, checks that its data lies where data can lie, reads it, and compares it with its checksum. A
    file without an index.json of ours has no checksums, and its fingerprint covers header, metadata (labels, sizes,
    places), allocation table and the file's size, but not the images' bytes; with an index.json it covers their SHA-256
    as stated there.
    """

    def __init__(self, path: Path, class_names: tuple[str, ...], stated: SplitFile | None = None) -> None:
        """Raises DataError where the file is no usable .beton, or not the one that `stated` describes."""
        self._path = path
        self._classes = class_names
        try:
            self._file: _OpenFile | None = _OpenFile(path)
            self._layout = read_layout(self._file.pread, self._file.bytes)
            self._contents = read_contents(self._file.pread, self._layout)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise DataError(f"{path} cannot be used: {error}. {_REMEDY}") from error
        self._check_labels()
        if stated is not None and stated.digest != self._contents.digest:
            raise DataError(
                f"{path} is not the file that {path.with_name(set_index.FILE_NAME)} describes: it was damaged, "
                f"replaced or copied without it. Copy both anew, or delete {path.parent} and prepare it again."
            )
        self._checksums = None if stated is None else _read_checksums(path, stated, len(self))
        self._fingerprint = f"{self._contents.digest}{f'/{stated.sha256}' if stated else ''}"

    def _check_labels(self) -> None:
        count = len(self._classes)
        for label in (self._contents.lowest_label, self._contents.highest_label):
            if not 0 <= label < count:
                raise DataError(
                    f"{self._path} has the label {label}, and the configuration says {count} classes: labels must be "
                    f"from 0 to {count - 1}. Set data.num_classes, or write the file anew."
                )

    @property
    def num_classes(self) -> int:
        return len(self._classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._classes

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def digest(self) -> str:
        """SHA-256 of everything but the images' data, in hexadecimal."""
        return self._contents.digest

    @property
    def shard_sizes(self) -> npt.NDArray[np.int64]:
        """Samples in each run of consecutive samples that lie together in the file (about 64 MiB), (runs,)."""
        return self._contents.runs

    def __len__(self) -> int:
        return self._layout.samples

    def read(self, index: int) -> RawSample:
        """The sample at `index`: the bytes of a JPEG, or pixels (H, W, 3).

        Raises DamagedSampleError where the file's own statements on it contradict each other or the file ends before
        it, IndexError out of range, DataError where the file cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self._path}")
        file = self._file
        if file is None:
            raise ValueError("the source was closed")
        try:
            record = read_record(file.pread, self._layout, index)
            image = self._read_image(file, record, int(self._contents.sizes[index]))
            if self._checksums is not None and checksum(image) != self._checksums[index]:
                raise ValueError("the image's bytes were changed (checksum differs)")
        except ValueError as error:
            raise DamagedSampleError(self._path.name, str(index), str(error)) from error
        except OSError as error:
            raise DataError(f"{self._path} cannot be read: {error.strerror or error}") from error
        verified = self._checksums is not None
        return RawSample(str(index), image, record.label, self._path.name, verified=verified)

    def close(self) -> None:
        """Close the file. Reading afterwards is an error."""
        self._file = None

    def _read_image(self, file: _OpenFile, record: Record, size: int) -> bytes | npt.NDArray[np.uint8]:
        """Raises ValueError for a sample that contradicts itself."""
        if size == 0:
            raise ValueError("its image is not where its metadata says: the file is damaged")
        if not self._layout.data_offset <= record.offset <= self._layout.allocations_offset - size:
            raise ValueError("its image lies outside of the file's data: the file is damaged")
        if not 0 <= record.label < self.num_classes:
            raise ValueError(f"its label {record.label} is none of the {self.num_classes} classes")
        if record.mode == JPEG:
            data = file.pread(size, record.offset)
            if len(data) < size:
                raise ValueError("the file ends within its image: it was cut short")
            if data[:2] != _JPEG_START:
                raise ValueError("its image is stored as JPEG, and is none")
            return data
        if record.mode != RAW:
            raise ValueError(f"its image is stored in an unknown way ({record.mode})")
        if size != record.height * record.width * 3:
            raise ValueError(f"its {record.height} x {record.width} pixels do not take {size:,} bytes")
        return file.read_array(size, record.offset).reshape(record.height, record.width, 3)


class _OpenFile:
    """An open file, closed when the last thread that reads from it lets go of this object. Reading moves no position,
    so threads and forked processes may share it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.bytes = os.fstat(self._descriptor).st_size

    def pread(self, size: int, offset: int) -> bytes:
        """Bytes at `offset`, fewer at the end of the file."""
        data = os.pread(self._descriptor, size, offset)
        while len(data) < size:  # a network file system may return less than asked for
            more = os.pread(self._descriptor, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def read_array(self, size: int, offset: int) -> npt.NDArray[np.uint8]:
        """Bytes at `offset` in memory of the caller's own; raises ValueError where the file ends within them."""
        array = np.empty(size, np.uint8)
        done = 0
        while done < size:
            count = os.preadv(self._descriptor, [array.data[done:]], offset + done)
            if count == 0:
                raise ValueError("the file ends within its image: it was cut short")
            done += count
        return array

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
