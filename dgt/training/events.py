"""The story of a run as launchers write it to RUN/events.jsonl, read here so that TensorBoard can tell it, too.

One JSON object per line, with at least `time` (ISO 8601), `event` (such as "started") and `text` (one sentence).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger("dgt")


def read(path: Path) -> list[dict[str, Any]]:
    """All events, oldest first; none where there is no file. Lines that a kill or full disk has cut are passed over."""
    try:
        lines = path.read_text("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        log.warning("the events of this run cannot be read from %s: %s", path, error.strerror or error)
        return []
    events = []
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and {"time", "event", "text"} <= found.keys():
            events.append(found)
    return events


def attempts(events: Sequence[dict[str, Any]]) -> int:
    """How often the run was started."""
    return sum(event["event"] == "started" for event in events)


def as_table(events: Sequence[dict[str, Any]], ending: str = "") -> str:
    """The events as a table in Markdown, and below it the sentence that says how the last attempt ended."""
    rows = [[cell(event[name]) for name in ("time", "event", "text")] for event in events]
    lines = [f"| {' | '.join(row)} |" for row in [["time", "event", "what happened"], ["---"] * 3, *rows]]
    return "\n".join([*lines, "", ending] if ending else lines)


def cell(value: object) -> str:
    """What may stand in one cell of a table."""
    return " ".join(str(value).split()).replace("|", "\\|")
