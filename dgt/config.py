"""The whole configuration of a run: composed here from each part's own type, read from YAML, validated before use.

A configuration file names a ``base:`` file (relative to itself) and says what differs. Command-line overrides such as
``optimizer.lr=5e-4`` come last. Whatever is wrong ends in one `ConfigError` that names the file and the key.
Reading files needs pydantic and PyYAML; building a `Config` in Python needs neither.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from data_pipeline.config import DataConfig
from dgt.models import ModelConfig
from dgt.tasks import TaskConfig
from dgt.training.checkpoint import CheckpointConfig
from dgt.training.ema import EmaConfig
from dgt.training.mixing import MixingConfig
from dgt.training.monitor import MonitorConfig
from dgt.training.optim import OptimizerConfig
from dgt.training.parallel import EngineConfig
from dgt.training.run_folder import plain
from dgt.training.schedule import ScheduleConfig
from dgt.training.steps import StepsConfig


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file, the key and what to do."""


@dataclass(frozen=True)
class Config:
    """Everything that a run is made of. Each section is described where its type is declared."""

    name: str = "run"
    """The run's name; its folder is `output_dir`/`name`."""
    output_dir: str = "runs"
    """Folder of all runs; on a cluster a file system that every node sees."""
    seed: int = 0
    """Key of every random draw: initial weights, sample order, augmentation, mixing, drop path."""
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    steps: StepsConfig = field(default_factory=StepsConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    mixing: MixingConfig = field(default_factory=MixingConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(f"name: {self.name!r} is no folder name; use letters, digits, '.', '_' and '-'")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: must lie in [0, 2**32), got {self.seed}")
        if self.mixing.enabled and self.steps.micro_batch_size % 2:
            raise ValueError(
                "steps.micro_batch_size: must be even while mixing is on, because the samples at positions 2i and "
                f"2i+1 of the global batch are mixed with each other; got {self.steps.micro_batch_size}"
            )

        streams = self.data.canonical_nodes if self.data.order == "block" else 1
        if streams > 1 and self.steps.global_batch_size % (2 * streams):
            raise ValueError(
                f"steps.global_batch_size: must be a multiple of {2 * streams}, twice data.canonical_nodes, so that "
                f"the streams of order 'block' advance together in pairs; got {self.steps.global_batch_size}"
            )

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return Path(self.output_dir) / self.name


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads, merges and validates the configuration file at `path`, with ``key.sub=value`` `overrides` on top.

    Raises `ConfigError` naming the file or override and the key: unknown keys (with the nearest known one), wrong
    types, values out of range, missing or circular base files, overrides that are not ``key=value``.
    """
    import yaml

    values = read_with_bases(Path(path))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {override!r}: expected key.sub=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: the value is not valid YAML ({error})") from None
        for part in reversed(key.split(".")):
            value = {part: value}
        check_keys(value, Config, f"override {override!r}")
        values = merged(values, value)
    return from_dict(values, source=f"{path} with the overrides" if overrides else str(path))


def from_dict(values: Mapping[str, Any], source: str = "configuration") -> Config:
    """Validates nested plain `values` into a `Config`; `source` is named in errors. Raises `ConfigError`."""
    from pydantic import TypeAdapter, ValidationError

    check_keys(values, Config, source)
    try:
        config = TypeAdapter(Config).validate_python(dict(values))
    except ValidationError as error:
        raise ConfigError("\n".join(f"{source}: {describe(e)}" for e in error.errors())) from None
    for key, value in leaves(plain(config)):  # afterwards, because "nan" is a text until pydantic has read it
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{source}: {key}: must be a finite number, got {value}")
    return config


def describe(error: Mapping[str, Any]) -> str:
    """One line for one of pydantic's errors: the key, what was wrong, what was given."""
    key = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] == "value_error" else f", got {error['input']!r}"
    return f"{key}: {message}{given}" if key else f"{message}{given}"


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load` reads back to an equal `Config`."""
    import yaml

    return yaml.safe_dump(plain(config), sort_keys=False, default_flow_style=None, width=110)


def read_with_bases(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's values merged over those of its ``base:`` files. Raises `ConfigError`."""
    import yaml

    if path.resolve() in seen:
        chain = " -> ".join(p.name for p in (*seen, path.resolve()))
        raise ConfigError(f"{path}: base files form a circle: {chain}")
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read this configuration file: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of keys to values, this is a {type(values).__name__}")
    base = values.pop("base", None)
    check_keys(values, Config, str(path))
    if base is None:
        return values
    return merged(read_with_bases(path.parent / str(base), (*seen, path.resolve())), values)


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `under`: mappings merge key by key, everything else is replaced."""
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return result


def check_keys(values: Any, kind: type, source: str, prefix: str = "") -> None:
    """Raises `ConfigError` at the first key of `values` that the dataclass `kind` does not have, at any depth.

    And where true or false is given for a number, because pydantic takes them for 1 and 0.
    """
    if not isinstance(values, Mapping):
        given = "nothing" if values is None else repr(values)
        raise ConfigError(f"{source}: {prefix.rstrip('.')}: expected a section of keys and values, got {given}")
    hints = get_type_hints(kind)
    for key, value in values.items():
        if key not in hints:
            raise ConfigError(f"{source}: unknown key {prefix}{key}{suggestion(str(key), prefix, list(hints))}")
        if dataclasses.is_dataclass(hints[key]):
            check_keys(value, hints[key], source, f"{prefix}{key}.")
        elif is_numeric(hints[key]) and any(isinstance(leaf, bool) for _, leaf in leaves(value)):
            raise ConfigError(f"{source}: {prefix}{key}: true and false are no numbers, got {value!r}")


def is_numeric(hint: Any) -> bool:
    """Whether a value of this type is a number or consists of numbers."""
    return hint in (int, float) or any(is_numeric(part) for part in get_args(hint))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested mappings and lists; the entries of a list have the list's key."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from leaves(below, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for below in value:
            yield from leaves(below, path)
    else:
        yield path, value


def suggestion(key: str, prefix: str, known: Sequence[str]) -> str:
    """The nearest known key in words: of the same section, else of any section, else the list of what there is."""
    near = difflib.get_close_matches(key, known, n=1)
    if near:
        return f"; did you mean {prefix}{near[0]}?"
    everywhere = dict(leaf_keys(Config))
    near = difflib.get_close_matches(key, everywhere, n=1, cutoff=0.75)
    if near:
        return f"; did you mean {everywhere[near[0]]}?"
    return f"; known here: {', '.join(known)}"


def leaf_keys(kind: type, prefix: str = "") -> list[tuple[str, str]]:
    """(name, dotted path) of every key below the dataclass `kind`."""
    keys: list[tuple[str, str]] = []
    for name, hint in get_type_hints(kind).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            keys += leaf_keys(hint, f"{prefix}{name}.")
        else:
            keys.append((name, prefix + name))
    return keys
