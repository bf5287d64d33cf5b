"""What `launch/jobs.py` prints: the table of runs, the page of one run, the timeline."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import story
from launch.layout import count
from launch.status import RunStatus

NAME_LENGTHS = (12, 36)
"""Characters that a run's name has in the table on a terminal, a quarter of its width between these bounds."""
NOTHING = "-"
COLOURS = {
    "RUNNING": "green", "running": "green", "COMPLETING": "green", "PENDING": "yellow", "locked": "yellow",
    "finished": "bold green", "stopped": "yellow", "cancelled": "yellow", "CANCELLED": "yellow", "unknown": "yellow",
}  # fmt: skip
"""Of states; any other means that something went wrong."""
LABEL_WIDTH, GAP = 14, 2
"""Characters of a label, and between columns."""


@dataclass(frozen=True)
class Column:
    """One column of the table of runs."""

    title: str
    cell: Callable[[RunStatus], str]
    rank: int
    """Where the terminal is narrow, columns of lower rank come first; those of rank 0 are always there."""
    is_number: bool = False


COLUMNS = (
    Column("run", lambda s: s.name, 0),
    Column("state", lambda s: state_text(s), 0),
    Column("job", lambda s: s.job or NOTHING, 7),
    Column("nodes", lambda s: s.nodes or NOTHING, 10),
    Column("step", lambda s: step_text(s), 1, is_number=True),
    Column("%", lambda s: percent(s.progress.part_done), 5, is_number=True),
    Column("ETA", lambda s: brief(s.seconds_left), 2, is_number=True),
    Column("loss", lambda s: number(s.progress.loss), 3, is_number=True),
    Column("images/s", lambda s: number(s.progress.images_per_s), 8, is_number=True),
    Column("restarts", lambda s: str(len(s.story.restarts)), 9, is_number=True),
    Column("last stop", lambda s: s.story.last_stop or NOTHING, 6),
    Column("last sign", lambda s: brief(s.idle_seconds), 4, is_number=True),
)


def show_runs(found: Sequence[RunStatus]) -> None:
    """Prints the table of runs: all columns where it is piped, what fits on a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    columns, cells = fitting(found, console.width if console.is_terminal else None)
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    for column in columns:
        table.add_column(column.title, justify="right" if column.is_number else "left", no_wrap=True)
    for status, row in zip(found, cells, strict=True):
        colours = [COLOURS.get(status.state, "red") if c.title == "state" else "" for c in columns]
        table.add_row(*(Text(text, style=colour) for text, colour in zip(row, colours, strict=True)))
    show(console, table)
    left_out = [column.title for column in COLUMNS if column not in columns]
    if left_out:
        console.print(f"left out at this width: {', '.join(left_out)}; --json tells all", style="dim", markup=False)


def fitting(found: Sequence[RunStatus], width: int | None) -> tuple[list[Column], list[list[str]]]:
    """The columns that fit into `width` characters (None: all), and the cells of every row."""
    texts = {column.title: [column.cell(status) for status in found] for column in COLUMNS}
    if width is not None:
        longest = min(max(width // 4, NAME_LENGTHS[0]), NAME_LENGTHS[1])
        texts["run"] = [shortened(name, longest) for name in texts["run"]]
    columns, left = [], float("inf") if width is None else width + GAP
    for column in sorted(COLUMNS, key=lambda column: column.rank):
        needed = max(map(len, [column.title, *texts[column.title]])) + GAP
        if needed <= left or not column.rank:
            columns.append(column)
            left -= needed
    columns.sort(key=COLUMNS.index)
    return columns, [[texts[column.title][row] for column in columns] for row in range(len(found))]


def show(console: Any, table: Any) -> None:
    """Prints a table of rich; in a pipe every row is one line without spaces at its end."""
    if console.is_terminal:
        console.print(table)
        return
    from rich.console import Console

    wide = Console(width=100_000, color_system=None)
    with wide.capture() as captured:
        wide.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def show_timeline(noted: Sequence[dict[str, Any]]) -> None:
    """Prints the events of a run, oldest first, in this machine's time."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    table.add_column("time", no_wrap=True)
    table.add_column("event", no_wrap=True)
    table.add_column("what happened", overflow="fold")
    for event in noted:
        kind = str(event["event"])
        if kind == "stopped" and event.get("reason"):
            kind += f" ({event['reason']})"
        table.add_row(*(Text(str(text)) for text in (story.local_time(event["time"]), kind, event["text"])))
    show(console, table)


def show_run(status: RunStatus, command: str, typed: str) -> None:
    """Prints all that is known of one run, and what to type next: `command` begins such a line, `typed` is the run."""
    for label, text in [*who(status), *how_far(status), *what_happened(status), *where(status)]:
        if text:
            print(f"{label:<{LABEL_WIDTH}}{text}")
    print()
    for line, meaning in next_lines(status, shlex.quote(typed)):
        print(f"  {command} {line:<24}  {meaning}")


def who(status: RunStatus) -> list[tuple[str, str]]:
    """State, job and nodes."""
    record, entry = status.record, status.entry
    lines = [("run", str(status.path)), ("state", status.state + (f": {status.detail}" if status.detail else ""))]
    lines += [("", problem) for problem in status.problems]
    if record:
        job = f"Slurm job {status.job or 'without a number yet'}" if record.cluster == "slurm" else "local"
        size = f"{count(record.nodes, 'node')} x {count(record.processes_per_node, 'process')}"
        lines.append(("job", f"{job}, {size}, submitted {story.local_time(record.submitted)}"))
    if entry and entry.is_active and entry.state == "PENDING" and entry.start:
        lines.append(("expected", f"to start at {story.local_time(entry.start)}"))
    lines.append(("nodes", status.nodes))
    if status.story.started is not None:
        lines.append(("attempt", f"{status.story.attempt}, started {story.local_time(status.story.started)}"))
    return lines


