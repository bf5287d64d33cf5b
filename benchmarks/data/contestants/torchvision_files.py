"""torchvision's JPEG decoder and v2 transforms over single files, in torch's DataLoader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from benchmarks.data.contestants import SIZE, Running, Task, crop, package_versions


class Files(Dataset[tuple[torch.Tensor, int]]):
    """The JPEG files of the class folders."""

    def __init__(self, folder: Path) -> None:
        classes = sorted(path for path in folder.iterdir() if path.is_dir())
        self._files = [(str(path), label) for label, name in enumerate(classes) for path in sorted(name.iterdir())]
        self._transform = v2.Compose(
            [
                v2.RandomResizedCrop((SIZE, SIZE), scale=crop.SCALE, ratio=crop.RATIO, antialias=True),
                v2.RandomHorizontalFlip(),
            ]
        )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self._files[index]
        return self._transform(decode_jpeg(read_file(path), mode=ImageReadMode.RGB)), label


def start(task: Task) -> Running:
    """Worker processes that stay alive between epochs, global shuffle."""
    loader = DataLoader(
        Files(Path(task.files) / "train"),
        batch_size=task.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=task.threads,
        persistent_workers=True,
        multiprocessing_context="fork",
    )

    def epoch(number: int) -> Iterator[Any]:
        for images, _ in loader:
            yield images

    return Running(epoch, package_versions("torch", "torchvision"))
