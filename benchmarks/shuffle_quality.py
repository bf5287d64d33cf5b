"""How well an order shuffles: python -m benchmarks.shuffle_quality [--samples N] [--shard-samples N] [--json FILE]

For each order it tells, as means over the epoch's batches or over its samples:

mixed       different classes in a global batch, of a set whose shards mix the classes, as data_pipeline.prepare stores
by class    the same of a set that is stored by class, so that a shard holds one class or a few
shards      different shards in a global batch
again       how often two samples of a batch are together in a batch of the next epoch, as a multiple of chance
moved       how far a sample moves from one epoch to the next, as a share of the epoch; 1/3 by chance
rank corr.  Spearman's correlation of a sample's position with its stored place; 0 by chance
open        shards that a node reads at a time, what its cache must hold; with as many nodes as streams
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.table import Table

from data_pipeline.order import EpochOrder, keyed_permutation

Ids = npt.NDArray[np.int64]
ORDERS: tuple[tuple[Literal["global", "block"], int, int], ...] = (
    ("global", 0, 1),
    *(("block", block_shards, streams) for streams in (1, 4, 16) for block_shards in (4, 16, 64)),
)
"""(order, block_shards, canonical streams)"""


@dataclass(frozen=True)
class Quality:
    """What was measured of one order; see the top of this file."""

    order: str
    block_shards: int
    streams: int
    classes_if_mixed: float
    classes_if_by_class: float
    shards: float
    again: float
    moved: float
    rank_correlation: float
    open_shards: int


def measure(
    order: Literal["global", "block"], block_shards: int, streams: int, sizes: Ids, num_classes: int, batch_size: int
) -> Quality:
    """One order's quality over a whole epoch, and from that to the next."""
    total = int(sizes.sum())
    first, second = (
        EpochOrder(order, sizes, 0, epoch, block_shards=max(block_shards, 1), streams=streams).ids(0, total)
        for epoch in (0, 1)
    )
    whole = total // batch_size * batch_size
    batches = first[:whole].reshape(-1, batch_size)
    labels = np.arange(total) * num_classes // total
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    places = np.empty((2, total), np.int64)  # position of each sample in both epochs
    for row, ids in zip(places, (first, second), strict=True):
        row[ids] = np.arange(total)
    return Quality(
        order,
        block_shards,
        streams,
        classes_if_mixed=different(labels[keyed_permutation(total, 1, 0)][batches]),
        classes_if_by_class=different(labels[batches]),
        shards=different(shard_of[batches]),
        again=together(places[1][batches] // batch_size) / (batch_size / total),
        moved=float(np.abs(places[0] - places[1]).mean() / total),
        rank_correlation=float(np.corrcoef(places[0], np.arange(total))[0, 1]),
        open_shards=block_shards if order == "block" else len(sizes),
    )


def different(batches: Ids) -> float:
    """Mean number of different values in a row."""
    return float((np.diff(np.sort(batches, axis=1), axis=1) != 0).sum(axis=1).mean() + 1)


def together(batches: Ids) -> float:
    """The share of pairs of one row (a batch of this epoch) that have equal values (their batch in the next)."""
    ordered = np.sort(batches, axis=1)
    pairs = 0
    for row in ordered:
        counts = np.unique(row, return_counts=True)[1]
        pairs += int((counts * (counts - 1)).sum())
    size = batches.shape[1]
    return pairs / (len(batches) * size * (size - 1))


def print_table(found: Sequence[Quality]) -> None:
    """One line per order."""
    table = Table(title="shuffle quality", box=box.SIMPLE, padding=0)
    columns = ("order", "block", "streams", "mixed", "by class", "shards", "again", "moved", "rank corr.", "open")
    for column in columns:
        table.add_column(column, justify="left" if column == "order" else "right")
    for row in found:
        block = str(row.block_shards) if row.order == "block" else ""
        classes = (f"{row.classes_if_mixed:.0f}", f"{row.classes_if_by_class:.0f}")
        numbers = (*classes, f"{row.shards:.0f}", f"{row.again:.2f}x", f"{row.moved:.3f}")
        table.add_row(
            row.order, block, str(row.streams), *numbers, f"{row.rank_correlation:+.3f}", str(row.open_shards)
        )
    Console().print(table)


def main() -> None:
    """Measures all orders and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_281_167, help="default %(default)s (ImageNet-1k)")
    parser.add_argument("--classes", type=int, default=1000, help="default %(default)s")
    parser.add_argument("--shard-samples", type=int, default=2400, help="default %(default)s (256 MB of ImageNet)")
    parser.add_argument("--batch-size", type=int, default=1024, help="global; default %(default)s")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args()
    whole, rest = divmod(options.samples, options.shard_samples)
    sizes = np.array([options.shard_samples] * whole + [rest] * (rest > 0))
    found = [measure(*order, sizes, options.classes, options.batch_size) for order in ORDERS]
    print_table(found)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
