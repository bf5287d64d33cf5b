"""ImageNet-1k as it is handed out: the tars of ILSVRC2012 and its development kit, or the folders unpacked from them.

    SRC/ILSVRC2012_devkit_t12.tar.gz    or the folder ILSVRC2012_devkit_t12/
    SRC/ILSVRC2012_img_train.tar        1,000 tars of one class each; or train/n01440764.tar, or train/n01440764/*.JPEG
    SRC/ILSVRC2012_img_val.tar          50,000 images; or val/*.JPEG, or val/n01440764/*.JPEG

Nothing is unpacked. Tars and folders give the same shards. Images are told by what they are, not by their names: the
PNG that is called n02105855_2933.JPEG is stored as a PNG, and the 22 CMYK JPEGs stay as they are (decoding turns them
into RGB).
"""

from __future__ import annotations

import argparse
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.prepare import devkit
from data_pipeline.prepare.devkit import Devkit
from data_pipeline.prepare.listing import Item, Listing, unique_keys
from data_pipeline.prepare.tar_items import (
    WNID,
    ClassImages,
    FoundImage,
    class_tars_in,
    images_among,
    in_threads,
    is_image,
    kind_of,
    list_class_tars,
    read_item,
    some,
)
from data_pipeline.prepare.tar_members import DamagedTarError, list_members
from data_pipeline.shards.source import DataError

NAME = "imagenet"
HELP = "ImageNet-1k: the tars of ILSVRC2012 and its development kit"

SPLITS = ("train", "val")
_ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")
_WHERE = (
    "Images: https://image-net.org/download-images.php, where one registers (ILSVRC2012, tasks 1 and 2). "
    f"Development kit: https://image-net.org/data/ILSVRC/2012/{devkit.ARCHIVE}"
)

_EPILOG = f"""\
SRC holds the files as they are downloaded, and nothing needs to be unpacked:
  {devkit.ARCHIVE}     or the folder {devkit.FOLDER}/
  {_ARCHIVES["train"]}         or train/ with class tars or class folders
  {_ARCHIVES["val"]}           or val/ with images or class folders
{_WHERE}

Labels follow the WordNet ids (n01440764 is 0), as in every published model. A class is named by its id and its words:
"n01440764 tench, Tinca tinca". Numbers of images are compared with the development kit; fewer are a warning, and an
error with --on-error stop. The kit's meta.mat is read by SciPy.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the downloaded files are, and which of the two splits to make."""
    parser.description = "Turn the official files of ImageNet-1k (ILSVRC2012) into shards."
    parser.epilog = _EPILOG
    parser.add_argument("--src", type=Path, required=True, metavar="DIR", help="the folder of the downloaded files")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS, help="only these; default: both")


@dataclass
class _Found:
    """What the source holds, as it is met."""

    splits: dict[str, list[Item]] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    outside: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def list_source(arguments: argparse.Namespace) -> Listing:
    """The images of the chosen splits. Raises DataError naming the files that are missing, and where to get them."""
    splits = [split for split in SPLITS if split in arguments.splits]
    places, kit_path = _locate(arguments.src, splits)
    kit = devkit.load(kit_path)
    labels = {wnid: label for label, wnid in enumerate(kit.words)}
    found = _Found()
    for split in splits:
        by_class = _train(places[split], found) if split == "train" else _val(places[split], kit, found)
        _require_classes(places[split], by_class, labels, split)
        _compare_counts(split, by_class, kit, found)
        found.splits[split] = _items(by_class, labels)
    if found.warnings and arguments.on_error == "stop":
        raise DataError(f"{' '.join(found.warnings)} (An error because of --on-error stop.)")
    classes = tuple(f"{wnid} {words}" for wnid, words in kit.words.items())
    return Listing(
        NAME,
        {"splits": " ".join(splits)},
        classes,
        found.splits,
        read_item,
        dict(sorted(found.ignored.items())),
        tuple(found.outside),
        warnings=tuple(found.warnings),
    )


def _locate(source: Path, splits: list[str]) -> tuple[dict[str, Path], Path]:
    """Where each split and the development kit are."""
    if not source.is_dir():
        raise DataError(f"There is no folder {source}.")
    places, missing = {}, []
    for split in splits:
        found = [path for path in (source / _ARCHIVES[split], source / split) if path.exists()]
        if found:
            places[split] = found[0]
        else:
            missing.append(f"{_ARCHIVES[split]} (or the folder {split}/)")
    kit = devkit.find(source)
    if kit is None:
        missing.append(f"{devkit.ARCHIVE} (or the folder {devkit.FOLDER}/)")
    if kit is None or missing:
        raise DataError(
            f"{source} lacks {', '.join(missing)}. {_WHERE}. One split alone: --splits train, --splits val."
        )
    return places, kit


