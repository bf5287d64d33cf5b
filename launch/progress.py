"""How far a run has come, by the files that its rank 0 writes: metrics.jsonl, its log, its newest checkpoint."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch import runs

TAIL_BYTES = 1 << 16
"""How much of the end of metrics.jsonl is read where only the last report is wanted."""
LOG_BLOCK_BYTES = 1 << 18
"""A log is searched for its last report from its end, in such blocks."""
LOG_SEARCH_BYTES = 1 << 24
"""How far back: libraries can say a lot between two reports, such as NCCL under NCCL_DEBUG."""
REPORT_BYTES = 256
"""More than the longest report."""
REPORT = re.compile(r"epoch +(\d+)/(\d+) \[[= ]*\] step +(\d+)/(\d+)  ")
"""The line of dgt/training/monitor.py; only it knows the total, which depends on the number of samples."""


@dataclass(frozen=True)
class Progress:
    """The last reports; None where there is none yet."""

    step: int | None = None
    """Optimizer steps done."""
    total_steps: int | None = None
    epoch: int | None = None
    """From 1."""
    epochs: int | None = None
    loss: float | None = None
    """Of the last reported step; not a number where training has diverged."""
    images_per_s: float | None = None
    step_seconds: float | None = None
    data_wait: float | None = None
    """Part of the time that was spent waiting for data, between 0 and 1."""
    memory_gb: float | None = None
    """Most memory that rank 0 has held, in 10^9 bytes."""
    evaluation: dict[str, float] = field(default_factory=dict)
    """Metrics of the last evaluation, by name."""
    evaluated_at: int | None = None
    """Step after which it ran."""
    best: tuple[str, float, int] | None = None
    """Name, value and step of the best evaluation."""
    checkpoint: str | None = None
    """Name of the newest committed checkpoint."""
    checkpoint_age: float | None = None
    """Seconds since it was committed."""
    damaged_lines: int = 0
    """Lines of metrics.jsonl that could not be read, beside one at the end that may not be whole yet."""

    @property
    def seconds_left(self) -> float | None:
        """At the speed of the last report, without evaluations and saves."""
        if self.step is None or self.total_steps is None or self.step_seconds is None:
            return None
        return max(self.total_steps - self.step, 0) * self.step_seconds

    @property
    def part_done(self) -> float | None:
        """Between 0 and 1."""
        return self.step / self.total_steps if self.step is not None and self.total_steps else None


def read(run: Path, thoroughly: bool = False) -> Progress:
    """The progress of the run in this folder; `thoroughly`: with evaluations, however long ago they were."""
    rows, damaged = read_rows(run / "metrics.jsonl", None if thoroughly else TAIL_BYTES)
    training: dict[str, Any] = next((row for row in reversed(rows) if "train/loss" in row), {})
    evaluated: dict[str, Any] = next((row for row in reversed(rows) if is_evaluation(row)), {})
    newest = runs.newest_checkpoint(run)
    steps = [number for number in (training.get("step"), evaluated.get("step")) if isinstance(number, int)]
    epoch, epochs, total = last_report(run / "logs" / "rank-0.log")
    return Progress(
        step=max(steps) if steps else runs.step_of(newest),
        total_steps=total,
        epoch=epoch,
        epochs=epochs,
        loss=number(training, "train/loss"),
        images_per_s=number(training, "speed/images_per_s"),
        step_seconds=number(training, "speed/step_seconds"),
        data_wait=number(training, "speed/data_wait"),
        memory_gb=number(training, "speed/memory_gb"),
        evaluation=metrics_of(evaluated),
        evaluated_at=evaluated.get("step"),
        best=best(run, newest, rows) if thoroughly and newest else None,
        checkpoint=newest,
        checkpoint_age=age(run / "checkpoints" / newest) if newest else None,
        damaged_lines=damaged,
    )


def read_rows(path: Path, limit: int | None) -> tuple[list[dict[str, Any]], int]:
    """The readable lines among the last `limit` bytes (None: all of them), and how many others are damaged."""
    text, is_whole = tail(path, limit)
    lines = text.splitlines(keepends=True)
    rows: list[dict[str, Any]] = []
    damaged = 0
    for line in lines if is_whole else lines[1:]:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        elif line.endswith("\n") and not line.isspace():
            damaged += 1
    return rows, damaged


def tail(path: Path, limit: int | None) -> tuple[str, bool]:
    """The last `limit` bytes of a text file (None: all), and whether that is the whole; nothing where it is missing."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            start = max(size - limit, 0) if limit is not None else 0
            file.seek(start)
            return file.read().decode(errors="replace"), start == 0
    except FileNotFoundError:
        return "", True


def is_evaluation(row: dict[str, Any]) -> bool:
    """Whether a line of metrics.jsonl reports an evaluation."""
    return any(name.startswith("val/") for name in row)


def metrics_of(row: dict[str, Any]) -> dict[str, float]:
    """The metrics of a line that reports an evaluation, by their names."""
    found = {name.removeprefix("val/"): number(row, name) for name in row if name.startswith("val/")}
    return {name: value for name, value in found.items() if value is not None}


def number(row: dict[str, Any], name: str) -> float | None:
    """One number of a line, which has null for what is not finite; None where the line does not have it."""
    value = row.get(name, "")
    if value is None:
        return math.nan
    return float(value) if isinstance(value, (int, float)) else None


def last_report(log: Path) -> tuple[int | None, int | None, int | None]:
    """Epoch, number of epochs and total steps as of the last report in the log of rank 0."""
    after = b""
    try:
        with log.open("rb") as file:
            position = file.seek(0, 2)
            lowest = max(position - LOG_SEARCH_BYTES, 0)
            while position > lowest:
                size = min(LOG_BLOCK_BYTES, position - lowest)
                position = file.seek(position - size)
                block = file.read(size) + after
                found = REPORT.findall(block.decode(errors="replace"))
                if found:
                    epoch, epochs, _, total = found[-1]
                    return int(epoch), int(epochs), int(total)
                after = block[:REPORT_BYTES]  # where the end of a report may be that begins in the block before
    except FileNotFoundError:
        pass
    return None, None, None


def best(run: Path, newest: str, rows: list[dict[str, Any]]) -> tuple[str, float, int] | None:
    """The best evaluation: the newest checkpoint says which step and value it was, metrics.jsonl which metric."""
    manifest = runs.read_json(run / "checkpoints" / newest / "manifest.json") or {}
    progress = manifest.get("progress")
    if not isinstance(progress, dict) or progress.get("best_metric") is None:
        return None
    step, value = progress.get("best_step"), progress["best_metric"]
    then = next((metrics_of(row) for row in rows if row["step"] == step and is_evaluation(row)), {})
    name = next((name for name, then_value in then.items() if then_value == value), None)
    return (name, value, step) if name and isinstance(step, int) else None


def age(path: Path) -> float | None:
    """Seconds since a file or folder has changed; None where it is not there."""
    try:
        return max(time.time() - path.stat().st_mtime, 0.0)
    except OSError:
        return None
