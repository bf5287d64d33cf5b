"""What a folder of prepared data holds, by its indexes, or a picture of it: `python -m data_pipeline.inspect SET`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.progress import progress_bar
from data_pipeline.settings import read_settings
from data_pipeline.shards import beton, set_index
from data_pipeline.shards.beton_format import SUFFIX as BETON_SUFFIX
from data_pipeline.shards.reader import file_problems
from data_pipeline.shards.set_index import SetIndex, SplitIndex
from data_pipeline.shards.shard_index import RECORD, SUBSAMPLINGS, SUFFIX, Records
from data_pipeline.shards.source import DataError
from data_pipeline.shards.verify import Damage, load_matching_index
from data_pipeline.targets.check import SEGMENTATION
from data_pipeline.targets.masks import MaskLabels
from data_pipeline.targets.objects import ObjectLabels
from data_pipeline.verify.betons import holds_betons, number_of_classes
from data_pipeline.verify.cli import local_set

_COLUMNS = ("size", "label", "width", "height", "subsampling", "orientation", "rows_count", "target_size")
_GRID_OPTIONS = (
    "split",
    "rows",
    "columns",
    "epoch",
    "seed",
    "image_size",
    "training",
    "evaluation",
    "config",
    "set_values",
)
_MOST = 10_000
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_SHOWN_CLASSES = 20
_SHOWN_SIZES = 3
_TRAINING_SIZES = {"segmentation": "segmentation.crop_size=256", "detection": "detection.short_sides=[320]"}

_EPILOG = """\
The overview reads the indexes only, and says which files are missing or have another size;
`python -m data_pipeline.verify SET` reads everything.

  python -m data_pipeline.inspect SET --grid out.png --config configs/dgt_s_in1k.yaml
  python -m data_pipeline.inspect SET --grid out.png --set augment.rand_augment=rand-m9-mstd0.5-inc1 image_size=160
  python -m data_pipeline.inspect SET --grid out.png --training --set segmentation.crop_size=256

