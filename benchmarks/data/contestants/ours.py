"""The loader of this repository: tar shards, tar shards with restart rows, or .beton."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.data.contestants import CONTESTANTS, SIZE, Running, Task, package_versions
from data_pipeline import AugmentConfig, DataConfig, build_loader


def start(task: Task) -> Running:
    """As a training run uses it, with the default settings but for threads and resampling."""
    contestant = CONTESTANTS[task.contestant]
    config = DataConfig(
        backend="ffcv" if contestant.form == "beton" else "webdataset",
        path=task.data,
        num_classes=sum(1 for _ in (Path(task.files) / "train").iterdir()),
        image_size=SIZE,
        num_threads=task.threads,
        augment=AugmentConfig(interpolation=contestant.resampling),  # type: ignore[arg-type]
    )
    loader = build_loader(config, "train", train=True, global_batch_size=task.batch_size, rank=0, world_size=1, seed=0)

    def epoch(number: int) -> Iterator[Any]:
        loader.set_epoch(number)
        for batch in loader:
            yield batch.images

    return Running(epoch, package_versions("torch", "simplejpeg", "opencv-python", "numpy"), loader.close)
