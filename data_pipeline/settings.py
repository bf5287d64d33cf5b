"""The data section of a configuration file, for the commands of this package, which know nothing of the rest."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from data_pipeline.config import DataConfig
from data_pipeline.shards.source import DataError

SECTION = "data"


def read_settings(file: Path | None, overrides: Sequence[str]) -> DataConfig:
    """The section `data` of a YAML file (laid over those of its `base:` files), with "key.sub=value" on top.

    Keys of `overrides` may begin with "data." or not. Raises DataError naming the file or override and the key.
    """
    values = _section(file, ()) if file is not None else {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise DataError(f"'{override}' sets nothing: give KEY=VALUE, such as augment.horizontal_flip=0.")
        value = _yaml(text, f"'{override}'")
        for part in reversed(key.removeprefix(f"{SECTION}.").split(".")):
            value = {part: value}
        values = _merged(values, value)
    try:
        config: DataConfig = _converted(values, DataConfig, "")
    except (ValueError, TypeError) as error:
        source = " with ".join([*([str(file)] if file else []), *(["--set"] if overrides else [])])
        raise DataError(f"{source}: {error}.") from error
    return config


def _section(path: Path, below: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in below:
        raise DataError(f"{path}: its base files form a circle.")
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    content = _yaml(text, str(path)) or {}
    if not isinstance(content, dict) or not isinstance(content.get(SECTION) or {}, dict):
        raise DataError(f"{path} is no configuration with a section '{SECTION}'.")
    own = content.get(SECTION) or {}
    if content.get("base") is None:
        return own
    return _merged(_section(path.parent / str(content["base"]), (*below, path.resolve())), own)


def _yaml(text: str, where: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise DataError("Reading settings needs the package PyYAML: pip install PyYAML") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"{where} is not valid YAML: {error}") from error


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        result[key] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def _converted(value: Any, kind: Any, where: str) -> Any:
    """`value` from YAML as the type that a field has; raises ValueError naming the key."""
    if dataclasses.is_dataclass(kind):
        return _section_of(value, kind, where)
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise ValueError(f"{where}: must be one of {', '.join(map(str, typing.get_args(kind)))}, got {value!r}")
        return value
    if typing.get_origin(kind) is tuple:
        return _tuple(value, typing.get_args(kind), where)
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        value = float(value)  # YAML takes 1e-3 for a text
    if type(value) is not kind:
        raise ValueError(f"{where}: must be of type {kind.__name__}, got {value!r}")
    return value


def _section_of(value: Any, kind: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where or SECTION}: must be a section of keys and values, got {value!r}")
    hints = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    for key in value:
        if key not in hints:
            raise ValueError(f"unknown key {prefix}{key}; known here: {', '.join(hints)}")
    return kind(**{key: _converted(entry, hints[key], f"{prefix}{key}") for key, entry in value.items()})


def _tuple(value: Any, kinds: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where}: must be a list, got {value!r}")
    if len(kinds) == 2 and isinstance(kinds[1], types.EllipsisType):
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise ValueError(f"{where}: must be a list of {len(kinds)}, got {value!r}")
    return tuple(_converted(entry, kind, where) for entry, kind in zip(value, kinds, strict=True))
