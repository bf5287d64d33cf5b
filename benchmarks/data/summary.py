"""What the measured rounds say: medians, spreads, ratios to FFCV, and whether the targets are met. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.data.contestants import CONTESTANTS, REFERENCE

SPEED_TARGETS = {
    "ours-tar-linear": 1.5,
    "ours-tar-antialias": 1.2,
    "ours-rows-linear": 1.9,
    "ours-rows-antialias": 1.35,
    "ours-beton-linear": 1.0,
    "ours-beton-antialias": 1.0,
}
"""Images per second against FFCV's Loader with as many threads in the same round; the median must reach this."""

MEMORY_TARGET = 32e6
"""Bytes that ours may grow by from the end of the first epoch to the end of the last."""


@dataclass(frozen=True)
class Spread:
    """Median, least and largest of the rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Raises ValueError where there is no value."""
        ordered = sorted(values)
        if not ordered:
            raise ValueError("no round was measured")
        return cls(statistics.median(ordered), ordered[0], ordered[-1])


@dataclass(frozen=True)
class Row:
    """One contestant on one set of images with one number of threads."""

    images_set: str
    threads: int
    contestant: str
    images_per_second: Spread
    ratio: Spread | None
    """Images per second against FFCV's in the same round; None where FFCV did not run."""

    cpu_ms: Spread
    """CPU time per image, of the process and all below it, in milliseconds."""

    cpu_ratio: Spread | None
    """FFCV's CPU time per image against this one's in the same round."""

    cores: float
    """CPU time / wall time, median."""

    scaling: float
    """Images per second against the same contestant with the fewest threads."""

    growth_bytes: int
    """Anonymous memory at the end of the last epoch less that at the end of the first."""


@dataclass(frozen=True)
class Check:
    """One target."""

    what: str
    measured: str
    target: str
    passed: bool


def summarize(records: Sequence[dict[str, Any]]) -> list[Row]:
    """One row per set, thread count and contestant, in the order of the records.

    A record is one epoch: set, threads, contestant, round, images, seconds, cpu_seconds, anonymous_bytes. Round 0 warms
    up and counts for the growth of memory only.
    """
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["set"], record["threads"], record["contestant"]), []).append(record)
    sets = list(dict.fromkeys(record["set"] for record in records))
    base: dict[tuple[str, str], float] = {}
    rows = []
    for (images_set, threads, contestant), group in sorted(groups.items(), key=lambda entry: _place(entry[0], sets)):
        rounds = [record for record in group if record["round"] > 0]
        if not rounds:
            continue
        reference = {r["round"]: r for r in groups.get((images_set, threads, REFERENCE), []) if r["round"] > 0}
        pairs = [(record, reference[record["round"]]) for record in rounds if record["round"] in reference]
        speed = Spread.of(_speed(record) for record in rounds)
        rows.append(
            Row(
                images_set=images_set,
                threads=threads,
                contestant=contestant,
                images_per_second=speed,
                ratio=Spread.of(_speed(own) / _speed(other) for own, other in pairs) if pairs else None,
                cpu_ms=Spread.of(1e3 * _cpu(record) for record in rounds),
                cpu_ratio=Spread.of(_cpu(other) / _cpu(own) for own, other in pairs) if pairs else None,
                cores=statistics.median(record["cpu_seconds"] / record["seconds"] for record in rounds),
                scaling=speed.median / base.setdefault((images_set, contestant), speed.median),
                growth_bytes=group[-1]["anonymous_bytes"] - group[0]["anonymous_bytes"],
            )
        )
    return rows


def checks(rows: Sequence[Row], resume: Sequence[dict[str, Any]]) -> list[Check]:
    """Every target with what was measured; a target without a measurement is missed."""
    result = []
    for name, target in SPEED_TARGETS.items():
        title, own = CONTESTANTS[name].title, [row for row in rows if row.contestant == name]
        if not own:
            result.append(Check(f"{title}: speed", "not measured", f">= {target:.2f}x FFCV", False))
        for row in own:
            where = f"{title}: {row.images_set}, {_threads(row.threads)}"
            ratio = row.ratio.median if row.ratio else 0.0
            shown = f"{ratio:.3f}x FFCV" if row.ratio else "FFCV did not run"
            result.append(Check(f"{where}: speed", shown, f">= {target:.2f}x FFCV", ratio >= target))
            result.append(
                Check(
                    f"{where}: memory",
                    f"{row.growth_bytes / 1e6:+.1f} MB",
                    f"<= {MEMORY_TARGET / 1e6:+.0f} MB",
                    row.growth_bytes <= MEMORY_TARGET,
                )
            )
    for entry in resume:
        result += _resume_checks(entry)
    if not resume:
        result.append(Check("resume", "not measured", "< 2 s, < 500 MB", False))
    return result


def _resume_checks(entry: dict[str, Any]) -> list[Check]:
    seconds, size = entry["seconds"], entry["bytes"]
    return [
        Check(f"{entry['what']}: time", f"{seconds:.2f} s", f"< {entry['max_seconds']:g} s",
              seconds < entry["max_seconds"]),
        Check(f"{entry['what']}: memory", f"{size / 1e6:.0f} MB", f"< {entry['max_bytes'] / 1e6:.0f} MB",
              size < entry["max_bytes"]),
    ]  # fmt: skip


def _place(key: tuple[str, int, str], sets: Sequence[str]) -> tuple[int, int, int]:
    """Where the row of a set, a thread count and a contestant stands in the table."""
    images_set, threads, contestant = key
    return sets.index(images_set), threads, list(CONTESTANTS).index(contestant)


def _speed(record: dict[str, Any]) -> float:
    return float(record["images"] / record["seconds"])


def _cpu(record: dict[str, Any]) -> float:
    return float(record["cpu_seconds"] / record["images"])


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
