"""Existing WebDataset tars, cut anew into shards of one size, in mixed order, with an index.

SRC/{train,val}/*.tar    or SRC/*.tar, or any paths and patterns
"""

from __future__ import annotations

import argparse
import functools
import glob
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.prepare import options
from data_pipeline.prepare.imagefolder import held_out
from data_pipeline.prepare.listing import SPLIT_NAME, SPLIT_RULE, Item, Listing, unique_keys
from data_pipeline.prepare.tar_items import in_threads, is_image, read_item, some
from data_pipeline.prepare.tar_members import Member, list_members, read_member
from data_pipeline.prepare.webdataset_samples import (
    LABEL_EXTENSION,
    METADATA_EXTENSION,
    AmbiguousImageError,
    Sample,
    UnusableSampleError,
    class_number,
    group,
    image_of,
    label_of,
)
from data_pipeline.shards import set_index
from data_pipeline.shards.source import DataError

NAME = "webdataset"
HELP = "existing WebDataset tars: cut anew, mixed and indexed"

_SPLIT_AND_PATTERN = re.compile(rf"({SPLIT_NAME.pattern})=(.+)")

_EPILOG = """\
examples:
  python -m data_pipeline.prepare webdataset --src shards --out new                    shards/{train,val}/*.tar
  python -m data_pipeline.prepare webdataset --src 'shards/*.tar' --out new --val-fraction 0.02
  python -m data_pipeline.prepare webdataset --out new --label-key label \\
      --src 'train=imagenet1k-train-*.tar' 'val=imagenet1k-validation-*.tar'

Samples are told by webdataset's rule: the key goes up to the first dot of the file's name, so that a.b.jpg is the
member b.jpg of the sample a. A sample's image is the member whose extension ends as an image's does; of several, the
one without a further dot (jpg beside seg.png), or the one that --image-key names. Other members are left behind.

The label is the sample's .cls, or the field --label-key of its .json: a number from 0 on, or a name of --classes FILE
(a name per line). Without that file the names are those of SRC/index.json, where SRC is a folder that was prepared
here, and 0, 1, ... up to the largest number elsewhere. A sample without an image or a label is left out and reported.
Where a key comes again, in the same tar or in another one, the later sample gets
"~2" at its end. Compressed tars have to be decompressed first.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the tars are, what they are splits of, and where the labels are."""
    parser.description = "Cut existing WebDataset tars into new shards with an index."
    parser.epilog = _EPILOG
    parser.add_argument(
        "--src",
        dest="sources",
        nargs="+",
        required=True,
        metavar="SRC",
        help="a folder of tars, or of folders of tars, one per split; or tars and patterns; or SPLIT=PATTERN for each",
    )
    parser.add_argument(
        "--val-fraction",
        type=options.checked(options.held_out),
        metavar="F",
        help="hold out this part of each class as val",
    )
    parser.add_argument("--image-key", metavar="EXT", help="the image's extension, such as jpg; default: what ends so")
    parser.add_argument("--label-key", metavar="FIELD", help="the label's field in .json; default: the label is .cls")
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="the classes' names, one per line, from class 0 on"
    )


@dataclass(frozen=True)
class _Reading:
    """How samples are understood; picklable."""

    image_key: str | None
    label_key: str | None
    numbers: dict[str, int] | None


@dataclass(frozen=True)
class _Found:
    """A sample with its label, or why it has none."""

    key: str
    name: str
    label: int
    size: int
    place: tuple[str, int] | str


@dataclass
class _Tar:
    """What one tar holds."""

    samples: list[_Found] = field(default_factory=list)
    modified: float = 0.0
    left_behind: Counter[str] = field(default_factory=Counter)
    apart: int = 0
    """Samples whose members lie apart."""


