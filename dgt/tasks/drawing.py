"""Pictures of dense targets and answers: class maps and instances over their image, with a legend.

Drawn with Pillow, which timm brings along. Small images are enlarged by a whole number, so that what is written on them
can be read; large ones are shrunk before anything is drawn on them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.targets import rle
from data_pipeline.targets.instances import Instances
from data_pipeline.targets.masks import IGNORED
from data_pipeline.targets.objects import ImageObjects
from dgt.tasks.detections import Detected

Picture = npt.NDArray[np.uint8]
"""(H, W, 3) RGB"""
Colour = tuple[int, int, int]

WHITE, INK, SOFT = (255, 255, 255), (32, 36, 44), (110, 116, 128)
FIRST: Colour = (30, 110, 190)
"""Colour of class 0."""
SMALL = 320
"""An image whose longest side has fewer pixels is enlarged to this or more."""
LONGEST = 640
"""Pixels of the longest side of an image, if nothing else is said."""
LINE = 20
"""Height of a line of the legend, in pixels."""
MARGIN = 10
LEGEND_LINES = 8
"""Most lines of a legend; the classes that do not fit are counted."""
MANY = 40
"""From so many instances on only those have a tag that are as wide as it."""


@dataclass(frozen=True)
class Shape:
    """One instance to be drawn, in pixels of its image."""

    box: tuple[float, float, float, float]
    """Left, top, right, bottom."""
    label: int
    """Class index."""
    score: float | None
    """None of what is annotated."""
    mask: Callable[[], npt.NDArray[np.bool_]] | None
    """Gives (h, w), or None. A function, so that masks of many objects of a large image are not there at once."""
    at: tuple[int, int] = (0, 0)
    """(left, top) of the mask."""


def font(size: float) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own typeface, so that pictures look the same everywhere."""
    return ImageFont.load_default(size)


def colours(count: int) -> npt.NDArray[np.uint8]:
    """(count, 3): distinct colours; that of a class does not depend on how many there are."""
    palette = _palette()
    return palette[np.arange(count) % len(palette)]


