"""NVIDIA DALI on the CPU over single files, with its decoder that fuses the random crop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types

from benchmarks.data.contestants import SIZE, Running, Task, package_versions

_AHEAD = 2  # DALI's default


def start(task: Task) -> Running:
    """Batches are asked for one by one, so that none is made between two epochs, while another contestant runs."""
    pipeline = _pipeline(
        str(Path(task.files) / "train"),
        batch_size=task.batch_size,
        num_threads=task.threads,
        device_id=None,
        seed=0,
        prefetch_queue_depth=_AHEAD,
    )
    pipeline.build()
    batches = task.num_images // task.batch_size

    def epoch(number: int) -> Iterator[Any]:
        for _ in range(min(_AHEAD, batches)):
            pipeline.schedule_run()
        for index in range(batches):
            images, _ = pipeline.share_outputs()
            yield np.asarray(images.as_tensor())
            pipeline.release_outputs()
            if index + _AHEAD < batches:
                pipeline.schedule_run()

    return Running(epoch, package_versions("nvidia-dali-cuda120"))


@pipeline_def
def _pipeline(folder: str) -> Any:
    encoded, labels = fn.readers.file(file_root=folder, random_shuffle=True, name="files")
    images = fn.decoders.image_random_crop(
        encoded,
        device="cpu",
        output_type=types.RGB,
        random_area=[0.08, 1.0],
        random_aspect_ratio=[3 / 4, 4 / 3],
        num_attempts=10,
    )
    images = fn.resize(images, size=[SIZE, SIZE], interp_type=types.INTERP_LINEAR, antialias=True)
    return fn.flip(images, horizontal=fn.random.coin_flip()), labels
