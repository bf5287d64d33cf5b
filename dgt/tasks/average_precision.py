"""Average precision of boxes and of masks as COCO defines it, computed by pycocotools from the records of detection.

What is evaluated is what `dataset` and `results` give: whoever writes both down as JSON and hands them to pycocotools
(COCO, loadRes, COCOeval) has the same numbers.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from data_pipeline.shards.source import DataError
from data_pipeline.targets.objects import ImageObject
from dgt.tasks.detections import Judged

log = logging.getLogger("dgt")

Kind = Literal["bbox", "segm"]
"""What overlaps: boxes, or masks. The names are those of pycocotools."""

SHORT: dict[Kind, str] = {"bbox": "box", "segm": "mask"}
"""What a metric's name begins with."""

AREAS = ("", "_s", "_m", "_l")
"""Ending of a metric's name for each of COCO's ranges of the object's area: any, below 32^2, to 96^2, above."""

NO_OBJECT = "none of the {} images of the evaluation split has an object that counts (crowds do not)"


@dataclass(frozen=True)
class Precisions:
    """Precision of one kind of overlap; whatever has no object that counts is -1 throughout."""

    kind: Kind
    values: npt.NDArray[np.float64]
    """(ious 0.5 to 0.95, recalls 0 to 1, classes, AREAS), with as many detections of an image as count at most."""

    def metrics(self) -> dict[str, float]:
        """Average precision in percent: "box_ap" or "mask_ap" over all ten overlaps, the same with 50 and 75 at one
        of them, and with _s, _m and _l of objects by size, where there are any."""
        name, every, half = f"{SHORT[self.kind]}_ap", self.values, self.values[:1]
        parts = {name: every[..., 0], f"{name}50": half[..., 0], f"{name}75": self.values[5:6, ..., 0]}
        parts |= {f"{name}{ending}": every[..., i] for i, ending in enumerate(AREAS) if ending}
        means = {name: mean_of(part) for name, part in parts.items()}
        return {name: mean for name, mean in means.items() if mean is not None}

    def per_class(self) -> dict[str, list[float | None]]:
        """Average precision of each class in percent, over all overlaps and at 0.5; None of a class without objects."""
        name, classes = f"{SHORT[self.kind]}_ap", range(self.values.shape[2])
        return {
            name: [mean_of(self.values[:, :, k, 0]) for k in classes],
            f"{name}50": [mean_of(self.values[0, :, k, 0]) for k in classes],
        }


def mean_of(precision: npt.NDArray[np.float64]) -> float | None:
    """In percent, over what is there (is not -1); None where nothing is."""
    there = precision[precision > -1]
    return 100 * float(there.mean()) if there.size else None


def metrics_of(
    records: Mapping[int, Judged], category_ids: Sequence[int], masks: bool, max_detections: int = 100
) -> dict[str, float]:
    """box_ap, box_ap50, box_ap75, box_ap_s, box_ap_m, box_ap_l in percent, and with `masks` mask_ap, ...; see
    `precisions`, whose errors it raises but one: where there is no object that counts, everything is 0, which it warns
    of, because a training asks, which need not end for that. A size without objects has no entry."""
    if records and not any_counts(records):
        log.warning(f"average precision is given as 0: {NO_OBJECT.format(len(records))}")
        names = [SHORT[kind] for kind in kinds_of(masks)]
        return {f"{name}_ap{ending}": 0.0 for name in names for ending in ("", "50", "75")}
    found: dict[str, float] = {}
    for part in precisions(records, category_ids, masks, max_detections):
        found |= part.metrics()
    return found


def precisions(
    records: Mapping[int, Judged], category_ids: Sequence[int], masks: bool, max_detections: int = 100
) -> list[Precisions]:
    """Precision of boxes, and with `masks` of masks.

    Args:
        records: by sample id, whatever order.
        category_ids: for each class its own number, from 0 or 1 on.
        masks: also judge masks.
        max_detections: of an image and class, so many of the most likely detections count; COCO's 100 at least.

    Raises:
        DataError: without records, without any object that counts, where two records have the same image id, or
            without pycocotools.
    """
    if not records:
        raise DataError("nothing could be evaluated: every sample of the evaluation split is damaged")
    if not any_counts(records):
        raise DataError(f"nothing could be evaluated: {NO_OBJECT.format(len(records))}")
    truth = dataset(records, category_ids)
    return [
        Precisions(kind, judged(truth, results(records, category_ids, kind), kind, max_detections))
        for kind in kinds_of(masks)
    ]


