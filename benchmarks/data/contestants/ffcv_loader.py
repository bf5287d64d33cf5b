"""FFCV's own Loader over a .beton of JPEG bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import RandomHorizontalFlip, ToTensor

from benchmarks.data.contestants import SIZE, Running, Task, package_versions


def start(task: Task) -> Running:
    """The settings of FFCV's ImageNet example: random order, the file in the page cache, three batches ahead."""
    crop = RandomResizedCropRGBImageDecoder((SIZE, SIZE), scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    loader = Loader(
        str(Path(task.data) / "train.beton"),
        batch_size=task.batch_size,
        num_workers=task.threads,
        order=OrderOption.RANDOM,
        os_cache=True,
        batches_ahead=3,
        drop_last=True,
        seed=0,
        pipelines={"image": [crop, RandomHorizontalFlip(), ToTensor()], "label": [IntDecoder(), ToTensor()]},
    )

    def epoch(number: int) -> Iterator[Any]:
        for images, _ in loader:
            yield images

    return Running(epoch, package_versions("ffcv", "numba", "opencv-python"))