def list_source(arguments: argparse.Namespace) -> Listing:
    """The samples of the tars. Raises DataError where there are none, or where none of a split's can be used."""
    by_split = _tars(arguments.sources)
    if arguments.val_fraction is not None and list(by_split) != ["train"]:
        raise DataError(f"--val-fraction is for one split; here are {' and '.join(by_split)}.")
    _require_outside(arguments.out, [path for paths in by_split.values() for path in paths])
    names = _read_classes(arguments.classes) if arguments.classes else _prepared_classes(arguments.sources)
    numbers = None if names is None else {name: number for number, name in enumerate(names)}
    image_key = arguments.image_key.lower().removeprefix(".") if arguments.image_key else None
    reading = _Reading(image_key, arguments.label_key, numbers)
    splits, ignored, warnings = {}, Counter[str](), []
    for split, paths in by_split.items():
        tars = list(in_threads(functools.partial(_list_tar, reading), paths, f"reading tars of {split}"))
        _require_usable(split, tars)
        splits[split] = _items(tars)
        for tar in tars:
            ignored.update(tar.left_behind)
        warnings += _warnings(split, tars, splits[split])
    if arguments.val_fraction is not None:
        splits["train"], splits["val"] = held_out(splits["train"], arguments.val_fraction, Path(arguments.sources[0]))
    chosen = {
        "val_fraction": str(arguments.val_fraction or "not given"),
        "image_key": image_key or "not given",
        "label_key": arguments.label_key or "not given",
    }
    classes = names or _numbered(splits)
    warnings += _unused(classes, splits)
    counted = dict(sorted(ignored.items()))
    return Listing(NAME, chosen, classes, splits, read_item, counted, warnings=tuple(warnings))


def _tars(sources: list[str]) -> dict[str, list[str]]:
    """Split -> its tars, in the order of their paths."""
    named = [_SPLIT_AND_PATTERN.fullmatch(source) for source in sources]
    splits: dict[str, list[str]] = {}
    if all(named):
        for match in named:
            if match:
                splits.setdefault(match[1], []).extend(_matching(match[2]))
    elif any(named):
        raise DataError("Give all of --src as SPLIT=PATTERN, or none.")
    elif len(sources) == 1 and os.path.isdir(sources[0]) and (found := _split_folders(sources[0])):
        splits = found
    else:
        splits["train"] = [path for source in sources for path in _matching(source)]
    return {split: sorted(set(paths)) for split, paths in splits.items()}


def _split_folders(source: str) -> dict[str, list[str]]:
    """The folders of tars in a folder, train first, then val."""
    names = [name for name in os.listdir(source) if not name.startswith(".")]
    found = {name: glob.glob(os.path.join(glob.escape(source), glob.escape(name), "*.tar")) for name in names}
    splits = {name: found[name] for name in sorted(names, key=_train_first) if found[name]}
    strange = [name for name in splits if not SPLIT_NAME.fullmatch(name)]
    if strange:
        raise DataError(
            f"The folder {strange[0]!r} in {source} can be no split: {SPLIT_RULE}. Say --src SPLIT=PATTERN."
        )
    if splits and glob.glob(os.path.join(glob.escape(source), "*.tar")):
        raise DataError(
            f"{source} holds tars, and folders of tars ({some(splits)}). Say which are which split: "
            f"--src 'train={source}/*.tar' 'val=...'"
        )
    return splits


def _train_first(name: str) -> tuple[int, str]:
    return (("train", "val").index(name) if name in ("train", "val") else 2, name)


def _matching(pattern: str) -> list[str]:
    if os.path.isdir(pattern):
        found = glob.glob(os.path.join(glob.escape(pattern), "*.tar"))
    else:
        found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern)
    if not found:
        raise DataError(f"There is no tar {'in ' if os.path.isdir(pattern) else ''}{pattern}.")
    return found


def _require_outside(out: Path, paths: list[str]) -> None:
    """The shards must not be written among the tars that they are made of."""
    inside = [path for path in paths if out.resolve() in Path(path).resolve().parents]
    if inside:
        raise DataError(f"--out {out} holds the source {inside[0]}; choose another folder.")


def _read_classes(path: Path) -> tuple[str, ...]:
    try:
        names = tuple(line.strip() for line in path.read_text("utf-8").splitlines())
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text ({error}).") from error
    twice = [name for name, count in Counter(names).items() if count > 1 or not name]
    if twice or not names:
        what = f"has the line '{twice[0]}' more than once, or empty" if twice else "is empty"
        raise DataError(f"{path} {what}: it should hold one class per line.")
    return names


