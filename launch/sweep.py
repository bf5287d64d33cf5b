"""Several runs from one command: the combinations of values to try, and the names of their runs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from launch.runs import LaunchError


def combinations(sweeps: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(ending of the run's name, overrides) of every combination; one empty one where nothing is swept.

    "optimizer.lr=1e-3,2e-3" gives ("-lr-1e-3", ["optimizer.lr=1e-3"]) and so on; commas inside brackets and quotes do
    not separate. Raises LaunchError for what is no `key=a,b,c`, and where two combinations would have one name.
    """
    axes = [[(ending(key, value), f"{key}={value}") for value in values] for key, values in map(parsed, sweeps)]
    found = [("".join(e for e, _ in point), [o for _, o in point]) for point in itertools.product(*axes)]
    names = [name for name, _ in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise LaunchError(f"--sweep: two runs would have the name ending {twice}; give each value once")
    return found


def parsed(sweep: str) -> tuple[str, list[str]]:
    """Key and values."""
    key, separator, text = sweep.partition("=")
    values = [value.strip() for value in re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|\"[^\"]*\"|'[^']*'|[^,])+", text)]
    if not separator or not key or not values or not all(values):
        raise LaunchError(f"--sweep {sweep!r}: expected key=a,b,c such as optimizer.lr=5e-4,1e-3")
    return key, values


def ending(key: str, value: str) -> str:
    """What is added to the run's name, made of characters that a folder's name may have."""
    return f"-{key.rpartition('.')[2]}-" + re.sub(r"[^A-Za-z0-9._-]+", "_", value).strip("_")
