"""What is to be seen in an image of the set `shapes`, and its pixels.

All of it is arithmetic with whole numbers on the raw output of Philox, a generator whose stream is fixed for ever, so
that pixels and masks are the same on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from data_pipeline.prepare.shapes_outlines import (
    RADIUS,
    TURN,
    UNIT,
    Contour,
    Outline,
    around,
    filled,
    placed,
    polygon,
    wave,
)

CLASSES = ("disc", "square", "triangle", "star", "ring", "cross")
BLOB, OTHER = -1, -2
"""Kinds beside the classes: a blob, whose class its key decides, and a crescent, which is of no class."""

_EMPTY_PERCENT, _BLOB_PERCENT, _OTHER_PERCENT = 6, 25, 20
_SHAPES = (2, 4)  # least and most
_RADIUS_PERCENT, _BLOB_RADIUS_PERCENT = (14, 26), (9, 15)  # of the long side
_FAR_PERCENT = 45  # of the long side, from a blob's centre to its key's
_SEEN_PERCENT = 60  # of an object's pixels in the image that others may not cover
_LEAST_PIXELS = 40
_TRIES = 12
_HUES = 8
_T = TypeVar("_T")
Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


class Draws:
    """Random whole numbers: a function of seed, split and number of the image alone."""

    def __init__(self, seed: int, split: str, number: int) -> None:
        key = hashlib.sha256(f"shapes {seed} {split} {number}".encode()).digest()[:16]
        self._bits = np.random.Philox(key=np.frombuffer(key, "<u8"))

    def many(self, below: int, count: int) -> npt.NDArray[np.int64]:
        """`count` numbers from 0 to `below` - 1, int64."""
        raw: npt.NDArray[np.uint64] = np.asarray(self._bits.random_raw(count))
        return ((raw >> np.uint64(40)).astype(np.int64) * below) >> 24

    def between(self, low: int, high: int) -> int:
        """A number from `low` to `high`, both included."""
        return low + int(self.many(high - low + 1, 1)[0])

    def chance(self, percent: int) -> bool:
        """True so often."""
        return self.between(0, 99) < percent

    def shuffled(self, values: Sequence[_T]) -> list[_T]:
        """The values in any order (Fisher and Yates)."""
        result = list(values)
        for last in range(len(result) - 1, 0, -1):
            other = self.between(0, last)
            result[last], result[other] = result[other], result[last]
        return result


@dataclass(frozen=True)
class Texture:
    """How a surface is painted: one colour, and a darker one in a pattern."""

    light: tuple[int, int, int]
    dark: tuple[int, int, int]
    pattern: int
    """0 stripes, 1 checks, 2 dots, 3 plain."""
    period: int
    direction: int


@dataclass(frozen=True)
class Object:
    """One object as it is seen."""

    kind: int
    """Index in CLASSES, BLOB or OTHER."""

    label: int
    """Class index; of a blob, that of its key; -1 where it has none."""

    key: int | None
    """Of a blob: which of the scene's objects decides its class."""

    whole: Mask
    """Its pixels in the image, (height, width), those that other objects cover among them."""

    seen: Mask
    """Its pixels that nothing covers."""

    depth: int
    """Objects of larger depth are drawn first."""

    texture: Texture
    centre: tuple[int, int]
    """x, y in 1/64 pixels."""


@dataclass(frozen=True)
class Scene:
    """An image and what is in it."""

    pixels: Pixels
    """(height, width, 3)"""

    objects: tuple[Object, ...]


@dataclass(frozen=True)
class _Plan:
    """An object that is still to be placed."""

    kind: int
    label: int
    key: int | None
    """Position of its key in the list of plans."""
    texture: Texture


def compose(seed: int, split: str, number: int, size: int, varied: bool) -> Scene:
    """The scene of an image with a long side of `size` pixels: a square, or `varied`, of any aspect up to 16 to 9."""
    draws = Draws(seed, split, number)
    height, width = _sides(draws, size, varied)
    pixels = _background(draws, height, width)
    objects = () if draws.chance(_EMPTY_PERCENT) else _place_all(draws, _plans(draws), height, width)
    for found in sorted(objects, key=lambda found: -found.depth):
        pixels[found.seen] = _painted(found.texture, height, width)[found.seen]
    grain = draws.many(17, height * width).reshape(height, width, 1) - 8
    return Scene(np.clip(pixels + grain, 0, 255).astype(np.uint8), objects)


