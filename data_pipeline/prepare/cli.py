"""The command line of `python -m data_pipeline.prepare`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from data_pipeline.prepare import digits, imagefolder
from data_pipeline.prepare.build import LEFT_OUT_FILE, Outcome, build
from data_pipeline.prepare.listing import Listing, ShardSize
from data_pipeline.prepare.make_shard import printable
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


CONVERTERS: tuple[Converter, ...] = (imagefolder, digits)

EXIT_DONE, EXIT_ERROR, EXIT_LEFT_OUT, EXIT_INTERRUPTED = 0, 1, 3, 130
_SHOWN = 20

_EPILOG = """\
The output is OUT/SPLIT/shard-000000.tar ... (plain WebDataset tars: KEY.jpg and KEY.cls), an index beside each, and
OUT/index.json, written last. The same input gives the same bytes. A run that was interrupted is continued by the same
command: finished shards are verified and kept. A run on a finished output checks names and sizes, and does nothing;
`python -m data_pipeline.inspect` checks every byte.

exit codes: 0 done; 1 error, nothing usable or unfinished; 2 wrong usage; 3 done, but some images could not be read and
are left out (they are listed, and written to OUT/left_out.jsonl); 130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare shards as the arguments say; returns the exit code."""
    arguments = _parser().parse_args(argv)
    started = time.monotonic()
    try:
        listing = _list_source(arguments)
        options = BuildOptions(arguments.shard_size, arguments.jobs, arguments.on_error == "stop")
        outcome = build(listing, arguments.out, options)
    except DataError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return EXIT_ERROR
    except OSError as error:
        print(f"error: {printable(str(error.filename))} cannot be read: {error.strerror}.", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue: finished shards are kept.", file=sys.stderr)
        return EXIT_INTERRUPTED
    _print_summary(arguments.out, listing, outcome, time.monotonic() - started)
    return EXIT_LEFT_OUT if outcome.left_out else EXIT_DONE


def _list_source(arguments: argparse.Namespace) -> Listing:
    if "src" in arguments:
        source, out = arguments.src.resolve(), arguments.out.resolve()
        if out == source or source in out.parents:
            raise DataError(f"--out {arguments.out} lies inside --src {arguments.src}; choose a folder outside of it.")
    listing: Listing = arguments.list_source(arguments)
    return listing


def _print_summary(out: Path, listing: Listing, outcome: Outcome, seconds: float) -> None:
    _print_some("left out", [f"{printable(entry.path)}: {printable(entry.reason)}" for entry in outcome.left_out])
    _print_some("passed over, being in no class folder", [printable(name) for name in listing.outside])
    if listing.ignored:
        kinds = ", ".join(f"{kind} ({count:,})" for kind, count in listing.ignored.items())
        print(f"passed over, being no images: {printable(kinds)}")
    if outcome.was_finished:
        print(f"{out} was complete already; nothing was done.")
    total = 0
    for name, split in outcome.index.splits.items():
        total += split.total
        left_out = f", {split.left_out:,} images left out" if split.left_out else ""
        print(f"{name}: {split}{left_out}")
    if not outcome.was_finished:
        rate = f"{total / seconds:,.0f} images/s, " if outcome.shards_kept == 0 else ""
        print(
            f"{out}: {len(outcome.index.classes):,} classes; {outcome.shards_written} shards written, "
            f"{outcome.shards_kept} kept; {rate}{seconds:.1f} s"
        )
    if outcome.left_out:
        print(f"{len(outcome.left_out):,} images could not be read and are left out: see {out / LEFT_OUT_FILE}")
    print(f"look at it: python -m data_pipeline.inspect {out}")


def _print_some(what: str, lines: list[str]) -> None:
    for line in lines[:_SHOWN]:
        print(f"{what}: {line}", file=sys.stderr)
    if len(lines) > _SHOWN:
        print(f"{what}: {len(lines) - _SHOWN} more", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m data_pipeline.prepare",
        description="Turn images into shards for training.",
        epilog=_EPILOG,
        formatter_class=raw,
    )
    converters = parser.add_subparsers(dest="converter", required=True, metavar="CONVERTER", title="converters")
    for converter in CONVERTERS:
        own = converters.add_parser(converter.NAME, help=converter.HELP, formatter_class=raw)
        own.set_defaults(list_source=converter.list_source)
        converter.add_arguments(own)
        own.epilog = f"{own.epilog or ''}\n{_EPILOG}".lstrip()
        _add_common_arguments(own)
    return parser


def _add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder for the shards")
    parser.add_argument(
        "--shard-size",
        type=_shard_size,
        default=ShardSize.parse("64MB"),
        metavar="SIZE",
        help="the largest shard: samples (10000) or bytes (64MB, 256MiB); default 64MB",
    )
    parser.add_argument(
        "--jobs",
        type=_jobs,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes; default: the %(default)s cores this program may use",
    )
    parser.add_argument(
        "--on-error",
        choices=("skip", "stop"),
        default="skip",
        help="at an unreadable image: leave it out, report it and end with exit code 3 (skip, the default); "
        "or stop at once with exit code 1",
    )


def _shard_size(text: str) -> ShardSize:
    try:
        return ShardSize.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _jobs(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of processes; give 1 or more")
    return int(text)
