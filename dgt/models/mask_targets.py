"""What the mask head is to answer in each region: the object's mask, cut out and resized.

The same as RoIAlign of one map of the whole image for each object. RoIAlign's samples form a grid, so that it is a
product of three matrices: weights of rows, mask, weights of columns. Here the mask is the object's own crop, and memory
does not grow with objects times image.

A pixel's centre lies half a pixel from its corner, as in Detectron2 and mmdetection. torchvision's own Mask R-CNN
leaves that out, here and where it draws masks, so that even a perfect answer may come back another mask than it was
made of.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dgt.models.roi_align import samples


def mask_targets(
    crops: Sequence[npt.NDArray[np.uint8]],
    corners: Sequence[tuple[int, int]],
    size: tuple[int, int],
    boxes: Tensor,
    matched: Tensor,
    resolution: int,
) -> Tensor:
    """Share of each of resolution x resolution cells of p boxes that their objects cover: (p, resolution, resolution).

    Args:
        crops: of each of k objects uint8 (h, w), 0 or 1; what lies outside of its crop is not the object's.
        corners: of each crop (top, left) in the image, in whole pixels.
        size: (height, width) of the image.
        boxes: (p, 4) float, left, top, right, bottom.
        matched: (p,) int64, the object that each box shows.
        resolution: cells a side.
    """
    targets = boxes.new_zeros(len(boxes), resolution, resolution)
    objects = matched.unique().tolist()
    if not objects:
        return targets
    spans = [max(crops[k].shape[axis] for k in objects) for axis in (0, 1)]
    origins = torch.tensor(corners, dtype=boxes.dtype, device=boxes.device)[matched]
    rows = axis_weights(boxes[:, 1::2], size[0], origins[:, 0], spans[0], resolution)
    columns = axis_weights(boxes[:, 0::2], size[1], origins[:, 1], spans[1], resolution)
    # One copy to the device for all crops; they come out of it as views.
    pixels = torch.from_numpy(np.concatenate([crops[k].ravel() for k in objects])).to(boxes.device)
    for k, flat in zip(objects, pixels.split([crops[k].size for k in objects]), strict=True):
        height, width = crops[k].shape
        crop, own = flat.view(height, width).to(boxes.dtype), torch.where(matched == k)[0]
        with torch.autocast(boxes.device.type, enabled=False):  # which would round the products to 16 bits
            targets[own] = rows[own, :, :height] @ crop @ columns[own, :, :width].transpose(1, 2)
    return targets


def axis_weights(ranges: Tensor, extent: int, origins: Tensor, span: int, cells: int) -> Tensor:
    """Weight of each of `span` pixels from `origins` on in each of the `cells` of each range: (p, cells, span).

    A cell is the mean of as many samples as pixels fall on it, rounded up.

    Args:
        ranges: (p, 2) float, begin and end in pixels.
        extent: pixels of the whole image.
        origins: (p,) first pixel whose weight is asked for.
        span: pixels whose weights are asked for.
        cells: cells in a range.
    """
    count = ((ranges[:, 1] - ranges[:, 0]) / cells).ceil().clamp(min=1)
    pixels, shares = samples(ranges, extent, cells, count)
    index = pixels - origins[:, None, None, None].long()
    inside = (index >= 0) & (index < span)
    place = torch.arange(len(ranges) * cells, device=ranges.device).view(-1, cells, 1, 1) * span
    weights = ranges.new_zeros(len(ranges) * cells * span)
    weights.scatter_add_(0, (place + index.clamp(0, span - 1)).flatten(), (shares * inside).flatten())
    return weights.view(-1, cells, span)