def _sides(draws: Draws, size: int, varied: bool) -> tuple[int, int]:
    if not varied:
        return size, size
    short = draws.between(size * 9 // 16, size)
    return (short, size) if draws.chance(60) else (size, short)


def _plans(draws: Draws) -> list[_Plan]:
    """Shapes of different hues, one blob of the hue and texture of one of them, one crescent of its own hue."""
    hues = draws.shuffled(range(_HUES))
    plans = []
    for hue in hues[: draws.between(*_SHAPES)]:
        label = draws.between(0, len(CLASSES) - 1)
        plans.append(_Plan(label, label, None, _texture(draws, hue)))
    if draws.chance(_BLOB_PERCENT):
        key = draws.between(0, len(plans) - 1)
        plans.append(_Plan(BLOB, plans[key].label, key, plans[key].texture))
    if draws.chance(_OTHER_PERCENT):
        plans.append(_Plan(OTHER, -1, None, _texture(draws, hues[-1])))
    return plans


def _place_all(draws: Draws, plans: list[_Plan], height: int, width: int) -> tuple[Object, ...]:
    """Place what finds room; a blob without a key is left out."""
    depths = draws.shuffled(range(len(plans)))
    found: dict[int, Object] = {}
    for position, plan in enumerate(plans):
        if plan.key is not None and plan.key not in found:
            continue
        for _ in range(_TRIES):
            centre, whole = _anywhere(draws, plan.kind, height, width)
            if plan.key is not None and not _is_far(centre, found[plan.key].centre, max(height, width)):
                continue
            added = Object(plan.kind, plan.label, plan.key, whole, whole, depths[position], plan.texture, centre)
            seen = _seen({**found, position: added})
            if all(_enough(entry) for entry in seen.values()):
                found = seen
                break
    numbers = {position: number for number, position in enumerate(found)}
    return tuple(replace(entry, key=None if entry.key is None else numbers[entry.key]) for entry in found.values())


def _is_far(one: tuple[int, int], other: tuple[int, int], side: int) -> bool:
    squared = (one[0] - other[0]) ** 2 + (one[1] - other[1]) ** 2
    return squared * 100**2 >= (side * UNIT * _FAR_PERCENT) ** 2


def _enough(entry: Object) -> bool:
    seen, whole = int(entry.seen.sum()), int(entry.whole.sum())
    return seen >= _LEAST_PIXELS and seen * 100 >= whole * _SEEN_PERCENT


def _seen(objects: dict[int, Object]) -> dict[int, Object]:
    """The objects with what is seen of each, nearer ones covering those of larger depth."""
    covered = np.zeros(next(iter(objects.values())).whole.shape, np.bool_)
    result = dict(objects)
    for position, entry in sorted(objects.items(), key=lambda item: item[1].depth):
        result[position] = replace(entry, seen=entry.whole & ~covered)
        covered = covered | entry.whole
    return result


def _anywhere(draws: Draws, kind: int, height: int, width: int) -> tuple[tuple[int, int], Mask]:
    """A centre and the pixels of an outline there, of any size, stretch and turn; the border may cut it."""
    side = max(height, width) * UNIT
    least, most = _BLOB_RADIUS_PERCENT if kind == BLOB else _RADIUS_PERCENT
    radius = draws.between(side * least // 100, side * most // 100)
    inset = radius // 2
    centre = (
        draws.between(inset, width * UNIT - inset),
        draws.between(inset, height * UNIT - inset),
    )
    stretch, turn = draws.between(75, 100), draws.between(0, TURN - 1)
    return centre, filled(placed(_outline(draws, kind), centre, radius, stretch, turn), height, width)


def _outline(draws: Draws, kind: int) -> Outline:
    """An outline about the origin, within a circle of RADIUS."""
    if kind == BLOB:
        return (_blob(draws),)
    if kind == OTHER:
        hollow: Contour = around([RADIUS * 7 // 10] * _POINTS) + np.array([RADIUS * 28 // 100, 0], np.int64)
        return (around([RADIUS] * _POINTS), hollow)
    return _OUTLINES[CLASSES[kind]]


def _blob(draws: Draws) -> Contour:
    """A line around the origin with two and three swellings."""
    first, second = draws.between(0, TURN - 1), draws.between(0, TURN - 1)
    twofold, threefold = RADIUS * draws.between(0, 14) // 100, RADIUS * draws.between(10, 18) // 100
    radii = []
    for point in range(_POINTS):
        angle = point * (TURN // _POINTS)
        radii.append(RADIUS * 66 // 100 + wave(2 * angle + first, twofold) + wave(3 * angle + second, threefold))
    return around(radii)


def _corners(*percent: tuple[int, int]) -> Contour:
    return polygon(*((RADIUS * x // 100, RADIUS * y // 100) for x, y in percent))


_POINTS = 60  # of round contours
_CROSS = ((-30, -100), (30, -100), (30, -30), (100, -30), (100, 30), (30, 30))
_OUTLINES: dict[str, Outline] = {
    "disc": (around([RADIUS * 9 // 10] * _POINTS),),
    "square": (_corners((-80, -80), (80, -80), (80, 80), (-80, 80)),),
    "triangle": (_corners((0, -100), (87, 50), (-87, 50)),),
    "star": (around([RADIUS, RADIUS * 45 // 100] * 5),),
    "ring": (around([RADIUS] * _POINTS), around([RADIUS // 2] * _POINTS)),
    "cross": (_corners(*_CROSS, *((-x, -y) for x, y in _CROSS)),),
}


def _texture(draws: Draws, hue: int) -> Texture:
    """A bright colour of one of the hues, and the same one darker, in any pattern."""
    value, saturation = draws.between(60, 95), draws.between(65, 95)
    return Texture(
        _colour(hue * 6 * 256 // _HUES, saturation, value),
        _colour(hue * 6 * 256 // _HUES, saturation, value * 6 // 10),
        draws.between(0, 3),
        draws.between(3, 6),
        draws.between(0, 3),
    )


def _colour(hue: int, saturation: int, value: int) -> tuple[int, int, int]:
    """Red, green and blue (0 to 255) of a hue (1,536 to a turn), a saturation and a value in percent."""

    def channel(offset: int) -> int:
        away = (hue + offset) % 1536
        share = min(256, max(0, abs(away - 768) - 256))  # 256 where the hue has this channel in full
        return 255 * value * (100 * 256 - saturation * (256 - share)) // (100 * 100 * 256)

    return channel(0), channel(1024), channel(512)


def _painted(texture: Texture, height: int, width: int) -> npt.NDArray[np.int64]:
    """A texture that fills the image, (height, width, 3)."""
    y, x = np.mgrid[:height, :width].astype(np.int64)
    period, (down, across) = texture.period, ((0, 1), (1, 0), (1, 1), (1, -1))[texture.direction]
    dark = {
        0: (x * across + y * down) // period % 2 == 1,
        1: (x // period + y // period) % 2 == 1,
        2: (2 * (x % period) - period + 1) ** 2 + (2 * (y % period) - period + 1) ** 2 <= period**2 // 2,
        3: np.zeros((height, width), np.bool_),
    }[texture.pattern]
    return np.where(dark[..., None], np.array(texture.dark, np.int64), np.array(texture.light, np.int64))


def _background(draws: Draws, height: int, width: int) -> npt.NDArray[np.int64]:
    """Two dull colours in clouds, (height, width, 3)."""
    clouds = np.zeros((height, width), np.int64)
    for cell, weight in ((32, 4), (16, 2), (8, 1)):
        clouds += weight * _waves(draws, height, width, cell)
    one, other = (
        np.array(_colour(draws.between(0, 1535), draws.between(0, 25), value), np.int64)
        for value in (draws.between(25, 50), draws.between(50, 90))
    )
    return one + (other - one) * (clouds // 7)[..., None] // 255


def _waves(draws: Draws, height: int, width: int, cell: int) -> npt.NDArray[np.int64]:
    """Values from 0 to 255 that change from one random value to the next within `cell` pixels, (height, width)."""
    rows, columns = height // cell + 2, width // cell + 2
    grid = draws.many(256, rows * columns).reshape(rows, columns)
    (row, down), (column, right) = (divmod(np.arange(side, dtype=np.int64), cell) for side in (height, width))
    down, right = down[:, None], right[None, :]
    upper = grid[row][:, column] * (cell - right) + grid[row][:, column + 1] * right
    lower = grid[row + 1][:, column] * (cell - right) + grid[row + 1][:, column + 1] * right
    return np.asarray((upper * (cell - down) + lower * down) // cell**2)
