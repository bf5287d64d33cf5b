"""From a listing to a finished folder of shards: order, processes, resuming, the index at the end.

Every shard is a pure function of the listing, so a shard that is there and right is kept, one that is missing or
damaged is made again, and index.json, written last, says that all of them are there.
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.prepare import folder, parts, recode
from data_pipeline.prepare.folder import PROGRESS_FOLDER, locked
from data_pipeline.prepare.left_out import LEFT_OUT_FILE, LeftOut, nothing_left, read_lines, to_lines
from data_pipeline.prepare.listing import Item, Listing, cut_evenly, cut_into_shards, mixed, source_digest
from data_pipeline.prepare.load import Loading
from data_pipeline.prepare.make_shard import ShardJob, ShardResult
from data_pipeline.prepare.options import BuildOptions
from data_pipeline.prepare.parallel import run_jobs
from data_pipeline.shards import set_index, shard_index
from data_pipeline.shards.files import TEMPORARY_PREFIX
from data_pipeline.shards.set_index import SetIndex, SplitIndex
from data_pipeline.shards.source import DataError
from data_pipeline.shards.writer import WrittenShard, member_bytes

Results = dict[str, list[tuple[str, ShardResult]]]
"""Of each split, (file name of the tar, what became of it) in order."""

Cut = dict[str, list[list[Item]]]
"""Of each split, the items of its shards in order."""


@dataclass(frozen=True)
class Outcome:
    """What a build did."""

    index: SetIndex
    """Of the whole set; of the shards that it made, where it was one part of the work."""

    left_out: list[LeftOut]
    shards_written: int
    shards_kept: int

    images_written: int
    """Those in shards that were written now."""

    counts: dict[str, int]
    """How many images have which traits (load.Loaded.traits)."""

    counted: int
    """How many images `counts` is about: all but those in kept shards of which nothing is remembered."""

    was_finished: bool
    """index.json was there already, and every shard with it."""


def build(listing: Listing, out: Path, options: BuildOptions) -> Outcome:
    """Make the folder `out` hold the listing's images as shards, continuing whatever an earlier run has done.

    With `options.part`, only that share of them, and what `merge` needs to know of it. Raises DataError where `out`
    holds something else, where it cannot be written, where images are unreadable and `options.stop_on_error` is set,
    and where the options cannot be followed.
    """
    _require_possible(listing, options)
    cut = _cut(listing, options)
    another = f"Another run is preparing {out}"
    try:
        if not (out / folder.RECORD_FILE).exists():  # once `out` is claimed, other options would be refused
            shards = parts.shards_of([shard for split in cut.values() for shard in split], options.part)
            _require_space(out, shards, options)
        folder.claim(out, record_of(listing, options))
        with locked(out, shared=options.part is not None, whose=another):
            finished = _finished_index(out)
            if finished is not None and finished.splits.keys() != listing.splits.keys():
                finished = None  # another set's index
            if options.part is None or finished is not None:
                return _build_locked(listing, cut, out, options, finished)
            with locked(parts.begin(out, options.part), shared=False, whose=f"{another}, part {options.part},"):
                return _build_locked(listing, cut, out, options, finished)
    except OSError as error:
        raise DataError(folder.why_not_used(out, error)) from error


def merge(out: Path, converter: str, options: BuildOptions) -> Outcome:
    """Write the index of a set whose parts were made one by one. It looks at sizes and indexes, and reads no image.

    Raises DataError where there are no parts, where some are missing, and where they were made with other options.
    """
    try:
        if not out.is_dir():
            raise DataError(f"There is nothing to merge: there is no folder {out}. Run the parts (--part) first.")
        folder.require_options(out, converter, options.recorded())
        with locked(out, shared=False, whose=f"Another run is preparing {out}"):
            finished = _finished_index(out)
            if finished is not None:  # the index is written last
                return _look_at_finished(out, finished)
            merged = parts.collect(out)
            about = SetIndex(merged.classes, {}, merged.kind, merged.targets)
            return _conclude(out, about, merged.splits)
    except OSError as error:
        raise DataError(folder.why_not_used(out, error)) from error


def _require_possible(listing: Listing, options: BuildOptions) -> None:
    if options.recode.restart_rows:
        recode.require_tool()
    if options.recode.max_size is not None and listing.kind != "classification" and listing.resize_target is None:
        raise DataError(f"--max-size cannot be used with {listing.converter}: its targets would not fit the images.")


def _build_locked(listing: Listing, cut: Cut, out: Path, options: BuildOptions, finished: SetIndex | None) -> Outcome:
    about = SetIndex(listing.classes, {}, listing.kind, _targets(listing))
    plan = _plan(cut, Loading.of(listing, options.recode), out, options, finished)
    jobs = parts.shards_of([job for split in plan.values() for job in split], options.part)
    for split in plan:
        (out / split).mkdir(exist_ok=True)
        own = {job.path.stem for job in jobs if job.path.parent.name == split}
        _remove_unfinished(out / split, own if options.part else None)
    missing = [job for job in jobs if not job.path.with_suffix(shard_index.SUFFIX).exists()]
    _require_space(out, [job.items for job in missing], options)
    processes = 1 if finished and not missing else options.jobs  # looking at what is there is quick
    results = dict(zip((job.path for job in jobs), run_jobs(jobs, processes), strict=True))
    made: Results = {
        split: [(job.path.name, results[job.path]) for job in split_jobs if job.path in results]
        for split, split_jobs in plan.items()
    }
    if options.part is None:
        return _conclude(out, about, made, finished=finished is not None)
    if finished is None:
        shares = {
            split: parts.Share(len(jobs), [(n, results[job.path]) for n, job in enumerate(jobs) if job.path in results])
            for split, jobs in plan.items()
        }
        parts.finish(out, options.part, about.classes, about.kind, about.targets, shares)
    return _outcome(_set_index(about, made), made, finished=finished is not None)


def _targets(listing: Listing) -> dict[str, Any]:
    """What index.json says of the target files; nothing where there are none."""
    return {"extension": listing.target_extension, **listing.targets} if listing.target_extension else {}


def _conclude(out: Path, about: SetIndex, results: Results, finished: bool = False) -> Outcome:
    """All shards are there: write what stands beside them, the index last, and clear away what is not needed.

    `about` is the index as far as it is known without them.
    """
    index = _set_index(about, results)
    outcome = _outcome(index, results, finished)
    for split, part in index.splits.items():
        if part.total == 0:
            raise nothing_left(split, outcome.left_out)
    for split, shards in results.items():
        _remove_leftover_shards(out / split, {name for name, _ in shards})
    folder.write_if_changed(out / LEFT_OUT_FILE, to_lines(outcome.left_out))
    folder.write_if_changed(out / set_index.FILE_NAME, set_index.to_bytes(index))
    _remove_progress(out)
    return outcome


def _outcome(index: SetIndex, results: Results, finished: bool) -> Outcome:
    done = [result for shards in results.values() for _, result in shards]
    kept = sum(result.kept for result in done)
    counts: Counter[str] = Counter()
    for result in done:
        counts.update(result.counts or {})
    return Outcome(
        index,
        left_out=[entry for result in done for entry in result.left_out],
        shards_written=len(done) - kept,
        shards_kept=kept,
        images_written=sum(result.shard.samples for result in done if not result.kept),
        counts=dict(counts),
        counted=sum(result.shard.samples for result in done if result.counts is not None),
        was_finished=finished and kept == len(done),
    )


def _finished_index(out: Path) -> SetIndex | None:
    """The index of a finished output; where it is missing or damaged, nothing is taken for finished."""
    try:
        return set_index.load(out)
    except DataError:
        return None


def _look_at_finished(out: Path, index: SetIndex) -> Outcome:
    for split, part in index.splits.items():
        columns = (part.names, part.samples, part.tar_bytes, part.index_bytes, part.sha256)
        for name, samples, tar_bytes, index_bytes, sha256 in zip(*columns, strict=True):
            shard = WrittenShard(int(samples), int(tar_bytes), int(index_bytes), sha256)
            parts.require_shard(out / split / name, shard, "Run the command without --merge to make it again")
    entries = read_lines(out / LEFT_OUT_FILE)
    _remove_progress(out)
    return Outcome(index, entries, 0, sum(len(part) for part in index.splits.values()), 0, {}, 0, was_finished=True)


def _remove_progress(out: Path) -> None:
    if (out / PROGRESS_FOLDER).exists():
        shutil.rmtree(out / PROGRESS_FOLDER)


def _plan(
    cut: Cut, loading: Loading, out: Path, options: BuildOptions, finished: SetIndex | None
) -> dict[str, list[ShardJob]]:
    """The shards of every split; raises DataError where a finished output has more or fewer of them."""
    plan = {}
    for split, shards in cut.items():
        digests = finished.splits[split].sha256 if finished else (None,) * len(shards)
        if len(digests) != len(shards):  # the images' sizes decide on it
            raise DataError(
                f"The source of {out} has changed since that was finished ({len(shards)} shards for '{split}' instead "
                f"of {len(digests)}). Prepare it into another folder, or delete that one first."
            )
        plan[split] = [
            ShardJob(
                out / split / parts.shard_name(number),
                shard,
                loading,
                sha256,
                options.stop_on_error,
                out / PROGRESS_FOLDER / "notes" / split / f"{number}.json",
            )
            for number, (shard, sha256) in enumerate(zip(shards, digests, strict=True))
        ]
    return plan


def _cut(listing: Listing, options: BuildOptions) -> Cut:
    """The items of every split, mixed and cut into shards."""
    if options.num_shards is None:
        return {split: cut_into_shards(mixed(items), options.shard_size) for split, items in listing.splits.items()}
    weights = {split: sum(member_bytes(item.size) for item in items) for split, items in listing.splits.items()}
    largest = max(weights, key=lambda split: weights[split])
    images = len(listing.splits[largest])
    if images < options.num_shards:
        raise DataError(f"--num-shards {options.num_shards}: the split '{largest}' has only {images} images.")
    counts = {split: round(options.num_shards * weight / weights[largest]) for split, weight in weights.items()}
    return {
        split: cut_evenly(mixed(items), min(max(1, counts[split]), len(items)))
        for split, items in listing.splits.items()
    }


def _set_index(about: SetIndex, results: Results) -> SetIndex:
    return replace(about, splits={split: _split_index(shards) for split, shards in results.items()})


def _split_index(shards: list[tuple[str, ShardResult]]) -> SplitIndex:
    results = [result for _, result in shards]
    return SplitIndex(
        names=tuple(name for name, _ in shards),
        samples=np.array([result.shard.samples for result in results], dtype=np.int64),
        tar_bytes=np.array([result.shard.tar_bytes for result in results], dtype=np.int64),
        index_bytes=np.array([result.shard.index_bytes for result in results], dtype=np.int64),
        sha256=tuple(result.shard.sha256 for result in results),
        left_out=sum(len(result.left_out) for result in results),
    )


def record_of(listing: Listing, options: BuildOptions) -> dict[str, object]:
    """What decides the content of the shards; a later run into the same folder must agree with it."""
    return {
        "converter": listing.converter,
        "options": {**listing.options, **options.recorded()},
        "images": sum(len(items) for items in listing.splits.values()),
        "source": source_digest(listing),
    }


def _remove_unfinished(directory: Path, stems: set[str] | None) -> None:
    """Remove what a killed run left half written: of the named shards, as other parts may be at work, or of all."""
    for path in directory.glob(f"{TEMPORARY_PREFIX}*"):
        if stems is None or path.name.removeprefix(TEMPORARY_PREFIX).split(".")[0] in stems:
            path.unlink(missing_ok=True)


def _remove_leftover_shards(directory: Path, names: set[str]) -> None:
    """Remove shards that an interrupted run with other image sizes left beyond the present last one."""
    stems = {Path(name).stem for name in names}
    for path in directory.glob("shard-*"):
        if path.stem not in stems:
            path.unlink()


def _require_space(out: Path, shards: list[list[Item]], options: BuildOptions) -> None:
    """How small images become is known only when they are; without --max-size, the tars' size is known to the byte."""
    known = options.recode.max_size is None
    needed = sum(member_bytes(item.size if known else 0) for items in shards for item in items)
    folder.require_space(out, needed, exact=known)
