"""Pictures drawn with Pillow, which timm brings along: a confusion matrix, a reliability diagram, training samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.targets.instances import Instances
from dgt.tasks import Inputs, drawing
from dgt.tasks.drawing import INK, SOFT, WHITE, font

GRID = (222, 225, 230)
RIGHT, WRONG = (30, 110, 190), (205, 70, 45)
"""Colours of right answers and of wrong ones."""
DOUBTED, CLAIMED = (150, 190, 228), (240, 190, 175)
"""Colours of accuracy above the confidence, and of confidence above the accuracy."""
SIZE = 900
"""Least side of a confusion matrix, in pixels."""
NAMED_CLASSES, NUMBERED_CLASSES = 40, 20
"""Most classes whose names stand at the border, and whose counts stand in the cells."""
SHOWN_IMAGES, SHOWN_DENSE = 16, 4
"""Training images in a picture, of classification and of dense tasks."""
DENSE_SIDE = 512
"""Most pixels of the longest side of each training image of a dense task."""


def mixed(share: np.ndarray, colour: Sequence[int]) -> np.ndarray:
    """(...,) shares in [0, 1] -> (..., 3) float colours between white and `colour`."""
    return 255 + share[..., None] * (np.array(colour, float) - 255)


def confusion(counts: np.ndarray, names: Sequence[str] = ()) -> np.ndarray:
    """Draws (classes, classes) samples by class and guess: uint8 (H, W, 3).

    Rows are scaled to the class's samples: blue on the diagonal, red elsewhere, with square roots, so that rare
    mistakes show. Up to 20 classes have their counts in the cells, up to 40 their names at the border. Where cells
    are smaller than three pixels, a mistake is widened to its neighbours.
    """
    classes = len(counts)
    share = np.sqrt(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
    cell = max(1, SIZE // classes)
    body = np.repeat(np.repeat(cell_colours(share, cell), cell, axis=0), cell, axis=1)
    names = [names[i][:24] if i < len(names) else str(i) for i in range(classes)]
    small = font(max(11, min(18, cell * 0.6)) if classes <= NAMED_CLASSES else 14)
    widest = math.ceil(max(small.getlength(name) for name in names)) if classes <= NAMED_CLASSES else 40
    left, top = widest + 50, 64
    canvas = Image.new("RGB", (left + len(body) + 24, top + len(body) + widest + 60), WHITE)
    canvas.paste(Image.fromarray(body), (left, top))
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((left - 1, top - 1, left + len(body), top + len(body)), outline=SOFT)
    draw.text((left, 12), f"{int(np.trace(counts)):,} of {int(counts.sum()):,} right", INK, font(22))
    draw.text((left, 40), "share of each class: blue right, red wrong (square root)", SOFT, font(14))
    for i in range(0, classes, 1 if classes <= NAMED_CLASSES else nice_step(classes)):
        middle, below = round((i + 0.5) * cell), top + len(body) + 8
        draw.text((left - 8, top + middle), names[i], INK, small, anchor="rm")
        if classes <= NAMED_CLASSES and widest > cell:
            upright(canvas, (left + middle, below), names[i], small)
        else:
            draw.text((left + middle, below), names[i], INK, small, anchor="ma")
    upright(canvas, (16, top + len(body) // 2), "class", font(16), centred=True)
    draw.text((left + len(body) // 2, canvas.height - 12), "first guess", SOFT, font(16), anchor="mb")
    if classes <= NUMBERED_CLASSES:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = WHITE if share[row, column] > 0.6 else INK
                at = (left + (column + 0.5) * cell, top + (row + 0.5) * cell)
                text = f"{int(count)}"
                draw.text(at, text, colour, font(min(20, cell * 0.36, cell * 1.6 / len(text))), anchor="mm")
    return np.asarray(canvas)


def cell_colours(share: np.ndarray, cell: int) -> np.ndarray:
    """(classes, classes) shares -> uint8 (classes, classes, 3), for cells of so many pixels."""
    diagonal = np.eye(len(share), dtype=bool)
    right, wrong = np.where(diagonal, share, 0), np.where(diagonal, 0, share)
    if cell < 3:
        right, wrong = widened(right), widened(wrong)
    faintest = 0.4 if cell < 3 else 0.1
    wrong = np.where(wrong > 0, faintest + (1 - faintest) * wrong, 0)
    blue = (right > 0) & (diagonal | (wrong == 0))
    return np.where(blue[..., None], mixed(right, RIGHT), mixed(wrong, WRONG)).round().astype(np.uint8)


def widened(values: np.ndarray) -> np.ndarray:
    """Each cell of a square matrix takes the largest value of its 3 x 3 neighbourhood."""
    padded = np.pad(values, 1)
    n = len(values)
    return np.max([padded[i : i + n, j : j + n] for i in range(3) for j in range(3)], axis=0)


def nice_step(count: int) -> int:
    """1, 2 or 5 times a power of ten, such that about ten steps make `count`."""
    power = 10 ** math.floor(math.log10(count / 10))
    return next(int(m * power) for m in (1, 2, 5, 10) if m * power * 10 >= count)


def upright(
    canvas: Image.Image, at: tuple[int, int], text: str, face: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    centred: bool = False,
) -> None:  # fmt: skip
    """Writes text that is read from below: its end, or with `centred` its middle, is at `at`, horizontally centred."""
    box = face.getbbox(text)
    width, height = math.ceil(box[2]) + 2, math.ceil(box[3]) + 2
    label = Image.new("RGB", (width, height), WHITE)
    ImageDraw.Draw(label).text((1, 0), text, SOFT if centred else INK, face)
    turned = label.rotate(90, expand=True)
    x, y = at
    canvas.paste(turned, (x - turned.width // 2, y - (turned.height // 2 if centred else 0)))


def reliability(bins: np.ndarray, error: float) -> np.ndarray:
    """Draws a reliability diagram (Guo et al. 2017, figure 1) above the number of samples: uint8 (H, W, 3).

    `bins`: (n, 3) samples, right answers and summed confidence of n equal bins of [0, 1]; `error`: the expected
    calibration error in percent.
    """
    side, low, left, top = 560, 130, 76, 64
    canvas = Image.new("RGB", (left + side + 28, top + side + low + 100), WHITE)
    draw = ImageDraw.Draw(canvas)
    samples, width = bins[:, 0], side / len(bins)
    draw.text((left, 12), f"expected calibration error {error:.2f} %", INK, font(22))
    draw.text((left, 40), "blue: accuracy, pale above the mean confidence; red: confidence above it", SOFT, font(14))
    scale = tick_marks(draw, left, top, side)
    for i, (count, right, confidence) in enumerate(bins):
        if not count:
            continue
        x0, x1 = left + i * width + 1, left + (i + 1) * width - 1
        accuracy, claimed = scale(right / count), scale(confidence / count)
        draw.rectangle((x0, accuracy, x1, top + side), fill=RIGHT)
        gap = (x0, min(accuracy, claimed), x1, max(accuracy, claimed))
        draw.rectangle(
            gap, fill=DOUBTED if accuracy < claimed else CLAIMED, outline=RIGHT if accuracy < claimed else WRONG
        )
    draw.line((left, top + side, left + side, top), SOFT, 2)
    base = top + side + 48 + low
    for i, count in enumerate(samples):
        height = low * count / max(samples.max(), 1)
        draw.rectangle((left + i * width + 1, base - height, left + (i + 1) * width - 1, base), fill=SOFT)
    draw.text((left - 10, base - low), f"{int(samples.max()):,}", INK, font(14), anchor="rm")
    draw.text((left - 10, base), "0", INK, font(14), anchor="rm")
    draw.text((left + side / 2, canvas.height - 10), "confidence of the first guess", INK, font(16), anchor="mb")
    upright(canvas, (18, top + side // 2), "accuracy", font(16), centred=True)
    upright(canvas, (18, base - low // 2), "images", font(16), centred=True)
    return np.asarray(canvas)


def tick_marks(draw: ImageDraw.ImageDraw, left: int, top: int, side: int) -> Callable[[float], float]:
    """Draws the axes of a square from 0 to 1; returns the height in pixels of a value."""
    for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        x, y = left + tick * side, top + (1 - tick) * side
        draw.line((left, y, left + side, y), GRID)
        draw.line((x, top, x, top + side), GRID)
        draw.text((left - 10, y), f"{tick:.1f}", INK, font(14), anchor="rm")
        draw.text((x, top + side + 8), f"{tick:.1f}", INK, font(14), anchor="ma")
    return lambda value: top + (1 - value) * side


def samples(inputs: Inputs, mean: Sequence[float], std: Sequence[float], names: Sequence[str] = ()) -> np.ndarray:
    """Draws images as the network sees them, four in a row, above what they count as: uint8 (H, W, 3).

    `inputs`: normalised by `mean` and `std`; of a mixed image both labels and their shares are written. Targets of a
    dense task are drawn over the images, of which `SHOWN_DENSE` are shown.
    """
    images = inputs.images.detach().float().cpu().permute(0, 2, 3, 1).numpy()
    pixels = ((images * np.array(std) + np.array(mean)).clip(0, 1) * 255).round().astype(np.uint8)
    if inputs.targets:
        return dense_samples(pixels, inputs, names)
    scale = max(1, math.ceil(160 / pixels.shape[1]))
    side, columns, margin, line = pixels.shape[1] * scale, min(4, len(pixels)), 8, 40
    rows = math.ceil(len(pixels) / columns)
    size = (margin + columns * (side + margin), margin + rows * (side + line))
    canvas = Image.new("RGB", size, WHITE)
    draw = ImageDraw.Draw(canvas)
    for i, image in enumerate(pixels):
        x, y = margin + (i % columns) * (side + margin), margin + (i // columns) * (side + line)
        canvas.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (x, y))
        for number, text in enumerate(shares_of(inputs, i, names)):
            draw.text((x, y + side + 2 + 16 * number), text, INK, font(14))
    return np.asarray(canvas)


def dense_samples(pixels: np.ndarray, inputs: Inputs, names: Sequence[str]) -> np.ndarray:
    """Draws targets over the images `pixels`, uint8 (n, H, W, 3), without what they are padded with: one row."""
    drawn = []
    for image, (height, width), target in zip(pixels[:SHOWN_DENSE], inputs.sizes, inputs.targets, strict=False):
        seen = np.ascontiguousarray(image[:height, :width])
        if isinstance(target, Instances):
            drawn.append(drawing.instances(seen, target, names, DENSE_SIDE))
        else:
            drawn.append(drawing.class_map(seen, target[:height, :width], names, DENSE_SIDE))
    return drawing.beside(drawn)


def shares_of(inputs: Inputs, i: int, names: Sequence[str]) -> list[str]:
    """What image `i` counts as, one line per label: its own, and that of the image mixed in."""

    def name(label: int) -> str:
        return (names[label] if label < len(names) else str(label))[:16]

    own, share = name(int(inputs.labels[i])), 1.0 if inputs.share is None else float(inputs.share[i])
    if inputs.partner_labels is None or share == 1:
        return [own]
    return [f"{own}  {share:.2f}", f"{name(int(inputs.partner_labels[i]))}  {1 - share:.2f}"]
