"""The folder of one run, and the configuration that owns it.

OUTPUT_DIR/NAME/
    config.yaml      the resolved configuration
    metrics.jsonl    one line per logged step, per evaluation and per checkpoint
    events.jsonl     why every attempt started and stopped; written by the launcher, see dgt/training/events.py
    quarantine.jsonl one line per damaged sample that was met (data_pipeline/quarantine.py); absent while there is none
    bad_steps.jsonl  one line per step that was bad and skipped (dgt/training/guard.py); absent while there is none
    tensorboard/     the same as curves
    profile          asks for a trace (dgt/training/profiling.py); profiles/ holds those that were taken
    samples/         the sample ids of every step (dgt/training/sample_log.py); only with monitor.log_samples
    checkpoints/     see dgt/training/checkpoint.py
    hangs/           where each rank stood when an attempt hung (dgt/training/watchdog.py); absent while none did
    logs/            one file per rank, appended by every attempt
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgt.training.checkpoint import write_durably

MAY_CHANGE = (
    "name",
    "output_dir",
    "output_mode",
    "engine.name",
    "engine.fsdp.",
    "engine.deepspeed.",
    "engine.activation_checkpointing",
    "engine.compile",
    "engine.apex_layer_norm",
    "engine.collect_garbage_every",
    "engine.threads",
    "engine.deterministic",
    "guard.",
    "checkpoint.",
    "monitor.",
    "data.path",
    "data.num_threads",
    "data.prefetch",
    "data.max_bad_samples",
    "data.stall_seconds",
    "data.cache.",
    "steps.micro_batch_size",
    "steps.max_steps",
    "steps.evaluate_",
)
"""Keys that a resumed run may have changed: they say where and how fast it computes, not what."""


class RunFolderError(RuntimeError):
    """The run's folder cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class RunFolder:
    """Paths inside one run's folder."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """The launcher's story of the run, one JSON object per line."""
        return self.path / "events.jsonl"

    @property
    def samples(self) -> Path:
        """Sample ids of every step, one file per rank."""
        return self.path / "samples"

    @property
    def quarantine(self) -> Path:
        """Damaged samples, one JSON object per line."""
        return self.path / "quarantine.jsonl"

    @property
    def bad_steps(self) -> Path:
        """Steps that were skipped, one JSON object per line."""
        return self.path / "bad_steps.jsonl"

    @property
    def hangs(self) -> Path:
        """Stacks of ranks that hung, one folder per attempt."""
        return self.path / "hangs"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Committed checkpoints, and saves under way."""
        return self.path / "checkpoints"


def plain(config: Any) -> Any:
    """A configuration as nested plain values, such as YAML and JSON write and read back unchanged."""
    if dataclasses.is_dataclass(config):
        return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: plain(value) for key, value in config.items()}
    return [plain(value) for value in config] if isinstance(config, (list, tuple)) else config


def differences(left: Mapping[str, Any], right: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys at which two nested plain configurations differ, with both values (None where absent)."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in [*left, *(k for k in right if k not in left)]:
        a, b = left.get(key), right.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found[prefix + key] = (a, b)
    return found


def check(folder: RunFolder, settings: Mapping[str, Any]) -> None:
    """Raises RunFolderError where the folder belongs to a run whose results these `settings` would mix with theirs."""
    import yaml

    if not folder.config.exists():
        if any(folder.checkpoints.glob("step_*")):
            raise RunFolderError(f"{folder.path} holds checkpoints but no config.yaml; choose another name=")
        return
    try:
        earlier = yaml.safe_load(folder.config.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunFolderError(f"{folder.config} cannot be read: {error}") from None
    if not isinstance(earlier, Mapping):
        raise RunFolderError(f"{folder.config} holds no configuration; restore it, or choose another name=")
    changed = {k: v for k, v in differences(earlier, settings).items() if not k.startswith(MAY_CHANGE)}
    if changed:
        listed = "; ".join(f"{key} was {old!r}, now {new!r}" for key, (old, new) in changed.items())
        raise RunFolderError(
            f"{folder.path} holds a run of another configuration ({listed}); choose another name=, or restore the "
            "configuration to resume that run"
        )


def claim(folder: RunFolder, settings: Mapping[str, Any]) -> None:
    """Checks the folder, creates it with the permissions `output_mode`, and writes the settings into it.

    Raises RunFolderError.
    """
    import yaml

    check(folder, settings)
    try:
        if not folder.path.exists():
            folder.path.mkdir(parents=True)
            folder.path.chmod(int(settings["output_mode"], 8))  # mkdir's own mode is subject to the umask
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(dict(settings), sort_keys=False, default_flow_style=None, width=110)
        write_durably(folder.config, text)
    except OSError as error:
        raise RunFolderError(f"{folder.path} cannot be written: {error.strerror or error}") from None
