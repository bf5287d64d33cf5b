"""Folders of image files: SRC/SPLIT/CLASS/**.jpg, or SRC/CLASS/**.jpg from which a part is held out."""

from __future__ import annotations

import argparse
import functools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from data_pipeline.prepare import options
from data_pipeline.prepare.listing import SPLIT_NAME, SPLIT_RULE, Item, Listing, SourceFiles, hold_out, unique_keys
from data_pipeline.shards.source import DataError

NAME = "imagefolder"
HELP = "folders of image files, one per class"

EXTENSIONS = ("jpg", "jpeg", "jpe", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff")
"""What counts as an image, in lower or upper case."""

_LOOKED_FOR = f"looked for .{', .'.join(EXTENSIONS)}"

_EXAMPLES = """\
examples:
  python -m data_pipeline.prepare imagefolder --src photos --out shards          photos/{train,val}/CLASS/*.jpg
  python -m data_pipeline.prepare imagefolder --src photos --out shards --val-fraction 0.1      photos/CLASS/*.jpg

Image files (jpg, jpeg, png, webp, bmp, ppm, tiff) are found at any depth below a class folder. Classes are numbered in
the order of their names.
"""


@dataclass
class _PassedOver:
    """What a tree holds beside the images of its classes, as it is met."""

    kinds: Counter[str] = field(default_factory=Counter)
    """Files that are no images, by extension."""

    outside: list[str] = field(default_factory=list)
    """Images that lie beside the class folders, by path within the source."""

    def note(self, name: str) -> None:
        """Count a file that is no image."""
        self.kinds[_extension(name) or "without extension"] += 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the folders are, and which are splits."""
    parser.description = "Turn SRC/{train,val}/CLASS/*.jpg into shards."
    parser.epilog = _EXAMPLES
    parser.add_argument("--src", type=Path, required=True, metavar="DIR", help="the folder of images")
    layout = parser.add_mutually_exclusive_group()
    layout.add_argument(
        "--splits",
        nargs="+",
        metavar="NAME",
        help="folders of SRC to prepare; the first one's classes count (default: train val)",
    )
    layout.add_argument(
        "--val-fraction",
        type=options.checked(options.held_out),
        metavar="F",
        help="SRC holds one folder per class: hold out this part of each, such as 0.1, as the split val",
    )


def list_source(arguments: argparse.Namespace) -> Listing:
    """The tree that the arguments name."""
    return list_image_folder(arguments.src, arguments.splits, arguments.val_fraction)


def list_image_folder(source: Path, splits: Sequence[str] | None, val_fraction: float | None) -> Listing:
    """List a tree of images.

    With `val_fraction`, `source` holds one folder per class, and that part of each class becomes the split "val".
    Without it, `source` holds one folder per split (`splits`, by default train and val) with one folder per class in
    each; the classes of the first split are the classes of the set, in the order of their names.

    Raises DataError where folders are missing or empty, where a link beside the class folders leads nowhere, or where
    a later split has a class that the first has not.
    """
    if not source.is_dir():
        raise DataError(f"There is no folder {source}.")
    passed_over = _PassedOver()
    if val_fraction is not None:
        classes = _class_folders(source, source, passed_over)
        train, val = held_out(_items(source, source, classes, passed_over), val_fraction, source)
        return _listing(source, {"val_fraction": str(val_fraction)}, classes, {"train": train, "val": val}, passed_over)
    names = list(splits) if splits else ["train", "val"]
    _require_splits(source, names, chosen=bool(splits))
    by_split = {split: _class_folders(source, source / split, passed_over) for split in names}
    classes = by_split[names[0]]
    found = {}
    for split, own_classes in by_split.items():
        _require_known_classes(source / split, own_classes, classes, source / names[0])
        found[split] = _items(source, source / split, classes, passed_over)
    return _listing(source, {"splits": " ".join(names)}, classes, found, passed_over)


def _listing(
    source: Path, chosen: dict[str, str], classes: list[str], splits: dict[str, list[Item]], passed_over: _PassedOver
) -> Listing:
    first = next(iter(splits))
    for split, items in splits.items():
        if not items:
            raise DataError(f"{source} holds no images for the split '{split}' ({_LOOKED_FOR}).")
    trained = {item.label for item in splits[first]}
    empty = [name for label, name in enumerate(classes) if label not in trained]
    if empty:
        raise DataError(
            f"{_some(empty)}: no image of this class for the split '{first}' in {source} "
            f"({_LOOKED_FOR}). Delete the empty folder or add images."
        )
    read = functools.partial(read_file, source)
    kinds = dict(sorted(passed_over.kinds.items()))
    return Listing(NAME, chosen, tuple(classes), splits, read, kinds, tuple(passed_over.outside))


def read_file(source: Path, item: Item) -> SourceFiles:
    """One file of the tree."""
    return SourceFiles((source / item.name).read_bytes())


def _require_splits(source: Path, names: list[str], chosen: bool) -> None:
    for name in names:
        if name != Path(name).name or name.startswith("."):
            raise DataError(f"'{name}' is no name of a split: give the plain names of folders in {source}.")
        if not SPLIT_NAME.fullmatch(name):
            raise DataError(f"The folder {name!r} in {source} can be no split: {SPLIT_RULE}. Rename it.")
    missing = [name for name in names if not (source / name).is_dir()]
    if not missing:
        return
    if chosen or len(missing) < len(names):
        have = ", ".join(sorted(entry.name for entry in source.iterdir() if entry.is_dir())[:10]) or "no folder at all"
        raise DataError(f"{source} has no folder {' or '.join(missing)}; it has {have}. Name its splits with --splits.")
    raise DataError(
        f"{source} has neither train/ nor val/. Name its splits with --splits; or, where it holds one folder per "
        "class, say how much of each class to hold out, such as --val-fraction 0.1."
    )


def _require_known_classes(folder: Path, own: list[str], classes: list[str], first: Path) -> None:
    unknown = sorted(set(own) - set(classes))
    if unknown:
        raise DataError(f"{folder} has classes that {first} has not: {_some(unknown)}.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _class_folders(source: Path, folder: Path, passed_over: _PassedOver) -> list[str]:
    """Names of the class folders in `folder`, sorted; what else lies there is noted."""
    names = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            names.append(entry.name)
        elif not entry.exists():
            raise DataError(f"{entry} is a link that leads nowhere, in place of a class folder; repair or delete it.")
        elif _is_image(entry.name):
            passed_over.outside.append(os.path.relpath(entry, source))
        else:
            passed_over.note(entry.name)
    if not names:
        raise DataError(f"{folder} is empty: it should hold one folder of images per class.")
    for name in names:
        if not name.isprintable():  # nor valid UTF-8, where the file system holds other bytes
            raise DataError(f"the class folder {name!r} in {folder} has a name that is no plain text; rename it.")
    return names


def _items(source: Path, folder: Path, classes: list[str], passed_over: _PassedOver) -> list[Item]:
    """All images below the class folders that are there, sorted by path."""
    found: list[tuple[str, int, int, float]] = []
    for label, name in enumerate(classes):
        if (folder / name).is_dir():
            for entry in sorted(_walk(folder / name, passed_over), key=lambda entry: entry.path):
                size, modified = _size_and_time(entry)
                found.append((os.path.relpath(entry.path, source), label, size, modified))
    prefix = os.path.relpath(folder, source) + os.sep if folder != source else ""
    keys = unique_keys(str(PurePosixPath(path.removeprefix(prefix)).with_suffix("")) for path, *_ in found)
    return [Item(key, *entry) for key, entry in zip(keys, found, strict=True)]


def _walk(folder: Path, passed_over: _PassedOver) -> Iterator[os.DirEntry[str]]:
    """Image files at any depth. Links are followed; a folder that was visited already (a link in a circle) is not."""
    pending, visited = [str(folder)], set()
    while pending:
        path = pending.pop()
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        with os.scandir(path) as entries:
            found = sorted(entries, key=lambda entry: entry.name)  # which of two links to a folder counts is settled so
        for entry in found:
            if entry.name.startswith("."):
                passed_over.kinds["hidden"] += 1
            elif _is_folder(entry):
                pending.append(entry.path)
            elif _is_image(entry.name) and (not os.path.exists(entry.path) or entry.is_file()):
                yield entry  # a link that leads nowhere too: reading it fails later, and is reported then
            else:
                passed_over.note(entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _is_image(name: str) -> bool:
    return _extension(name).removeprefix(".") in EXTENSIONS


def _size_and_time(entry: os.DirEntry[str]) -> tuple[int, float]:
    try:
        status = entry.stat()
    except OSError:  # a link that leads nowhere, or to itself; reading it says which
        return 0, 0.0
    return status.st_size, status.st_mtime


def held_out(items: list[Item], fraction: float, source: Path) -> tuple[list[Item], list[Item]]:
    """(To train on, held out) by --val-fraction; raises DataError where that leaves nothing for one of them."""
    if not items:
        raise DataError(f"{source} holds no images ({_LOOKED_FOR}).")
    count = round(fraction * len(items))
    if not 0 < count < len(items):
        raise DataError(
            f"--val-fraction {fraction} of the {len(items)} images in {source} leaves a split without images."
        )
    return hold_out(items, count)
