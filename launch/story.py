"""The story of a run as its own files tell it: events.jsonl, and the markers that its ranks have left."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import events, runs
from launch.runs import JobRecord

FINISHED, FAILED, GAVE_UP, CANCELLED, STOPPED = "finished", "failed", "gave up", "cancelled", "stopped"
"""How a job can have ended."""
FINAL = (FINISHED, FAILED, GAVE_UP, CANCELLED)
"""No attempt follows by itself."""
ENDINGS = ("started", "stopped", "requeued", "finished", "gave-up", "cancelled")
"""Events of which the newest says where an attempt stands."""
MARKER = re.compile(r"\.(\d+)\.(finished|failed|interrupted)")
"""What follows the token in a marker's name: attempt and end."""


@dataclass(frozen=True)
class Restart:
    """One attempt after the first."""

    time: str
    """ISO 8601, in UTC."""
    attempt: int | None
    reason: str
    """Why the one before had stopped: preempted, time limit, crash, ...; unknown where nobody noted it."""
    is_resubmission: bool
    """A person submitted it; else it came back by itself."""
    step: int | None
    """Of the checkpoint that it started from."""


@dataclass(frozen=True)
class Story:
    """What matters of it now."""

    end: str | None = None
    """How the last job ended, in the words above; None where nothing says that it has."""
    is_final: bool = False
    """No attempt follows by itself, whatever Slurm says."""
    why: str = ""
    """The sentence that goes with it."""
    last_stop: str = ""
    """Reason of the last stop of the whole run; empty where there was none."""
    attempt: int | None = None
    """Of the last start of the last job."""
    started: str | None = None
    """Its time, ISO 8601."""
    nodes: tuple[str, ...] = ()
    """Where it started."""
    restarts: tuple[Restart, ...] = ()
    """Of the whole run, oldest first."""
    excluded: tuple[str, ...] = ()
    """Nodes that the last job does not use again."""


def read(run: Path, record: JobRecord | None) -> Story:
    """The story of the run in this folder. Raises OSError where a file of it is not readable."""
    noted = events.read(run)
    told = of_last_job(noted, record)
    start: dict[str, Any] = next((event for event in reversed(told) if event["event"] == "started"), {})
    end, why = end_of(told)
    newest = next((event["event"] for event in reversed(told) if event["event"] in ENDINGS), "")
    if end != FINISHED:
        marked = end_by_marker(run, record, start.get("attempt"))
        # a job that was complete when it was cancelled, or when its node died, is complete
        if marked and (marked[0] == FINISHED or (end not in FINAL and newest not in ("requeued", "gave-up"))):
            end, why = marked
    return Story(
        end=end,
        why=why,
        is_final=end in FINAL or newest == "gave-up",
        last_stop=next((str(e.get("reason", "unknown")) for e in reversed(noted) if e["event"] == "stopped"), ""),
        attempt=start.get("attempt"),
        started=start.get("time"),
        nodes=names(start.get("nodes")),
        restarts=restarts_of(noted),
        excluded=tuple(dict.fromkeys(e["node"] for e in told if e["event"] == "node-excluded" and "node" in e)),
    )


def of_last_job(noted: list[dict[str, Any]], record: JobRecord | None) -> list[dict[str, Any]]:
    """The events of the last submission, known by their token.

    Their order says less: a job can start before its submission is noted, and a full disk can have cost that note.
    Where no record names the last submission, it is that of the newest event.
    """
    tokens = [event["token"] for event in noted if "token" in event]
    token = record.token if record else tokens[-1] if tokens else None
    return [event for event in noted if event.get("token", token) == token]


def end_of(told: list[dict[str, Any]]) -> tuple[str | None, str]:
    """How the last job ended by its events, and why."""
    end: str | None = None
    why = ""
    for event in told:
        kind, reason = event["event"], event.get("reason")
        if kind == "started":
            end, why = None, ""
        elif kind == "finished":
            end, why = FINISHED, event["text"]
        elif end in FINAL:
            continue  # such as a cancellation that came too late, or what a cancelled job says when it leaves
        elif kind == "requeued":
            end, why = None, ""
        elif kind == "cancelled" or (kind == "stopped" and reason == "cancelled"):
            end, why = CANCELLED, event["text"]
        elif kind == "stopped":
            end, why = FAILED if reason == "error" else STOPPED, event["text"]
        elif kind == "gave-up":
            # after Ctrl-C or the like nothing failed
            end, why = STOPPED if end == STOPPED and stop_reason(told) == "signal" else GAVE_UP, event["text"]
    return end, why


def stop_reason(told: list[dict[str, Any]]) -> str | None:
    """Reason of the last stop."""
    return next((event.get("reason") for event in reversed(told) if event["event"] == "stopped"), None)


def end_by_marker(run: Path, record: JobRecord | None, attempt: int | None) -> tuple[str, str] | None:
    """How the newest attempt of the last job ended by its marker; None where that left none."""
    if record is None:
        return None
    found: list[tuple[int, str, Path]] = []
    for path in (run / "jobs").glob(f"{record.token}.*"):
        match = MARKER.fullmatch(path.name.removeprefix(record.token))
        if match and int(match[1]) >= (attempt or 0):
            found.append((int(match[1]), match[2], path))
    if not found:
        return None
    _, end, path = max(found)
    facts = runs.read_json(path) or {}
    if end == "failed":
        return FAILED, str(facts.get("reason", ""))
    if end == "finished":
        return FINISHED, f"training is complete after step {facts.get('step')}"
    return STOPPED, f"stopped by {facts.get('signal')} after step {facts.get('step')}"


def restarts_of(noted: list[dict[str, Any]]) -> tuple[Restart, ...]:
    """Every start after the first, with the reason of the stop before it."""
    found = []
    before: dict[str, Any] | None = None
    reason = "unknown"
    for event in noted:
        if event["event"] == "stopped":
            reason = str(event.get("reason", "unknown"))
        elif event["event"] == "finished" or (event["event"] == "cancelled" and reason != "finished"):
            reason = event["event"]
        elif event["event"] == "started":
            if before is not None:
                is_resubmission = event.get("token") != before.get("token")
                step = event.get("step")
                found.append(Restart(event["time"], event.get("attempt"), reason, is_resubmission, step))
            before, reason = event, "unknown"
    return tuple(found)


def names(nodes: Any) -> tuple[str, ...]:
    """Nodes of an event, which has a list of them."""
    return tuple(str(node) for node in nodes) if isinstance(nodes, list) else (str(nodes),) if nodes else ()


def local_time(time: str | None) -> str:
    """A noted time as people here read it; what is no time stays as it is."""
    if not time:
        return ""
    try:
        return datetime.datetime.fromisoformat(time).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except ValueError:
        return time