def _train(place: Path, found: _Found) -> dict[str, list[FoundImage]]:
    """The training images by class, from class tars or class folders."""
    folders = _class_folders(place)
    if folders:
        return _from_folders(folders, found)
    tars = class_tars_in(place, found.ignored)
    twice = [wnid for wnid, count in Counter(tar.wnid for tar in tars).items() if count > 1]
    if twice:
        raise DataError(f"{place} holds more than one tar of the class {some(twice)}.")
    by_class = {}
    for images in list_class_tars(tars):
        if images.damage:
            raise DamagedTarError(f"{images.wnid}.tar is damaged: {images.damage} Download it again.")
        by_class[images.wnid] = images.files
        found.ignored.update(images.ignored)
    return by_class


def _val(place: Path, kit: Devkit, found: _Found) -> dict[str, list[FoundImage]]:
    """The validation images by class, from one tar or one folder of images, or from class folders."""
    folders = _class_folders(place)
    if folders:
        return _from_folders(folders, found)
    images = _from_folder(("", place)) if place.is_dir() else images_among("", list_members(place), str(place), "")
    found.ignored.update(images.ignored)
    by_class: dict[str, list[FoundImage]] = {}
    for image in images.files:
        match = _VALIDATION_NAME.fullmatch(_stem(image.name))
        if match is None:
            found.outside.append(image.name)
            continue
        number = int(match[1])
        if not 1 <= number <= len(kit.validation):
            raise DataError(
                f"{place}: {image.name} is image {number}, but the development kit has the classes of "
                f"{len(kit.validation):,}: the two do not belong together."
            )
        by_class.setdefault(kit.validation[number - 1], []).append(image)
    return by_class


def _class_folders(place: Path) -> list[tuple[str, Path]]:
    """(WordNet id, folder) of the folders named by WordNet ids."""
    if not place.is_dir():
        return []
    return [(path.name, path) for path in sorted(place.iterdir()) if WNID.fullmatch(path.name) and path.is_dir()]


def _from_folders(folders: list[tuple[str, Path]], found: _Found) -> dict[str, list[FoundImage]]:
    by_class = {}
    for images in in_threads(_from_folder, folders, "reading class folders"):
        by_class[images.wnid] = images.files
        found.ignored.update(images.ignored)
    return by_class


def _from_folder(folder: tuple[str, Path]) -> ClassImages:
    """The images of one folder, in the order of their names."""
    wnid, path = folder
    files, ignored = [], Counter[str]()
    with os.scandir(path) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if is_image(entry.name) and entry.is_file():
                status = entry.stat()
                name = f"{path.parent.name}/{path.name}/{entry.name}" if wnid else f"{path.name}/{entry.name}"
                files.append(FoundImage(name, status.st_size, status.st_mtime, (entry.path, 0)))
            else:
                ignored[kind_of(entry.name)] += 1
    return ClassImages(wnid, files, ignored, "")


def _require_classes(place: Path, by_class: dict[str, list[FoundImage]], labels: dict[str, int], split: str) -> None:
    strange = sorted(by_class.keys() - labels.keys())
    if strange:
        raise DataError(f"{place} has classes that the development kit has not: {some(strange)}.")
    empty = [wnid for wnid in labels if not by_class.get(wnid)]
    if empty and (split == "train" or len(empty) == len(labels)):
        raise DataError(
            f"{place} has no images of {len(empty):,} of the {len(labels):,} classes: {some(empty)}. Download or "
            "unpack it again; for a part of the classes in folders use the converter imagefolder."
        )


def _compare_counts(split: str, by_class: dict[str, list[FoundImage]], kit: Devkit, found: _Found) -> None:
    expected = kit.train_images if split == "train" else Counter(kit.validation)
    counts = {wnid: len(by_class.get(wnid, [])) for wnid in kit.words}
    different = [
        f"{wnid} ({counts[wnid]:,} of {expected[wnid]:,})" for wnid in counts if counts[wnid] != expected[wnid]
    ]
    if different:
        total, due = sum(counts.values()), sum(expected[wnid] for wnid in counts)
        found.warnings.append(f"{split} has {total:,} images instead of {due:,}: {some(different)}.")


def _items(by_class: dict[str, list[FoundImage]], labels: dict[str, int]) -> list[Item]:
    """Keys are WNID/NAME whatever the source, so that every source gives the same shards."""
    images = [(wnid, image) for wnid in labels for image in by_class.get(wnid, [])]
    keys = unique_keys(f"{wnid}/{_stem(image.name)}" for wnid, image in images)
    return [
        Item(key, image.name, labels[wnid], image.size, image.modified, image.place)
        for key, (wnid, image) in zip(keys, images, strict=True)
    ]


def _stem(name: str) -> str:
    return os.path.splitext(name.rsplit("/", 1)[-1])[0]