@functools.cache
def _palette(count: int = 256) -> npt.NDArray[np.uint8]:
    """(count, 3): each as far as possible from all before it, in CIELAB, where distances are those that people see.

    Neither grey nor glaring, nor so light or dark that it would be lost on white or black.
    """
    levels = np.linspace(0, 255, 22).round()
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _lab(grid)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    colourful = (lab[:, 0] > 40) & (lab[:, 0] < 84) & (chroma > 34) & (chroma < 82)
    grid, lab = grid[colourful], lab[colourful]
    chosen = [int(np.linalg.norm(grid - np.array(FIRST), axis=1).argmin())]
    nearest = np.full(len(lab), np.inf)
    for _ in range(count - 1):
        nearest = np.minimum(nearest, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
        chosen.append(int(nearest.argmax()))
    palette = grid[chosen].astype(np.uint8)
    palette.flags.writeable = False
    return palette


def _lab(rgb: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """CIELAB (D65) of (n, 3) sRGB values from 0 to 255."""
    shares = rgb / 255
    linear = np.where(shares > 0.04045, ((shares + 0.055) / 1.055) ** 2.4, shares / 12.92)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    x, y, z = f.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def class_map(image: Picture, classes: npt.NDArray[np.uint8], names: Sequence[str], longest: int = LONGEST) -> Picture:
    """A map of classes over its image, above a legend with the share of each class's pixels, the largest first.

    Args:
        image: uint8 (H, W, 3).
        classes: uint8 (H, W) class indices; pixels of 255 belong to none and show the image.
        names: of the classes; a class without one goes by its number.
        longest: most pixels of the longest side.
    """
    drawn, _ = fitted(image, longest)
    height, width = drawn.shape[:2]
    scaled = np.asarray(Image.fromarray(classes).resize((width, height), Image.Resampling.NEAREST))
    known = scaled != IGNORED
    grey = np.asarray(Image.fromarray(drawn).convert("L"))[..., None]  # so that colours are those of the legend
    over = np.where(known[..., None], 0.45 * grey + 0.55 * colours(256)[scaled], drawn)
    border = np.zeros((height, width), bool)  # between two classes
    border[:, :-1] |= scaled[:, :-1] != scaled[:, 1:]
    border[:-1] |= scaled[:-1] != scaled[1:]
    over[border] *= 0.55
    counts = np.bincount(classes.ravel(), minlength=256)[:IGNORED]
    total = max(int(counts.sum()), 1)
    present = sorted(np.flatnonzero(counts).tolist(), key=lambda c: (-counts[c], c))
    entries = [(_colour(c), f"{_name(c, names)}  {_percent(counts[c] / total)}") for c in present]
    return with_legend(over.round().astype(np.uint8), entries)


def detections(
    image: Picture, detected: Detected, names: Sequence[str], threshold: float = 0.5, longest: int = LONGEST
) -> Picture:
    """Boxes with class and score, and masks if there are any, of the detections with a score of `threshold` at least.

    The other arguments are those of `class_map`.
    """
    shown = [i for i, score in enumerate(detected.scores.tolist()) if score >= threshold]
    shapes = [
        Shape(
            tuple(detected.boxes[i].tolist()),
            int(detected.labels[i]),
            float(detected.scores[i]),
            None if detected.masks is None else functools.partial(rle.decode, detected.masks[i]),
        )
        for i in shown
    ]
    return _instances(image, shapes, names, longest)


def instances(image: Picture, targets: Instances, names: Sequence[str], longest: int = LONGEST) -> Picture:
    """The objects that a training image teaches; arguments as of `class_map`."""
    masks = targets.masks or [None] * len(targets)
    shapes = [
        Shape(
            tuple(box),
            label,
            None,
            None if mask is None else functools.partial(mask.astype, bool),
            (math.floor(box[0]), math.floor(box[1])),
        )
        for box, label, mask in zip(targets.boxes.tolist(), targets.labels.tolist(), masks, strict=True)
    ]
    return _instances(image, shapes, names, longest)


def objects(image: Picture, truth: ImageObjects, names: Sequence[str], longest: int = LONGEST) -> Picture:
    """What is annotated on an image, without crowds; arguments as of `class_map`."""
    shapes = []
    for thing in truth.objects:
        left, top, width, height = thing.box
        if not thing.crowd:
            box = (left, top, left + width, top + height)
            mask = functools.partial(_covered, thing.segmentation, truth.size) if thing.segmentation else None
            shapes.append(Shape(box, thing.category, None, mask))
    return _instances(image, shapes, names, longest)


def _covered(segmentation: Any, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """The mask, (height, width), of polygons or a run-length encoding."""
    if isinstance(segmentation, dict):
        return rle.decode(segmentation)
    canvas = Image.new("1", (size[1], size[0]))
    draw = ImageDraw.Draw(canvas)
    for polygon in segmentation:  # Pillow's pixels have their centres at whole numbers, COCO's half a pixel further
        draw.polygon([(x - 0.5, y - 0.5) for x, y in zip(polygon[::2], polygon[1::2], strict=True)], fill=1)
    return np.array(canvas)


def _instances(image: Picture, shapes: Sequence[Shape], names: Sequence[str], longest: int) -> Picture:
    """Masks, above them boxes, above them tags; the first shapes uppermost."""
    drawn, scale = fitted(image, longest)
    apart = len(names) == 1  # of a single class, colours tell instances apart
    tints = [_colour(i if apart else shape.label) for i, shape in enumerate(shapes)]
    over = drawn.astype(np.float32)
    for shape, tint in reversed(list(zip(shapes, tints, strict=True))):
        if shape.mask is not None:
            _fill(over, shape, scale, tint)
    picture = Image.fromarray(over.round().astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for shape, tint in reversed(list(zip(shapes, tints, strict=True))):
        left, top, right, bottom = (side * scale for side in shape.box)
        thick = 1 if shape.mask is not None and (len(shapes) > MANY or scale < 1) else 2
        draw.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), outline=tint, width=thick)
    _tag(draw, shapes, tints, names, scale)
    counts = np.bincount([shape.label for shape in shapes], minlength=1)
    present = sorted(np.flatnonzero(counts).tolist(), key=lambda c: (-counts[c], c))
    entries = [(SOFT if apart else _colour(c), f"{_name(c, names)}  {counts[c]}") for c in present]
    return with_legend(np.asarray(picture), entries or [(WHITE, "no objects")])


def _fill(over: npt.NDArray[np.float32], shape: Shape, scale: float, tint: Colour) -> None:
    """Tints what a mask covers of the picture, and paints its outline."""
    assert shape.mask is not None
    mask = shape.mask()
    rows, columns = (
        np.arange(max(0, math.ceil(start * scale)), min(limit, math.ceil((start + size) * scale)))
        for start, size, limit in zip(shape.at[::-1], mask.shape, over.shape[:2], strict=True)
    )
    below, right = mask.shape[0] - 1, mask.shape[1] - 1
    covered = mask[
        np.clip((rows / scale).astype(int) - shape.at[1], 0, below)[:, None],
        np.clip((columns / scale).astype(int) - shape.at[0], 0, right),
    ]
    if not covered.any():
        return
    padded = np.pad(covered, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    region = over[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    region[covered] += 0.45 * (np.array(tint, np.float32) - region[covered])
    region[covered & ~inside] = tint


def _tag(
    draw: ImageDraw.ImageDraw, shapes: Sequence[Shape], tints: Sequence[Colour], names: Sequence[str], scale: float
) -> None:
    """Writes class and score at the boxes' upper left corners, wherever there is room for it."""
    face, height = font(12), 15
    limit_x, limit_y = draw.im.size
    taken: list[tuple[float, float, float, float]] = []
    for shape, tint in zip(shapes, tints, strict=True):
        words = [_name(shape.label, names)] if len(names) != 1 or shape.score is None else []
        text = " ".join(words + ([] if shape.score is None else [f"{shape.score:.2f}"]))
        width = math.ceil(face.getlength(text)) + 6
        left, top, right, _ = (side * scale for side in shape.box)
        if len(shapes) > MANY and right - left < width:
            continue
        left = max(0.0, min(left, limit_x - width))
        for y in (top - height, top):  # above the box, else within
            place = (left, y, left + width, y + height)
            if 0 <= y <= limit_y - height and not any(_meet(place, other) for other in taken):
                taken.append(place)
                draw.rectangle((left, y, left + width - 1, y + height - 1), fill=tint)
                draw.text((left + 3, y + height / 2), text, text_colour(tint), face, anchor="lm")
                break


def _meet(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def text_colour(background: Colour) -> Colour:
    """Of what is written on a colour: the one of dark and white that is further from it."""
    return INK if _lab(np.array([background], float))[0, 0] > 60 else WHITE


def guesses(image: Picture, scores: Sequence[tuple[str, float]], longest: int = LONGEST) -> Picture:
    """An image above its classes, each a name with its probability, the most likely first, as bars."""
    drawn, _ = fitted(image, longest)
    face, width = font(14), max(drawn.shape[1], 240)
    picture = Image.new("RGB", (width + 2 * MARGIN, drawn.shape[0] + 2 * MARGIN + 26 * len(scores) + MARGIN), WHITE)
    picture.paste(Image.fromarray(drawn), (MARGIN, MARGIN))
    draw = ImageDraw.Draw(picture)
    for i, (name, score) in enumerate(scores):
        top = drawn.shape[0] + 2 * MARGIN + 26 * i
        draw.rectangle((MARGIN, top, MARGIN + width - 1, top + 21), fill=(238, 240, 244))
        if round(width * score):
            draw.rectangle((MARGIN, top, MARGIN + round(width * score) - 1, top + 21), fill=(150, 190, 228))
        draw.text((MARGIN + 6, top + 11), _cut(name, face, width - 80), INK, face, anchor="lm")
        draw.text((MARGIN + width - 6, top + 11), _percent(score), INK, face, anchor="rm")
    return np.asarray(picture)


def fitted(image: Picture, longest: int = LONGEST) -> tuple[Picture, float]:
    """The image shrunk to `longest` pixels of the longest side, or enlarged by a whole number to `SMALL` and more; and
    the factor."""
    height, width = image.shape[:2]
    side = max(height, width)
    if side > longest:
        scale = longest / side
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)), scale
    times = max(1, min(math.ceil(SMALL / side), longest // side))
    return image.repeat(times, axis=0).repeat(times, axis=1), float(times)


def with_legend(picture: Picture, entries: Sequence[tuple[Colour, str]]) -> Picture:
    """A picture above coloured squares with what they mean, in columns, on white."""
    face = font(13)
    width = max(picture.shape[1], 200)
    texts = [_cut(text, face, width - LINE) for _, text in entries]
    column = max([math.ceil(face.getlength(text)) for text in texts], default=0) + LINE + MARGIN
    columns = max(1, (width + MARGIN) // column)
    most = columns * LEGEND_LINES
    shown = entries if len(entries) <= most else [*entries[: most - 1], (WHITE, f"and {len(entries) - most + 1} more")]
    lines = math.ceil(len(shown) / columns)
    size = (width + 2 * MARGIN, picture.shape[0] + (3 if lines else 2) * MARGIN + lines * LINE)
    canvas = Image.new("RGB", size, WHITE)
    canvas.paste(Image.fromarray(picture), (MARGIN, MARGIN))
    draw = ImageDraw.Draw(canvas)
    for i, (tint, text) in enumerate(shown):
        x, y = MARGIN + i // lines * column, picture.shape[0] + 2 * MARGIN + i % lines * LINE
        draw.rectangle((x, y + 3, x + 12, y + 15), fill=tint)
        draw.text((x + LINE, y + LINE / 2), _cut(text, face, width - LINE), INK, face, anchor="lm")
    return np.asarray(canvas)


def beside(pictures: Sequence[Picture]) -> Picture:
    """Pictures in a row, at their upper edge, on white."""
    height, width = max(picture.shape[0] for picture in pictures), sum(picture.shape[1] for picture in pictures)
    row = np.full((height, width, 3), 255, np.uint8)
    left = 0
    for picture in pictures:
        row[: picture.shape[0], left : left + picture.shape[1]] = picture
        left += picture.shape[1]
    return row


def _colour(number: int) -> Colour:
    red, green, blue = colours(number + 1)[number].tolist()
    return red, green, blue


def _name(label: int, names: Sequence[str]) -> str:
    return names[label] if label < len(names) else str(label)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1f} %"


def _cut(text: str, face: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: float) -> str:
    """As much of a text as fits."""
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
