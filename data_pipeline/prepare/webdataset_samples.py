"""Which members of a WebDataset tar make up a sample, by webdataset's own rule, and what its label is.

A member's key is its name up to the first dot of the last part of its path, and its extension everything after that
dot, in lower case: `train/a.b.jpg` has the key `train/a` and the extension `b.jpg`. Members without a dot, and those
named `__something__`, belong to no sample. webdataset makes a sample of neighbouring members with one key; here members
of a key that lie apart are brought together, unless they say the same thing twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from data_pipeline.prepare.imagefolder import EXTENSIONS
from data_pipeline.prepare.tar_members import Member

_KEY_AND_EXTENSION = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__(?:$|/)")
_MOST_LABEL_BYTES = 1 << 20
LABEL_EXTENSION, METADATA_EXTENSION = "cls", "json"
MOST_CLASSES = 1_000_000
"""A number above it, without a list of classes, is taken for something else than a class."""


class UnusableSampleError(Exception):
    """A sample has no image or no label; the message says why."""


class AmbiguousImageError(Exception):
    """It cannot be told which of a sample's members is its image; the message names them."""


@dataclass
class Sample:
    """Members with one key."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    """By extension."""

    twice: str = ""
    """An extension that two neighbouring members share; empty where there is none."""

    apart: bool = False
    """Its members lie apart."""


def group(members: Iterable[Member]) -> tuple[list[Sample], int]:
    """The samples of one tar in the order of their first members, and how many members belong to none."""
    samples: list[Sample] = []
    last_of_key: dict[str, Sample] = {}
    current, outside = Sample(""), 0
    for member in members:
        match = None if _META.match(member.name) else _KEY_AND_EXTENSION.fullmatch(member.name)
        if match is None:
            outside += 1
            continue
        key, extension = match[1], match[2].lower()
        if key != current.key:
            earlier = last_of_key.get(key)
            fits = earlier is not None and extension not in earlier.members
            current = earlier if earlier is not None and fits else Sample(key)
            if fits:
                current.apart = True
            else:
                samples.append(current)
                last_of_key[key] = current
        if extension in current.members:
            if not current.apart:
                current.twice = extension
                continue
            current = Sample(key)  # one that lay apart is complete: this is another of its key
            samples.append(current)
            last_of_key[key] = current
        current.members[extension] = member
    return samples, outside


def image_of(sample: Sample, image_key: str | None) -> tuple[str, Member]:
    """(Extension, member) of a sample's image.

    It is the member with the extension `image_key`; where that is not given, the only one whose extension ends as an
    image's does (`jpg`, `b.jpg`), or of several the only one without a dot (`jpg` beside `seg.png`). Raises
    UnusableSampleError where there is none, AmbiguousImageError where there are several.
    """
    if sample.twice:
        raise UnusableSampleError(f"it has two members .{sample.twice}: one name or key stands for two samples")
    have = ", ".join(f".{extension}" for extension in sample.members)
    if image_key is not None:
        if image_key not in sample.members:
            raise UnusableSampleError(f"it has no .{image_key}, only {have}")
        return image_key, sample.members[image_key]
    images = [extension for extension in sample.members if extension.rsplit(".", 1)[-1] in EXTENSIONS]
    plain = [extension for extension in images if "." not in extension]
    if not images:
        raise UnusableSampleError(f"it has no image, only {have}")
    if len(images) > 1 and len(plain) != 1:
        raise AmbiguousImageError(", ".join(f".{extension}" for extension in images))
    chosen = plain[0] if plain else images[0]
    return chosen, sample.members[chosen]


def label_of(sample: Sample, label_key: str | None, read: Callable[[Member], bytes]) -> int | str:
    """A sample's label, a number or a class's name: its `.cls`, or the field `label_key` of its `.json`.

    Raises UnusableSampleError where there is none.
    """
    extension = LABEL_EXTENSION if label_key is None else METADATA_EXTENSION
    member = sample.members.get(extension)
    if member is None:
        have = ", ".join(f".{extension}" for extension in sample.members)
        raise UnusableSampleError(f"it has no label: no .{extension}, only {have}")
    if member.size > _MOST_LABEL_BYTES:
        raise UnusableSampleError(f"its .{extension} has {member.size:,} bytes, which is no label")
    try:
        text = read(member).decode("utf-8").strip()
        value = text if label_key is None else json.loads(text)[label_key]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        field_name = f" with the field '{label_key}'" if label_key else ""
        raise UnusableSampleError(f"its .{extension} is not what it should be{field_name} ({error!r})") from error
    return _number_or_name(value, extension)


def _number_or_name(value: object, extension: str) -> int | str:
    if isinstance(value, str) and value:
        digits = value.isascii() and value.isdecimal() and len(value) <= 18
        return int(value) if digits else value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise UnusableSampleError(f"its .{extension} gives {str(value)[:40]!r}, which is no label")


def class_number(label: int | str, numbers: dict[str, int] | None) -> int:
    """The class of a label; `numbers` gives those of the names of --classes. Raises UnusableSampleError."""
    if numbers is not None:
        found = numbers.get(label) if isinstance(label, str) else label
        if found is None or not 0 <= found < len(numbers):
            raise UnusableSampleError(f"its label {str(label)[:40]!r} is none of the {len(numbers):,} of --classes")
        return found
    if isinstance(label, str):
        raise UnusableSampleError(f"its label {label[:40]!r} is no number, and there is no list of names (--classes)")
    if label >= MOST_CLASSES:
        raise UnusableSampleError(
            f"its label {label:,} is too large for a class; is it an id? List them with --classes"
        )
    return label
