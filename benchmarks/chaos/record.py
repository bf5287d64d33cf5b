"""The record of all sessions: how many faults were injected, survived and lost, by kind, on which machine."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

RECORD = Path(__file__).parents[2] / "docs" / "benchmarks" / "chaos.json"


def machine() -> str:
    """This machine in words."""
    model = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), platform.machine(),
    )  # fmt: skip
    return f"{len(os.sched_getaffinity(0))} cores of {model}, torch {torch.__version__}"


def commit() -> str:
    """What is checked out, as far as git knows."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def session(seed: int, seconds: float, runs: int, survived: Counter[str], lost: Counter[str]) -> dict[str, Any]:
    """One entry of the record."""
    kinds = sorted(survived | lost)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "machine": machine(),
        "seed": seed,
        "minutes": round(seconds / 60, 1),
        "runs": runs,
        "faults": {kind: {"survived": survived[kind], "lost": lost[kind]} for kind in kinds},
    }


def read(path: Path) -> list[dict[str, Any]]:
    """All sessions so far."""
    return json.loads(path.read_text())["sessions"] if path.exists() else []


def add(path: Path, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Writes the record with one more session; returns all of them."""
    sessions = [*read(path), entry]
    survived, lost = totals(sessions)
    total = {"injected": survived + lost, "survived": survived, "lost": lost}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"total": total, "sessions": sessions}, indent=1) + "\n")
    return sessions


def totals(sessions: Iterable[dict[str, Any]]) -> tuple[int, int]:
    """Faults survived and lost in all sessions."""
    counts = [count for entry in sessions for count in entry["faults"].values()]
    return sum(c["survived"] for c in counts), sum(c["lost"] for c in counts)


def table(entry: dict[str, Any]) -> str:
    """One session in lines of text."""
    rows = [
        f"  {c['survived'] + c['lost']:5d} {c['survived']:9d} {c['lost']:5d}  {kind}"
        for kind, c in entry["faults"].items()
    ]
    return "\n".join(["  total  survived  lost  fault", *rows])
