"""webdataset over the same tar shards, decoded by PIL, or by simplejpeg and OpenCV."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import webdataset
from torch.utils.data import DataLoader

from benchmarks.data.contestants import Running, Task, crop, package_versions


def start(task: Task) -> Running:
    """Worker processes that stay alive between epochs and make whole batches; shuffled shards, a shuffle buffer."""
    pil = task.contestant == "webdataset-pil"
    shards = sorted(str(path) for path in (Path(task.data) / "train").glob("*.tar"))
    if len(shards) < task.threads:
        raise ValueError(f"{task.data} has {len(shards)} shards, fewer than the {task.threads} worker processes")
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=len(shards), workersplitter=webdataset.split_by_worker)
        .shuffle(1000)
        .to_tuple("jpg", "cls")
        .map_tuple(crop.with_pil if pil else crop.with_simplejpeg, int)
        .batched(task.batch_size, collation_fn=crop.collate)
    )
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_size=None, num_workers=task.threads, persistent_workers=True, multiprocessing_context="fork"
    )

    def epoch(number: int) -> Iterator[Any]:
        for images, _ in loader:
            yield images

    return Running(epoch, package_versions("webdataset", "torch", "torchvision", "pillow" if pil else "simplejpeg"))
