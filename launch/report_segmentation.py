"""What an evaluation of a segmentation says, and the class maps that it answered with.

OUT/metrics.json       what was evaluated and how it did, with the table below
OUT/classes.csv        one line per class, the worst first
OUT/confusion.csv      pixels by class (rows) and answer (columns)
OUT/confusion.png
OUT/pictures/ID.png    a few images with their classes as annotated and as answered, by sample id
OUT/predictions/KEY.png with --save-predictions: class indices in 8 bits, as large as the image
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from launch.report import SHOWN_CLASSES, Facts, Row, print_table, share, speed, taken_for, write_csv, write_pictures
from launch.runs import LaunchError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from data_pipeline.batch import Batch
    from data_pipeline.shards.source import Source
    from dgt.config import Config
    from dgt.tasks import Findings
    from dgt.tasks.pixels import CountedPixels
    from dgt.tasks.segmentation import Segmentation


def settings(config: Config) -> dict[str, Any]:
    """How images are answered."""
    from dgt.tasks import SegmentationConfig

    assert isinstance(config.task, SegmentationConfig)
    data, inference = config.data.segmentation, config.task.inference
    window = {"crop_size": data.crop_size, "stride": inference.stride or data.crop_size * 2 // 3}
    return {
        "short_side": data.short_side,
        "long_side": data.long_side,
        "mode": inference.mode,
        **(window if inference.mode == "slide" else {}),
        "scales": list(inference.scales),
        "flip": inference.flip,
    }


class Kept:
    """A segmentation that also keeps what it answers: by sample id, (key, PNG of the class map) as records."""

    def __init__(self, task: Segmentation, source: Source):
        self.task, self.source = task, source

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def found(self, model: nn.Module, batch: Batch, device: torch.device) -> Findings:
        """What the task finds, which answers to each place of the batch in turn, with these answers."""
        answers: list[Tensor] = []
        answer = self.task.answer

        def kept(model: nn.Module, image: Tensor) -> Tensor:
            answers.append(answer(model, image))
            return answers[-1]

        self.task.answer = kept  # type: ignore[method-assign]
        try:
            found = self.task.found(model, batch, device)
        finally:
            self.task.answer = answer  # type: ignore[method-assign]
        for sample, valid, classes in zip(batch.ids.tolist(), batch.valid.tolist(), answers, strict=True):
            if valid:
                found.records[sample] = (self.source.read(sample).key, as_png(classes.cpu().numpy()))
        return found


def as_png(classes: np.ndarray) -> bytes:
    """A class map, uint8 (H, W), as a PNG file of one 8-bit channel."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(classes).save(file, "PNG")
    return file.getvalue()


def class_rows(counted: CountedPixels, names: Sequence[str]) -> list[Row]:
    """One row per class, by IoU, the lowest first; classes that are neither there nor answered come last."""

    def percent(value: float) -> float | None:
        return None if math.isnan(value) else 100 * float(value)

    total = int(counted.support.sum())
    rows = [
        {
            "class": c,
            "name": names[c] if c < len(names) else str(c),
            "pixels": int(counted.support[c]),
            "share": share(int(counted.support[c]), total),
            "iou": percent(counted.iou[c]),
            "accuracy": percent(counted.accuracy[c]),
            "precision": percent(counted.precision[c]),
            "most_taken_for": taken_for(counted.confusion, c, names),
        }
        for c in range(len(counted.confusion))
    ]
    return sorted(rows, key=lambda row: (math.inf if row["iou"] is None else row["iou"], row["class"]))


def write(out: Path, facts: Facts, counted: CountedPixels, names: Sequence[str], found: Findings) -> None:
    """Writes tables, pictures, and class maps where they were kept. Raises LaunchError where that fails."""
    from PIL import Image

    from dgt.training import pictures

    rows = class_rows(counted, names)
    labels = [names[i] if i < len(names) else str(i) for i in range(len(counted.confusion))]
    try:
        (out / "metrics.json").write_text(json.dumps({**facts, **counted.metrics, "classes": rows}, indent=1) + "\n")
        write_csv(out / "classes.csv", [list(rows[0]), *(row.values() for row in rows)])
        table = [[label, *line] for label, line in zip(labels, counted.confusion.tolist(), strict=True)]
        write_csv(out / "confusion.csv", [["class", *labels], *table])
        Image.fromarray(pictures.confusion(counted.confusion, labels)).save(out / "confusion.png")
        write_pictures(out, found.pictures)
        write_maps(out / "predictions", found.records)
    except OSError as error:
        raise LaunchError(f"--out {out}: cannot be written: {error.strerror or error}") from None


def write_maps(folder: Path, kept: Mapping[int, tuple[str, bytes]]) -> None:
    """Writes class maps under the keys of their samples, which may name folders."""
    for key, png in kept.values():
        parts = PurePosixPath(key).parts
        if ".." in parts or PurePosixPath(key).is_absolute():
            raise LaunchError(f"the key {key!r} of a sample leads out of the folder of predictions")
        path = folder.joinpath(*parts[:-1], f"{parts[-1]}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png)


def show(as_json: bool, facts: Facts, counted: CountedPixels, names: Sequence[str]) -> None:
    """Prints what was evaluated and how it did."""
    metrics = counted.metrics
    if as_json:
        print(json.dumps({**facts, **metrics}))
        return
    print(f"{facts['checkpoint']}, {facts['weights']} weights after step {facts['step']}")
    print(f"{counted.images:,} images of split {facts['split']}, {in_words(facts)}")
    for name in ("miou", "macc", "pixel_acc"):
        print(f"  {name:<10} {metrics[name]:.4f} %")
    speed(facts, "  speed      ")
    rows = class_rows(counted, names)
    few = [row for row in rows if row["iou"] is not None][:SHOWN_CLASSES]
    if few:
        print("\nclasses" if len(few) == len(rows) else f"\nthe {len(few)} worst of {len(rows)} classes")
        print_table(few)


def in_words(facts: Facts) -> str:
    """How images were answered."""
    seen = f"short side {facts['short_side']} px, long side at most {facts['long_side']} px"
    if facts["mode"] == "slide":
        seen += f", windows of {facts['crop_size']} px every {facts['stride']} px"
    scales: Any = facts["scales"]
    if scales != [1.0]:
        seen += f", scales {' '.join(f'{scale:g}' for scale in scales)}"
    return seen + (", mean with mirror images" if facts["flip"] else "")
