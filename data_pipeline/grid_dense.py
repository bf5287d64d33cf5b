"""A contact sheet of a set for a dense task as training sees it: crops and canvases with their masks or objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from data_pipeline.config import DataConfig, Kind
from data_pipeline.grid import Cell, Pixels, Sheet, colour_of, draw_sheet
from data_pipeline.targets.instances import Instances
from data_pipeline.targets.masks import IGNORED

if TYPE_CHECKING:
    from PIL import Image

_OPACITY = 0.55


def draw_training(config: DataConfig, kind: str, sheet: Sheet) -> Image.Image:
    """The first global batch of an epoch, of as many images as the sheet has places, with what each is to teach.

    Classes and objects have the colours of their classes, padding and ignored pixels of masks are dark. Raises
    DataError where the data cannot be used, ValueError for settings that do not fit together.
    """
    from data_pipeline.loader import Loader, open_split
    from data_pipeline.order import Batching

    config = replace(config, order="global", canonical_nodes=1, prefetch=0)
    task = cast(Kind, kind)
    source = open_split(config, sheet.split, task)
    batching = Batching(max(1, min(sheet.rows * sheet.columns, len(source))))
    with Loader(source, config, batching, train=True, seed=sheet.seed, kind=task) as loader:
        loader.set_epoch(sheet.epoch)
        batch = next(iter(loader))
    cells = []
    for number, image, target in zip(batch.ids.tolist(), batch.images, batch.targets, strict=True):
        draw = _with_objects if isinstance(target, Instances) else _with_classes
        pixels, seen = draw(image.numpy(), target)
        cells.append(Cell(pixels, ((f"sample {number}", None), *((source.class_names[n], colour_of(n)) for n in seen))))
    height, width = cells[0].pixels.shape[:2]
    title = f"{config.path}, {sheet.split}: {kind}, epoch {sheet.epoch}, seed {sheet.seed}, {width}x{height} px"
    return draw_sheet(cells, sheet.columns, title)


def _with_classes(image: Pixels, classes: Pixels) -> tuple[Pixels, Sequence[int]]:
    """The image under its classes' colours; and the classes in it, the largest first."""
    table = np.array([colour_of(number) for number in range(256)], np.uint8)
    table[IGNORED] = 0
    counts = np.bincount(classes.ravel(), minlength=256)[:IGNORED]
    seen = [number for number in np.argsort(-counts, kind="stable").tolist() if counts[number]]
    return _blended(image, table[classes]), seen


def _with_objects(image: Pixels, objects: Instances) -> tuple[Pixels, Sequence[int]]:
    """The image with masks laid over it and boxes around them; and the classes of the objects."""
    from PIL import Image, ImageDraw

    drawn = image.copy()
    colours = [colour_of(label) for label in objects.labels.tolist()]
    for box, mask, colour in zip(objects.boxes, objects.masks or (), colours, strict=False):
        left, top = np.floor(box[:2]).astype(int).tolist()
        part = drawn[top : top + mask.shape[0], left : left + mask.shape[1]]
        part[mask == 1] = _blended(part, np.broadcast_to(np.array(colour, np.uint8), part.shape))[mask == 1]
    picture = Image.fromarray(drawn)
    for (left, top, right, bottom), colour in zip(objects.boxes.tolist(), colours, strict=True):
        corners = (left, top, max(left, right - 1), max(top, bottom - 1))
        ImageDraw.Draw(picture).rectangle(corners, outline=colour)
    return np.asarray(picture), sorted(set(objects.labels.tolist()))


def _blended(under: Pixels, over: npt.NDArray[np.uint8]) -> Pixels:
    return np.rint(under * (1 - _OPACITY) + over * _OPACITY).astype(np.uint8)
