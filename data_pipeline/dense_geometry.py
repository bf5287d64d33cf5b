"""How dense tasks resize: torchvision's v2 functions for what torch does alone in its thread, integers for labels.

Torch flips, copies and picks nearest neighbours with a team of threads for each thread that asks, so that the loader's
threads leave those to NumPy.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from data_pipeline.decode import Picture, Size

Image = npt.NDArray[np.uint8]


def fitted(size: Size, short_side: int, long_side: int, factor: float = 1.0, *, within: Size | None = None) -> Size:
    """(height, width) of an image that is resized as mmsegmentation's and mmdetection's keep_ratio does.

    The short side becomes `short_side` or the long side `long_side`, whichever is the smaller factor; times `factor`.
    An image that does not fit into (height, width) `within` so becomes as much smaller as needed.
    """
    factor *= min(short_side / min(size), long_side / max(size))
    height, width = _rounded(size, factor)
    if within is not None and (height > within[0] or width > within[1]):
        height, width = _rounded(size, min(within[0] / size[0], within[1] / size[1]))
    return height, width


def _rounded(size: Size, factor: float) -> Size:
    return max(1, int(size[0] * factor + 0.5)), max(1, int(size[1] * factor + 0.5))


def whole(picture: Picture, target: Size | None = None) -> Image:
    """All pixels of an image, uint8 (H, W, 3); with `target`, as Picture.region says."""
    return picture.region((0, 0, *picture.size), target)


def resized(pixels: Image, size: Size) -> tv_tensors.Image:
    """uint8 (H, W, 3) -> (3, h, w) with (h, w) `size`, bilinear and antialiased; may be a view of `pixels`."""
    if not (pixels.flags.c_contiguous and pixels.flags.writeable):
        pixels = pixels.copy()
    image = tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))
    found: tv_tensors.Image = F.resize(image, list(size), antialias=True)
    return found


def pixels_of(image: tv_tensors.Image) -> Image:
    """(3, h, w) -> uint8 (h, w, 3), a view."""
    pixels: Image = image.permute(1, 2, 0).numpy()
    return pixels


def nearest(before: int, after: int) -> npt.NDArray[np.int64]:
    """For each of `after` pixels in a row the one of `before` that its centre lies in, (after,).

    What torch calls "nearest-exact", in whole numbers: no label moves against the image by half a pixel, as it does
    under "nearest".
    """
    return (2 * np.arange(after, dtype=np.int64) + 1) * before // (2 * after)
