"""The command line of `python -m data_pipeline.prepare`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from data_pipeline.prepare import (
    ade20k,
    coco,
    digits,
    imagefolder,
    imagenet,
    imagenet22k,
    mask_folders,
    options,
    shapes,
    synthetic_jpegs,
    webdataset,
)
from data_pipeline.prepare.beton import build_beton
from data_pipeline.prepare.build import Outcome, build, merge
from data_pipeline.prepare.left_out import LEFT_OUT_FILE, printable
from data_pipeline.prepare.listing import Listing
from data_pipeline.prepare.options import BuildOptions
from data_pipeline.shards.source import DataError


class Converter(Protocol):
    """A module that knows one form in which data sets are found. It imports what is heavy where it uses it."""

    NAME: str
    """What the user types."""

    HELP: str
    """One line of the list of converters."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the converter's own arguments; may set the parser's description and begin its epilog."""

    def list_source(self, arguments: argparse.Namespace) -> Listing:
        """What the source holds. Raises DataError, before anything is written, where it is not what it should be."""
        ...


CONVERTERS: tuple[Converter, ...] = (
    imagefolder,
    imagenet,
    imagenet22k,
    webdataset,
    ade20k,
    mask_folders,
    coco,
    digits,
    shapes,
    synthetic_jpegs,
)

EXIT_DONE, EXIT_ERROR, EXIT_LEFT_OUT, EXIT_INTERRUPTED = 0, 1, 3, 130
_SHOWN = 20

_EPILOG = """\
The output is OUT/SPLIT/shard-000000.tar ... (plain WebDataset tars: KEY.jpg with KEY.cls or a target), an index beside
each, and OUT/index.json, written last. Images are copied byte by byte, unless an option says otherwise; each is
decoded once, as strictly as training does it, and what cannot be decoded is reported. The same input gives the same
bytes.

A run that was interrupted is continued by the same command: finished shards are compared with the source and kept. A
run on a finished output checks names and sizes, and does nothing; `python -m data_pipeline.verify` checks every byte.

Several jobs can share the work, such as a Slurm array: each runs the command with --part I/N, and when all have ended,
one runs it with --merge. The result is the same as that of one run, byte for byte.

With --format ffcv the output is one OUT/SPLIT.beton per split, the samples in the same order. It is written from the
beginning when it was interrupted.

exit codes: 0 done; 1 error, nothing usable or unfinished; 2 wrong usage; 3 done, but some images could not be read and
are left out (they are listed, and written to OUT/left_out.jsonl; a part ends with 0, and the merge with 3); 130
interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare shards as the arguments say; returns the exit code."""
    command_line = parser()
    arguments = command_line.parse_args(argv)
    try:
        chosen = options.from_arguments(arguments)
    except ValueError as error:
        command_line.error(str(error))
    started = time.monotonic()
    try:
        listing = None if arguments.merge else _list_source(arguments)
        outcome = _prepare(arguments, listing, chosen)
    except DataError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return EXIT_ERROR
    except OSError as error:
        what = f"{error.filename} cannot be read: " if error.filename else ""
        print(f"error: {printable(what)}{error.strerror or error}.", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        kept = "it starts over" if chosen.format == "ffcv" else "finished shards are kept"
        print(f"interrupted; run the same command again to continue: {kept}.", file=sys.stderr)
        return EXIT_INTERRUPTED
    try:
        if listing is not None:
            _print_passed_over(listing)
        _print_summary(arguments.out, chosen, outcome, time.monotonic() - started)
        sys.stdout.flush()
    except BrokenPipeError:  # who read it has gone, as `head` does; Python flushes once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    # A part that is done is one that Slurm's afterok waits for; what it left out, the merge reports.
    return EXIT_LEFT_OUT if outcome.left_out and chosen.part is None else EXIT_DONE


def _prepare(arguments: argparse.Namespace, listing: Listing | None, chosen: BuildOptions) -> Outcome:
    if listing is None:
        return merge(arguments.out, arguments.converter, chosen)
    if chosen.format == "ffcv":
        return build_beton(listing, arguments.out, chosen)
    return build(listing, arguments.out, chosen)


def _list_source(arguments: argparse.Namespace) -> Listing:
    if "src" in arguments:
        source, out = arguments.src.resolve(), arguments.out.resolve()
        if out == source or source in out.parents:
            raise DataError(f"--out {arguments.out} lies inside --src {arguments.src}; choose a folder outside of it.")
    listing: Listing = arguments.list_source(arguments)
    _print_some("warning", [printable(warning) for warning in listing.warnings])
    return listing


def _print_passed_over(listing: Listing) -> None:
    _print_some("passed over, being in no class folder", [printable(name) for name in listing.outside])
    if listing.ignored:
        kinds = ", ".join(f"{kind} ({count:,})" for kind, count in listing.ignored.items())
        print(f"passed over, being no images: {printable(kinds)}")


def _print_summary(out: Path, chosen: BuildOptions, outcome: Outcome, seconds: float) -> None:
    _print_some("left out", [str(entry) for entry in outcome.left_out])
    if outcome.was_finished:
        print(f"{out} was complete already; nothing was done.")
    part = f"part {chosen.part}: " if chosen.part and not outcome.was_finished else ""
    for name, split in outcome.index.splits.items():
        left_out = f", {split.left_out:,} images left out" if split.left_out else ""
        print(f"{part}{name}: {split}{left_out}")
    if outcome.counts:
        counts = ", ".join(f"{count:,} {trait}" for trait, count in sorted(outcome.counts.items()))
        print(f"of {outcome.counted:,} images: {counts}")
    if not outcome.was_finished:
        rate = f"{outcome.images_written / seconds:,.0f} images/s, " if outcome.images_written else ""
        print(
            f"{part}{out}: {len(outcome.index.classes):,} classes; {outcome.shards_written} shards written, "
            f"{outcome.shards_kept} kept; {rate}{seconds:.1f} s"
        )
    if part:
        print(f"when all {chosen.part.of if chosen.part else 0} parts have ended: the same command with --merge")
        return
    if outcome.left_out:
        print(f"{len(outcome.left_out):,} images could not be read and are left out: see {out / LEFT_OUT_FILE}")
    print(f"look at it: python -m data_pipeline.inspect {out}")


def _print_some(what: str, lines: list[str]) -> None:
    for line in lines[:_SHOWN]:
        print(f"{what}: {line}", file=sys.stderr)
    if len(lines) > _SHOWN:
        print(f"{what}: {len(lines) - _SHOWN} more", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """The command line, with a subcommand for each converter."""
    raw = argparse.RawDescriptionHelpFormatter
    listed = "\n".join(f"  {converter.NAME:<15}{converter.HELP}" for converter in CONVERTERS)
    result = argparse.ArgumentParser(
        "python -m data_pipeline.prepare",
        description="Turn images into shards for training.\n\n"
        f"converters, by what they read (each has a --help of its own):\n{listed}",
        epilog=_EPILOG,
        formatter_class=raw,
    )
    converters = result.add_subparsers(dest="converter", required=True, metavar="CONVERTER", help="one of the above")
    for converter in CONVERTERS:
        own = converters.add_parser(converter.NAME, formatter_class=raw)
        own.set_defaults(list_source=converter.list_source)
        converter.add_arguments(own)
        own.epilog = f"{own.epilog or ''}\n{_EPILOG}".lstrip()
        options.add_arguments(own)
    return result
