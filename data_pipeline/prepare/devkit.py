"""The development kit of ILSVRC2012: which classes there are, and which of them each validation image shows.

    ILSVRC2012_devkit_t12.tar.gz, or the folder unpacked from it
        ILSVRC2012_devkit_t12/data/meta.mat                                  the synsets
        ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt    an ILSVRC2012_ID per image

An ILSVRC2012_ID is a number of the competition's own (1 is n02119789, a kit fox). The field numbers the classes in the
order of their WordNet ids instead (0 is n01440764, a tench), and so do we.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.prepare.tar_items import WNID
from data_pipeline.shards.source import DataError

ARCHIVE = "ILSVRC2012_devkit_t12.tar.gz"
FOLDER = "ILSVRC2012_devkit_t12"
_META = "meta.mat"
_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_MOST_BYTES = 64 << 20  # both files together have less than one megabyte


@dataclass(frozen=True)
class Devkit:
    """What the development kit says."""

    words: dict[str, str]
    """WordNet id -> names, such as "tench, Tinca tinca", of the classes that have images, in the order of the ids."""

    train_images: dict[str, int]
    """WordNet id -> how many images there are to train on."""

    validation: tuple[str, ...]
    """The WordNet id of each validation image, beginning with image number 1."""


def find(source: Path) -> Path | None:
    """The development kit in a folder."""
    for path in (source / ARCHIVE, source / FOLDER):
        if path.exists():
            return path
    return None


def load(path: Path) -> Devkit:
    """Read the archive or the folder; raises DataError where it is not what it should be."""
    files = _from_folder(path) if path.is_dir() else _from_archive(path)
    ids, words, train_images = _synsets(path, files[_META])
    try:
        numbers = [int(line) for line in files[_GROUND_TRUTH].decode("ascii").split()]
        validation = tuple(ids[number] for number in numbers)
    except KeyError as error:
        raise DataError(f"{path}: {_GROUND_TRUTH} has the class {error}, which {_META} does not know.") from error
    except ValueError as error:
        raise DataError(f"{path}: {_GROUND_TRUTH} should hold one number per line ({error}).") from error
    return Devkit(words, train_images, validation)


def _from_folder(path: Path) -> dict[str, bytes]:
    files = {}
    for name in (_META, _GROUND_TRUTH):
        try:
            files[name] = (path / "data" / name).read_bytes()
        except OSError as error:
            raise DataError(f"{path / 'data' / name} cannot be read: {error.strerror}.") from error
    return files


def _from_archive(path: Path) -> dict[str, bytes]:
    """The two files, read from the beginning of the archive on, as it is compressed."""
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name = member.name.rsplit("/", 1)[-1]
                if name in (_META, _GROUND_TRUTH) and member.isreg() and member.size <= _MOST_BYTES:
                    content = tar.extractfile(member)
                    files[name] = content.read() if content else b""
                if len(files) == 2:
                    return files
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path} cannot be read ({error}); download it again.") from error
    missing = " and ".join({_META, _GROUND_TRUTH} - files.keys())
    raise DataError(f"{path} holds no {missing}: is it the development kit of tasks 1 and 2?")


def _synsets(path: Path, data: bytes) -> tuple[dict[int, str], dict[str, str], dict[str, int]]:
    """ILSVRC2012_ID -> WordNet id; WordNet id -> words; WordNet id -> training images.

    meta.mat also has the 860 synsets above those 1,000; a synset that has children has no images of its own.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError(f"{path} holds {_META}, which is read by SciPy: pip install scipy") from error
    try:
        rows: Any = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"].ravel()
        leaves = sorted(
            (str(row["WNID"]), int(row["ILSVRC2012_ID"]), str(row["words"]), int(row["num_train_images"]))
            for row in rows
            if int(row["num_children"]) == 0
        )
    except Exception as error:  # SciPy fails in many ways on a damaged file
        raise DataError(f"{path}: {_META} is not what it should be ({type(error).__name__}: {error}).") from error
    if not leaves or not all(WNID.fullmatch(wnid) for wnid, *_ in leaves):
        raise DataError(f"{path}: {_META} names no classes by WordNet ids.")
    return (
        {number: wnid for wnid, number, _, _ in leaves},
        {wnid: " ".join(words.split()) for wnid, _, words, _ in leaves},
        {wnid: count for wnid, _, _, count in leaves},
    )
