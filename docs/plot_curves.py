"""Draws a run's training curves from its TensorBoard event files: python docs/plot_curves.py RUN OUT.png"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CURVES = (
    ("train/loss", "training loss"),
    ("val/top1", "validation accuracy, %"),
    ("train/lr", "learning rate"),
    ("speed/images_per_s", "images/s"),
)


def main(run: Path, out: Path) -> None:
    """Four panels over the optimizer step; dots mark the logged steps, a line where an attempt began."""
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    figure, axes = plt.subplots(2, 2, figsize=(10, 5.2), layout="constrained")
    for axis, (tag, label) in zip(axes.flat, CURVES, strict=True):
        points = events.Scalars(tag)
        axis.plot([p.step for p in points], [p.value for p in points], marker=".", linewidth=1.2)
        axis.set_title(label, loc="left", fontsize=10)
        axis.set_ylim(bottom=0 if tag != "val/top1" else None)
        axis.grid(alpha=0.3)
        for start in attempts(run)[1:]:
            axis.axvline(start, color="tab:red", linestyle="--", linewidth=1)
    axes[0, 0].legend(["logged step", "resumed here"][: len(attempts(run))], fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("optimizer step")
    figure.savefig(out, dpi=110)


def attempts(run: Path) -> list[int]:
    """The step after which each attempt began: the purge step that its event file names."""
    starts = []
    for file in sorted((run / "tensorboard").glob("events.*")):
        first = next((e for e in read(file) if e.HasField("session_log")), None)
        starts.append(first.step - 1 if first else 0)
    return starts


def read(file: Path) -> list[object]:
    """All events of one file."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    return list(LegacyEventFileLoader(str(file)).Load())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
