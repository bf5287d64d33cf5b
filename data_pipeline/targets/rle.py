"""COCO's run-length encoding of binary masks: runs of 0 and 1 by turns, down the columns, as numbers or as text.

The text form is that of pycocotools (maskApi.c, rleToString): from the fourth run on the difference to the run before
the last; each number in groups of five bits from the lowest on, a sixth bit says that more follow, 48 is added.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.targets.fault import TargetError

_MOST_GROUPS = 6  # 30 bits, more pixels than any image has; pycocotools reads negative numbers of more otherwise


def runs_of(segmentation: dict[str, Any]) -> npt.NDArray[np.int64]:
    """Lengths of the runs of {"size": [height, width], "counts": numbers or text}, zeros first; (runs,).

    Raises TargetError where they do not cover height x width pixels exactly.
    """
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
        raise TargetError(f"the size of its mask is {size!r} instead of [height, width]")
    if isinstance(counts, str):
        runs = _parse(counts)
    elif isinstance(counts, list) and all(type(count) is int and 0 <= count < 2**31 for count in counts):
        runs = np.array(counts, np.int64)
    else:
        raise TargetError("the runs of its mask are neither text nor numbers of 0 or more")
    if (runs < 0).any() or int(runs.sum()) != size[0] * size[1]:
        raise TargetError(f"the runs of its mask do not cover {size[0]} x {size[1]} pixels")
    return runs


def bounds_of(runs: npt.NDArray[np.int64], height: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the ones in `runs` down columns of `height` pixels; some must be there."""
    ends = np.cumsum(runs)
    stops = ends[1::2]
    starts = ends[0::2][: len(stops)]
    filled = stops > starts
    starts, stops = starts[filled], stops[filled]
    tops = starts % height
    bottoms = tops + (stops - starts)
    if bottoms.max() > height:  # a run goes on at the top of the next column
        top, bottom = 0, height
    else:
        top, bottom = int(tops.min()), int(bottoms.max())
    return int(starts[0]) // height, top, (int(stops[-1]) - 1) // height + 1, bottom


def decode(segmentation: dict[str, Any]) -> npt.NDArray[np.bool_]:
    """The mask as bool (height, width); raises TargetError."""
    runs = runs_of(segmentation)
    height, width = segmentation["size"]
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _parse(text: str) -> npt.NDArray[np.int64]:
    try:
        codes = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        raise TargetError("the text of its mask has characters that no mask has") from None
    if ((codes < 0) | (codes > 63)).any():
        raise TargetError("the text of its mask has characters that no mask has")
    if not len(codes):
        return codes
    ends = np.flatnonzero(codes & 32 == 0)
    if not len(ends) or ends[-1] != len(codes) - 1:
        raise TargetError("the text of its mask ends within a number")
    starts = np.concatenate(([0], ends[:-1] + 1))
    groups = ends - starts + 1
    if groups.max() > _MOST_GROUPS:
        raise TargetError("the text of its mask has a number that is too large")
    places = 5 * (np.arange(len(codes)) - np.repeat(starts, groups))
    values = np.add.reduceat((codes & 31) << places, starts)
    values -= np.where(codes[ends] & 16, 1 << (5 * groups), 0)  # the last group's highest bit is the sign
    for parity in (1, 2):
        values[parity::2] = np.cumsum(values[parity::2])
    return values
