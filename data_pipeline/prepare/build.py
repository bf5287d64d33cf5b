"""From a listing to a finished folder of shards: order, processes, resuming, the index at the end.

Every shard is a pure function of the listing, so a shard that is there and right is kept, one that is missing or
damaged is made again, and index.json, written last, says that all of them are there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.prepare.listing import Listing, cut_into_shards, mixed, source_digest
from data_pipeline.prepare.make_shard import LeftOut, ShardJob, ShardResult
from data_pipeline.prepare.options import BuildOptions
from data_pipeline.prepare.parallel import run_jobs
from data_pipeline.shards import set_index, shard_index
from data_pipeline.shards.files import TEMPORARY_PREFIX, atomic_write
from data_pipeline.shards.set_index import SetIndex, SplitIndex
from data_pipeline.shards.source import DataError
from data_pipeline.shards.writer import member_bytes

RECORD_FILE = "prepare.json"
LEFT_OUT_FILE = "left_out.jsonl"


@dataclass(frozen=True)
class Outcome:
    """What a build did."""

    index: SetIndex
    left_out: list[LeftOut]
    shards_written: int
    shards_kept: int
    was_finished: bool
    """index.json was there already, and every shard with it."""


def build(listing: Listing, out: Path, options: BuildOptions) -> Outcome:
    """Make the folder `out` hold the listing's images as shards, continuing whatever an earlier run has done.

    Raises DataError where `out` holds something else, where it cannot be written, and where images are unreadable and
    `options.stop_on_error` is set.
    """
    record = _record(listing, options)
    try:
        _claim(out, record)
        with _locked(out):
            return _build_locked(listing, out, options)
    except OSError as error:
        raise DataError(f"{error.filename or out} cannot be used: {error.strerror or error}.") from error


def _build_locked(listing: Listing, out: Path, options: BuildOptions) -> Outcome:
    finished = _finished_index(out, listing)
    plan = _plan(listing, out, options, finished)
    jobs = [job for split in plan.values() for job in split]
    for split in plan:
        (out / split).mkdir(exist_ok=True)
        _remove_unfinished(out / split)
    missing = [job for job in jobs if not job.path.with_suffix(shard_index.SUFFIX).exists()]
    _require_space(out, missing)
    processes = 1 if finished and not missing else options.jobs  # looking at what is there is quick
    results = iter(run_jobs(jobs, processes))
    by_split = {split: [next(results) for _ in split_jobs] for split, split_jobs in plan.items()}
    for split, split_jobs in plan.items():
        _remove_leftover_shards(out / split, split_jobs)
    index = SetIndex(
        listing.classes, {split: _split_index(plan[split], by_split[split]) for split in plan}, listing.kind
    )
    for split, part in index.splits.items():
        if part.total == 0:
            raise DataError(
                f"None of the {part.left_out} images of the split '{split}' can be read; see the files above."
            )
    done = [result for split_results in by_split.values() for result in split_results]
    left_out = [entry for result in done for entry in result.left_out]
    _write_if_changed(out / LEFT_OUT_FILE, b"".join(_report_line(entry) for entry in left_out))
    _write_if_changed(out / set_index.FILE_NAME, set_index.to_bytes(index))
    kept = sum(result.kept for result in done)
    return Outcome(index, left_out, len(done) - kept, kept, was_finished=finished is not None and kept == len(done))


def _finished_index(out: Path, listing: Listing) -> SetIndex | None:
    """The index of a finished output; where it is missing, damaged or another set's, nothing is taken for finished."""
    try:
        index = set_index.load(out)
    except DataError:
        return None
    return index if index.splits.keys() == listing.splits.keys() else None


def _plan(listing: Listing, out: Path, options: BuildOptions, finished: SetIndex | None) -> dict[str, list[ShardJob]]:
    """The shards of every split; raises DataError where a finished output has more or fewer of them."""
    plan = {}
    for split, items in listing.splits.items():
        shards = cut_into_shards(mixed(items), options.shard_size)
        digests = finished.splits[split].sha256 if finished else (None,) * len(shards)
        if len(digests) != len(shards):  # the images' sizes decide on it
            raise DataError(
                f"The source of {out} has changed since that was finished ({len(shards)} shards for '{split}' instead "
                f"of {len(digests)}). Prepare it into another folder, or delete that one first."
            )
        plan[split] = [
            ShardJob(out / split / f"shard-{number:06d}.tar", shard, listing.read, sha256, options.stop_on_error)
            for number, (shard, sha256) in enumerate(zip(shards, digests, strict=True))
        ]
    return plan


