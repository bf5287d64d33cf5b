"""Reading everything in a set of tar shards."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_pipeline.prepare.examine import ImageFacts, UnreadableImageError, examine
from data_pipeline.prepare.listing import digest
from data_pipeline.restart_rows import find_rows
from data_pipeline.shards import shard_index
from data_pipeline.shards.reader import file_problems
from data_pipeline.shards.set_index import SetIndex
from data_pipeline.shards.shard_index import SUBSAMPLINGS
from data_pipeline.shards.source import DataError
from data_pipeline.shards.verify import Damage, StoredSample, load_matching_index, verify_shard
from data_pipeline.targets import TargetCheck, TargetError, target_check
from data_pipeline.targets.objects import ImageObjects
from data_pipeline.verify.threads import Advance, in_threads

UNKNOWN_SUBSAMPLING = "other"
"""What is stated where nothing could tell it: simplejpeg is missing, here or where the shards were made."""


@dataclass(frozen=True)
class _Expected:
    """What every sample of a set must be."""

    num_classes: int
    target_extension: str
    check_target: TargetCheck | None
    decode: bool


@dataclass
class _Content:
    """Looks at the samples of one shard, and gathers what must be unique in a split."""

    expected: _Expected
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Where the pieces of images with restart rows begin, by key."""

    image_ids: list[int] = field(default_factory=list)
    annotation_ids: list[int] = field(default_factory=list)

    def look(self, sample: StoredSample) -> str | None:
        """What is wrong with a sample whose bytes are right."""
        what = self._label_or_target(sample)
        if what or not self.expected.decode:
            return what
        try:
            facts = examine(sample.image)
        except UnreadableImageError as error:
            return f"the image cannot be decoded: {error}"
        rows = self.rows.get(sample.key)
        if rows is not None and find_rows(sample.image) != rows:
            return "the restart rows in the index are not those of the image"
        return _other_facts(facts, sample) or self._target(sample, facts)

    def _label_or_target(self, sample: StoredSample) -> str | None:
        label, extension = int(sample.record["label"]), self.expected.target_extension
        if sample.target_extension != extension:
            found = f"a target .{sample.target_extension}" if sample.target_extension else "no target"
            return f"it has {found}, and index.json promises {f'.{extension}' if extension else 'none'}"
        if label == shard_index.NO_LABEL:
            return None if extension else "it has no label"
        if label >= self.expected.num_classes:
            return f"its label {label} is none of the {self.expected.num_classes} classes"
        return None

    def _target(self, sample: StoredSample, facts: ImageFacts) -> str | None:
        if sample.target is None or self.expected.check_target is None:
            return None
        try:
            target = self.expected.check_target(sample.target, facts.upright_size)
        except TargetError as error:
            return str(error)
        if isinstance(target, ImageObjects):
            self.image_ids.append(target.image_id)
            self.annotation_ids += [found.id for found in target.objects]
        return None


@dataclass(frozen=True)
class _ShardFindings:
    """What one shard turned out to hold."""

    shard: str
    damages: list[Damage]
    keys: npt.NDArray[np.uint64]
    """A digest of each key."""

    image_ids: npt.NDArray[np.int64]
    annotation_ids: npt.NDArray[np.int64]


def verify_tars(folder: Path, index: SetIndex, jobs: int, decode: bool, advance: Advance) -> list[Damage]:
    """All damages of the set in `folder`, split by split. Raises DataError where a folder cannot be looked into."""
    damages: list[Damage] = []
    try:
        check = target_check(index.kind, len(index.classes), index.targets)
    except ValueError as error:
        return [Damage("index.json", "", str(error))]
    damages += _strangers(folder, index)
    expected = _Expected(len(index.classes), str(index.targets.get("extension", "")), check, decode)
    for name, split in index.splits.items():
        problems = file_problems(folder / name, split)
        damages += [Damage(f"{name}/{file}", "", what) for file, what in problems]
        # an index that is missing is among the problems already
        missing = {file for file, what in problems if what == "is missing"}
        works = [
            _Work(folder / name / file, sha256, int(samples), missing)
            for file, sha256, samples in zip(split.names, split.sha256, split.samples, strict=True)
        ]
        findings = list(in_threads(functools.partial(_verify, expected), works, jobs, advance))
        for found in findings:
            damages += found.damages
        damages += _repetitions(folder, findings)
    return damages


@dataclass(frozen=True)
class _Work:
    """A shard to be checked."""

    path: Path
    sha256: str
    samples: int
    missing: set[str]
    """Names of files that are not there."""


