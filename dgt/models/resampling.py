"""Pooling and enlarging of maps as products with two small matrices, one along each axis.

The functions of torch that do the same (`adaptive_avg_pool2d` and `interpolate`) have no backward pass on CUDA devices
that repeats bit for bit: `torch.use_deterministic_algorithms` refuses the one and replaces the other. A matrix product
repeats everywhere. Everything is computed in float32 (float64 for a float64 map), under autocast too.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def float32_arithmetic(x: Tensor) -> AbstractContextManager[Any]:
    """Context in which autocast changes nothing on the device of `x`."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def averaging(cells: int, size: int, like: Tensor) -> Tensor:
    """(cells, size) matrix that averages `size` places into cells, as torch's adaptive average pooling cuts them.

    Cell i takes the places from floor(i size / cells) to ceil((i + 1) size / cells), so that neighbours may share one.
    """
    cell = torch.arange(cells, device=like.device)[:, None]
    place = torch.arange(size, device=like.device)
    first, end = cell * size // cells, ((cell + 1) * size + cells - 1) // cells
    return ((place >= first) & (place < end)).to(like.dtype) / (end - first)


def interpolation(places: int, cells: int, step: float, like: Tensor) -> Tensor:
    """(places, cells) matrix that interpolates linearly between the centres of cells.

    Args:
        places: how many places the result has; the centre of place i lies (i + 1/2) * `step` cells from the start.
        cells: how many cells there are; before the first centre and after the last the value stays what it is there.
        step: width of a place in cells; cells / places is what torch calls `align_corners=False`.
        like: lends device and dtype.
    """
    centre = (torch.arange(places, device=like.device, dtype=torch.float64) + 0.5) * step - 0.5
    distance = centre.clamp(0, cells - 1)[:, None] - torch.arange(cells, device=like.device)
    return (1 - distance.abs()).clamp(min=0).to(like.dtype)


def pool(x: Tensor, cells: int) -> Tensor:
    """(n, C, H, W) -> (n, C, cells, cells) in the dtype of `x`: the means that `adaptive_avg_pool2d` takes."""
    height, width = x.shape[-2:]
    with float32_arithmetic(x):
        precise = _precise(x)
        means = _along_both(precise, averaging(cells, height, precise), averaging(cells, width, precise))
        return means.to(x.dtype)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, C, h, w) -> (n, C, *size) in the dtype of `x`: bilinear, as `interpolate` without `align_corners`."""
    height, width = x.shape[-2:]
    with float32_arithmetic(x):
        precise = _precise(x)
        rows = interpolation(size[0], height, height / size[0], precise)
        columns = interpolation(size[1], width, width / size[1], precise)
        return _along_both(precise, rows, columns).to(x.dtype)


def enlarge(x: Tensor, factor: int, size: tuple[int, int]) -> Tensor:
    """(n, C, h, w) -> (n, C, *size) in the dtype of `x`: bilinear, a cell being `factor` places wide.

    `size` is at most `factor` times the map's: where the last cell of a strided convolution sticks out of the image,
    what is outside is not computed, and nothing inside is moved for it. Otherwise the same as `resize`.
    """
    height, width = x.shape[-2:]
    if size == (height, width):
        return x
    with float32_arithmetic(x):
        precise = _precise(x)
        rows = interpolation(size[0], height, 1 / factor, precise)
        columns = interpolation(size[1], width, 1 / factor, precise)
        return _along_both(precise, rows, columns).to(x.dtype)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _along_both(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(n, C, h, w) with the matrices (H, h) and (W, w) -> (n, C, H, W), laid out in memory as `x` is."""
    n, channels, height, width = x.shape
    if x.is_contiguous():
        wide = x.reshape(-1, width) @ columns.t()
        tall = rows.expand(n * channels, -1, -1) @ wide.reshape(n * channels, height, len(columns))
        return tall.reshape(n, channels, len(rows), len(columns))
    places = x.permute(0, 2, 3, 1)  # what a channels-last map is in memory: no copy
    tall = rows @ places.reshape(n, height, width * channels)
    wide = columns @ tall.reshape(n * len(rows), width, channels)
    return wide.reshape(n, len(rows), len(columns), channels).permute(0, 3, 1, 2)