def how_far(status: RunStatus) -> list[tuple[str, str]]:
    """Progress, speed, quality, and the newest checkpoint."""
    done = status.progress
    step = step_text(status) + (f" ({percent(done.part_done)})" if done.part_done is not None else "")
    epoch = f", epoch {done.epoch} of {done.epochs}" if done.epoch else ""
    left = f", {duration(status.seconds_left)} left" if status.seconds_left is not None else ""
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in done.evaluation.items())
    speed = f"{number(done.images_per_s)} images/s" if done.images_per_s is not None else ""
    if speed and done.data_wait is not None:
        speed += f", {percent(done.data_wait)} of the time spent waiting for data"
    lines = [
        ("step", step + epoch + left),
        ("loss", number(done.loss) if done.loss is not None else ""),
        ("evaluation", f"{metrics} (step {done.evaluated_at})" if metrics else ""),
        ("best", f"{done.best[0]} {done.best[1]:.4g} (step {done.best[2]})" if done.best else ""),
        ("speed", speed),
        ("memory", f"{done.memory_gb:.1f} GB at most on rank 0" if done.memory_gb is not None else ""),
        ("checkpoint", f"{done.checkpoint}, {duration(done.checkpoint_age)} old" if done.checkpoint else "none yet"),
    ]
    if done.damaged_lines:
        lines.append(("", f"metrics.jsonl: {count(done.damaged_lines, 'damaged line')} passed over"))
    return lines


def what_happened(status: RunStatus) -> list[tuple[str, str]]:
    """Restarts and their reasons, excluded nodes, the last sign of life."""
    told = status.story
    lines = [("last sign", f"{duration(status.idle_seconds)} ago" if status.idle_seconds is not None else "")]
    lines.append(("restarts", str(len(told.restarts))))
    for restart in told.restarts:
        by = ", submitted again" if restart.is_resubmission else ""
        start = f", from step {restart.step}" if restart.step is not None else ""
        lines.append(("", f"{story.local_time(restart.time)}  after: {restart.reason}{by}{start}"))
    lines.append(("excluded", ", ".join(told.excluded)))
    return lines


def where(status: RunStatus) -> list[tuple[str, str]]:
    """Files to look at."""
    run = status.path
    logs = run / "logs"
    return [
        ("logs", f"{logs}" if logs.is_dir() else ""),
        ("curves", f"{run / 'tensorboard'}" if (run / "tensorboard").is_dir() else ""),
    ]


def next_lines(status: RunStatus, name: str) -> list[tuple[str, str]]:
    """What a person may want to type next, and what it does."""
    if status.is_active and not status.has_left:
        lines = [(f"logs {name} -f", "follow the log of rank 0"), (f"cancel {name}", "stop it")]
        if status.story.is_final:  # it is cancelled already
            return lines[:1]
        return lines[1:] if status.state == "PENDING" and not status.story.started else lines
    if status.end == story.FINISHED:
        return [(f"tensorboard {name}", "look at its curves")]
    lines = [(f"events {name}", "what happened"), (f"logs {name}", "the end of rank 0's log")]
    return [*lines, (f"resume {name}", "go on from the newest checkpoint")] if status.record else lines


def state_text(status: RunStatus) -> str:
    """The state, with Slurm's reason where the job waits."""
    reason = status.entry.reason if status.entry and status.state == "PENDING" else ""
    return f"{status.state} ({shortened(reason, 24)})" if reason else status.state


def step_text(status: RunStatus) -> str:
    """Steps done, and of how many."""
    done = status.progress
    if done.step is None:
        return NOTHING
    return f"{done.step}/{done.total_steps}" if done.total_steps else str(done.step)


def percent(part: float | None) -> str:
    """A part of 1 in percent, rounded down so that only what is complete has 100."""
    return NOTHING if part is None else f"{int(100 * part + 1e-9)} %"


def number(value: float | None) -> str:
    """Four significant digits."""
    if value is None:
        return NOTHING
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """A time in the two units that matter."""
    if seconds is None:
        return NOTHING
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h} h"
    if hours:
        return f"{hours} h {m:02d} min"
    return f"{m} min" if m else f"{s} s"


def brief(seconds: float | None) -> str:
    """A time in its largest unit."""
    if seconds is None:
        return NOTHING
    for unit, size in (("d", 86400), ("h", 3600)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"


def shortened(text: str, length: int) -> str:
    """The text with its middle left out where it is too long."""
    if len(text) <= length:
        return text
    kept = length - 3
    return f"{text[: -(-kept // 2)]}...{text[len(text) - kept // 2 :]}"


def command_name(runs_folder: Path, default: Path) -> str:
    """How the program was started, for lines to type next, with the folder of runs where it is not the usual one."""
    typed = Path(sys.argv[0])
    program = f"python {shlex.quote(sys.argv[0])}" if typed.name == "jobs.py" else "dgt-jobs"
    return program if runs_folder == default else f"{program} --runs {shlex.quote(str(runs_folder))}"
