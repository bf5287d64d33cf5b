"""The progress bar of the command-line programs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(what: str, total: int, unit: str = "images") -> Iterator[Callable[[int], None]]:
    """Show progress towards `total` on standard error; yields the function to tell of each n images (or files) done.

    Without the package rich there is one line in place of the bar.
    """
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
    except ImportError:
        print(f"{what}: {total:,} {unit} (for a progress bar: pip install rich)", file=sys.stderr)
        yield lambda images: None
        return
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{unit}, elapsed"),
        TimeElapsedColumn(),
        TextColumn("remaining"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda images: bar.advance(task, images)
