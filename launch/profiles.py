"""Cluster profiles: what to ask a Slurm for, from a YAML file and the command line."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from launch.runs import LaunchError

PROFILES = Path(__file__).resolve().parents[1] / "slurm" / "profiles"
DEFAULT = "generic"


@dataclass(frozen=True)
class Profile:
    """What sbatch is asked for; None leaves the cluster's own default."""

    gpus_per_node: int = 8
    """GPUs of a node that a run uses, one process each."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | int | None = None
    """Limit of one attempt, in Slurm's notation or in minutes; the run goes on after it."""
    cpus_per_task: int | None = None
    """Cores of one process."""
    mem: str | int | None = None
    """Memory of a node in Slurm's notation."""
    exclude: str | None = None
    """Nodes that are not to be used."""
    exclusive: bool = True
    """Ask for whole nodes."""
    signal_lead: int = 120
    """Seconds before the time limit at which the ranks are told to save and leave."""
    max_retries: int = 3
    """Crashes in a row without a new checkpoint that are followed by another attempt."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of every rank."""
    setup: tuple[str, ...] = ()
    """Lines of shell that run before the ranks."""
    sbatch: Mapping[str, Any] = field(default_factory=dict)
    """Any other options of sbatch, by their long names."""


def load(name: str | None, overrides: Mapping[str, Any]) -> Profile:
    """The profile called `name` in slurm/profiles, or at the path `name`, with the `overrides` that are not None.

    Without a name it is the generic one, or what this class says where the program was installed without that folder.
    Raises LaunchError for an unknown profile, an unknown key or a value of the wrong type.
    """
    path = PROFILES / f"{name or DEFAULT}.yaml"
    if name and name.endswith((".yaml", ".yml")):
        path = Path(name)
    values = {} if name is None and not path.exists() else read(path)
    values |= {key: value for key, value in overrides.items() if value is not None}
    return Profile(**{**values, "setup": tuple(values.get("setup", ()))})


def read(path: Path) -> dict[str, Any]:
    """The checked content of a profile's file."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise LaunchError(f"profile {path}: {error.strerror}; there are {known or 'none'} in {PROFILES}") from None
    except yaml.YAMLError as error:
        raise LaunchError(f"profile {path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise LaunchError(f"profile {path}: expected keys and values")
    hints = get_type_hints(Profile)
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(hints)}; others go under sbatch:"
            raise LaunchError(f"profile {path}: unknown key {key}; {hint}")
        check_type(path, key, value)
    return values


def check_type(path: Path, key: str, value: Any) -> None:
    """Raises LaunchError where the value's type is not that of the field `key`."""
    default = {f.name: f for f in dataclasses.fields(Profile)}[key]
    numbers = ("gpus_per_node", "cpus_per_task", "signal_lead", "max_retries")
    wanted: tuple[type, ...] = (str, int) if key in ("time", "mem") else (str,)
    if key in numbers:
        wanted = (int,)
    elif key in ("environment", "sbatch"):
        wanted = (dict,)
    elif key == "setup":
        wanted = (list,)
    elif isinstance(default.default, bool):
        wanted = (bool,)
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        names = " or ".join(kind.__name__ for kind in wanted)
        raise LaunchError(f"profile {path}: {key} must be {names}, got {value!r}")