exit codes: 0 done, and all files are there; 1 something is missing, or there is no such set; 2 wrong usage.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Print what a folder holds, or draw some of it; returns the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not arguments.grid:
        ignored = [name for name in _GRID_OPTIONS if getattr(arguments, name) != parser.get_default(name)]
        if ignored:
            shown = ", ".join(f"--{name.removesuffix('_values').replace('_', '-')}" for name in ignored)
            parser.error(f"{shown}: of use with --grid only")
    try:
        return _draw_grid(arguments) if arguments.grid else _print_set(arguments.set)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        path = error.filename or arguments.grid or arguments.set
        print(f"error: {path} cannot be used: {error.strerror or error}.", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


@dataclass(frozen=True)
class _Facts:
    """What the shards' indexes say about a split: one entry per sample of each sound index."""

    columns: dict[str, np.ndarray]

    @classmethod
    def of(cls, parts: list[Records]) -> _Facts:
        empty = np.empty(0, RECORD)
        return cls({name: np.concatenate([part[name] for part in parts or [empty]]) for name in _COLUMNS})

    def __getitem__(self, column: str) -> np.ndarray:
        """A column of shard_index.RECORD, (samples,)."""
        return self.columns[column]


def _print_set(folder: Path) -> int:
    if holds_betons(folder):
        return _print_betons(folder)
    index = set_index.load(folder)
    _print_overview(folder, index.classes, index.kind, list(index.splits))
    if index.targets:
        print(f"  targets        {_meaning(index)}")
    damages: list[Damage] = []
    facts = {}
    with progress_bar("reading", sum(map(len, index.splits.values())), "indexes") as advance:
        for name, split in index.splits.items():
            facts[name], found = _look_into(folder / name, split, advance)
            damages += found
    for name, split in index.splits.items():
        _print_split(name, split, index, facts[name])
    return _print_verdict(folder, damages)


def _look_into(folder: Path, split: SplitIndex, advance: Callable[[int], None]) -> tuple[_Facts, list[Damage]]:
    """The facts of a split, and what is missing or has another size."""
    damages = [Damage(f"{folder.name}/{name}", "", what) for name, what in file_problems(folder, split)]
    records = []
    for name, sha256 in zip(split.names, split.sha256, strict=True):
        path = folder / name
        try:
            records.append(load_matching_index(path, sha256).records)
        except DataError as error:
            if path.with_suffix(SUFFIX).exists():  # one that is missing is among the damages already
                damages.append(Damage(f"{folder.name}/{name}", "", f"its index cannot be used: {error}"))
        advance(1)
    return _Facts.of(records), damages


def _print_overview(folder: Path, classes: Sequence[str], kind: str, splits: Sequence[str]) -> None:
    print(f"{folder}: {kind}, {len(classes):,} classes, splits {', '.join(splits)}")
    names = [f"{label} {name}" for label, name in enumerate(classes[:_SHOWN_CLASSES])]
    more = len(classes) - len(names)
    print(f"  classes        {', '.join(names)}{f', ... and {more:,} more' if more else ''}")


def _meaning(index: SetIndex) -> str:
    """What index.json says of targets, in words."""
    try:
        if index.kind == SEGMENTATION:
            labels = MaskLabels.from_json(len(index.classes), index.targets)
            return f"KEY.{index.targets.get('extension')}, values {labels}"
        masks = ObjectLabels.from_json(len(index.classes), index.targets).masks
        return f"KEY.{index.targets.get('extension')}, {'boxes and masks' if masks else 'boxes'}"
    except ValueError as error:
        return f"cannot be understood: {error}"


def _print_split(name: str, split: SplitIndex, index: SetIndex, facts: _Facts) -> None:
    print(f"{name}: {split}")
    if split.left_out:
        print(f"  left out       {split.left_out:,} images of the source that could not be used")
    if not len(facts["size"]):
        return
    print(f"  shards         {_spread(split.samples)} images each")
    if index.kind == "classification":
        labels = facts["label"]
        per_class = np.bincount(labels[labels < len(index.classes)], minlength=len(index.classes))
        print(f"  per class      {_spread(per_class)} images")
    else:
        print(f"  target files   {_spread(facts['target_size'])} bytes")
    print(f"  image files    {_spread(facts['size'])} bytes")
    print(f"  image width    {_spread(facts['width'])} pixels")
    print(f"  image height   {_spread(facts['height'])} pixels")
    print(f"  most frequent  {_most_frequent_sizes(facts)}")
    codes, counts = np.unique(facts["subsampling"], return_counts=True)
    kinds = (f"{SUBSAMPLINGS[code]} ({count:,})" for code, count in zip(codes, counts, strict=True))
    print(f"  subsampling    {', '.join(kinds)}")
    rotated, with_rows = np.count_nonzero(facts["orientation"] > 1), np.count_nonzero(facts["rows_count"])
    if rotated:
        print(f"  rotated        {rotated:,} images, by EXIF")
    if with_rows:
        print(f"  restart rows   in {with_rows:,} images")


def _spread(values: np.ndarray) -> str:
    low, middle, high = int(values.min()), float(np.median(values)), int(values.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,} (median {middle:,.0f})"


def _most_frequent_sizes(facts: _Facts) -> str:
    sizes, counts = np.unique(np.stack([facts["width"], facts["height"]], axis=1), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_SHOWN_SIZES]
    return ", ".join(f"{sizes[i][0]}x{sizes[i][1]} ({counts[i]:,})" for i in order)


def _print_betons(folder: Path) -> int:
    index = beton.load_index(folder)
    if index is None:
        splits = sorted(path.stem for path in folder.glob(f"*{BETON_SUFFIX}"))
        print(f"{folder}: .beton files that another program wrote, splits {', '.join(splits)}")
        return _print_verdict(folder, [])
    _print_overview(folder, index.classes, "classification", list(index.splits))
    damages = []
    for name, split in index.splits.items():
        print(
            f"{name}: {split.samples:,} images in one file, {split.bytes / 1e6:,.1f} MB; {split.raw:,} stored as pixels"
        )
        if split.left_out:
            print(f"  left out       {split.left_out:,} images of the source that could not be used")
        path = folder / f"{name}{BETON_SUFFIX}"
        size = path.stat().st_size if path.is_file() else None
        if size != split.bytes:
            what = "is missing" if size is None else f"has {size:,} bytes instead of {split.bytes:,}"
            damages.append(Damage(path.name, "", what))
    return _print_verdict(folder, damages)


def _print_verdict(folder: Path, damages: list[Damage]) -> int:
    for damage in damages:
        print(f"damaged: {damage}", file=sys.stderr)
    check = f"python -m data_pipeline.verify {folder}"
    if damages:
        print(f"places that are damaged: {len(damages):,}; to see all: {check}", file=sys.stderr)
        return 1
    print(f"all files are there; to read and check everything in them: {check}")
    return 0


def _draw_grid(arguments: argparse.Namespace) -> int:
    from data_pipeline.grid import Sheet, draw_samples, draw_targets

    folder: Path = arguments.set
    config = read_settings(arguments.config, arguments.set_values)
    names = ("rows", "columns", "epoch", "seed", "evaluation")
    choices = {name: getattr(arguments, name) for name in names}
    try:
        if holds_betons(folder):
            beton_index = beton.load_index(folder)
            path = folder / f"{arguments.split or config.train_split}{BETON_SUFFIX}"
            classes = len(beton_index.classes) if beton_index else number_of_classes(path)
            config = replace(config, backend="ffcv", path=str(folder), num_classes=classes)
            config = _resized(config, arguments.image_size)
            picture = draw_samples(config, Sheet(path.stem, **choices))
        else:
            index = set_index.load(folder)
            sheet = Sheet(arguments.split or config.train_split, **choices)
            if index.kind == "classification":
                config = replace(config, backend="webdataset", path=str(folder), num_classes=len(index.classes))
                picture = draw_samples(_resized(config, arguments.image_size), sheet)
            elif arguments.training:
                from data_pipeline.grid_dense import draw_training

                if arguments.image_size is not None:
                    raise DataError(
                        f"--image-size has no meaning for {index.kind} as training sees it: set its sizes with --set, "
                        f"such as {_TRAINING_SIZES[index.kind]}"
                    )
                picture = draw_training(
                    replace(config, path=str(folder), num_classes=len(index.classes)), index.kind, sheet
                )
            else:
                picture = draw_targets(folder, index, sheet, arguments.image_size)
    except ValueError as error:
        raise DataError(str(error)) from error
    picture.save(arguments.grid)
    print(f"{arguments.grid}: {picture.width}x{picture.height} pixels")
    return 0


def _resized(config: DataConfig, size: int | None) -> DataConfig:
    return config if size is None else replace(config, image_size=size, image_size_schedule=())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m data_pipeline.inspect",
        description="Print what a folder of prepared data holds, or draw a contact sheet of samples with their labels.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("set", type=local_set, metavar="SET", help="a folder made by `python -m data_pipeline.prepare`")
    grid = parser.add_argument_group("contact sheet")
    grid.add_argument(
        "--grid",
        type=_picture,
        metavar="FILE",
        help="draw samples into FILE (.png, .jpg), as the loader serves them to training; of a set for a dense task, "
        "whole images with masks or boxes over them",
    )
    grid.add_argument("--split", metavar="NAME", help="default: the one to train on")
    grid.add_argument("--rows", type=_count, default=4, metavar="N", help="default 4")
    grid.add_argument("--columns", type=_count, default=6, metavar="N", help="default 6")
    grid.add_argument("--epoch", type=int, default=0, metavar="N", help="whose order and augmentation; default 0")
    grid.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    grid.add_argument("--image-size", type=_count, metavar="PIXELS", help="in place of the configuration's")
    seen = grid.add_mutually_exclusive_group()
    seen.add_argument(
        "--training",
        action="store_true",
        help="a set for a dense task, too, as training sees it: cropped, resized and mirrored",
    )
    seen.add_argument(
        "--evaluation", action="store_true", help="as evaluation sees the images: central crop, no augmentation"
    )
    grid.add_argument("--config", type=Path, metavar="FILE", help="a configuration, whose section data is used")
    grid.add_argument(
        "--set",
        dest="set_values",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="settings of its section data, such as augment.random_erasing=0.25",
    )
    return parser


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in _PICTURES:
        raise argparse.ArgumentTypeError(f"'{text}' is no name of a picture; end it with {', '.join(_PICTURES)}")
    return path


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MOST:
        raise argparse.ArgumentTypeError(f"'{text}' is no number from 1 to {_MOST:,}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
