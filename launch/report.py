"""What an evaluation of a classifier says: on the screen, as tables (CSV, JSON) and as pictures (PNG).

OUT/metrics.json       what was evaluated and how it did, with the tables below
OUT/classes.csv        one line per class, the worst first
OUT/reliability.csv    one line per bin of confidence
OUT/confusion.csv      images by class (rows) and first guess (columns); absent beyond 2048 classes
OUT/confusion.png, OUT/reliability.png
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.runs import LaunchError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from dgt.tasks.counts import Counted

Facts = Mapping[str, Any]
Row = dict[str, Any]

SHOWN_CLASSES = 20
"""Most classes in the table on the screen; more are the business of --out."""


def device_name(device: torch.device) -> str:
    """Of the GPU, or of the processor."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU with {threads} thread{'s' if threads > 1 else ''} a rank"


def share(part: float, whole: float) -> float | None:
    """In percent; None of nothing."""
    return 100 * part / whole if whole else None


def class_rows(counted: Counted, names: Sequence[str]) -> list[Row]:
    """One row per class, by recall, the lowest first; classes without images come last.

    Recall is the top-1 accuracy over the class's images; precision is None where nothing was taken for the class.
    """
    rows = []
    for c in range(len(counted.support)):
        support, hits = int(counted.support[c]), int(counted.hits[c])
        rows.append(
            {
                "class": c,
                "name": names[c] if c < len(names) else str(c),
                "support": support,
                "recall": share(hits, support),
                "precision": share(hits, int(counted.guessed[c])),
                "top5": share(int(counted.hits5[c]), support),
                "most_taken_for": taken_for(counted.confusion, c, names),
            }
        )
    return sorted(rows, key=lambda row: (math.inf if row["recall"] is None else row["recall"], row["class"]))


def taken_for(confusion: np.ndarray | None, c: int, names: Sequence[str]) -> str | None:
    """The wrong class that images of class `c` are taken for most often; None where there is none."""
    if confusion is None:
        return None
    wrong = confusion[c].copy()
    wrong[c] = 0
    most = int(wrong.argmax())
    return (names[most] if most < len(names) else str(most)) if wrong[most] else None


def reliability_rows(counted: Counted) -> list[Row]:
    """One row per bin of confidence; accuracy and mean confidence are None in empty bins."""
    count = len(counted.bins)
    return [
        {
            "above": 100 * i / count,
            "up_to": 100 * (i + 1) / count,
            "images": int(images),
            "confidence": share(confidence, images),
            "accuracy": share(right, images),
        }
        for i, (images, right, confidence) in enumerate(counted.bins.tolist())
    ]


def make_folder(out: Path) -> None:
    """Makes the folder. Raises LaunchError where nothing can be written to it, before anything is computed."""
    probe = out / f".{os.getpid()}.probe"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise LaunchError(f"--out {out}: cannot be written: {error.strerror or error}") from None


def write(out: Path, facts: Facts, counted: Counted, names: Sequence[str]) -> None:
    """Writes tables and pictures. Raises LaunchError where that fails."""
    from PIL import Image

    from dgt.training import pictures

    classes, bins = class_rows(counted, names), reliability_rows(counted)
    everything = {**facts, **counted.metrics, "reliability": bins, "classes": classes}
    try:
        (out / "metrics.json").write_text(json.dumps(everything, indent=1) + "\n")
        write_csv(out / "classes.csv", [list(classes[0]), *(row.values() for row in classes)])
        write_csv(out / "reliability.csv", [list(bins[0]), *(row.values() for row in bins)])
        Image.fromarray(pictures.reliability(counted.bins, counted.calibration_error)).save(out / "reliability.png")
        if counted.confusion is not None:
            labels = [names[i] if i < len(names) else str(i) for i in range(len(counted.support))]
            table = [[label, *line] for label, line in zip(labels, counted.confusion.tolist(), strict=True)]
            write_csv(out / "confusion.csv", [["class", *labels], *table])
            Image.fromarray(pictures.confusion(counted.confusion, labels)).save(out / "confusion.png")
    except OSError as error:
        raise LaunchError(f"--out {out}: cannot be written: {error.strerror or error}") from None


def write_csv(path: Path, lines: Sequence[Any]) -> None:
    """One file; None is an empty cell."""
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


def show(as_json: bool, facts: Facts, counted: Counted, names: Sequence[str]) -> None:
    """Prints what was evaluated and how it did."""
    metrics = counted.metrics
    if as_json:
        print(json.dumps({**facts, **metrics}))
        return
    images, flip = round(metrics["samples"]), f", mean {facts['flip']} with mirror images" if facts["flip"] else ""
    print(f"{facts['checkpoint']}, {facts['weights']} weights after step {facts['step']}")
    print(f"{images:,} images of split {facts['split']} at {facts['image_size']} px (crop {facts['crop_pct']:g}){flip}")
    for name, unit in (("top1", " %"), ("top5", " %"), ("loss", ""), ("ece", " %")):
        print(f"  {name:<6} {metrics[name]:.4f}{unit}")
    speed(facts, "  speed  ", f", {facts['batch_size']} images a pass")
    rows = class_rows(counted, names)
    few = [row for row in rows if row["support"]][:SHOWN_CLASSES]
    print("\nclasses" if len(few) == len(rows) else f"\nthe {len(few)} worst of {len(rows)} classes")
    print_table(few)
    print("\nconfidence of the first guess")
    print_table([row for row in reliability_rows(counted) if row["images"]])


def speed(facts: Facts, before: str, after: str = "") -> None:
    """Prints how many images were evaluated in a second, where that is known, and on what."""
    if facts["images_per_s"] is not None:
        print(
            f"{before}{facts['images_per_s']:.1f} images/s after the first batch: {facts['ranks']} x "
            f"{facts['device']}, {facts['precision']}{after}"
        )


def write_pictures(out: Path, pictures: Mapping[int, np.ndarray]) -> None:
    """Writes uint8 (H, W, 3) pictures as PNG files that are named after their sample ids. Raises OSError."""
    from PIL import Image

    for sample, drawn in pictures.items():
        (out / "pictures").mkdir(exist_ok=True)
        Image.fromarray(drawn).save(out / "pictures" / f"{sample}.png")


def print_table(rows: Sequence[Row]) -> None:
    """Right-aligned columns under their names; percentages have two digits."""

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)[:24]

    lines = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  " + "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
