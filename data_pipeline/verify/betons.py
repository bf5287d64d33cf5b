"""Reading everything in a folder of .beton files."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

from data_pipeline.config import DataConfig
from data_pipeline.decode import DecodeError, decode_image
from data_pipeline.progress import progress_bar
from data_pipeline.shards import set_index
from data_pipeline.shards.beton import BetonIndex, BetonSource, SplitFile, load_index, open_beton
from data_pipeline.shards.beton_format import SUFFIX, read_contents, read_layout
from data_pipeline.shards.files import sha256_of_file
from data_pipeline.shards.source import DamagedSampleError, DataError
from data_pipeline.shards.verify import Damage
from data_pipeline.verify.threads import Advance, in_threads

_RUN = 64  # samples that a thread takes at a time
_MOST_CLASSES = 10_000_000


def holds_betons(folder: Path) -> bool:
    """Whether a folder is a set of .beton files, and not one of tar shards into which such a file has strayed."""
    if not (folder.is_dir() and any(folder.glob(f"*{SUFFIX}"))):
        return False
    try:
        content = json.loads((folder / set_index.FILE_NAME).read_bytes())
    except (OSError, ValueError):
        return True
    return not isinstance(content, dict) or content.get("format") != set_index.FORMAT


def verify_betons(folder: Path, jobs: int, decode: bool) -> tuple[dict[str, int], list[Damage]]:
    """(samples of each split, all damages) of a folder of .beton files; raises DataError for a damaged index.json."""
    index = load_index(folder)
    names = list(index.splits) if index else sorted(path.stem for path in folder.glob(f"*{SUFFIX}"))
    samples: dict[str, int] = {}
    damages: list[Damage] = []
    for name in names:
        damages += _file_damages(folder / f"{name}{SUFFIX}", index.splits[name] if index else None)
        try:
            samples[name], found = _verify_split(folder, name, index, jobs, decode)
        except DataError as error:
            samples[name], found = 0, [Damage(f"{name}{SUFFIX}", "", str(error))]
        damages += found
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        if path.stem not in names:
            damages.append(Damage(path.name, "", "is no part of the set: index.json does not name it"))
    return samples, damages


def _file_damages(path: Path, stated: SplitFile | None) -> list[Damage]:
    """Whether a file has the size and digest that index.json states; one that is missing is found at opening."""
    if stated is None or not path.is_file():
        return []
    size = path.stat().st_size
    if size != stated.bytes:
        return [Damage(path.name, "", f"has {size:,} bytes instead of {stated.bytes:,}")]
    changed = sha256_of_file(path).hex() != stated.sha256
    return [Damage(path.name, "", "its bytes were changed (SHA-256 differs)")] if changed else []


def _verify_split(
    folder: Path, name: str, index: BetonIndex | None, jobs: int, decode: bool
) -> tuple[int, list[Damage]]:
    damages: list[Damage] = []
    path = folder / f"{name}{SUFFIX}"
    classes = len(index.classes) if index else number_of_classes(path)
    source = open_beton(DataConfig(backend="ffcv", path=str(folder), num_classes=classes), name)
    try:
        runs = [range(first, min(first + _RUN, len(source))) for first in range(0, len(source), _RUN)]
        with progress_bar(f"verifying {path.name}", len(source)) as advance:
            for found in in_threads(functools.partial(_verify_run, source, path.name, decode), runs, jobs, advance):
                damages += found
        return len(source), damages
    finally:
        source.close()


def number_of_classes(path: Path) -> int:
    """What the labels suggest, where no index.json says it; raises DataError."""
    try:
        with open(path, "rb") as file:

            def pread(size: int, offset: int) -> bytes:
                return os.pread(file.fileno(), size, offset)

            highest = read_contents(pread, read_layout(pread, os.fstat(file.fileno()).st_size)).highest_label
    except ValueError as error:
        raise DataError(f"it cannot be used: {error}") from error
    if highest >= _MOST_CLASSES:
        raise DataError(f"it has the label {highest}, which cannot be the number of a class")
    return max(1, highest + 1)


def _verify_run(source: BetonSource, name: str, decode: bool, run: range, advance: Advance) -> list[Damage]:
    damages = []
    for number in run:
        try:
            sample = source.read(number)
            if decode:
                decode_image(sample.image)
        except DamagedSampleError as error:
            damages.append(Damage(name, error.key, error.reason))
        except DecodeError as error:
            damages.append(Damage(name, str(number), f"the image cannot be decoded: {error}"))
        advance(1)
    return damages
