"""Read everything in a set of shards and report what is wrong: `python -m data_pipeline.verify SET`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline.progress import progress_bar
from data_pipeline.shards import set_index
from data_pipeline.shards.source import DataError
from data_pipeline.shards.verify import Damage

EXIT_SOUND, EXIT_DAMAGED, EXIT_UNCHECKED, EXIT_INTERRUPTED = 0, 1, 3, 130
_MOST_THREADS = 1024

_EPILOG = """\
Checked are, in every split: that all files of index.json are there with their sizes and SHA-256, and no other shards;
the indexes beside the shards, the places of restart rows in them among it; the header of every file in the tars; the
checksum of every image, label and target; that every image can be decoded without a complaint of the decoder and has
the size, subsampling and rotation that the index states; that every label is one of the classes; that every mask has
its image's size and known values only, and every annotation a known class, a box in the image and a sound
segmentation; that no key, image id or annotation id occurs twice in a split. Of .beton files: size and SHA-256 (where
index.json states them), metadata, allocation table, labels, and every image.

exit codes: 0 sound; 1 damaged, or something is missing; 2 wrong usage; 3 there is no set that could be checked; 130
interrupted. Where the report could not be written it is 3, too, unless something is damaged.
"""


@dataclass(frozen=True)
class Report:
    """What was found."""

    kind: str
    """What the set is for: classification, segmentation or detection."""

    samples: dict[str, int]
    """Of each split, as its index states it."""

    damages: list[Damage]


def main(argv: Sequence[str] | None = None) -> int:
    """Check a set; returns the exit code."""
    arguments = _parser().parse_args(argv)
    started = time.monotonic()
    try:
        report = verify_set(arguments.set, arguments.jobs, arguments.decode)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_UNCHECKED
    except OSError as error:
        print(f"error: {error.filename or arguments.set} cannot be used: {error.strerror or error}.", file=sys.stderr)
        return EXIT_UNCHECKED
    except KeyboardInterrupt:
        print("interrupted; nothing can be said of the set.", file=sys.stderr)
        return EXIT_INTERRUPTED
    status = _print_verdict(arguments.set, report, arguments.decode, time.monotonic() - started)
    if arguments.json:
        try:
            arguments.json.write_bytes(to_json(arguments.set, arguments.decode, report))
        except OSError as error:
            print(f"error: {arguments.json} cannot be written: {error.strerror or error}.", file=sys.stderr)
            return status or EXIT_UNCHECKED
    return status


def verify_set(folder: Path, jobs: int, decode: bool) -> Report:
    """Read a whole set with `jobs` threads; without `decode`, bytes are checked and not what they mean.

    Raises DataError where there is no set, or no index of it.
    """
    from data_pipeline.verify import betons, tars

    if betons.holds_betons(folder):
        samples, damages = betons.verify_betons(folder, jobs, decode)
        return Report("classification", samples, damages)
    index = set_index.load(folder)
    samples = {name: split.total for name, split in index.splits.items()}
    with progress_bar("verifying", sum(samples.values())) as advance:
        return Report(index.kind, samples, tars.verify_tars(folder, index, jobs, decode, advance))


def to_json(folder: Path, decoded: bool, report: Report) -> bytes:
    """The report as JSON."""
    content = {
        "set": str(folder),
        "kind": report.kind,
        "samples": report.samples,
        "decoded": decoded,
        "sound": not report.damages,
        "damages": [asdict(damage) for damage in report.damages],
    }
    return (json.dumps(content, indent=1) + "\n").encode()


def _print_verdict(folder: Path, report: Report, decoded: bool, seconds: float) -> int:
    counts = ", ".join(f"{name} {count:,}" for name, count in report.samples.items())
    print(f"{folder}: {report.kind}, samples: {counts}; read in {seconds:.1f} s")
    if not report.damages:
        print("sound: " + ("every file, image and target is as it must be" if decoded else "every byte is as written"))
        return EXIT_SOUND
    for damage in report.damages:
        print(f"damaged: {str(damage).encode(errors='backslashreplace').decode()}", file=sys.stderr)
    files = len({damage.shard for damage in report.damages})
    print(
        f"places that are damaged: {len(report.damages):,}, files: {files:,}. Delete the damaged files and run the "
        f"prepare command that made {folder} again (it rebuilds only what is missing), or copy them anew.",
        file=sys.stderr,
    )
    return EXIT_DAMAGED


def local_set(text: str) -> Path:
    """A command's argument SET, which must be a folder on a disk."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is remote: look at the set where it lies on a disk, or copy it")
    return Path(text)


def _report_file(text: str) -> Path:
    """A file that can be written, as far as can be told before hours of reading."""
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written: give a file in a folder that is there")
    return path


def _threads(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MOST_THREADS:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of threads; give 1 to {_MOST_THREADS}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m data_pipeline.verify",
        description="Read a set of shards from the first byte to the last, decode every image, report what is wrong.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("set", type=local_set, metavar="SET", help="a folder made by `python -m data_pipeline.prepare`")
    parser.add_argument(
        "--jobs",
        type=_threads,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="threads, each of which reads a shard at a time; default: the %(default)s cores this program may use",
    )
    parser.add_argument(
        "--decode",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="decode images and read targets (the default); without it, bytes are compared with the checksums only",
    )
    parser.add_argument("--json", type=_report_file, metavar="FILE", help="write the report as JSON, too")
    return parser
