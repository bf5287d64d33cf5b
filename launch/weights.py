"""Weights out of a run's checkpoints, whatever engine and number of ranks wrote them; needs no GPU and no ranks."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from launch.runs import LaunchError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dgt.config import Config
    from dgt.training.checkpoint import Checkpoint
    from dgt.training.tensor_files import TensorFiles

Kind = Literal["ema", "raw"]

log = logging.getLogger("launch")


def find(checkpoints: Path, which: str) -> Checkpoint:
    """The checkpoint "newest" or "best" in the folder `checkpoints`, or the one at the path `which`, verified.

    Raises CheckpointError; see `dgt.training.checkpoint.find`.
    """
    from dgt.training import checkpoint

    return checkpoint.find(checkpoints, which, log.warning)


def read(checkpoint: Checkpoint, network: nn.Module, kind: Kind | None) -> tuple[dict[str, Tensor], Kind]:
    """The state dict of `network` (which may lie on the meta device) from a checkpoint, on the CPU in float32.

    `kind`: averaged or raw weights; None takes the averaged where there are any. Returns the tensors and their kind.
    Raises CheckpointError where names or shapes are not the network's, LaunchError where there are no averages.
    """
    from dgt.training.checkpoint import tensors_in, wording

    with wording(checkpoint):
        stored = tensors_in(checkpoint)
        names, kind = names_in(checkpoint, stored, network, kind)
        return {name: stored.whole(saved) for name, saved in names.items()}, kind


def names_in(
    checkpoint: Checkpoint, stored: TensorFiles, network: nn.Module, kind: Kind | None
) -> tuple[dict[str, str], Kind]:
    """Under which name a checkpoint holds each tensor of the network's state dict, and the kind; raises as `read`."""
    from dgt.training.checkpoint import CheckpointError
    from dgt.training.tensor_files import TensorFileError

    averaged = any(name.startswith("ema.") for name in stored.tensors)
    if kind == "ema" and not averaged:
        raise LaunchError(f"{checkpoint.path} holds no averaged weights (ema.decay was 0); use --weights raw")
    kind = kind or ("ema" if averaged else "raw")
    part = "ema" if kind == "ema" else "model"
    parameters, state = dict(network.named_parameters()), network.state_dict()
    known = {f"{part}.{name}" for name in parameters} | {f"model.{name}" for name, _ in network.named_buffers()}
    if foreign := {name for name in stored.tensors if name.startswith(f"{part}.")} - known:
        raise CheckpointError(f"{checkpoint.path}: {min(foreign)} and {len(foreign) - 1} others are not the network's")
    names = {name: f"{part if name in parameters else 'model'}.{name}" for name in state}
    try:
        for name, saved in names.items():
            stored.check(saved, state[name].shape, state[name].dtype)
    except TensorFileError as error:
        raise CheckpointError(f"{checkpoint.path}: does not fit {type(network).__name__}: {error}") from None
    return names, kind


def without_start(config: Config) -> Config:
    """The configuration without the weights that training began with, which a checkpoint replaces."""
    from dgt.training.start import StartConfig

    return dataclasses.replace(config, start=StartConfig())
