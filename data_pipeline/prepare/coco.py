"""Object detection and instance segmentation in COCO's format: a JSON of annotations per split beside its images.

T.-Y. Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014; cocodataset.org, "Data format".
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_pipeline.prepare.coco_file import PLACE, CocoFile, CocoImage, read_coco_file
from data_pipeline.prepare.listing import Item, Listing, SourceFiles, unique_keys
from data_pipeline.prepare.tar_members import read_member
from data_pipeline.shards.source import DataError
from data_pipeline.targets.objects import EXTENSION, ObjectLabels

NAME = "coco"
HELP = "object detection and instance segmentation in COCO's format (COCO, LVIS, one's own)"

_YEAR = re.compile(r"(?<=[a-z])(19|20)\d\d$")

_EXAMPLES = """\
examples:
  python -m data_pipeline.prepare coco --src COCO --out shards
      COCO/annotations/instances_{train2017,val2017}.json, COCO/{train2017,val2017}/*.jpg; the splits are train and val
  python -m data_pipeline.prepare coco --src nuclei --out shards --splits train val
  python -m data_pipeline.prepare coco --src mine --out shards --splits train val \\
      --annotations '{split}/_annotations.coco.json'

Each image gets a KEY.json with its id, file name, size and annotations (id, bbox, area, iscrowd, segmentation as the
file has them; the category counts from 0, and index.json holds the original ids), so that evaluation can restore the
file. Images without annotations are kept, as in the field.

An image is left out as a whole, and reported with the annotation, where one of its annotations is wrong: an unknown
category, no box of four numbers, a box with a negative side or entirely outside of the image, no area, no or a
malformed segmentation, one outside of the image or without a pixel; or where the image has another size than is stated.
With the faulty annotation alone gone, training would take the object for background. A box that reaches beyond the
image's border, or is flat, is kept as it is, because evaluation counts it so: training cuts the former at the border
and passes over the latter. Ids that occur twice, a file that is listed twice and annotations of unlisted images are
errors, before anything is written.
"""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an item's parts are."""

    json: str
    image: CocoImage
    annotations: bytes
    """Packed coco_file.PLACE entries."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where images and annotations are."""
    parser.description = "Turn images and COCO annotations into shards: KEY.jpg and KEY.json."
    parser.epilog = _EXAMPLES
    parser.add_argument("--src", type=Path, required=True, metavar="DIR", help="the folder that holds both")
    parser.add_argument(
        "--splits",
        nargs="+",
        default=["train2017", "val2017"],
        metavar="NAME",
        help="default: train2017 val2017; a year at the end is dropped from the name that the split gets",
    )
    parser.add_argument(
        "--annotations",
        default="annotations/instances_{split}.json",
        metavar="PATH",
        help="the annotations of a split in DIR; default annotations/instances_{split}.json",
    )
    parser.add_argument("--images", default="{split}", metavar="PATH", help="its folder of images; default {split}")
    parser.add_argument(
        "--boxes-only", action="store_true", help="leave segmentations out; without it every object must have one"
    )


def list_source(arguments: argparse.Namespace) -> Listing:
    """The annotation files that the arguments name."""
    source: Path = arguments.src
    names = {split: _YEAR.sub("", split) for split in arguments.splits}
    for split, name in names.items():
        if name != Path(name).name or name.startswith("."):
            raise DataError(f"'{split}' is no name of a split: give plain names.")
    if len(set(names.values())) != len(arguments.splits):
        raise DataError(f"--splits {' '.join(arguments.splits)}: two of them would get the same name.")
    splits: dict[str, list[Item]] = {}
    categories: dict[int, str] = {}
    for split, name in names.items():
        path = source / arguments.annotations.replace("{split}", split)
        if not path.is_file():
            raise DataError(f"There is no {path}; name the splits with --splits, and the file with --annotations.")
        content = read_coco_file(path)
        if splits and content.categories != categories:
            raise DataError(f"{path} has other categories than the split '{arguments.splits[0]}'.")
        categories = content.categories
        splits[name] = _items(source, arguments.images.replace("{split}", split), path, content)
    labels = ObjectLabels(tuple(categories), masks=not arguments.boxes_only)
    options = {name: str(getattr(arguments, name)) for name in ("annotations", "images", "splits", "boxes_only")}
    return Listing(
        NAME,
        options,
        tuple(categories.values()),
        splits,
        functools.partial(read_annotated, source, labels),
        kind="detection",
        target_extension=EXTENSION,
        targets=labels.to_json(),
    )


def _items(source: Path, folder: str, path: Path, content: CocoFile) -> list[Item]:
    if not (source / folder).is_dir():
        raise DataError(f"There is no folder {source / folder} with the images of {path}; name it with --images.")
    if not content.images:
        raise DataError(f"{path} lists no images.")
    _require_different(path, content.images)
    for image in content.images:
        _require_inside(path, image)
    found = _sizes_and_times(source, folder, content.images)
    if not any(size for size, _ in found):
        raise DataError(f"{source / folder} holds none of the images of {path}, such as {content.images[0].file_name}.")
    changed = path.stat().st_mtime
    keys = unique_keys(str(PurePosixPath(image.file_name).with_suffix("")) for image in content.images)
    return [
        Item(
            key,
            os.path.join(folder, image.file_name),
            -1,
            size,
            max(modified, changed),
            _Place(str(path), image, content.places.get(image.id, b"")),
        )
        for key, image, (size, modified) in zip(keys, content.images, found, strict=True)
    ]


def _require_different(path: Path, images: list[CocoImage]) -> None:
    """An image that is listed twice would be counted twice, and be found without what is annotated for the other."""
    ids: dict[PurePosixPath, int] = {}
    for image in images:
        earlier = ids.setdefault(PurePosixPath(image.file_name), image.id)
        if earlier != image.id:
            raise DataError(
                f"{path}: the images {earlier} and {image.id} are both the file {image.file_name!r}. Give all of its "
                "annotations to one of them, and remove the other."
            )


def _require_inside(path: Path, image: CocoImage) -> None:
    name = PurePosixPath(image.file_name)
    if name.is_absolute() or ".." in name.parts or not name.name:
        raise DataError(f"{path}: the file name {image.file_name!r} of image {image.id} leads out of the folder.")


def _sizes_and_times(source: Path, folder: str, images: list[CocoImage]) -> list[tuple[int, float]]:
    """(bytes, time) of each image's file; zeros where it is missing, which is reported when it is to be read."""
    result = []
    for image in images:
        try:
            status = os.stat(os.path.join(source, folder, image.file_name))
            result.append((status.st_size, status.st_mtime))
        except OSError:
            result.append((0, 0.0))
    return result


def read_annotated(source: Path, labels: ObjectLabels, item: Item) -> SourceFiles:
    """An image and its annotations as they go into a shard (data_pipeline.targets.objects), not yet checked.

    Raises ValueError for an unknown category, and where the annotation file is not what it was when it was listed.
    """
    place: _Place = item.place
    index = {number: category for category, number in enumerate(labels.category_ids)}
    content: dict[str, Any] = {
        "image_id": place.image.id,
        "file_name": place.image.file_name,
        "width": place.image.width,
        "height": place.image.height,
        "annotations": [_entry(annotation, index, labels.masks) for annotation in _read_annotations(place)],
    }
    target = json.dumps(content, separators=(",", ":")).encode()
    return SourceFiles((source / item.name).read_bytes(), target)


def _read_annotations(place: _Place) -> list[dict[str, Any]]:
    changed = f"{place.json} was changed while it was in use; run the same command again"
    try:
        places = np.frombuffer(place.annotations, PLACE).tolist()
        annotations = [json.loads(read_member(place.json, offset, size)) for offset, size in places]
    except ValueError as error:
        raise ValueError(changed) from error
    for annotation in annotations:
        if not isinstance(annotation, dict) or annotation.get("image_id") != place.image.id or "id" not in annotation:
            raise ValueError(changed)
    return annotations


def _entry(annotation: dict[str, Any], index: dict[int, int], masks: bool) -> dict[str, Any]:
    category = annotation.get("category_id")
    if type(category) is not int or category not in index:
        raise ValueError(f"annotation {annotation['id']}: its category {category!r} is none that the file lists")
    kept: dict[str, Any] = {name: annotation[name] for name in ("bbox", "area", "iscrowd") if name in annotation}
    entry: dict[str, Any] = {"id": annotation["id"], "category": index[category], **kept}
    return {**entry, "segmentation": annotation.get("segmentation")} if masks else entry
