"""A contact sheet: samples of a set as training sees them, with their labels, drawn into one picture."""

from __future__ import annotations

import colorsys
import functools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from data_pipeline.config import DataConfig
from data_pipeline.shards.set_index import SetIndex
from data_pipeline.shards.source import DamagedSampleError, DataError, RawSample

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Pixels = npt.NDArray[np.uint8]

_LEAST_CELL = 128
"""Pixels; smaller images are enlarged by a whole factor, so that their captions can be read."""

_DENSE_CELL = 320
_GAP, _FONT_SIZE, _LINE = 8, 13, 17
_BACKGROUND, _INK, _FAINT = (250, 250, 250), (20, 20, 20), (110, 110, 110)
_MASK_OPACITY = 0.55
_INSTANCE_OPACITY = 102  # of 255


@dataclass(frozen=True)
class Sheet:
    """What to show."""

    split: str
    rows: int = 4
    columns: int = 6
    epoch: int = 0
    seed: int = 0
    evaluation: bool = False
    """Show images as evaluation sees them, without augmentation."""


@dataclass(frozen=True)
class Cell:
    """One image of the sheet and what stands below it."""

    pixels: Pixels
    """uint8 (H, W, 3)"""

    caption: tuple[tuple[str, Colour | None], ...]
    """Texts, with the colour that stands for each in the image."""


def draw_samples(config: DataConfig, sheet: Sheet) -> Image.Image:
    """The first images of an epoch in order `global`, as training gets them, with the names of their classes.

    What augment.place leaves to the device is made by the device's operations, here on the CPU.

    Raises DataError where the data cannot be used, ValueError for settings that do not fit together.
    """
    import torch

    from data_pipeline.device_changes import apply_changes
    from data_pipeline.loader import build_loader, open_split

    source = open_split(config, sheet.split)
    count = min(sheet.rows * sheet.columns, len(source))
    source.close()
    config = replace(config, order="global", canonical_nodes=1, prefetch=0)
    train = not sheet.evaluation
    with build_loader(
        config, sheet.split, train=train, global_batch_size=count, rank=0, world_size=1, seed=sheet.seed
    ) as loader:
        loader.set_epoch(sheet.epoch)
        batch = next(iter(loader))
        names = loader.source.class_names
    assert isinstance(batch.images, torch.Tensor)  # lists are for evaluations of dense tasks
    images = apply_changes(batch.images, batch.changes, config) if batch.changes else batch.images
    shown = zip(images.numpy(), batch.labels.tolist(), batch.valid.tolist(), strict=True)
    cells = [Cell(image, ((names[label] if valid else "damaged", None),)) for image, label, valid in shown]
    how = "as evaluation sees it" if sheet.evaluation else f"epoch {sheet.epoch}, seed {sheet.seed}"
    return draw_sheet(cells, sheet.columns, f"{config.path}, {sheet.split}: {how}, {cells[0].pixels.shape[0]} px")


def draw_targets(folder: Path, index: SetIndex, sheet: Sheet, size: int | None) -> Image.Image:
    """Whole images of a set for a dense task, fitted into `size` pixels, with their masks or objects drawn over them.

    Which ones is a function of (seed, epoch). Raises DataError.
    """
    from data_pipeline.shards.reader import open_source

    source = open_source(DataConfig(path=str(folder), num_classes=len(index.classes)), sheet.split, index.kind)
    try:
        draws = np.random.default_rng(np.random.SeedSequence([sheet.seed, sheet.epoch]))
        chosen = draws.choice(len(source), min(sheet.rows * sheet.columns, len(source)), replace=False)
        cells = [_dense_cell(source.read(number), index, size or _DENSE_CELL) for number in chosen.tolist()]
    except DamagedSampleError as error:
        raise DataError(f"{error}. Look for more with `python -m data_pipeline.verify {folder}`") from error
    finally:
        source.close()
    return draw_sheet(cells, sheet.columns, f"{folder}, {sheet.split}: {index.kind}, as stored, seed {sheet.seed}")


