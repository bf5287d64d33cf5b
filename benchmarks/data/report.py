"""The numbers for people and for programs: tables, JSON, a plot."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.data.contestants import CONTESTANTS
from benchmarks.data.summary import Check, Row, Spread
from benchmarks.data.team import REPOSITORY


def print_rows(rows: Sequence[Row], failures: Sequence[dict[str, str]], console: Console) -> None:
    """One table per set and thread count, then who did not run and why."""
    for images_set, threads in dict.fromkeys((row.images_set, row.threads) for row in rows):
        table = Table(title=f"{images_set}, {threads} thread(s)")
        for column in ("contestant", "resampling"):
            table.add_column(column)
        for column in ("images/s", "spread", "x FFCV", "spread", "CPU ms/image", "x FFCV (CPU)", "cores", "scaling",
                       "growth MB"):  # fmt: skip
            table.add_column(column, justify="right")
        for row in rows:
            if (row.images_set, row.threads) == (images_set, threads):
                table.add_row(*_cells(row))
        console.print(table)
    for failure in failures:
        console.print(f"did not run: {failure['title']} ({failure['where']}): {failure['error']}", markup=False)


def _cells(row: Row) -> list[str]:
    contestant, speed = CONTESTANTS[row.contestant], row.images_per_second
    return [
        contestant.title,
        contestant.resampling,
        f"{speed.median:.0f}",
        f"{speed.least:.0f}-{speed.most:.0f}",
        *_ratio_cells(row.ratio),
        f"{row.cpu_ms.median:.3f}",
        _ratio_cells(row.cpu_ratio)[0],
        f"{row.cores:.2f}",
        f"{row.scaling:.2f}",
        f"{row.growth_bytes / 1e6:+.1f}",
    ]


def _ratio_cells(ratio: Spread | None) -> tuple[str, str]:
    return (f"{ratio.median:.2f}", f"{ratio.least:.2f}-{ratio.most:.2f}") if ratio else ("", "")


def print_resume(resume: Sequence[dict[str, Any]], console: Console) -> None:
    """Time and memory to go on within huge data sets."""
    if not resume:
        return
    table = Table(title="resume: open, seek, first batch")
    for column in ("what", "seconds", "MB", "MB of imports"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for entry in resume:
        imports = f"{entry['imports'] / 1e6:.0f}"
        table.add_row(entry["what"], f"{entry['seconds']:.2f}", f"{entry['bytes'] / 1e6:.0f}", imports)
    console.print(table)


def print_checks(checks: Sequence[Check], console: Console) -> None:
    """Every target, met or missed."""
    table = Table(title="targets")
    for column in ("what", "measured", "target", ""):
        table.add_column(column)
    for check in checks:
        table.add_row(check.what, check.measured, check.target, "met" if check.passed else "MISSED")
    console.print(table)


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, cores, memory, system, Python."""
    with open("/proc/cpuinfo") as file:
        models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
    }


def commit() -> str:
    """The commit of this repository, with "+changes" where tracked files differ from it; "" outside of git."""
    try:
        name = _git("rev-parse", "HEAD")
        return f"{name}+changes" if _git("status", "--porcelain", "--untracked-files=no") else name
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def plot(rows: Sequence[Row], path: Path) -> None:
    """Bars of images per second against FFCV with the spread over the rounds; a panel per set and thread count.

    Raises ValueError where FFCV did not run.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install matplotlib, or leave --plot out") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = [row for row in rows if row.ratio is not None]
    if not drawn:
        raise ValueError("there is nothing to plot: FFCV, which the others are compared to, did not run")
    names = [name for name in reversed(CONTESTANTS) if any(row.contestant == name for row in drawn)]
    lines, columns = list(dict.fromkeys(row.images_set for row in drawn)), sorted({row.threads for row in drawn})
    size = (2 + 4 * len(columns), len(lines) * (1 + 0.3 * len(names)))
    figure, axes = pyplot.subplots(len(lines), len(columns), sharex=True, sharey=True, figsize=size, squeeze=False)
    for row in drawn:
        _draw_bar(axes[lines.index(row.images_set)][columns.index(row.threads)], names.index(row.contestant), row)
    for images_set, line in zip(lines, axes, strict=True):
        for threads, axis in zip(columns, line, strict=True):
            axis.axvline(1, color="black", linewidth=0.8, linestyle="--")
            axis.set_title(f"{images_set}, {threads} thread{'s' if threads > 1 else ''}", fontsize=10)
            axis.set_yticks(range(len(names)), [CONTESTANTS[name].title for name in names])
    for axis in axes[-1]:
        axis.set_xlabel("images/s against FFCV")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_bar(axis: Any, place: int, row: Row) -> None:
    ratio = row.ratio
    assert ratio is not None
    spread = [[ratio.median - ratio.least], [ratio.most - ratio.median]]
    colour = "tab:blue" if row.contestant.startswith("ours") else "tab:gray"
    axis.barh(place, ratio.median, xerr=spread, color=colour, height=0.7, ecolor="black", capsize=2)
    axis.text(0.03, place, f"{ratio.median:.2f}", va="center", color="white", fontsize=8)
