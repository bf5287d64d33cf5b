"""Images in, batches out: shards on disk, an exact order, keyed augmentation, decoding in threads.

    with build_loader(config, "train", train=True, global_batch_size=1024, rank=0, world_size=8, seed=0) as loader:
        for batch in loader:
            images = normalize(batch.images.to(device, non_blocking=True), config.mean, config.std)

The names below are imported when they are first used, so that reading a configuration or preparing shards does not wait
for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.batch import Batch
    from data_pipeline.config import AugmentConfig, DataConfig, SyntheticConfig
    from data_pipeline.loader import Loader, build_loader
    from data_pipeline.order import Batching
    from data_pipeline.shards.source import DamagedSampleError, DataError, RawSample, Source
    from data_pipeline.transforms import normalize

__all__ = [
    "AugmentConfig",
    "Batch",
    "Batching",
    "DamagedSampleError",
    "DataConfig",
    "DataError",
    "Loader",
    "RawSample",
    "Source",
    "SyntheticConfig",
    "build_loader",
    "normalize",
]

_MODULES = {
    "config": ("AugmentConfig", "DataConfig", "SyntheticConfig"),
    "batch": ("Batch",),
    "order": ("Batching",),
    "shards.source": ("DamagedSampleError", "DataError", "RawSample", "Source"),
    "loader": ("Loader", "build_loader"),
    "transforms": ("normalize",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'data_pipeline' has no attribute '{name}'")
    return getattr(importlib.import_module(f"data_pipeline.{_HOME[name]}"), name)
