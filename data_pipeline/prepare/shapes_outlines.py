"""Outlines in whole numbers: made, turned, filled, and read back from a mask, without a rounding that could differ.

A contour is an int64 array (points, 2) of x, y; an outline is a tuple of contours, filled by the even-odd rule: a
second contour within the first is a hole. Drawn outlines are in units of 1/64 pixel; the centre of pixel (row, column)
lies at (64 column + 32, 64 row + 32).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Contour = npt.NDArray[np.int64]
Outline = tuple[Contour, ...]

UNIT = 64
"""Steps of a pixel."""

TURN = 240
"""Steps of a full turn."""

RADIUS = 1024
"""Of the circle around an outline before it is scaled."""

_ONE = 1 << 16  # of sines and cosines


@functools.lru_cache(maxsize=1)
def _cosines() -> npt.NDArray[np.int64]:
    return np.array([round(_ONE * math.cos(2 * math.pi * step / TURN)) for step in range(TURN)], np.int64)


def wave(step: int, height: int) -> int:
    """`height` times the cosine of so many steps of a turn, rounded down."""
    return int(_cosines()[step % TURN]) * height // _ONE


def around(radii: Sequence[int]) -> Contour:
    """Points at these distances from the centre, in equal steps (that divide TURN) around it, the first upwards."""
    angles = np.arange(len(radii)) * (TURN // len(radii)) + (TURN * 3 // 4)
    table, lengths = _cosines(), np.array(radii, np.int64)
    x = (table[angles % TURN] * lengths) // _ONE
    y = (table[(angles - TURN // 4) % TURN] * lengths) // _ONE
    return np.stack((x, y), axis=1)


def polygon(*points: tuple[int, int]) -> Contour:
    """A contour from its points."""
    return np.array(points, np.int64)


def placed(outline: Outline, centre: tuple[int, int], radius: int, stretch: int, turn: int) -> Outline:
    """An outline scaled to `radius` (1/64 pixels), stretched to `stretch` percent of its width, turned by `turn` steps
    and moved to `centre` (x, y)."""
    cosine, sine = int(_cosines()[turn % TURN]), int(_cosines()[(turn - TURN // 4) % TURN])
    result = []
    for contour in outline:
        x, y = contour[:, 0] * stretch // 100, contour[:, 1]
        turned = np.stack((x * cosine - y * sine, x * sine + y * cosine), axis=1)
        result.append(turned * radius // (RADIUS * _ONE) + np.array(centre, np.int64))
    return tuple(result)


def filled(outline: Outline, height: int, width: int) -> npt.NDArray[np.bool_]:
    """Which pixels have their centre within the outline, bool (height, width)."""
    starts = np.concatenate(outline)
    ends = np.concatenate([np.roll(contour, -1, axis=0) for contour in outline])
    downwards = (starts[:, 1] <= ends[:, 1])[:, None]
    top, bottom = np.where(downwards, starts, ends), np.where(downwards, ends, starts)
    rows: npt.NDArray[np.int64] = np.arange(height, dtype=np.int64) * UNIT + UNIT // 2
    edges, lines = np.nonzero((top[:, 1, None] <= rows) & (rows < bottom[:, 1, None]))
    rise = bottom[edges, 1] - top[edges, 1]
    # 64 columns + 32 > x of the crossing, from this column on
    across = (top[edges, 0] - UNIT // 2) * rise + (rows[lines] - top[edges, 1]) * (bottom[edges, 0] - top[edges, 0])
    columns = np.clip(across // (UNIT * rise) + 1, 0, width)
    crossings = np.zeros((height, width + 1), np.int64)
    np.add.at(crossings, (lines, columns), 1)
    return (np.cumsum(crossings, axis=1) % 2 == 1)[:, :width]


def border(mask: npt.NDArray[np.bool_]) -> list[int] | None:
    """The line around a mask along the pixels' edges, as x, y, x, y, ...; None where one line does not tell it: it has
    holes, several parts, or parts that touch at a corner."""
    padded = np.pad(mask, 1).astype(np.int8)
    corners: dict[tuple[int, int], tuple[int, int]] = {}  # each corner's next, with the mask on the right
    for horizontal, step in (
        (True, padded[1:, 1:-1] - padded[:-1, 1:-1]),
        (False, padded[1:-1, 1:] - padded[1:-1, :-1]),
    ):
        for row, column in np.argwhere(step).tolist():
            ends = ((column, row), (column + 1, row) if horizontal else (column, row + 1))
            start, end = ends if (step[row, column] > 0) == horizontal else ends[::-1]
            if start in corners:
                return None
            corners[start] = end
    if not corners:
        return None
    first = min(corners)
    line, corner, seen = [], first, 0
    while not seen or corner != first:
        before, corner, seen = corner, corners[corner], seen + 1
        following = corners[corner]
        if (corner[0] == before[0]) != (following[0] == corner[0]):  # it turns here
            line += [*corner]
    return line if seen == len(corners) else None


def runs(mask: npt.NDArray[np.bool_]) -> list[int]:
    """COCO's run lengths of a mask: of zeros and ones by turns, down the columns, zeros first."""
    values = mask.T.ravel()
    changes = np.flatnonzero(values[1:] != values[:-1]) + 1
    lengths = np.diff(np.concatenate(([0], changes, [values.size])))
    return ([0] if values[0] else []) + [int(length) for length in lengths]
