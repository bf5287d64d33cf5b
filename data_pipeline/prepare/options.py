"""What can be chosen for every converter: how shards are cut, by how many processes, and what is done at an error."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.prepare.listing import ShardSize


@dataclass(frozen=True)
class BuildOptions:
    """How shards are made."""

    shard_size: ShardSize
    jobs: int
    stop_on_error: bool
