"""What a converter says about its source, and pure functions on it."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from data_pipeline.shards.writer import member_bytes

Kind = Literal["classification", "segmentation", "detection"]

SPLIT_NAME = re.compile(r"[A-Za-z0-9_-]+")
SPLIT_RULE = "a split's name has letters, digits, '_' and '-' only"

_UNSAFE_IN_KEY = re.compile(r"[.\\\x00-\x1f\x7f\ud800-\udfff]")
_DATA_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, slots=True)
class Item:
    """One image of the source, not yet read."""

    key: str
    """Its key in the shards: unique within the split, without a dot."""

    name: str
    """What the source calls it, for messages (for a folder: the path within it)."""

    label: int
    """Its class; -1 where it has none, as in a set for a dense task."""

    size: int
    """Bytes of the image file; an estimate will do where `modified` is 0."""

    modified: float = 0.0
    """When the image or its target was last changed, in seconds since 1970; 0 where they cannot change."""

    place: Any = None
    """Where the converter finds it, such as (path of a tar, offset): picklable, and nobody else's business."""


@dataclass(frozen=True)
class SourceFiles:
    """What the source holds for one item."""

    image: bytes
    target: bytes | None = None
    """The PNG of a mask or the JSON of annotations, where the set is one for a dense task."""


ResizeTarget = Callable[[bytes, tuple[int, int], tuple[int, int]], bytes]
"""(target, (height, width) of the upright image before, and after) -> target; picklable."""


@dataclass(frozen=True)
class Listing:
    """Everything a source holds."""

    converter: str
    """Name of the command that made it."""

    options: dict[str, str]
    """What the user chose and the result depends on."""

    classes: tuple[str, ...]
    splits: dict[str, list[Item]]

    read: Callable[[Item], SourceFiles]
    """The files of an item; picklable, as other processes call it. Raises OSError, or ValueError saying why they cannot
    be used; the item is then left out."""

    ignored: dict[str, int] = field(default_factory=dict)
    """How many files of which kind were passed over because they are no images."""

    outside: tuple[str, ...] = ()
    """Names of images that were passed over because they are in no class folder."""

    kind: Kind = "classification"
    """What the samples teach: a label each, or a target file each."""

    target_extension: str = ""
    """Of the target's file in the tar, such as "seg.png"; empty for classification."""

    targets: dict[str, Any] = field(default_factory=dict)
    """What is in the targets, as index.json will say it (data_pipeline.targets); every target is checked against it."""

    resize_target: ResizeTarget | None = None
    """Fits a target to an image that was made smaller; without it, a set with targets cannot be made smaller."""

    warnings: tuple[str, ...] = ()
    """What is odd about the source, in sentences; shown before the work begins."""


@dataclass(frozen=True)
class ShardSize:
    """Where one shard ends: at a number of samples, or before its tar gets larger than a number of bytes."""

    text: str
    """As the user wrote it."""

    limit: int
    """The largest number of samples, or of bytes of a tar."""

    in_bytes: bool

    @classmethod
    def parse(cls, text: str) -> ShardSize:
        """ "10000" is a number of samples, "64MB" or "256MiB" a number of bytes. Raises ValueError."""
        match = re.fullmatch(r"(\d+)\s*([a-z]*)", text.strip(), re.IGNORECASE)
        unit = match[2].upper() if match else None
        if match is None or unit not in _DATA_UNITS or int(match[1]) == 0:
            raise ValueError(
                f"'{text}' is no shard size; give samples, such as 10000, or bytes, such as 64MB or 256MiB"
            )
        number = int(match[1]) * _DATA_UNITS[unit]
        return cls(text, number, in_bytes=unit != "")


def unique_keys(names: Iterable[str]) -> list[str]:
    """A key for each name (a path without its extension): dots and control characters become "_".

    Where two names lead to the same key (`a.b` and `a_b`, or one stem with two extensions), the later one gets "~2",
    "~3", ... at its end. Depends on nothing but the sequence of names.
    """
    taken: set[str] = set()
    keys = []
    for name in names:
        stem = _UNSAFE_IN_KEY.sub("_", name)
        key, count = stem, 1
        while key in taken:
            count += 1
            key = f"{stem}~{count}"
        taken.add(key)
        keys.append(key)
    return keys


def mixed(items: Iterable[Item]) -> list[Item]:
    """The items in an order that mixes the classes: by a digest of their keys, so that it is the same for ever."""
    return sorted(items, key=lambda item: (digest(item.key), item.key))


def digest(key: str) -> bytes:
    """Eight bytes that look random and depend on the key alone."""
    return hashlib.blake2b(key.encode(), digest_size=8).digest()


def cut_into_shards(items: Sequence[Item], size: ShardSize) -> list[list[Item]]:
    """Consecutive runs of items, about equally large, none above `size` unless a single item is."""
    weights = [member_bytes(item.size) if size.in_bytes else 1 for item in items]
    share = sum(weights) / max(1, math.ceil(sum(weights) / size.limit))
    shards: list[list[Item]] = []
    placed = filled = 0
    for item, weight in zip(items, weights, strict=True):
        if not shards or placed + weight / 2 > share * len(shards) or filled + weight > size.limit:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        placed += weight
        filled += weight
    return shards


def cut_evenly(items: Sequence[Item], count: int) -> list[list[Item]]:
    """`count` consecutive runs of items (of which there are at least as many), about equally large in bytes."""
    ends = list(itertools.accumulate(member_bytes(item.size) for item in items))
    bounds = [0]
    for number in range(1, count):
        at = bisect.bisect_left(ends, ends[-1] * number / count) + 1
        bounds.append(min(max(at, bounds[-1] + 1), len(items) - (count - number)))
    return [list(items[start:end]) for start, end in itertools.pairwise([*bounds, len(items)])]


def hold_out(items: Sequence[Item], count: int) -> tuple[list[Item], list[Item]]:
    """Split into (rest, `count` held out), each class in proportion (largest remainder), by digest of the key."""
    by_class: dict[int, list[Item]] = {}
    for item in mixed(items):
        by_class.setdefault(item.label, []).append(item)
    shares = {label: count * len(members) / len(items) for label, members in sorted(by_class.items())}
    quotas = {label: int(share) for label, share in shares.items()}
    by_remainder = sorted(shares, key=lambda label: (quotas[label] - shares[label], label))
    for label in by_remainder[: count - sum(quotas.values())]:
        quotas[label] += 1
    held = {item.key for label, members in by_class.items() for item in members[: quotas[label]]}
    return [item for item in items if item.key not in held], [item for item in items if item.key in held]


def source_digest(listing: Listing) -> str:
    """Tells one source from another: classes, and the keys and labels of every split. Not the images' content."""
    result = hashlib.sha256("\n".join(listing.classes).encode(errors="surrogateescape"))
    for split, items in sorted(listing.splits.items()):
        result.update(f"\n\n{split}".encode())
        for item in sorted(items, key=lambda item: item.key):
            result.update(f"\n{item.label} {item.key}".encode())
    return result.hexdigest()
