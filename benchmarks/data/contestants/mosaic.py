"""MosaicML Streaming over its own MDS shards on the local disk, decoded by PIL."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streaming import MDSWriter, StreamingDataset
from streaming.base.util import clean_stale_shared_memory
from torch.utils.data import DataLoader

from benchmarks.data.contestants import Running, Task, crop, package_versions


def prepare(files: str, folder: str) -> None:
    """Write the JPEG files as MDS shards, their bytes untouched."""
    partial = Path(f"{folder}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    classes = sorted(path for path in (Path(files) / "train").iterdir() if path.is_dir())
    with MDSWriter(out=str(partial), columns={"image": "bytes", "label": "int"}) as writer:
        for label, name in enumerate(classes):
            for path in sorted(name.iterdir()):
                writer.write({"image": path.read_bytes(), "label": label})
    partial.rename(folder)


class Images(StreamingDataset):
    """Streaming's random access, then PIL."""

    def __getitem__(self, at: Any) -> Any:
        sample = super().__getitem__(at)
        return crop.with_pil(sample["image"]), sample["label"]


def start(task: Task) -> Running:
    """Shuffled by its default algorithm; worker processes stay alive between epochs."""
    clean_stale_shared_memory()
    dataset = Images(local=task.data, shuffle=True, batch_size=task.batch_size)
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=task.batch_size,
        num_workers=task.threads,
        persistent_workers=True,
        drop_last=True,
        collate_fn=crop.collate,
    )

    def epoch(number: int) -> Iterator[Any]:
        for images, _ in loader:
            yield images

    return Running(epoch, package_versions("mosaicml-streaming", "torch", "pillow"))