def _split_index(jobs: list[ShardJob], results: list[ShardResult]) -> SplitIndex:
    return SplitIndex(
        names=tuple(job.path.name for job in jobs),
        samples=np.array([result.shard.samples for result in results], dtype=np.int64),
        tar_bytes=np.array([result.shard.tar_bytes for result in results], dtype=np.int64),
        index_bytes=np.array([result.shard.index_bytes for result in results], dtype=np.int64),
        sha256=tuple(result.shard.sha256 for result in results),
        left_out=sum(len(result.left_out) for result in results),
    )


def _record(listing: Listing, options: BuildOptions) -> dict[str, object]:
    """What decides the content of the shards; a later run into the same folder must agree with it."""
    return {
        "converter": listing.converter,
        "options": {**listing.options, "shard_size": options.shard_size.text},
        "images": sum(len(items) for items in listing.splits.values()),
        "source": source_digest(listing),
    }


def _claim(out: Path, record: dict[str, object]) -> None:
    """Make `out` ours, or see that it is; raises DataError where it holds anything else."""
    path = out / RECORD_FILE
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        strangers = [name for name in sorted(os.listdir(out)) if not name.startswith(TEMPORARY_PREFIX)]
        if strangers:
            raise DataError(f"{out} is not empty (it holds {', '.join(strangers[:3])}); choose a new folder for --out.")
        with atomic_write(path) as file:
            file.write((json.dumps(record, indent=1) + "\n").encode())
        return
    try:
        earlier = json.loads(path.read_bytes())
        differences = _differences(earlier, record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}); delete {out} and prepare it again.") from error
    if differences:
        raise DataError(
            f"{out} was made differently: {'; '.join(differences)}. "
            "Run with the same source and options to continue it, choose another --out, or delete it first."
        )


def _differences(earlier: dict[str, object], now: dict[str, object]) -> list[str]:
    if earlier["converter"] != now["converter"]:
        return [f"with '{earlier['converter']}', not '{now['converter']}'"]
    before, after = dict(earlier["options"]), dict(now["options"])  # type: ignore[call-overload]
    found = [
        f"{name.replace('_', '-')} was {before.get(name, 'not given')}, now {after.get(name, 'not given')}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    if not found and earlier["source"] != now["source"]:
        found.append(f"from a source of {earlier['images']:,} images; this one has {now['images']:,}, or other names")
    return found


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep a second run out of the folder. The lock goes with the process, however it ends."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(descriptor)
            raise DataError(f"Another run is preparing {out} at this moment; wait for it to end.") from error
        # A network file system without locks on folders: shards are still written whole, under names of their own.
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _remove_unfinished(folder: Path) -> None:
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        path.unlink(missing_ok=True)


def _remove_leftover_shards(folder: Path, jobs: list[ShardJob]) -> None:
    """Remove shards that an interrupted run with other image sizes left beyond the present last one."""
    planned = {job.path.name for job in jobs} | {job.path.with_suffix(shard_index.SUFFIX).name for job in jobs}
    for path in folder.glob("shard-*"):
        if path.name not in planned:
            path.unlink()


def _require_space(out: Path, jobs: list[ShardJob]) -> None:
    needed = sum(member_bytes(item.size) for job in jobs for item in job.items)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise DataError(f"The disk of {out} has {free / 1e9:.1f} GB free; the shards need {needed / 1e9:.1f} GB.")


def _report_line(entry: LeftOut) -> bytes:
    return (json.dumps({"split": entry.split, "path": entry.path, "reason": entry.reason}) + "\n").encode()


def _write_if_changed(path: Path, content: bytes) -> None:
    """Write the file, or remove it where there is nothing to say."""
    if path.exists() and path.read_bytes() == content:
        return
    if not content:
        path.unlink(missing_ok=True)
        return
    with atomic_write(path) as file:
        file.write(content)
