"""Look into a folder of prepared shards and check it: `python -m data_pipeline.inspect SHARDS`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.progress import progress_bar
from data_pipeline.shards import set_index
from data_pipeline.shards.reader import file_problems
from data_pipeline.shards.set_index import SetIndex, SplitIndex
from data_pipeline.shards.shard_index import SUBSAMPLINGS, Records
from data_pipeline.shards.source import DataError
from data_pipeline.shards.verify import Damage, load_matching_index, verify_shard

_SHOWN_CLASSES = 20
_SHOWN_SIZES = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Print what a folder of shards holds; returns 0 where it is sound, 1 where anything is damaged or missing."""
    arguments = _parser().parse_args(argv)
    folder: Path = arguments.shards
    try:
        index = set_index.load(folder)
        damages: list[Damage] = []
        _print_overview(folder, index)
        total = sum(split.total for split in index.splits.values())
        with progress_bar("checking" if arguments.verify else "reading", total) as advance:
            findings = {
                name: _look_into(folder / name, split, advance, arguments.verify)
                for name, split in index.splits.items()
            }
        for name, (facts, found) in findings.items():
            _print_split(name, index.splits[name], len(index.classes), facts)
            damages += found
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename} cannot be read: {error.strerror}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return _print_verdict(folder, damages, arguments.verify)


@dataclass(frozen=True)
class _Facts:
    """What the shards' indexes say about the images of a split: one entry per sample of each sound index."""

    sizes: np.ndarray
    labels: np.ndarray
    widths: np.ndarray
    heights: np.ndarray
    subsamplings: np.ndarray

    @classmethod
    def of(cls, parts: list[Records]) -> _Facts:
        columns = ("size", "label", "width", "height", "subsampling")
        return cls(*(np.concatenate([part[name] for part in parts] or [np.empty(0, "<u4")]) for name in columns))


def _look_into(
    folder: Path, split: SplitIndex, advance: Callable[[int], None], verify: bool
) -> tuple[_Facts, list[Damage]]:
    """The facts of a split, and all its damages."""
    damages = [Damage(f"{folder.name}/{name}", "", what) for name, what in file_problems(folder, split)]
    records = []
    for name, sha256 in zip(split.names, split.sha256, strict=True):
        path = folder / name
        try:
            index = load_matching_index(path, sha256)
        except DataError as error:
            damage = Damage(f"{folder.name}/{name}", "", f"its index cannot be used: {error}")
            if path.with_suffix(".idx").exists():  # one that is missing is among the damages already
                damages.append(damage)
            continue
        records.append(index.records)
        if verify and path.exists():
            damages += verify_shard(path, index, advance)
        else:
            advance(len(index.keys))
    return _Facts.of(records), damages


def _print_overview(folder: Path, index: SetIndex) -> None:
    print(f"{folder}: {len(index.classes):,} classes, splits {', '.join(index.splits)}")
    names = [f"{label} {name}" for label, name in enumerate(index.classes[:_SHOWN_CLASSES])]
    more = len(index.classes) - len(names)
    print(f"  classes        {', '.join(names)}{f', ... and {more:,} more' if more else ''}")


def _print_split(name: str, split: SplitIndex, num_classes: int, facts: _Facts) -> None:
    print(f"{name}: {split}")
    if split.left_out:
        print(f"  left out       {split.left_out:,} images of the source that could not be read")
    if not len(facts.sizes):
        return
    per_class = np.bincount(facts.labels, minlength=num_classes)
    print(f"  shards         {_spread(split.samples)} images each")
    print(f"  per class      {_spread(per_class)} images")
    print(f"  image files    {_spread(facts.sizes)} bytes")
    print(f"  image width    {_spread(facts.widths)} pixels")
    print(f"  image height   {_spread(facts.heights)} pixels")
    print(f"  most frequent  {_most_frequent_sizes(facts)}")
    codes, counts = np.unique(facts.subsamplings, return_counts=True)
    kinds = (f"{SUBSAMPLINGS[code]} ({count:,})" for code, count in zip(codes, counts, strict=True))
    print(f"  subsampling    {', '.join(kinds)}")


def _spread(values: np.ndarray) -> str:
    low, middle, high = int(values.min()), float(np.median(values)), int(values.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,} (median {middle:,.0f})"


def _most_frequent_sizes(facts: _Facts) -> str:
    sizes, counts = np.unique(np.stack([facts.widths, facts.heights], axis=1), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_SHOWN_SIZES]
    return ", ".join(f"{sizes[i][0]}x{sizes[i][1]} ({counts[i]:,})" for i in order)


def _print_verdict(folder: Path, damages: list[Damage], verify: bool) -> int:
    if not damages:
        checked = "every shard, tar header, image and label is as it was written" if verify else "all files are there"
        print(f"sound: {checked}")
        return 0
    for damage in damages:
        print(f"damaged: {damage}", file=sys.stderr)
    shards = len({damage.shard for damage in damages})
    print(
        f"places that are damaged: {len(damages):,}, files: {shards:,}. Delete the damaged shards and run the prepare "
        f"command that made {folder} again (it rebuilds only what is missing), or copy them anew.",
        file=sys.stderr,
    )
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m data_pipeline.inspect",
        description="Print what a folder of prepared shards holds, and check it: sizes and SHA-256 of the shards, tar "
        "headers, checksum of every image, every label. Exit code 1 where anything is damaged; each damaged shard and "
        "key is named.",
    )
    parser.add_argument(
        "shards", type=Path, metavar="SHARDS", help="a folder made by `python -m data_pipeline.prepare`"
    )
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read all shards and check them (the default), or look at the indexes and file sizes only",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