def _dense_cell(sample: RawSample, index: SetIndex, size: int) -> Cell:
    from data_pipeline.decode import DecodeError, decode_image
    from data_pipeline.targets import TargetError, target_check

    try:
        pixels = decode_image(sample.image)
        check = target_check(index.kind, len(index.classes), index.targets)
        if check is None or sample.target is None:
            raise TargetError("there is no target")
        target = check(sample.target, pixels.shape[:2])
    except (DecodeError, TargetError) as error:
        raise DamagedSampleError(sample.shard, sample.key, str(error)) from error
    if isinstance(target, np.ndarray):
        drawn, seen = _over_mask(pixels, target, index, size)
    else:
        drawn, seen = _over_objects(pixels, target, index, size)
    names = [(index.classes[number], colour_of(number)) for number in seen]
    return Cell(drawn, ((sample.key, None), *names))


def _over_mask(pixels: Pixels, mask: Pixels, index: SetIndex, size: int) -> tuple[Pixels, list[int]]:
    """Classes in their colours; what is ignored stays dark. And the classes, the largest first."""
    from PIL import Image

    from data_pipeline.targets.masks import IGNORED, MaskLabels, class_table

    labels = MaskLabels.from_json(len(index.classes), index.targets)
    shape = _fitted(pixels.shape[:2], size)
    image = np.asarray(Image.fromarray(pixels).resize(shape, Image.Resampling.BOX))
    classes = class_table(labels)[np.asarray(Image.fromarray(mask).resize(shape, Image.Resampling.NEAREST))]
    table = np.array([colour_of(number) for number in range(256)], np.uint8)
    table[IGNORED] = 0
    counts = np.bincount(class_table(labels)[mask].ravel(), minlength=256)
    counts[IGNORED] = 0
    seen = [number for number in np.argsort(-counts, kind="stable").tolist() if counts[number]]
    return _blended(image, table[classes], _MASK_OPACITY), seen


def _over_objects(pixels: Pixels, found: Any, index: SetIndex, size: int) -> tuple[Pixels, list[int]]:
    """Masks and boxes of objects in the colours of their classes, crowds in white; those too flat to learn from are
    left out. And the classes, by number."""
    from PIL import Image, ImageDraw

    width, height = _fitted(pixels.shape[:2], size)
    scale = width / pixels.shape[1], height / pixels.shape[0]
    picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX)
    shown = [(thing, box) for thing in found.objects if (box := thing.visible_box(found.size)) is not None]
    colours = [(255, 255, 255) if thing.crowd else colour_of(thing.category) for thing, _ in shown]
    for (thing, _), colour in zip(shown, colours, strict=True):
        mask = _instance_mask(thing.segmentation, (width, height), scale)
        if mask is not None:
            picture.paste(Image.new("RGB", picture.size, colour), mask=mask)
    draw = ImageDraw.Draw(picture)
    for (thing, box), colour in zip(shown, colours, strict=True):
        left, top, right, bottom = box[0] * scale[0], box[1] * scale[1], box[2] * scale[0] - 1, box[3] * scale[1] - 1
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=2)
        name = index.classes[thing.category]
        if _width(name) < right - left:  # the colour tells the others
            _label(draw, (left, top), name, colour)
    return np.asarray(picture), sorted({thing.category for thing in found.objects})


def _instance_mask(segmentation: Any, size: tuple[int, int], scale: tuple[float, float]) -> Image.Image | None:
    """Opacity at (width, height) `size`; None for an object without a mask."""
    from PIL import Image, ImageDraw

    from data_pipeline.targets import rle

    if isinstance(segmentation, dict):
        stored = Image.fromarray(rle.decode(segmentation).astype(np.uint8) * _INSTANCE_OPACITY)
        return stored.resize(size, Image.Resampling.NEAREST)
    if not segmentation:
        return None
    mask = Image.new("L", size)
    for points in segmentation:
        scaled = [(x * scale[0], y * scale[1]) for x, y in zip(points[::2], points[1::2], strict=True)]
        ImageDraw.Draw(mask).polygon(scaled, fill=_INSTANCE_OPACITY)
    return mask


def _label(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, colour: Colour) -> None:
    right, bottom = draw.textbbox(place, text, font=_font())[2:]
    draw.rectangle((place[0], place[1], right + 2, bottom + 2), fill=colour)
    draw.text((place[0] + 1, place[1]), text, font=_font(), fill=_readable_on(colour))


def _readable_on(colour: Colour) -> Colour:
    red, green, blue = colour
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


def _fitted(shape: Sequence[int], size: int) -> tuple[int, int]:
    """(width, height) with the longer side `size`, for an image of (height, width)."""
    scale = size / max(shape[0], shape[1])
    return max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale))


