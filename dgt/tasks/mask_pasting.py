"""From a mask within a box to a mask of the image, as COCO writes it down."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.shards.source import DataError

Floats = npt.NDArray[np.float32]


def pasted(mask: Floats, box: Floats, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Where a mask's probability is at least 1/2: uint8 (H, W), 0 or 1, in Fortran's order.

    Each pixel's centre is looked up between the centres of the mask's cells, beyond which it falls to 0, as Detectron2
    and mmdetection do.

    Args:
        mask: (m, m) probabilities of the cells of the box.
        box: (4,) left, top, right, bottom in pixels; more than 0 wide and high.
        size: (height, width) of the image.
    """
    whole = np.zeros(size, np.uint8, order="F")
    first = np.clip(np.floor(box[:2]).astype(int), 0, (size[1], size[0]))
    last = np.clip(np.ceil(box[2:]).astype(int), 0, (size[1], size[0]))
    rows, columns = (
        between_cells((np.arange(first[axis], last[axis]) + 0.5 - box[axis]) / (box[axis + 2] - box[axis]), len(mask))
        for axis in (1, 0)
    )
    whole[first[1] : last[1], first[0] : last[0]] = rows @ mask @ columns.T >= 0.5
    return whole


def between_cells(places: npt.NDArray[Any], cells: int) -> Floats:
    """(places, cells) weights of linear interpolation between the centres of cells that share [0, 1] evenly."""
    distance = np.abs(places[:, None] * cells - 0.5 - np.arange(cells))
    return np.clip(1 - distance, 0, None).astype(np.float32)


def encoded(masks: Floats, boxes: Floats, size: tuple[int, int]) -> tuple[dict[str, Any], ...]:
    """Run-length encodings {"size": [H, W], "counts": text} of d masks (d, m, m) in their boxes (d, 4).

    One mask at a time is as large as the image. Raises DataError without pycocotools.
    """
    try:
        from pycocotools import mask as coco
    except ImportError:
        raise DataError(
            "masks are encoded by the package pycocotools, which is not here. Install the extra: "
            "pip install 'dgt[dense]'"
        ) from None
    found = [coco.encode(pasted(mask, box, size)) for mask, box in zip(masks, boxes, strict=True)]
    return tuple({"size": list(size), "counts": runs["counts"].decode("ascii")} for runs in found)
