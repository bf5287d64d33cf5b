"""The whole configuration of a run: composed here from each part's own type, read from YAML, validated before use.

A configuration file names a ``base:`` file (relative to itself) and says what differs. Command-line overrides such as
``optimizer.lr=5e-4`` come last. Whatever is wrong ends in one `ConfigError` that names the file and the key.
Reading files needs pydantic and PyYAML; building a `Config` in Python needs neither.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.config import DataConfig
from data_pipeline.config_file import ConfigError, check_keys, read_with_bases, validated, with_overrides
from dgt.models import ModelConfig
from dgt.tasks import ClassificationConfig, TaskConfig
from dgt.training.checkpoint import CheckpointConfig
from dgt.training.ema import EmaConfig
from dgt.training.guard import GuardConfig
from dgt.training.mixing import MixingConfig
from dgt.training.monitor import MonitorConfig
from dgt.training.optim import OptimizerConfig
from dgt.training.parallel import EngineConfig
from dgt.training.run_folder import plain
from dgt.training.schedule import ScheduleConfig
from dgt.training.start import StartConfig
from dgt.training.steps import StepsConfig

__all__ = ["Config", "ConfigError", "from_dict", "load", "to_yaml"]


@dataclass(frozen=True)
class Config:
    """Everything that a run is made of. Each section is described where its type is declared."""

    name: str = "run"
    """The run's name; its folder is `output_dir`/`name`."""
    output_dir: str = "runs"
    """Folder of all runs; on a cluster a file system that every node sees."""
    output_mode: str = "700"
    """Permissions of a run's folder when it is made, octal; 750 lets a group read it."""
    seed: int = 0
    """Key of every random draw: initial weights, sample order, augmentation, mixing, drop path."""
    task: TaskConfig = field(default_factory=ClassificationConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    start: StartConfig = field(default_factory=StartConfig)
    data: DataConfig = field(default_factory=DataConfig)
    steps: StepsConfig = field(default_factory=StepsConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    mixing: MixingConfig = field(default_factory=MixingConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(f"name: {self.name!r} is no folder name; use letters, digits, '.', '_' and '-'")
        if not re.fullmatch(r"7[0-7]{2}", self.output_mode):
            raise ValueError(
                f"output_mode: must be three octal digits of which the first is 7, such as 700 or 750 (without a 0 in "
                f"front, which YAML reads as another number), got {self.output_mode!r}"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: must lie in [0, 2**32), got {self.seed}")
        self.check_task()
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

    def check_task(self) -> None:
        """Raises ValueError where a section is set to what the task has no use for."""
        if self.task.name == "classification":
            return
        if self.mixing.enabled:
            raise ValueError(f"mixing: is for classification; set both of its alphas to 0 for {self.task.name}")
        if self.data.backend != "webdataset":
            raise ValueError(f"data.backend: {self.data.backend} holds no {self.task.name}; use webdataset")
        if self.task.name == "detection" and self.data.order == "block":
            raise ValueError("data.order: block cannot put images of like shape together; use global for detection")
        if self.task.name == "segmentation" and len(self.task.class_weights) not in (0, self.data.num_classes):
            raise ValueError(
                f"task.class_weights: {len(self.task.class_weights)} weights for {self.data.num_classes} classes"
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
    values = with_overrides(read_with_bases(Path(path), _check), overrides, _check)
    return from_dict(values, source=f"{path} with the overrides" if overrides else str(path))


def from_dict(values: Mapping[str, Any], source: str = "configuration") -> Config:
    """Validates nested plain `values` into a `Config`; `source` is named in errors. Raises `ConfigError`."""
    mode = values.get("output_mode")
    if type(mode) is int:  # what YAML reads where the digits stand without quotes
        values = {**values, "output_mode": str(mode)}
    return validated(Config, values, source)


def _check(values: Mapping[str, Any], source: str) -> None:
    check_keys(values, Config, source)


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load` reads back to an equal `Config`."""
    import yaml

    return yaml.safe_dump(plain(config), sort_keys=False, default_flow_style=None, width=110)