def any_counts(records: Mapping[int, Judged]) -> bool:
    """Whether any of the images has an object that is no crowd."""
    return any(not found.crowd for record in records.values() for found in record.truth.objects)


def kinds_of(masks: bool) -> tuple[Kind, ...]:
    """What is judged: boxes, and with `masks` masks."""
    return ("bbox", "segm") if masks else ("bbox",)


def judged(
    truth: dict[str, Any], found: list[dict[str, Any]], kind: Kind, max_detections: int
) -> npt.NDArray[np.float64]:
    """(10, 101, classes, 4) precision of `found` against `truth`, as in `Precisions.values`, in the order of the
    categories in `truth`. Raises DataError without pycocotools."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise DataError(
            "average precision is computed by the package pycocotools, which is not here. Install the extra: "
            "pip install 'dgt[dense]'"
        ) from None
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it is about to do
        objects = COCO()
        objects.dataset = truth
        objects.createIndex()
        if found:
            detections = objects.loadRes(found)
        else:  # which loadRes does not accept
            detections = COCO()
            detections.dataset = {**truth, "annotations": []}
            detections.createIndex()
        evaluation = COCOeval(objects, detections, kind)
        evaluation.params.maxDets = [1, 10, max(100, max_detections)]
        evaluation.evaluate()
        evaluation.accumulate()
    precision: npt.NDArray[np.float64] = evaluation.eval["precision"][..., -1]
    place = {number: k for k, number in enumerate(evaluation.params.catIds)}
    return precision[:, :, [place[category["id"]] for category in truth["categories"]]]


def results(records: Mapping[int, Judged], category_ids: Sequence[int], kind: Kind = "bbox") -> list[dict[str, Any]]:
    """Detections as COCO's results have them: the image's id, the category's, a score, and a box (left, top, width,
    height) or, for "segm", a mask.

    Never both: with a box beside it, pycocotools takes the box's area for the mask's.
    """
    found = []
    for record in records.values():
        detected = record.detected
        boxes = detected.boxes.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        for i, (label, score) in enumerate(zip(detected.labels.tolist(), detected.scores.tolist(), strict=True)):
            entry = {"image_id": record.truth.image_id, "category_id": category_ids[label], "score": score}
            if kind == "bbox":
                entry["bbox"] = boxes[i].tolist()
            else:
                assert detected.masks is not None, "this detector gives no masks"
                entry["segmentation"] = detected.masks[i]
            found.append(entry)
    return found


def dataset(records: Mapping[int, Judged], category_ids: Sequence[int], names: Sequence[str] = ()) -> dict[str, Any]:
    """The annotations of the records' images as COCO has them, as stored, except that their ids count from 1 on: to
    pycocotools an object with id 0 is none.

    Raises DataError where two records have the same image id.
    """
    truths = [record.truth for record in records.values()]
    samples: dict[int, int] = {}
    for sample, record in records.items():
        if samples.setdefault(record.truth.image_id, sample) != sample:
            raise DataError(
                f"samples {samples[record.truth.image_id]} and {sample} of the evaluation split are both annotated as "
                f"image {record.truth.image_id} ({record.truth.file_name}): ids must tell images apart"
            )
    objects = [(truth.image_id, found) for truth in truths for found in truth.objects]
    return {
        "images": [
            {"id": truth.image_id, "file_name": truth.file_name, "height": truth.size[0], "width": truth.size[1]}
            for truth in truths
        ],
        "categories": [
            {"id": number, "name": names[i] if i < len(names) else str(i)} for i, number in enumerate(category_ids)
        ],
        "annotations": [
            annotation(number, image_id, category_ids[found.category], found)
            for number, (image_id, found) in enumerate(objects, 1)
        ],
    }


def annotation(number: int, image_id: int, category_id: int, found: ImageObject) -> dict[str, Any]:
    """One object as COCO has it."""
    entry = {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": list(found.box),
        "area": found.area,
        "iscrowd": int(found.crowd),
    }
    return entry if found.segmentation is None else entry | {"segmentation": found.segmentation}
