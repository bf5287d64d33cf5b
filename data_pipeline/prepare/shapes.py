"""Drawn shapes with masks or annotated objects: a set for dense tasks that needs no download.

The images are first written into a folder in the layout of ADE20K, or of COCO, and turned into shards from there by the
converter for that layout.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.prepare import coco
from data_pipeline.prepare.folder import json_bytes, locked, require_space, why_not_written, write_if_changed
from data_pipeline.prepare.listing import Listing
from data_pipeline.prepare.mask_folders import Layout, list_mask_folders
from data_pipeline.prepare.options import checked, count
from data_pipeline.prepare.shapes_outlines import border, runs
from data_pipeline.prepare.shapes_scene import CLASSES, OTHER, Object, Pixels, Scene, compose
from data_pipeline.progress import progress_bar
from data_pipeline.shards.files import TEMPORARY_PREFIX
from data_pipeline.shards.source import DataError
from data_pipeline.targets.masks import MaskLabels

NAME = "shapes"
HELP = "drawn shapes for segmentation or detection; nothing to download"

BACKGROUND = "background"
LABELS = MaskLabels(1 + len(CLASSES), first_label=1, ignore=(0,))
"""Of the masks: 0 "other objects", 1 the background, 2 and on the shapes."""

_RECORD = "shapes.json"
_VERSION = 2  # of the drawing: to be raised whenever the same options draw other pixels, masks or annotations
_QUALITY = 95
_SMALLEST, _LARGEST = 64, 1024
_BYTES_PER_PIXEL = 0.7
_MASK_FOLDERS = {"train": "training", "val": "validation"}
_COCO_FOLDERS = {"train": "train2017", "val": "val2017"}

_DESCRIPTION = """\
Draw textured shapes (disc, square, triangle, star, ring, cross) over clouds, and turn them into shards with a mask of
classes (segmentation) or with annotated objects (detection). Pixels and masks before JPEG's compression are a function
of --seed, --size, split and number of the image, the same on every machine."""

_EPILOG = """\
examples:
  python -m data_pipeline.prepare shapes --task segmentation --out data/shapes_segmentation
  python -m data_pipeline.prepare shapes --task detection --out data/shapes_detection --train 1000

Shapes cover one another; what is seen of each is its mask. The shapes of an image have different hues. 20 % (detection)
to 25 % (segmentation) of the images also hold a blob, whose outline says nothing: it has the class of the one shape of
the same hue and texture, its key, which is far away in the image (45 % of the long side and more). 15 to 20 % hold a
crescent, which is of no class, and 6 to 8 % hold nothing at all. Images for segmentation are square, those for
detection of any aspect.

