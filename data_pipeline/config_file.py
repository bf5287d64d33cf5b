"""Typed settings from YAML files with ``base:`` files and overrides, whose errors name the file and the key.

Both the whole configuration of a run (dgt.config) and its section `data` alone (data_pipeline.settings) are read here.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

Settings = TypeVar("Settings")
Check = Callable[[Mapping[str, Any], str], None]
"""(values, where they come from) -> raises ConfigError for a key that there is not."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file, the key and what to do."""


class _UnknownKeyError(ConfigError):
    """There is no such key; `depth` tells how much of its path is known."""

    def __init__(self, message: str, depth: float) -> None:
        super().__init__(message)
        self.depth = depth


def read_with_bases(path: Path, check: Check, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's values merged over those of its ``base:`` files (relative to itself), each of which passes `check`.

    Raises `ConfigError` for what cannot be read, is no mapping, or is a base of itself.
    """
    if path.resolve() in seen:
        chain = " -> ".join(p.name for p in (*seen, path.resolve()))
        raise ConfigError(f"{path}: base files form a circle: {chain}")
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read this configuration file: {error}") from None
    values = _from_yaml(text, f"{path}: not valid YAML")
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of keys to values, this is a {type(values).__name__}")
    base = values.pop("base", None)
    check(values, str(path))
    if base is None:
        return values
    return merged(read_with_bases(path.parent / str(base), check, (*seen, path.resolve())), values)


def with_overrides(values: Mapping[str, Any], overrides: Sequence[str], check: Check) -> dict[str, Any]:
    """`values` with each ``key.sub=value`` (in YAML) laid on top; raises `ConfigError` naming the override."""
    result = dict(values)
    for override in overrides:
        source = f"override {override!r}"
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"{source}: expected key.sub=value")
        value = _from_yaml(text, f"{source}: the value is not valid YAML")
        for part in reversed(key.split(".")):
            value = {part: value}
        check(value, source)
        result = merged(result, value)
    return result


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `under`: mappings merge key by key, everything else is replaced."""
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return result


def validated(kind: type[Settings], values: Mapping[str, Any], source: str) -> Settings:
    """Nested plain `values` as the dataclass `kind`; raises `ConfigError` naming `source` and each wrong key."""
    check_keys(values, kind, source)
    try:
        from pydantic import TypeAdapter, ValidationError
    except ImportError as error:
        raise ConfigError("Reading configurations needs the package pydantic: pip install pydantic") from error
    plain, lines = dict(values), []
    for key, hint in get_type_hints(kind).items():
        if kinds := _kinds(hint):  # which of them is decided here, and not by what happens to fit
            chosen = _named(plain.get(key, {}), kinds, source, f"{key}.") or kinds[0]
            _check_section(plain.get(key, {}), chosen, source, f"{key}.", dict(_leaf_keys(kind)))
            try:
                plain[key] = TypeAdapter(chosen).validate_python(dict(plain.get(key, {})))
            except ValidationError as error:
                lines += [f"{source}: {key}.{_described(e)}" for e in error.errors()]
                plain.pop(key)  # the default, for the other keys to be looked at
    try:
        settings = TypeAdapter(kind).validate_python(plain)
    except ValidationError as error:
        lines += [f"{source}: {_described(e)}" for e in error.errors()]
    if lines:
        raise ConfigError("\n".join(lines))
    for key, value in _leaves(dataclasses.asdict(settings)):  # type: ignore[call-overload]
        # only now, because "nan" is a text until pydantic has read it
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{source}: {key}: must be a finite number, got {value}")
    return settings


def check_keys(values: Any, kind: type, source: str) -> None:
    """Raises `ConfigError` at the first key of `values` that the dataclass `kind` does not have, at any depth.

    And where true or false is given for a number, because pydantic takes them for 1 and 0.
    """
    _check_section(values, kind, source, "", dict(_leaf_keys(kind)))


def _check_section(values: Any, kind: type, source: str, prefix: str, everywhere: Mapping[str, str]) -> None:
    if not isinstance(values, Mapping):
        given = "nothing" if values is None else repr(values)
        raise ConfigError(f"{source}: {prefix.rstrip('.')}: expected a section of keys and values, got {given}")
    hints = get_type_hints(kind)
    for key, value in values.items():
        if key not in hints:
            near, hint = _suggestion(str(key), prefix, list(hints), everywhere)
            raise _UnknownKeyError(f"{source}: unknown key {prefix}{key}{hint}", prefix.count(".") + near)
        if dataclasses.is_dataclass(hints[key]):
            _check_section(value, hints[key], source, f"{prefix}{key}.", everywhere)
        elif kinds := _kinds(hints[key]):
            _check_one_of(value, kinds, source, f"{prefix}{key}.", everywhere)
        elif _is_numeric(hints[key]) and any(isinstance(leaf, bool) for _, leaf in _leaves(value)):
            raise ConfigError(f"{source}: {prefix}{key}: true and false are no numbers, got {value!r}")


def _kinds(hint: Any) -> list[type]:
    """The dataclasses that a section may be one of, by its key `name`; none where `hint` is no choice of such."""
    kinds = list(get_args(hint))
    return kinds if kinds and all(dataclasses.is_dataclass(kind) for kind in kinds) else []


def _names(kind: type) -> tuple[str, ...]:
    return get_args(get_type_hints(kind)["name"])


def _named(value: Any, kinds: Sequence[type], source: str, prefix: str) -> type | None:
    """The kind that `value` names; None where it names none. Raises ConfigError for a name that there is not."""
    if not isinstance(value, Mapping) or "name" not in value:
        return None
    for kind in kinds:
        if value["name"] in _names(kind):
            return kind
    known = [name for kind in kinds for name in _names(kind)]
    raise ConfigError(f"{source}: {prefix}name: {value['name']!r} is none of {', '.join(known)}")


def _check_one_of(values: Any, kinds: Sequence[type], source: str, prefix: str, everywhere: Mapping[str, str]) -> None:
    """As _check_section; without a name, as in an override, what any of the kinds has will do for now."""
    named = _named(values, kinds, source, prefix)
    elsewhere = {key: path for key, path in everywhere.items() if not path.startswith(prefix)}
    errors: list[ConfigError] = []
    for kind in [named] if named else kinds:
        try:
            return _check_section(values, kind, source, prefix, elsewhere | dict(_leaf_keys(kind, prefix)))
        except ConfigError as error:
            errors.append(error)
    # the kind that is meant knows more of the key than the others
    raise max(errors, key=lambda error: error.depth if isinstance(error, _UnknownKeyError) else math.inf)


def _suggestion(key: str, prefix: str, known: Sequence[str], everywhere: Mapping[str, str]) -> tuple[float, str]:
    """The nearest known key in words: of the same section, else of any section, else the list of what there is.

    Before it, how near it is in the same section, from 0 (far) to 1.
    """
    near = difflib.get_close_matches(key, known, n=1)
    if near:
        return difflib.SequenceMatcher(None, key, near[0]).ratio(), f"; did you mean {prefix}{near[0]}?"
    near = difflib.get_close_matches(key, everywhere, n=1, cutoff=0.75)
    if near:
        return 0.0, f"; did you mean {everywhere[near[0]]}?"
    return 0.0, f"; known here: {', '.join(known)}"


def _leaf_keys(kind: type, prefix: str = "") -> list[tuple[str, str]]:
    """(name, dotted path) of every key below the dataclass `kind`."""
    keys: list[tuple[str, str]] = []
    for name, hint in get_type_hints(kind).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            keys += _leaf_keys(hint, f"{prefix}{name}.")
        elif kinds := _kinds(hint):
            for kind in kinds:
                keys += _leaf_keys(kind, f"{prefix}{name}.")
        else:
            keys.append((name, prefix + name))
    return keys


def _is_numeric(hint: Any) -> bool:
    """Whether a value of this type is a number or consists of numbers."""
    return hint in (int, float) or any(_is_numeric(part) for part in get_args(hint))


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested mappings and lists; the entries of a list have the list's key."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from _leaves(below, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for below in value:
            yield from _leaves(below, path)
    else:
        yield path, value


def _described(error: Mapping[str, Any]) -> str:
    """One line for one of pydantic's errors: the key, what was wrong, what was given."""
    key = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] == "value_error" else f", got {error['input']!r}"
    return f"{key}: {message}{given}" if key else f"{message}{given}"


def _from_yaml(text: str, complaint: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ConfigError("Reading configurations needs the package PyYAML: pip install PyYAML") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{complaint}: {error}") from None
