"""The whole of ImageNet: one tar per class, in a folder or in one tar (fall11: 21,841 classes; winter21: 19,167).

    SRC/n00004475.tar ...    or SRC = fall11_whole.tar, which holds these tars; it is not unpacked

Listing reads 512 bytes per image, and holds about 0.5 KB of memory for each (1.28 million take 0.7 GB).
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from data_pipeline.prepare import options
from data_pipeline.prepare.imagefolder import held_out
from data_pipeline.prepare.listing import Item, Listing, unique_keys
from data_pipeline.prepare.tar_items import (
    WNID,
    ClassImages,
    FoundImage,
    class_tars_in,
    list_class_tars,
    read_item,
    some,
)
from data_pipeline.shards.source import DataError

NAME = "imagenet22k"
HELP = "the class tars of the whole of ImageNet (fall11, winter21)"

_RELEASES = ("fall11_whole.tar", "winter21_whole.tar", "winter21_whole.tar.gz")

_EPILOG = """\
examples:
  python -m data_pipeline.prepare imagenet22k --src fall11_whole.tar --out shards
  python -m data_pipeline.prepare imagenet22k --src winter21_whole/ --out shards --min-images 500 --val-fraction 0.05

SRC is a tar of class tars, or a folder of class tars (n00004475.tar ...). A release that is compressed has to be
unpacked once (tar -xzf winter21_whole.tar.gz), as images are read from anywhere in it. --min-images 500 keeps the
classes of ImageNet-21K-P. The release has no validation images: --val-fraction holds some out of each class.

Labels follow the WordNet ids, or the lines of --classes FILE: an id each, and after it, if wanted, the class's name.
A class tar that is damaged gives the images before the damage; the damage is reported with the images left out.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the class tars are, and which classes to take."""
    parser.description = "Turn the class tars of the whole of ImageNet into shards."
    parser.epilog = _EPILOG
    parser.add_argument("--src", type=Path, required=True, metavar="PATH", help="the folder or the tar of class tars")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--min-images",
        type=options.checked(options.count),
        default=1,
        metavar="N",
        help="leave out classes with fewer images; default 1",
    )
    choice.add_argument("--classes", type=Path, metavar="FILE", help="only these classes, labelled in this order")
    parser.add_argument(
        "--val-fraction",
        type=options.checked(options.held_out),
        metavar="F",
        help="hold out this part of each class as val",
    )


def list_source(arguments: argparse.Namespace) -> Listing:
    """The images of the classes that were asked for. Raises DataError where there are none."""
    source = _release(arguments.src)
    ignored: Counter[str] = Counter()
    tars = class_tars_in(source, ignored)
    if not tars:
        raise DataError(
            f"{source} holds no class tars (n00004475.tar ...). For folders of images use the converter imagefolder."
        )
    wanted = _read_classes(arguments.classes) if arguments.classes else None
    by_class: dict[str, list[ClassImages]] = {}
    for images in list_class_tars([tar for tar in tars if wanted is None or tar.wnid in wanted]):
        by_class.setdefault(images.wnid, []).append(images)
        ignored.update(images.ignored)
    classes, warnings = _classes(source, by_class, wanted, arguments.min_images)
    items = _items(by_class, {wnid: label for label, wnid in enumerate(classes)})
    splits = {"train": items}
    if arguments.val_fraction is not None:
        splits["train"], splits["val"] = held_out(items, arguments.val_fraction, source)
    chosen = {"min_images": str(arguments.min_images), "val_fraction": str(arguments.val_fraction or "not given")}
    return Listing(
        NAME,
        chosen,
        tuple(f"{wnid} {words}".rstrip() for wnid, words in classes.items()),
        splits,
        read_item,
        dict(sorted(ignored.items())),
        warnings=tuple(warnings),
    )


def _release(source: Path) -> Path:
    """The tar of class tars, where `source` is the folder that a release was downloaded into."""
    if not source.exists():
        raise DataError(f"There is no {source}.")
    if source.is_dir() and not any(WNID.fullmatch(path.stem) for path in source.glob("n*.tar")):
        for name in _RELEASES:
            if (source / name).is_file():
                return source / name
    return source


def _read_classes(path: Path) -> dict[str, str]:
    """WordNet id -> name (or nothing), in the order of the lines of a file."""
    classes: dict[str, str] = {}
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text ({error}).") from error
    for number, line in enumerate(lines, start=1):
        wnid, *words = line.split() or [""]
        if wnid in classes or not WNID.fullmatch(wnid):
            what = "names a class again" if wnid in classes else "does not begin with a WordNet id such as n00004475"
            raise DataError(f"{path}, line {number} ('{line[:40]}') {what}.")
        classes[wnid] = " ".join(words)
    if not classes:
        raise DataError(f"{path} names no classes.")
    return classes


def _classes(
    source: Path, by_class: dict[str, list[ClassImages]], chosen: dict[str, str] | None, least: int
) -> tuple[dict[str, str], list[str]]:
    """The classes of the set, WordNet id -> name, and what to warn of."""
    counts = {wnid: sum(len(images.files) for images in found) for wnid, found in by_class.items()}
    damaged = {wnid for wnid, found in by_class.items() if any(images.damage for images in found)}
    if chosen is not None:
        empty = [f"{wnid} (damaged)" if wnid in damaged else wnid for wnid in chosen if not counts.get(wnid)]
        if empty:
            raise DataError(f"{source} has no images of {len(empty):,} of the {len(chosen):,} classes: {some(empty)}.")
        return chosen, []
    kept = {wnid: "" for wnid in sorted(counts) if counts[wnid] >= least}
    if not kept:
        raise DataError(f"{source} has no class with {least:,} or more images.")
    dropped = [f"{wnid}, damaged" if wnid in damaged else wnid for wnid in counts if wnid not in kept]
    what = f"{len(dropped):,} of {len(counts):,} classes have fewer than {least:,} images, left out: {some(dropped)}."
    return kept, [what] if dropped else []


def _items(by_class: dict[str, list[ClassImages]], labels: dict[str, int]) -> list[Item]:
    found: list[tuple[str, int, FoundImage | str]] = []
    for wnid, label in labels.items():
        for images in by_class[wnid]:
            found += [(f"{wnid}/{_stem(file.name)}", label, file) for file in images.files]
            if images.damage:  # becomes an image that is left out, so that it is reported as those are
                found.append((f"{wnid}/damaged", label, images.damage))
    items = []
    for key, (_, label, file) in zip(unique_keys(name for name, *_ in found), found, strict=True):
        if isinstance(file, str):
            items.append(Item(key, f"{key.split('/')[0]}.tar, from its damage on", label, 0, place=file))
        else:
            items.append(Item(key, file.name, label, file.size, file.modified, file.place))
    return items


def _stem(name: str) -> str:
    return name.rsplit("/", 1)[-1].rsplit(".", 1)[0]
