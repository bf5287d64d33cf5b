"""Semantic segmentation from folders: of images and, beside them, of masks of the same names."""

from __future__ import annotations

import argparse
import functools
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.prepare.imagefolder import EXTENSIONS
from data_pipeline.prepare.listing import Item, Listing, SourceFiles, unique_keys
from data_pipeline.shards.source import DataError
from data_pipeline.targets.masks import EXTENSION, MaskLabels, resize_mask

NAME = "segmentation"
HELP = "semantic segmentation: folders of images and of masks (CamVid, Cityscapes, one's own)"

_EXAMPLES = """\
examples:
  python -m data_pipeline.prepare segmentation --src camvid --out shards --ignore 11 --class-names \
      Sky,Building,Pole,Road,Pavement,Tree,SignSymbol,Fence,Car,Pedestrian,Bicyclist
      camvid/images/{train,val}/NAME.jpg and camvid/annotations/{train,val}/NAME.png
  python -m data_pipeline.prepare segmentation --src cityscapes --out shards --class-names names.txt --ignore 255 \\
      --images leftImg8bit/{split} --masks gtFine/{split} --image-suffix _leftImg8bit.png \\
      --mask-suffix _gtFine_labelTrainIds.png

A mask is a PNG of one channel with 8 bits, or with a palette, whose pixels are label values. It must have the size of
its image as a viewer shows it (turned as EXIF says), and only values of classes or ignored ones; an image whose mask is
missing or is otherwise is left out and reported. Masks are copied byte by byte.
"""


@dataclass(frozen=True)
class Layout:
    """Where the images and masks of each split lie, below a source folder."""

    images: dict[str, str]
    """Split -> folder of images."""

    masks: dict[str, str]
    """Split -> folder of masks."""

    image_suffix: str = ""
    """What ends the name of an image file, extension included; empty: any image extension."""

    mask_suffix: str = ".png"
    """What the name of a mask ends with in its place."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where images and masks are, and what the values mean."""
    parser.description = "Turn folders of images and masks into shards: KEY.jpg and KEY.seg.png."
    parser.epilog = _EXAMPLES
    parser.add_argument("--src", type=Path, required=True, metavar="DIR", help="the folder that holds both")
    parser.add_argument("--splits", nargs="+", default=["train", "val"], metavar="NAME", help="default: train val")
    parser.add_argument(
        "--images", default="images/{split}", metavar="PATH", help="folder of images in DIR; default images/{split}"
    )
    parser.add_argument(
        "--masks", default="annotations/{split}", metavar="PATH", help="folder of masks; default annotations/{split}"
    )
    parser.add_argument(
        "--image-suffix", default="", metavar="TEXT", help="what ends the images' names; default: any image extension"
    )
    parser.add_argument(
        "--mask-suffix", default=".png", metavar="TEXT", help="what ends the mask's name instead; default .png"
    )
    parser.add_argument(
        "--class-names",
        required=True,
        metavar="NAMES",
        help="names of the classes: a file with one in each line, or all of them with commas between",
    )
    parser.add_argument(
        "--first-label", type=int, default=0, metavar="VALUE", help="value of the first class in the masks; default 0"
    )
    parser.add_argument(
        "--ignore", type=int, nargs="*", default=[255], metavar="VALUE", help="values that are no class; default 255"
    )


def list_source(arguments: argparse.Namespace) -> Listing:
    """The folders that the arguments name."""
    classes = class_names(arguments.class_names)
    try:
        labels = MaskLabels(len(classes), arguments.first_label, tuple(sorted(set(arguments.ignore))))
    except ValueError as error:
        raise DataError(f"--first-label, --ignore: {error}.") from error
    layout = Layout(
        {split: arguments.images.replace("{split}", split) for split in arguments.splits},
        {split: arguments.masks.replace("{split}", split) for split in arguments.splits},
        arguments.image_suffix,
        arguments.mask_suffix,
    )
    options = {
        name: str(getattr(arguments, name)) for name in ("images", "masks", "image_suffix", "mask_suffix", "splits")
    }
    return list_mask_folders(NAME, arguments.src, layout, classes, labels, options)


def class_names(text: str) -> tuple[str, ...]:
    """The names in a text file, or those between commas where there is no such file; raises DataError."""
    if "," not in text or Path(text).exists():
        return read_class_names(Path(text))
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise DataError(f"--class-names {text}: there is nothing between two of the commas, or at an end.")
    return names


