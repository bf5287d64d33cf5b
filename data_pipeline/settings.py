"""The data section of a configuration file, for the commands of this package, which know nothing of the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.config import DataConfig
from data_pipeline.config_file import ConfigError, check_keys, read_with_bases, validated, with_overrides
from data_pipeline.shards.source import DataError


@dataclass(frozen=True)
class _Sections:
    """What is read of a configuration; other sections are for others to judge."""

    data: DataConfig = field(default_factory=DataConfig)


def read_settings(file: Path | None, overrides: Sequence[str]) -> DataConfig:
    """The section `data` of a YAML file (laid over those of its `base:` files), with "key.sub=value" on top.

    Keys of `overrides` may begin with "data." or not. Raises DataError naming the file or override and the key.
    """
    if file is None and not overrides:
        return DataConfig()
    try:
        values = _own(read_with_bases(file, _check)) if file is not None else {}
        values = with_overrides(values, [f"data.{text.removeprefix('data.')}" for text in overrides], _check)
        source = " with ".join([*([str(file)] if file else []), *(["--set"] if overrides else [])])
        return validated(_Sections, values, source).data
    except ConfigError as error:
        raise DataError(str(error)) from error


def _check(values: Mapping[str, Any], source: str) -> None:
    check_keys(_own(values), _Sections, source)


def _own(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: section for name, section in values.items() if name == "data"}