def _blended(under: Pixels, over: Pixels, opacity: float) -> Pixels:
    return np.rint(under * (1 - opacity) + over * opacity).astype(np.uint8)


def colour_of(number: int) -> Colour:
    """The colour of a class: hues by the golden ratio, so that neighbours differ, in three strengths by turns."""
    saturation, value = ((0.85, 0.95), (0.55, 0.85), (0.95, 0.65))[number % 3]
    red, green, blue = colorsys.hsv_to_rgb(number * (math.sqrt(5) - 1) / 2 % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_sheet(cells: Sequence[Cell], columns: int, title: str) -> Image.Image:
    """The cells, row by row, with their captions below and a line of `title` above."""
    from PIL import Image, ImageDraw

    columns = min(columns, len(cells))
    largest = max(max(cell.pixels.shape[:2]) for cell in cells)
    enlarged = -(-_LEAST_CELL // largest) if largest < _LEAST_CELL else 1
    width = enlarged * max(cell.pixels.shape[1] for cell in cells)
    height = enlarged * max(cell.pixels.shape[0] for cell in cells)
    lines = [list(_wrapped(cell.caption, width)) for cell in cells]
    step = height + _GAP + _LINE * max(map(len, lines)) + _GAP
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (_GAP + columns * (width + _GAP), _LINE + 2 * _GAP + rows * step), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP), _cut(title, sheet.width - 2 * _GAP), font=_font(), fill=_FAINT)
    for number, (cell, caption) in enumerate(zip(cells, lines, strict=True)):
        left = _GAP + number % columns * (width + _GAP)
        top = _LINE + 2 * _GAP + number // columns * step
        image = Image.fromarray(cell.pixels)
        image = image.resize((image.width * enlarged, image.height * enlarged), Image.Resampling.NEAREST)
        sheet.paste(image, (left + (width - image.width) // 2, top + (height - image.height) // 2))
        for row, line in enumerate(caption):
            _write(draw, line, (left, top + height + _GAP // 2 + row * _LINE))
    return sheet


_Line = list[tuple[str, Colour | None]]
_SWATCH = 14


def _wrapped(caption: Sequence[tuple[str, Colour | None]], width: int, most: int = 3) -> Iterator[_Line]:
    """The caption in at most `most` lines of `width` pixels; what does not fit is counted."""
    pending = [(part, colour) for text, colour in caption for part in ([text] if colour else _broken(text, width))]
    for number in range(most):
        line: _Line = []
        free = float(width)
        while pending:
            text, colour = pending[0]
            more = f"+{len(pending)}"
            needed = _width(text) + (_SWATCH if colour else 0) + _GAP
            last = number == most - 1 and len(pending) > 1
            if line and needed > free - (_width(more) + _GAP if last else 0):
                break
            line.append((_cut(text, int(free) - (_SWATCH if colour else 0)), colour))
            free -= needed
            pending.pop(0)
        if number == most - 1 and pending:
            line.append((f"+{len(pending)}", None))
        if line:
            yield line


def _broken(text: str, width: int) -> list[str]:
    """The text as it is, or in two parts (the first at most `width` pixels wide) where a word or number ends."""
    if _width(text) <= width:
        return [text]
    ends = [match.end() for match in re.finditer(r"[\s,_/-]+", text) if _width(text[: match.end()]) <= width]
    return [text[: ends[-1]], text[ends[-1] :]] if ends else [text]


def _write(draw: ImageDraw.ImageDraw, line: _Line, place: tuple[int, int]) -> None:
    left, top = float(place[0]), place[1]
    for text, colour in line:
        if colour is not None:
            draw.rectangle((left, top + 2, left + _SWATCH - 4, top + _SWATCH - 2), fill=colour, outline=_INK)
            left += _SWATCH
        draw.text((left, top), text, font=_font(), fill=_INK)
        left += _width(text) + _GAP


def _cut(text: str, width: int) -> str:
    """The text, shortened until it is at most `width` pixels wide."""
    if _width(text) <= width:
        return text
    while text and _width(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def _width(text: str) -> float:
    return float(_font().getlength(text))


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, so that sheets look the same everywhere."""
    from PIL import ImageFont

    return ImageFont.load_default(_FONT_SIZE)
