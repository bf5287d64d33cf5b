"""From the words of index.json to the check that its targets must pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

TargetCheck = Callable[[bytes, tuple[int, int]], Any]
"""(content of a target's file, (height, width) of its upright image) -> what it holds: the values of a mask, or
objects.ImageObjects. Raises TargetError where that is wrong or does not fit the image. Picklable."""

SEGMENTATION, DETECTION = "segmentation", "detection"


def target_check(kind: str, num_classes: int, meaning: Mapping[str, Any]) -> TargetCheck | None:
    """The check for the targets of a set; None for a set without targets.

    `meaning` is what index.json says of them ("targets"). Raises ValueError where that makes no sense.
    """
    if kind == SEGMENTATION:
        from data_pipeline.targets.masks import MaskLabels, check_mask

        return functools.partial(check_mask, labels=MaskLabels.from_json(num_classes, meaning))
    if kind == DETECTION:
        from data_pipeline.targets.objects import ObjectLabels, check_objects

        return functools.partial(check_objects, labels=ObjectLabels.from_json(num_classes, meaning))
    return None