def _prepared_classes(sources: list[str]) -> tuple[str, ...] | None:
    """The classes' names, where the source is a folder that was prepared here."""
    if len(sources) != 1 or not os.path.isfile(os.path.join(sources[0], set_index.FILE_NAME)):
        return None
    try:
        return set_index.load(Path(sources[0])).classes
    except DataError:  # another program's file of that name
        return None


def _list_tar(reading: _Reading, path: str) -> _Tar:
    """The samples of one tar."""
    contents = list_members(path)
    samples, outside = group(contents.members)
    tar = _Tar(modified=os.stat(path).st_mtime, apart=sum(sample.apart for sample in samples))
    tar.left_behind.update({kind: count for kind, count in contents.passed_over.items() if kind != "folder"})
    if outside:
        tar.left_behind["without a key"] += outside
    shard = os.path.basename(path)
    for sample in samples:
        try:
            tar.samples.append(_understood(sample, reading, path, tar.left_behind))
        except UnusableSampleError as error:
            tar.samples.append(_Found(sample.key, f"{shard}/{sample.key}", 0, 0, str(error)))
        except AmbiguousImageError as error:
            raise DataError(
                f"{path}: the sample '{sample.key}' has several images ({error}). Choose one with --image-key. Where "
                "these are different pictures, their names have dots before the extension: a key ends at the first."
            ) from error
    return tar


def _understood(sample: Sample, reading: _Reading, path: str, left_behind: Counter[str]) -> _Found:
    extension, member = image_of(sample, reading.image_key)
    label = label_of(sample, reading.label_key, functools.partial(_read, path))
    number = class_number(label, reading.numbers)
    used = {extension, LABEL_EXTENSION if reading.label_key is None else METADATA_EXTENSION}
    for other in sample.members.keys() - used:
        left_behind[f".{other} beside the image" if is_image(f"x.{other}") else f".{other}"] += 1
    name = f"{os.path.basename(path)}/{member.name}"
    return _Found(sample.key, name, number, member.size, (path, member.offset))


def _read(path: str, member: Member) -> bytes:
    return read_member(path, member.offset, member.size)


def _require_usable(split: str, tars: list[_Tar]) -> None:
    """One sample without a label is left out; where all are, the options are wrong."""
    samples = [sample for tar in tars for sample in tar.samples]
    if not samples:
        raise DataError(f"The tars of the split '{split}' hold no samples.")
    unusable = [sample for sample in samples if isinstance(sample.place, str)]
    if len(unusable) == len(samples):
        raise DataError(
            f"None of the {len(samples):,} samples of the split '{split}' can be used. {unusable[0].name}: "
            f"{unusable[0].place}. See --image-key, --label-key and --classes."
        )


def _items(tars: list[_Tar]) -> list[Item]:
    found = [(sample, tar.modified) for tar in tars for sample in tar.samples]
    keys = unique_keys(sample.key for sample, _ in found)
    return [
        Item(key, sample.name, sample.label, sample.size, modified, sample.place)
        for key, (sample, modified) in zip(keys, found, strict=True)
    ]


def _warnings(split: str, tars: list[_Tar], items: list[Item]) -> list[str]:
    warnings = []
    apart = sum(tar.apart for tar in tars)
    if apart:
        warnings.append(
            f"{split}: the members of {apart:,} samples lie apart in their tar, and were brought together; webdataset "
            "itself takes them for several samples."
        )
    keys = Counter(sample.key for tar in tars for sample in tar.samples)
    again = len(items) - len(keys)
    if again:
        repeated = [key for key, count in keys.items() if count > 1]
        warnings.append(
            f"{split}: {again:,} samples have a key that came before ({some(repeated)}): the later ones get '~2' at "
            "its end."
        )
    return warnings


def _numbered(splits: dict[str, list[Item]]) -> tuple[str, ...]:
    return tuple(str(number) for number in range(1 + max(item.label for items in splits.values() for item in items)))


def _unused(classes: tuple[str, ...], splits: dict[str, list[Item]]) -> list[str]:
    split = next(iter(splits))
    seen = {item.label for item in splits[split] if not isinstance(item.place, str)}
    unused = [name for number, name in enumerate(classes) if number not in seen]
    if not unused:
        return []
    return [f"{split}: {len(unused):,} of {len(classes):,} classes have no image: {some(unused)}. Labels begin at 0."]