Images, and masks or annotations, are kept in the folder OUT-source: in the layout of ADE20K (images/, annotations/;
training and validation; 0 is "other", the crescents, and is ignored) or of COCO (annotations/instances_train2017.json;
polygons where a line along the pixels' borders tells the mask, else run lengths). It may be deleted when the set is
complete.
"""


@dataclass(frozen=True)
class Recipe:
    """All that the source folder depends on."""

    task: str
    train: int
    val: int
    size: int
    seed: int
    version: int = _VERSION

    @property
    def counts(self) -> dict[str, int]:
        """Images of each split."""
        return {"train": self.train, "val": self.val}

    def scene(self, split: str, number: int) -> Scene:
        """What is in an image."""
        return compose(self.seed, split, number, self.size, varied=self.task == "detection")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How many images of which size, and where they go before they become shards."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument("--task", choices=("segmentation", "detection"), required=True, help="masks, or objects")
    for name, default, metavar, what in (
        ("--train", 4000, "N", "images to train on"),
        ("--val", 200, "N", "images held out"),
        ("--size", 128, "PX", "the images' long side in pixels"),
    ):
        parser.add_argument(
            name, type=checked(count), default=default, metavar=metavar, help=f"{what}; default %(default)s"
        )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default %(default)s")
    parser.add_argument(
        "--source", type=Path, metavar="DIR", help="where images and masks or annotations are kept; default OUT-source"
    )


def list_source(arguments: argparse.Namespace) -> Listing:
    """Draw the source, unless it is there, and list it."""
    recipe = Recipe(arguments.task, arguments.train, arguments.val, arguments.size, arguments.seed)
    if not _SMALLEST <= recipe.size <= _LARGEST:
        raise DataError(f"--size {recipe.size}: give {_SMALLEST} to {_LARGEST} pixels.")
    out: Path = arguments.out
    source: Path = arguments.source or out.with_name(f"{out.name}-source")
    if out.resolve() == source.resolve() or {*out.resolve().parents} & {source.resolve()}:
        raise DataError(f"--out {out} lies inside --source {source}; choose a folder outside of it.")
    if out.resolve() in source.resolve().parents:
        raise DataError(f"--source {source} lies inside --out {out}; choose a folder outside of it.")
    try:
        write_source(recipe, source, alone=arguments.part is None)
    except OSError as error:
        raise DataError(why_not_written(Path(error.filename or source), error)) from error
    listing = _list_masks(source) if recipe.task == "segmentation" else _list_objects(source)
    return replace(listing, converter=NAME, options={name: str(value) for name, value in asdict(recipe).items()})


def _list_masks(source: Path) -> Listing:
    layout = Layout(
        {split: f"images/{folder}" for split, folder in _MASK_FOLDERS.items()},
        {split: f"annotations/{folder}" for split, folder in _MASK_FOLDERS.items()},
    )
    return list_mask_folders(NAME, source, layout, (BACKGROUND, *CLASSES), LABELS, {})


def _list_objects(source: Path) -> Listing:
    parser = argparse.ArgumentParser()
    coco.add_arguments(parser)
    return coco.list_source(parser.parse_args(["--src", str(source)]))


def write_source(recipe: Recipe, source: Path, alone: bool = True) -> None:
    """Write images and targets into `source`, which must be new or this recipe's own; one that is complete is kept.

    Unless `alone`, others may write the same at the same time. Raises DataError where it holds anything else, where
    another run draws it, or where the disk is too small, and OSError.
    """
    if _is_complete(recipe, source):
        return
    total = sum(recipe.counts.values())
    require_space(source, int(total * recipe.size**2 * _BYTES_PER_PIXEL), exact=False)
    source.mkdir(parents=True, exist_ok=True)
    lock = source / f"{TEMPORARY_PREFIX}lock"
    with (
        locked(lock, shared=not alone, whose=f"Another run is drawing {source}"),
        progress_bar("drawing", total) as bar,
    ):
        write_if_changed(source / _RECORD, json_bytes({**asdict(recipe), "complete": False}))
        if alone:
            _remove_unfinished(source, keep=lock)
        for split in recipe.counts:
            if recipe.task == "segmentation":
                _write_masks(recipe, source, split, bar)
            else:
                _write_objects(recipe, source, split, bar)
        write_if_changed(source / _RECORD, json_bytes({**asdict(recipe), "complete": True}))
        if alone:
            lock.unlink(missing_ok=True)


def _is_complete(recipe: Recipe, source: Path) -> bool:
    """Whether the folder holds the whole of it already; raises DataError where it holds something else."""
    names = sorted(path.name for path in source.iterdir()) if source.is_dir() else []
    if not [name for name in names if not name.startswith(TEMPORARY_PREFIX)]:
        return False
    try:
        found = json.loads((source / _RECORD).read_bytes())
        complete = found.pop("complete")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            f"{source} is not empty (it holds {', '.join(names[:3])}) and no source of shapes; choose another --source."
        ) from None
    if found != asdict(recipe):
        raise DataError(
            f"{source} was drawn with other options than these: choose another --source, or delete it first."
        )
    return complete is True


def _write_masks(recipe: Recipe, source: Path, split: str, advance: Callable[[int], None]) -> None:
    folders = [source / part / _MASK_FOLDERS[split] for part in ("images", "annotations")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for number in range(recipe.counts[split]):
        scene = recipe.scene(split, number)
        write_if_changed(folders[0] / f"{number:06d}.jpg", _encoded(scene.pixels, "JPEG"))
        write_if_changed(folders[1] / f"{number:06d}.png", _encoded(mask_of(scene), "PNG"))
        advance(1)


def mask_of(scene: Scene) -> Pixels:
    """The mask of a scene as its file has it: 0 other, 1 background, 2 and on CLASSES; uint8 (height, width)."""
    mask = np.full(scene.pixels.shape[:2], LABELS.first_label, np.uint8)
    for found in scene.objects:
        mask[found.seen] = 0 if found.kind == OTHER else LABELS.first_label + 1 + found.label
    return mask


def _write_objects(recipe: Recipe, source: Path, split: str, advance: Callable[[int], None]) -> None:
    folder = source / _COCO_FOLDERS[split]
    for needed in (folder, source / "annotations"):
        needed.mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(recipe.counts[split]):
        scene = recipe.scene(split, number)
        name = f"{number + 1:012d}.jpg"
        height, width = scene.pixels.shape[:2]
        images.append({"id": number + 1, "file_name": name, "width": width, "height": height})
        annotations += annotations_of(scene, number + 1, len(annotations) + 1)
        write_if_changed(folder / name, _encoded(scene.pixels, "JPEG"))
        advance(1)
    content = {
        "info": {"description": "data_pipeline.prepare shapes", **asdict(recipe)},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": number, "name": name, "supercategory": "shape"} for number, name in enumerate(CLASSES, start=1)
        ],
    }
    path = source / "annotations" / f"instances_{_COCO_FOLDERS[split]}.json"
    write_if_changed(path, (json.dumps(content, separators=(",", ":")) + "\n").encode())


def annotations_of(scene: Scene, image_id: int, first_id: int) -> list[dict[str, Any]]:
    """The objects of a scene in COCO's format; a crescent is of no class and has none.

    A blob's annotation has the id of that of its key beside it, "key".
    """
    ids: dict[int, int] = {}
    for number, found in enumerate(scene.objects):
        if found.kind != OTHER:
            ids[number] = first_id + len(ids)
    return [
        {
            "id": ids[number],
            "image_id": image_id,
            "category_id": found.label + 1,
            **_geometry(found),
            "iscrowd": 0,
            **({} if found.key is None else {"key": ids[found.key]}),
        }
        for number, found in enumerate(scene.objects)
        if number in ids
    ]


def _geometry(found: Object) -> dict[str, Any]:
    """Box, area and segmentation of what is seen of an object."""
    rows, columns = np.flatnonzero(found.seen.any(axis=1)), np.flatnonzero(found.seen.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    line = border(found.seen)
    return {
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "area": int(found.seen.sum()),
        "segmentation": [line] if line else {"size": [*found.seen.shape], "counts": runs(found.seen)},
    }


def _remove_unfinished(source: Path, keep: Path) -> None:
    """Remove what a killed run has left half written."""
    for path in source.rglob(f"{TEMPORARY_PREFIX}*"):
        if path != keep:
            path.unlink(missing_ok=True)


def _encoded(pixels: Pixels, kind: str) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    if kind == "JPEG":  # without it, chroma at half the resolution would smear the patterns
        Image.fromarray(pixels).save(file, kind, quality=_QUALITY, subsampling=0)
    else:
        Image.fromarray(pixels).save(file, kind)
    return file.getvalue()