def read_class_names(path: Path) -> tuple[str, ...]:
    """The names in a text file, one in each line; raises DataError."""
    try:
        names = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text file (UTF-8) with the names of classes.") from error
    while names and not names[-1]:
        names.pop()
    if not names or not all(names):
        raise DataError(f"{path} should hold the name of a class in each line; {'one' if names else 'it'} is empty.")
    return tuple(names)


def list_mask_folders(
    converter: str, source: Path, layout: Layout, classes: tuple[str, ...], labels: MaskLabels, options: dict[str, str]
) -> Listing:
    """List images and their masks. Raises DataError where a folder is missing or holds no image."""
    ignored: Counter[str] = Counter()
    warnings: list[str] = []
    splits = {}
    for split in layout.images:
        if split != Path(split).name or split.startswith("."):
            raise DataError(f"'{split}' is no name of a split: give plain names.")
        splits[split] = _list_split(source, layout, split, ignored)
        warnings += _shared_masks(splits[split])
    meaning = {"first_label": str(labels.first_label), "ignore": " ".join(map(str, labels.ignore))}
    return Listing(
        converter,
        {**options, **meaning},
        classes,
        splits,
        functools.partial(read_pair, source),
        ignored=dict(sorted(ignored.items())),
        kind="segmentation",
        target_extension=EXTENSION,
        targets=labels.to_json(),
        resize_target=resize_mask,
        warnings=tuple(warnings),
    )


def _shared_masks(items: list[Item]) -> list[str]:
    """Which images have one mask in common, as two files of different extensions do."""
    owners: dict[str, str] = {}
    return [
        f"{owner} and {item.name} have the same mask, {item.place}"
        for item in items
        if (owner := owners.setdefault(item.place, item.name)) != item.name
    ]


def read_pair(source: Path, item: Item) -> SourceFiles:
    """An image and its mask."""
    try:
        mask = (source / item.place).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"there is no mask {item.place}") from None
    return SourceFiles((source / item.name).read_bytes(), mask)


def _list_split(source: Path, layout: Layout, split: str, ignored: Counter[str]) -> list[Item]:
    image_folder, mask_folder = source / layout.images[split], source / layout.masks[split]
    for folder, what in ((image_folder, "images"), (mask_folder, "masks")):
        if not folder.is_dir():
            raise DataError(f"There is no folder {folder} with the {what} of the split '{split}'.")
    masks = {path: entry for path, entry in _files(mask_folder) if path.endswith(layout.mask_suffix)}
    images = []
    for path, entry in _files(image_folder):
        stem = _stem(path, layout.image_suffix)
        if stem is not None:
            images.append((stem, path, entry))
        elif image_folder != mask_folder or path not in masks:
            ignored[os.path.splitext(path)[1].lower() or "without extension"] += 1
    if not images:
        looked_for = layout.image_suffix or f".{', .'.join(EXTENSIONS)}"
        raise DataError(f"{image_folder} holds no images (looked for {looked_for}).")
    items = []
    for key, (stem, path, entry) in zip(unique_keys(stem for stem, _, _ in images), images, strict=True):
        size, modified = _size_and_time(entry)
        mask = masks.pop(stem + layout.mask_suffix, None)
        if mask is not None:
            modified = max(modified, _size_and_time(mask)[1])
        place = os.path.join(layout.masks[split], stem + layout.mask_suffix)
        items.append(Item(key, os.path.join(layout.images[split], path), -1, size, modified, place))
    if masks:
        ignored[f"masks without an image in {split}"] += len(masks)
    return items


def _stem(path: str, suffix: str) -> str | None:
    """The path without its suffix; None where it is no image."""
    if suffix:
        return path.removesuffix(suffix) if path.endswith(suffix) else None
    stem, extension = os.path.splitext(path)
    return stem if extension.lower().removeprefix(".") in EXTENSIONS else None


def _files(folder: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """(path within `folder`, entry) of all files at any depth that are not hidden, in the order of names."""
    with os.scandir(folder) as entries:
        found = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            for path, inner in _files(Path(entry.path)):
                yield f"{entry.name}/{path}", inner
        elif not entry.is_dir():  # a link to a folder could lead back here
            yield entry.name, entry


def _size_and_time(entry: os.DirEntry[str]) -> tuple[int, float]:
    try:
        status = entry.stat()
    except FileNotFoundError:  # a link that leads nowhere; reading it is reported
        return 0, 0.0
    return status.st_size, status.st_mtime
