"""How many shards a node reads at once, and whether the cache has room for them."""

from __future__ import annotations

import logging
import os

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.shards.set_index import SplitIndex
from data_pipeline.shards.source import DataError

logger = logging.getLogger(__name__)


def shards_at_once(config: DataConfig, split: str, shards: int) -> int:
    """Shards of a split (of `shards`) that this node's ranks read within a short time of each other.

    Training under order "block": a group of each stream that the node reads; under "global": all. Evaluation goes
    through the shards in order, each rank at its own place.
    """
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if split != config.train_split:
        return min(shards, 2 * ranks_here)
    if config.order == "global":
        return shards
    nodes = max(1, int(os.environ.get("WORLD_SIZE", "1")) // ranks_here)
    return min(shards, config.block_shards * -(-config.canonical_nodes // nodes))


def check_budget(config: DataConfig, split: str, index: SplitIndex, where: str) -> None:
    """Whether the cache of a remote set holds what is read at once; `where`: the set, for messages.

    Raises DataError with the number needed where it does not; warns where it does not hold as much again, which is
    fetched ahead meanwhile.
    """
    if not len(index):
        return
    sizes = np.sort(index.tar_bytes + index.index_bytes)[::-1]
    at_once = shards_at_once(config, split, len(index))
    needed = int(sizes[:at_once].sum())
    comfortable = int(sizes[: 2 * at_once].sum())
    budget = config.cache.max_gb * 1e9
    if comfortable <= budget:
        return
    how = _how_read(config, split)
    text = (
        f"data.cache.max_gb = {config.cache.max_gb:g} is too little for {where}, split '{split}': this node reads "
        f"{at_once:,} of its {len(index):,} shards at once ({how}), which take up to {_gb(needed)} GB"
    )
    # a process that was not told of its nodes, such as one that only checks, does not know how streams are shared
    if needed > budget and ("WORLD_SIZE" in os.environ or config.canonical_nodes == 1 or config.order == "global"):
        otherwise = "use order 'block'" if config.order == "global" else "lower data.block_shards"
        ahead = "so that the next ones can be fetched meanwhile"
        raise DataError(f"{text}. Set it to {_gb(comfortable)}, {ahead}, or {otherwise}")
    logger.warning(
        "%s, and %s GB with the next ones: the run will wait for them, or fetch some more than once",
        text,
        _gb(comfortable),
    )


def _how_read(config: DataConfig, split: str) -> str:
    if split != config.train_split:
        return "in order"
    if config.order == "global":
        return "order 'global' reads all shards all the time"
    return f"data.block_shards = {config.block_shards}, data.canonical_nodes = {config.canonical_nodes}"


def _gb(size: int) -> str:
    """Bytes in 10^9, rounded up, so that the number is enough."""
    return f"{np.ceil(size / 1e3) / 1e6:g}"
