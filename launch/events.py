"""The story of a run: why every attempt started, stopped and came back, one JSON object per line of RUN/events.jsonl.

    {"time": "2026-01-31T05:36:12+00:00", "event": "stopped", "text": "preempted; ...", "step": 120, ...}

`event` is one of `Event`; `text` says the whole in one sentence. The file is only ever appended to; at any time one job
of a run is active, so lines do not mix. It needs no more than Python itself, as batch scripts write it too.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

FILE = "events.jsonl"

Event = Literal[
    "submitted", "started", "warning", "stopped", "requeued", "finished", "gave-up", "node-excluded", "cancelled"
]  # fmt: skip


def note(run: Path, event: Event, text: str, **facts: Any) -> None:
    """Appends one event, without the `facts` that are None. Raises OSError where the folder cannot be written."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    told = {name: value for name, value in facts.items() if value is not None}
    line = json.dumps({"time": now, "event": event, "text": text, **told}) + "\n"
    descriptor = os.open(run / FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())  # in one piece, so that a reader sees no half of it
    finally:
        os.close(descriptor)


def read(run: Path) -> list[dict[str, Any]]:
    """All events, oldest first; a line that a full disk has cut off is passed over."""
    return list(_lines(run / FILE))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and {"time", "event", "text"} <= found.keys():
            yield found
