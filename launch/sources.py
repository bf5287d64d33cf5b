"""Where weights to evaluate are: a checkpoint of a run, or a file that launch/export.py has written."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch import weights
from launch.runs import LaunchError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dgt.config import Config
    from dgt.training.checkpoint import Checkpoint


@dataclass(frozen=True)
class Source:
    """What was asked for, before anything large is read."""

    config: Config
    checkpoints: Path
    which: str
    """best, newest, or a path."""

    def verified(self) -> Found:
        """The weights, known to be whole. Raises CheckpointError or LaunchError."""
        if self.which.endswith(".safetensors"):
            return Found(Path(self.which), int(header(Path(self.which)).get("step", 0)), None)
        checkpoint = weights.find(self.checkpoints, self.which)
        return Found(checkpoint.path, checkpoint.step, checkpoint)


@dataclass(frozen=True)
class Found:
    """Weights that can be read."""

    path: Path
    step: int
    checkpoint: Checkpoint | None
    """None: an exported file."""

    def read(self, network: nn.Module, kind: weights.Kind | None) -> tuple[dict[str, Tensor], weights.Kind]:
        """The state dict of `network` and its kind, as `weights.read` gives them and with its errors."""
        if self.checkpoint is not None:
            return weights.read(self.checkpoint, network, kind)
        return read_file(self.path, network, kind)


def find(options: argparse.Namespace) -> Source:
    """The configuration that goes with what --config, --run and --checkpoint name, with the options laid on top.

    Raises LaunchError where they do not name any, and ConfigError.
    """
    which, overrides = options.checkpoint, own_overrides(options)
    if which not in ("best", "newest") and (Path(which) / "checkpoints").is_dir():
        options = argparse.Namespace(**vars(options) | {"run": which})
        which = "best"
    if options.run:
        folder = Path(options.run)
        if not (folder / "config.yaml").is_file():
            raise LaunchError(f"{folder} is no run's folder: it has no config.yaml")
        config = configured(options.config or folder / "config.yaml", overrides)
        return Source(config, folder / "checkpoints", which)
    if options.config:
        config = configured(options.config, overrides)
        return Source(config, config.run_dir / "checkpoints", which)
    if which in ("best", "newest"):
        raise LaunchError(
            f"whose {which} checkpoint? Name a run with --run DIR, or its configuration with --config FILE"
        )
    return Source(carried(Path(which), overrides), Path(which).parent, which)


def own_overrides(options: argparse.Namespace) -> list[str]:
    """The overrides, and after them what the options say about the same settings."""
    stated = {
        "data.image_size": options.image_size,
        "data.eval_crop_pct": options.crop_pct,
        "steps.evaluate_batch_size": options.batch_size,
    }
    return [*options.overrides, *(f"{key}={value}" for key, value in stated.items() if value is not None)]


def configured(path: str | Path, overrides: Sequence[str]) -> Config:
    """The configuration file at `path`, without what training began from."""
    from dgt.config import load

    return weights.without_start(load(path, overrides))


def carried(path: Path, overrides: Sequence[str]) -> Config:
    """The configuration that a checkpoint or an exported file carries."""
    import yaml

    from data_pipeline.config_file import check_keys, with_overrides
    from dgt.config import Config, from_dict
    from dgt.training.checkpoint import read_manifest

    if path.suffix == ".safetensors":
        facts = header(path)
        if "config" not in facts:
            raise LaunchError(f"{path} does not say how it was trained; name its configuration with --config FILE")
        values = yaml.safe_load(facts["config"])
    elif path.is_dir():
        values = read_manifest(path)["config"]
    else:
        raise LaunchError(f"--checkpoint {path}: there is no such checkpoint, run or .safetensors file")
    values = with_overrides(values, overrides, lambda v, source: check_keys(v, Config, source))
    return weights.without_start(from_dict(values, source=f"the configuration in {path}"))


def header(path: Path) -> dict[str, str]:
    """What an exported file says of itself. Raises LaunchError where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise LaunchError(f"{path} cannot be read: {error}") from None


def read_file(path: Path, network: nn.Module, kind: weights.Kind | None) -> tuple[dict[str, Tensor], weights.Kind]:
    """The state dict of `network` from an exported file, and its kind.

    Raises LaunchError where the file does not fit the network, or has weights of the other kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    facts = header(path)
    if (part := facts.get("part", "network")) != "network":
        raise LaunchError(
            f"{path} holds the {part} of a network only, which answers nothing; begin a run with it (start.path), or "
            "export the whole network"
        )
    holds: weights.Kind = "raw" if facts.get("weights") == "raw" else "ema"
    if kind is not None and kind != holds:
        raise LaunchError(f"{path} holds {holds} weights; leave --weights {kind} out, or evaluate the run's checkpoint")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise LaunchError(f"{path} cannot be read: {error}") from None
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    held = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(wanted.keys() | held.keys()):
        if wanted.get(name) != held.get(name):
            there, here = held.get(name, "absent"), wanted.get(name, "absent")
            classes = json.loads(facts.get("num_classes", "null"))
            raise LaunchError(
                f"{path} ({facts.get('architecture', 'a network')}, {classes} classes) does not fit "
                f"{type(network).__name__}: {name} is {there} in the file and {here} in the network"
            )
    return tensors, holds
