"""The index of a whole data set: `index.json`, beside one folder of shards per split.

    OUT/index.json                 classes, and per split: shards with their samples, sizes and SHA-256; written last
    OUT/SPLIT/shard-000000.tar     KEY.jpg and KEY.cls for each sample, as webdataset reads them
    OUT/SPLIT/shard-000000.idx     where each sample lies in that tar (data_pipeline.shards.shard_index)

A folder without index.json is one that was never finished.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.shards.source import DataError
from data_pipeline.shards.storage import LocalFolder, Storage

FILE_NAME = "index.json"
FORMAT = "webdataset-shards"
BETON_FORMAT = "ffcv-beton"  # data_pipeline.shards.beton reads it
VERSION = 2
_COLUMNS = ("name", "samples", "bytes", "index_bytes")
_DIGEST_CHARACTERS = 64


@dataclass(frozen=True)
class SplitIndex:
    """One split's shards as columns: entry i of each describes shard i."""

    names: tuple[str, ...]
    """File names of the tars."""

    samples: npt.NDArray[np.int64]
    """Number of samples in each shard, (shards,)."""

    tar_bytes: npt.NDArray[np.int64]
    """Size of each tar, (shards,)."""

    index_bytes: npt.NDArray[np.int64]
    """Size of each shard's index file, (shards,)."""

    sha256: tuple[str, ...]
    """Of each tar, in hexadecimal."""

    left_out: int
    """Images of the source that could not be read and are therefore not in the shards."""

    def __len__(self) -> int:
        """Number of shards."""
        return len(self.names)

    @property
    def total(self) -> int:
        """Number of samples."""
        return int(self.samples.sum())

    def __str__(self) -> str:
        shards = "1 shard" if len(self) == 1 else f"{len(self):,} shards"
        return f"{self.total:,} images in {shards}, {self.tar_bytes.sum() / 1e6:,.1f} MB"


@dataclass(frozen=True)
class SetIndex:
    """Everything index.json holds."""

    classes: tuple[str, ...]
    splits: dict[str, SplitIndex]

    kind: str = "classification"
    """What the samples teach: "classification", "segmentation" or "detection"."""

    targets: dict[str, Any] = field(default_factory=dict)
    """What is in the target files (data_pipeline.targets), such as which values of a mask are ignored."""

    def fingerprint(self, split: str) -> str:
        """A digest of the classes, of what targets mean, and of a split's samples, labels and places (which the tars
        hold)."""
        index = self.splits[split]
        # packed numbers and digests, because half a million shards as JSON take too long
        meaning = [self.kind, self.targets] if self.targets else []
        result = hashlib.sha256(_digest([FORMAT, VERSION, list(self.classes), *meaning]).encode())
        result.update(index.samples.astype("<i8").tobytes())
        result.update(bytes.fromhex("".join(index.sha256)))
        return result.hexdigest()


def to_bytes(index: SetIndex) -> bytes:
    """The content of index.json."""
    splits = {name: _split_to_json(index, name) for name in index.splits}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "kind": index.kind,
        "classes": list(index.classes),
        **({"targets": index.targets} if index.targets else {}),
        "splits": splits,
    }
    content["fingerprint"] = _digest({name: split["fingerprint"] for name, split in splits.items()})
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def _split_to_json(index: SetIndex, name: str) -> dict[str, Any]:
    split = index.splits[name]
    columns = (split.names, split.samples.tolist(), split.tar_bytes.tolist(), split.index_bytes.tolist())
    return {
        "samples": split.total,
        "left_out": split.left_out,
        "fingerprint": index.fingerprint(name),
        # all digests in one text: a list of half a million is slow to read
        "shards": {**dict(zip(_COLUMNS, columns, strict=True)), "sha256": "".join(split.sha256)},
    }


def load(place: Path | Storage) -> SetIndex:
    """Read and check the index.json of a folder or other storage.

    Raises DataError where it is missing, damaged or of another kind.
    """
    storage = LocalFolder(place) if isinstance(place, Path) else place
    path = storage.shown(FILE_NAME)
    try:
        content = json.loads(storage.read_bytes(FILE_NAME))
    except FileNotFoundError:
        raise DataError(_why_missing(Path(storage.shown()))) from None
    except DataError as error:
        raise DataError(f"{error}. The data path must be the URL of the folder with {FILE_NAME}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}. {_REMEDY}") from error
    if isinstance(content, dict) and content.get("format") == BETON_FORMAT:
        raise DataError(f"{storage.shown()} holds .beton files, not tar shards: set data.backend to ffcv.")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path} is not the index of a set of shards made by `python -m data_pipeline.prepare`.")
    if content.get("version") != VERSION:
        raise DataError(f"{path} has format version {content.get('version')}; this program reads version {VERSION}.")
    try:
        index = SetIndex(
            classes=tuple(content["classes"]),
            splits={str(name): _split_from_json(split) for name, split in content["splits"].items()},
            kind=str(content.get("kind", "classification")),
            targets=dict(content.get("targets", {})),
        )
        stated = {name: split["fingerprint"] for name, split in content["splits"].items()}
        sound = (
            all(index.fingerprint(name) == stated[name] for name in stated)
            and _digest(stated) == content["fingerprint"]
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}). {_REMEDY}") from error
    if not sound:
        raise DataError(f"{path} was damaged or edited: its fingerprint does not fit its content. {_REMEDY}")
    return index


_REMEDY = "Delete it and run the prepare command again: finished shards are kept."


def _why_missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"There is no folder {folder}. Prepare shards with `python -m data_pipeline.prepare --help`."
    if (folder.parent / FILE_NAME).is_file():
        return f"{folder} is one split of a data set; give the folder above it, {folder.parent}."
    return (
        f"{folder} holds no {FILE_NAME}: it is no folder of prepared shards, or preparing it was interrupted. "
        "Run the same `python -m data_pipeline.prepare` command (again) to finish it."
    )


def _split_from_json(split: dict[str, Any]) -> SplitIndex:
    names, samples, tar_bytes, index_bytes = (split["shards"][column] for column in _COLUMNS)
    digests, each = split["shards"]["sha256"], _DIGEST_CHARACTERS
    counts = {len(names), len(samples), len(tar_bytes), len(index_bytes)}
    if len(counts) != 1 or len(digests) != each * len(names):
        raise ValueError("the columns of the shard table have different lengths")
    if any("/" in name or name.startswith(".") for name in names):
        raise ValueError("a shard's name points outside its folder")
    return SplitIndex(
        names=tuple(names),
        samples=np.array(samples, dtype=np.int64),
        tar_bytes=np.array(tar_bytes, dtype=np.int64),
        index_bytes=np.array(index_bytes, dtype=np.int64),
        sha256=tuple(digests[start : start + each] for start in range(0, len(digests), each)),
        left_out=int(split["left_out"]),
    )


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
