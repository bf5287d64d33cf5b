"""A class for every pixel of an image of any size: from the network's maps of the resized image back to the image.

One definition serves all modes. An image is seen in *views*: the resized image as a whole, or each window of it; at
each scale; as it is, or mirrored. A view's logits lie on a grid of cells, 4 pixels of the resized image each. For each
pixel of the original, the logits of every view in which its centre lies are interpolated bilinearly there and turned
into probabilities; those of overlapping windows are averaged, then those of all scales and mirrorings, and the largest
wins.

The field resizes maps of probabilities to the original's size instead, whole: 150 classes of a 3000 x 4000 photograph
are 7 GB. Here a band of rows is worked on at a time, so that the memory does not grow with the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CELL = 4
"""Pixels of the resized image per cell of the logits, along each axis."""

_BAND = 2**24
"""Probabilities that are worked on at a time: 64 MiB."""


@dataclass(frozen=True)
class Axis:
    """Where a view lies along one axis of an image."""

    length: int
    """Of the original image, in pixels."""
    resized: int
    """Of the resized image."""
    first: int
    """First pixel of the view in the resized (and mirrored) image."""
    size: int
    """Of the view, in pixels of the resized image."""
    mirrored: bool = False
    """The view is one of the mirror image."""

    def taps(self, first: int, end: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the original's pixels from `first` to `end` read of the view's logits along this axis.

        Returns:
            Four tensors of one number per pixel: whether its centre lies in the view (bool); the two neighbouring
            cells (int64), and the share of the second (float32).
        """
        pixel = torch.arange(first, end, device=device, dtype=torch.float64)
        centre = (pixel + 0.5) * (self.resized / self.length)
        if self.mirrored:
            centre = self.resized - centre
        centre = centre - self.first
        inside = (centre >= 0) & (centre < self.size)
        last = -(-self.size // CELL) - 1
        place = (centre / CELL - 0.5).clamp(0, last)
        lower = place.floor().long()
        return inside, lower, (lower + 1).clamp(max=last), (place - lower).float()


@dataclass(frozen=True)
class View:
    """The answer to a part of a resized image."""

    logits: Tensor
    """(rows, columns, classes) float32, in cells."""
    rows: Axis
    columns: Axis

    def at(self, rows: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
        """(m, n, classes): logits at m rows and n columns, each given by its `Axis.taps` without the first."""
        top, bottom, down = rows
        left, right, across = columns
        tall = torch.lerp(self.logits[top], self.logits[bottom], down[:, None, None])
        return torch.lerp(tall[:, left], tall[:, right], across[:, None])


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(H, W, 3) uint8 -> (*size, 3) uint8, by the function that resizes training images."""
    from torchvision.transforms.v2 import functional

    return functional.resize(image.permute(2, 0, 1), list(size), antialias=True).permute(1, 2, 0)


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin: every `stride` pixels, the last one moved inwards so that it ends with the image."""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def views_of(
    pixels: Tensor, original: tuple[int, int], mirrored: bool, window: tuple[int, int], forward: Callable[..., Tensor]
) -> list[View]:
    """The views of a resized image, in one pass of the network each.

    Args:
        pixels: (1, 3, h, w) float, normalised and, if `mirrored`, mirrored.
        original: (height, width) of the image before it was resized.
        mirrored: whether `pixels` are mirrored.
        window: height and width of a window, and the stride between two; (0, 0) takes the whole image.
        forward: the network, (1, 3, h, w) -> (1, classes, h / 4, w / 4), rounded up.
    """
    height, width = pixels.shape[-2:]
    side, stride = window if window[0] else (max(height, width), 1)
    views = []
    for top in window_starts(height, side, stride):
        for left in window_starts(width, side, stride):
            part = pixels[:, :, top : top + side, left : left + side]
            logits = forward(part)[0].float().permute(1, 2, 0).contiguous()
            rows = Axis(original[0], height, top, part.shape[-2])
            columns = Axis(original[1], width, left, part.shape[-1], mirrored)
            views.append(View(logits, rows, columns))
    return views


def classes_of(groups: Sequence[Sequence[View]], size: tuple[int, int]) -> Tensor:
    """The most probable class of each pixel, uint8 (height, width) = `size`, the lowest of equal ones.

    `groups`: for each scale and mirroring, its views, which cover the image.
    """
    height, width = size
    some = groups[0][0].logits
    answer = torch.empty(size, dtype=torch.uint8, device=some.device)
    for first, end in _bands(height, width * some.shape[-1]):
        if len(groups) == len(groups[0]) == 1:  # the softmax of a single view changes no order
            answer[first:end] = _logits(groups[0][0], first, end, width).argmax(dim=-1)
            continue
        total = some.new_zeros(end - first, width, some.shape[-1])
        for views in groups:
            _add_mean(total, views, first, end)
        answer[first:end] = total.argmax(dim=-1)
    return answer


def _bands(height: int, row: int) -> Iterator[tuple[int, int]]:
    """First row and end of each band; `row`: numbers in a row."""
    rows = max(_BAND // row, 1)
    return ((first, min(first + rows, height)) for first in range(0, height, rows))


def _logits(view: View, first: int, end: int, width: int) -> Tensor:
    """(end - first, width, classes): of a view that holds all these pixels."""
    device = view.logits.device
    _, *rows = view.rows.taps(first, end, device)
    _, *columns = view.columns.taps(0, width, device)
    return view.at(rows, columns)


def _add_mean(total: Tensor, views: Sequence[View], first: int, end: int) -> None:
    """Adds to `total` (end - first, width, classes) the mean probabilities of overlapping views."""
    width, device = total.shape[1], total.device
    spans = []
    times = total.new_zeros(end - first, width, 1)
    for view in views:
        inside_rows, *rows = view.rows.taps(first, end, device)
        inside_columns, *columns = view.columns.taps(0, width, device)
        # neighbouring pixels: a slice of each axis
        at_rows, at_columns = _span(inside_rows), _span(inside_columns)
        spans.append(((at_rows, at_columns), [tap[at_rows] for tap in rows], [tap[at_columns] for tap in columns]))
        times[at_rows, at_columns] += 1
    for view, (place, rows, columns) in zip(views, spans, strict=True):
        if len(rows[0]) and len(columns[0]):
            total[place] += view.at(rows, columns).softmax(dim=-1) / times[place]


def _span(inside: Tensor) -> slice:
    """The run of true values."""
    places = inside.nonzero().flatten().tolist()
    return slice(places[0], places[-1] + 1) if places else slice(0, 0)
