"""Exact evaluation: every sample counted once, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from data_pipeline.config import DataConfig
from data_pipeline.loader import Loader
from data_pipeline.transforms import normalize
from dgt.tasks import Task
from dgt.training.parallel import Engine


@torch.no_grad()
def evaluate(
    engine: Engine, task: Task, loader: Loader, data: DataConfig, stop_asked: Callable[[], bool] = lambda: False
) -> dict[str, float] | None:
    """The task's metrics over one pass of `loader`, the same on every rank; all ranks call it.

    Batches have the same number on every rank (padding does not count), because a sharded network computes
    together. Returns None when all ranks agreed to stop half way.
    """
    device = engine.world.device
    totals = None
    engine.network.eval()
    loader.set_epoch(0)
    for batch in loader:
        if stop_asked():
            return None
        images = normalize(batch.images.to(device, non_blocking=True), data.mean, data.std)
        with engine.arithmetic():
            counted = task.totals(engine.network, images, batch.labels.to(device), batch.valid.to(device))
        totals = counted if totals is None else totals + counted
    if totals is None:
        raise ValueError("nothing to evaluate: the evaluation split has no samples")
    if engine.world.size > 1:
        dist.all_reduce(totals)
    return task.metrics(totals.cpu())
