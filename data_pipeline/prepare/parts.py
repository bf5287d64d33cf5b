"""Several jobs share the work: what each leaves for the merge, and the merge.

    OUT/.progress/parts.json         into how many parts the work is divided; made by whichever job comes first
    OUT/.progress/part-3.json        part 3 is done: its shards with their sizes and digests, and what was left out
    OUT/.progress/part-3.lock        locked while a job makes part 3

Part i of n makes every n-th shard, from the i-th on, so that all have about the same to do.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.prepare.folder import PROGRESS_FOLDER, create_once, json_bytes, write_if_changed
from data_pipeline.prepare.left_out import LeftOut
from data_pipeline.prepare.make_shard import ShardResult
from data_pipeline.prepare.options import Part
from data_pipeline.shards import shard_index
from data_pipeline.shards.source import DataError
from data_pipeline.shards.writer import WrittenShard

_SHOWN = 20
_T = TypeVar("_T")


@dataclass(frozen=True)
class Share:
    """What one part has done of one split."""

    total: int
    """Shards of the split, whichever part makes them."""

    made: list[tuple[int, ShardResult]]
    """(number, result) of the part's own shards."""


@dataclass(frozen=True)
class Merged:
    """Everything that the parts left."""

    classes: tuple[str, ...]
    kind: str
    targets: dict[str, Any]
    splits: dict[str, list[tuple[str, ShardResult]]]
    """Of each split, (file name, result) of all shards in order."""


def shards_of(shards: list[_T], part: Part | None) -> list[_T]:
    """Those of all shards that a part makes; all of them, where the work is not divided."""
    return shards if part is None else shards[part.number - 1 :: part.of]


def begin(out: Path, part: Part) -> Path:
    """Agree with the other parts on how many there are; returns the path of the part's lock. Raises DataError."""
    folder = out / PROGRESS_FOLDER
    folder.mkdir(exist_ok=True)
    create_once(folder / "parts.json", json_bytes({"parts": part.of}))
    parts = number_of_parts(out)
    if parts != part.of:
        raise DataError(
            f"The work on {out} was divided into {parts} parts, not {part.of}. Give --part {part.number}/{parts} (or "
            f"another of those), or delete {folder} to divide it anew: shards that are there are looked at again."
        )
    return folder / f"part-{part.number}.lock"


def number_of_parts(out: Path) -> int | None:
    """Into how many parts the work on `out` was divided; None where it was not."""
    path = out / PROGRESS_FOLDER / "parts.json"
    try:
        return int(json.loads(path.read_bytes())["parts"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); delete {path.parent} and run the parts again.") from error


def finish(
    out: Path, part: Part, classes: tuple[str, ...], kind: str, targets: dict[str, Any], done: dict[str, Share]
) -> None:
    """Leave for the merge what the part has done of every split."""
    splits = {
        split: {"shards": share.total, "made": [[number, _to_json(result)] for number, result in share.made]}
        for split, share in done.items()
    }
    record = {"part": part.number, "parts": part.of, "classes": classes, "kind": kind, "targets": targets}
    record["splits"] = splits
    write_if_changed(_record_path(out, part.number), json_bytes(record))


def _record_path(out: Path, number: int) -> Path:
    return out / PROGRESS_FOLDER / f"part-{number}.json"


def _to_json(result: ShardResult) -> dict[str, Any]:
    left_out = [[entry.path, entry.reason] for entry in result.left_out]
    return {**asdict(result.shard), "left_out": left_out, "counts": result.counts}


def collect(out: Path) -> Merged:
    """What all parts have left, with every shard's file there; raises DataError naming what is missing.

    Looks at sizes and at the headers of the shards' indexes, and reads no tar.
    """
    parts = number_of_parts(out)
    if parts is None:
        raise DataError(f"There is nothing to merge in {out}: no part was made there. Run the parts (--part) first.")
    missing = [number for number in range(1, parts + 1) if not _record_path(out, number).exists()]
    if missing:
        listed = ", ".join(f"{number}/{parts}" for number in missing[:_SHOWN])
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise DataError(f"{len(missing)} of {parts} parts of {out} are not finished: {listed}{more}. Run them first.")
    records = [_read_record(_record_path(out, number)) for number in range(1, parts + 1)]
    first = records[0]
    splits: dict[str, list[tuple[str, ShardResult]]] = {}
    for split, described in first["splits"].items():
        made = {}
        for record in records:
            for number, result in record["splits"][split]["made"]:
                made[number] = _from_json(split, result)
                again = f"Run part {record['part']}/{parts} again, then merge"
                require_shard(out / split / shard_name(number), made[number].shard, again)
        if sorted(made) != list(range(described["shards"])):
            raise DataError(f"The parts of {out} do not fit together: delete {out / PROGRESS_FOLDER}, run them again.")
        splits[split] = [(shard_name(number), made[number]) for number in sorted(made)]
    return Merged(tuple(first["classes"]), first["kind"], first["targets"], splits)


def shard_name(number: int) -> str:
    """File name of a shard's tar."""
    return f"shard-{number:06d}.tar"


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
        for name in ("part", "parts", "classes", "kind", "targets", "splits"):
            record[name]
        return dict(record)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); delete it and run that part again.") from error


def _from_json(split: str, result: dict[str, Any]) -> ShardResult:
    shard = WrittenShard(result["samples"], result["tar_bytes"], result["index_bytes"], result["sha256"])
    left_out = [LeftOut(split, path, reason) for path, reason in result["left_out"]]
    counts = None if result["counts"] is None else Counter(result["counts"])
    return ShardResult(shard, left_out, kept=True, counts=counts)


def require_shard(path: Path, shard: WrittenShard, remedy: str) -> None:
    """Check that a shard and its index are those that were written, as far as sizes and the index's header tell.

    Raises DataError that ends with what to do about it.
    """
    index_path = path.with_suffix(shard_index.SUFFIX)
    try:
        with open(index_path, "rb") as file:
            header = shard_index.parse_header(file.read(shard_index.HEADER.size))
            sizes = (path.stat().st_size, file.seek(0, os.SEEK_END))
    except FileNotFoundError as error:
        raise DataError(f"{error.filename} is missing. {remedy}.") from error
    except ValueError as error:
        raise DataError(f"{index_path} cannot be used: {error}. {remedy}.") from error
    if sizes != (shard.tar_bytes, shard.index_bytes) or header.tar_sha256.hex() != shard.sha256:
        raise DataError(f"{path} or its index was changed after it was made. {remedy}.")