def _verify(expected: _Expected, work: _Work, advance: Advance) -> _ShardFindings:
    path, shard = work.path, f"{work.path.parent.name}/{work.path.name}"
    index_name = path.with_suffix(shard_index.SUFFIX).name
    content, keys, damages = _Content(expected), np.empty(0, np.uint64), []
    try:
        if index_name not in work.missing:
            index = load_matching_index(path, work.sha256)
            keys = np.frombuffer(b"".join(map(digest, index.keys)), np.uint64)
            if len(index.keys) != work.samples:
                damages.append(Damage(shard, "", f"holds {len(index.keys):,} samples instead of {work.samples:,}"))
            for number in np.flatnonzero(index.records["rows_count"]).tolist():
                content.rows[index.keys[number]] = tuple(index.rows_of(number)["offset"].tolist())
            if path.name not in work.missing:
                damages += verify_shard(path, index, advance, content.look)
    except DataError as error:
        damages.append(Damage(shard, "", f"its index cannot be used: {error}"))
    except OSError as error:
        damages.append(Damage(shard, "", f"cannot be read: {error.strerror or error}"))
    ids = (np.array(numbers, np.int64) for numbers in (content.image_ids, content.annotation_ids))
    return _ShardFindings(shard, damages, keys, *ids)


def _other_facts(facts: ImageFacts, sample: StoredSample) -> str | None:
    """In what the image is not as the index, or its name, says."""
    record = sample.record
    subsampling = SUBSAMPLINGS[record["subsampling"]] if record["subsampling"] < len(SUBSAMPLINGS) else "unknown"
    compared = {
        "width": (facts.width, int(record["width"])),
        "height": (facts.height, int(record["height"])),
        "orientation": (facts.orientation, int(record["orientation"])),
        "subsampling": (facts.subsampling, subsampling),
        "extension": (facts.extension, sample.extension),
    }
    for name, (found, stated) in compared.items():
        if found != stated and UNKNOWN_SUBSAMPLING not in (found, stated):
            return f"the image's {name} is {found}, and {stated} is stated"
    return None


def _strangers(folder: Path, index: SetIndex) -> Iterator[Damage]:
    """Shards that index.json does not know: whoever reads the folder by a pattern would take them in."""
    known = {folder / split / name for split, shards in index.splits.items() for name in shards.names}
    for pattern in ("*.beton", "*.tar", "*/*.tar"):
        for path in sorted(set(folder.glob(pattern)) - known):
            what = "is no part of the set: index.json does not name it"
            yield Damage(str(path.relative_to(folder)), "", what)


def _repetitions(folder: Path, findings: list[_ShardFindings]) -> Iterator[Damage]:
    """Keys and ids that occur more than once in a split."""
    for row, places in _repeated(found.keys for found in findings):
        yield Damage(findings[places[0]].shard, _key(folder, findings[places[0]], row), _again(findings, places))
    for what, columns in (
        ("image id", [found.image_ids for found in findings]),
        ("annotation id", [found.annotation_ids for found in findings]),
    ):
        for row, places in _repeated(columns):
            number = int(columns[places[0]][row])
            yield Damage(findings[places[0]].shard, "", f"{what} {number}: {_again(findings, places)}")


def _again(findings: list[_ShardFindings], places: list[int]) -> str:
    return f"occurs again in {', '.join(findings[place].shard for place in places[1:])}"


def _key(folder: Path, found: _ShardFindings, row: int) -> str:
    return shard_index.load((folder / found.shard).with_suffix(shard_index.SUFFIX)).keys[row]


def _repeated(columns: Iterable[npt.NDArray[np.generic]]) -> Iterator[tuple[int, list[int]]]:
    """(row of the first in its shard, shards of all) of every value that the shards' columns hold more than once."""
    parts = list(columns)
    values = np.concatenate([*parts, np.empty(0, parts[0].dtype)]) if parts else np.empty(0)
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    same = np.flatnonzero(ordered[1:] == ordered[:-1])
    ends = np.cumsum([len(part) for part in parts])
    groups: dict[object, list[int]] = {}
    for at in same.tolist():
        groups.setdefault(ordered[at].item(), [int(order[at])]).append(int(order[at + 1]))
    for group in groups.values():
        shards = np.searchsorted(ends, group, side="right").tolist()
        first = group[0] - (int(ends[shards[0]]) - len(parts[shards[0]]))
        yield first, shards
