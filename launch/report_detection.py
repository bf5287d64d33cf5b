"""What an evaluation of a detector says, and its answers as COCO's results.

OUT/metrics.json       what was evaluated and how it did, with the table below
OUT/classes.csv        one line per class, the worst first
OUT/annotations.json   the objects of the evaluated images, in COCO's format
OUT/predictions.json   boxes as COCO's results have them, with the image and category ids of the data set
OUT/predictions_masks.json  the same with masks, of a detector that gives some
OUT/pictures/ID.png    a few images with what was found there, by sample id
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.report import SHOWN_CLASSES, Facts, Row, print_table, speed, write_csv, write_pictures
from launch.runs import LaunchError

if TYPE_CHECKING:
    from data_pipeline.shards.source import Source
    from dgt.config import Config
    from dgt.tasks import Findings
    from dgt.tasks.average_precision import Precisions


@dataclass(frozen=True)
class Judgement:
    """A whole evaluation."""

    found: Findings
    precisions: list[Precisions]
    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    """In the data set, of each class."""

    @property
    def metrics(self) -> dict[str, float]:
        """Average precisions in percent, and the number of images they were counted over."""
        parts: dict[str, float] = {}
        for precision in self.precisions:
            parts |= precision.metrics()
        return {**parts, "samples": float(len(self.found.records))}


def settings(config: Config) -> dict[str, Any]:
    """How images are answered."""
    from dgt.tasks import DetectionConfig

    assert isinstance(config.task, DetectionConfig)
    return {
        "detector": config.task.detector,
        "short_side": config.data.detection.eval_short_side,
        "long_side": config.data.detection.long_side,
        "max_detections": config.task.max_detections,
        "score_threshold": config.task.score_threshold,
    }


def judge(config: Config, found: Findings, source: Source) -> Judgement:
    """What the findings say. Raises DataError where nothing could be evaluated."""
    from dgt.tasks import DetectionConfig
    from dgt.tasks.average_precision import precisions

    assert isinstance(config.task, DetectionConfig)
    numbers = category_ids(source)
    parts = precisions(found.records, numbers, config.task.has_masks, config.task.max_detections)
    return Judgement(found, parts, tuple(source.class_names), numbers)


def category_ids(source: Source) -> tuple[int, ...]:
    """Of each class, the id that the data set was made from; from 1 on where it has none."""
    meaning = getattr(source, "meaning", {})
    return tuple(meaning.get("category_ids", range(1, source.num_classes + 1)))


def class_rows(judgement: Judgement) -> list[Row]:
    """One row per class, by the last kind of average precision, the lowest first; classes without objects come last."""
    counts = [0] * len(judgement.category_ids)
    for record in judgement.found.records.values():
        for thing in record.truth.objects:
            counts[thing.category] += not thing.crowd
    columns: dict[str, list[float | None]] = {}
    for part in judgement.precisions:
        columns |= part.per_class()
    rows = [
        {
            "class": c,
            "name": judgement.names[c] if c < len(judgement.names) else str(c),
            "category_id": number,
            "objects": counts[c],
            **{name: values[c] for name, values in columns.items()},
        }
        for c, number in enumerate(judgement.category_ids)
    ]
    last = "mask_ap" if "mask_ap" in columns else "box_ap"
    return sorted(rows, key=lambda row: (math.inf if row[last] is None else row[last], row["class"]))


def write(out: Path, facts: Facts, judgement: Judgement) -> None:
    """Writes tables, answers and pictures. Raises LaunchError where that fails."""
    from dgt.tasks.average_precision import dataset, results

    rows, records = class_rows(judgement), judgement.found.records
    numbers = judgement.category_ids
    files: dict[str, Any] = {"annotations.json": dataset(records, numbers, judgement.names)}
    files["predictions.json"] = results(records, numbers, "bbox")
    if any(part.kind == "segm" for part in judgement.precisions):
        files["predictions_masks.json"] = results(records, numbers, "segm")
    try:
        content = {**facts, **judgement.metrics, "classes": rows}
        (out / "metrics.json").write_text(json.dumps(content, indent=1) + "\n")
        write_csv(out / "classes.csv", [list(rows[0]), *(row.values() for row in rows)])
        for name, content in files.items():
            (out / name).write_text(json.dumps(content) + "\n")
        write_pictures(out, judgement.found.pictures)
    except OSError as error:
        raise LaunchError(f"--out {out}: cannot be written: {error.strerror or error}") from None


def show(as_json: bool, facts: Facts, judgement: Judgement) -> None:
    """Prints what was evaluated and how it did."""
    metrics = judgement.metrics
    if as_json:
        print(json.dumps({**facts, **metrics}))
        return
    print(f"{facts['checkpoint']}, {facts['weights']} weights after step {facts['step']}")
    print(
        f"{round(metrics['samples']):,} images of split {facts['split']}, {facts['detector']}, short side "
        f"{facts['short_side']} px, long side at most {facts['long_side']} px, {facts['max_detections']} detections "
        "an image at most"
    )
    for name, value in metrics.items():
        if name != "samples":
            print(f"  {name:<10} {value:.4f} %")
    speed(facts, "  speed      ")
    rows = class_rows(judgement)
    few: Sequence[Row] = [row for row in rows if row["objects"]][:SHOWN_CLASSES]
    print("\nclasses" if len(few) == len(rows) else f"\nthe {len(few)} worst of {len(rows)} classes")
    print_table(few)
