"""Weights that a run begins with, from an exported file or from another run: fine-tuning and transfer."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open
from timm.models import load_state_dict
from torch import Tensor, nn

from dgt.models import DenseNetwork
from dgt.training import checkpoint
from dgt.training.checkpoint import MANIFEST, Checkpoint, CheckpointError, UnreadableError
from dgt.training.world import World, portable

log = logging.getLogger("dgt")

BACKBONE = "backbone."
"""What the names of a dense network's backbone begin with."""


@dataclass(frozen=True)
class StartConfig:
    """Where the weights of step 0 come from; a run that has a checkpoint of its own goes on from that instead."""

    path: str = ""
    """A file (.safetensors as `launch/export.py` writes it, or .pth), another run's folder (its best checkpoint), or a
    step_* folder; empty = weights drawn from the seed. A classifier of another number of classes is drawn anew. A dense
    task takes the backbone of a classifier, or of another dense task, and of the heads what is of the same shape."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """Of a run: the averaged or the raw weights; "auto": averaged where it kept an average. An exported file holds one
    kind only, and the other is refused."""


def find(path: Path) -> Path | Checkpoint:
    """The file, or the verified checkpoint, that `path` names. Raises CheckpointError where there is none."""
    if path.is_file():
        return path
    try:
        if (path / MANIFEST).exists():
            return checkpoint.verify(path)
        if checkpoint.committed(path / "checkpoints"):
            return checkpoint.best_of(checkpoint.find(path / "checkpoints", "newest", log.warning))
    except CheckpointError as error:
        raise type(error)(f"start.path: {error}") from None
    except OSError as error:
        raise UnreadableError(f"start.path: {path} cannot be read now: {error}") from None
    raise CheckpointError(f"start.path: {path} is no file, no step_* folder, and no run that has a checkpoint")


def check_kind(config: StartConfig, found: Path | Checkpoint) -> None:
    """Raises CheckpointError where `found` is an exported file that says that it holds the other kind of weights."""
    if config.weights == "auto" or not isinstance(found, Path) or found.suffix != ".safetensors":
        return
    try:
        with safe_open(found, framework="pt") as file:
            holds = (file.metadata() or {}).get("weights", config.weights)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"start.path: {found} cannot be read: {error}") from None
    if holds != config.weights:
        raise CheckpointError(f"start.weights: {found} holds {holds} weights, not {config.weights}; set it to auto")


def read_on_all(config: StartConfig, found: Path | Checkpoint, world: World) -> tuple[str, dict[str, Tensor]]:
    """As `read`, on every rank; where one of them fails, all raise its error."""
    result, error = None, None
    try:
        check_kind(config, found)
        result = read(config, found)
    except CheckpointError as raised:
        error = portable(raised)
    if first := next((e for e in world.gather(error) if e is not None), None):
        raise first
    assert result is not None
    return result


def read(config: StartConfig, found: Path | Checkpoint) -> tuple[str, dict[str, Tensor]]:
    """Where the weights are from, in words, and the tensors by name. Raises CheckpointError."""
    if isinstance(found, Path):
        try:
            return str(found), dict(load_state_dict(str(found), use_ema=config.weights != "raw", weights_only=True))
        except Exception as error:  # whatever a file of an unknown origin does to its reader
            raise CheckpointError(f"start.path: {found} cannot be read: {error}") from None
    with checkpoint.wording(found):
        return read_checkpoint(config, found)


def read_checkpoint(config: StartConfig, found: Checkpoint) -> tuple[str, dict[str, Tensor]]:
    """As `read`; raises TensorFileError and OSError, too."""
    stored = checkpoint.tensors_in(found)
    averaged = {name for name in stored.tensors if name.startswith("ema.")}
    if config.weights == "ema" and not averaged:
        raise CheckpointError(f"start.weights: {found.path} holds no averages; set it to raw")
    names = {name.removeprefix("model."): name for name in stored.tensors if name.startswith("model.")}
    if config.weights != "raw":
        names |= {name.removeprefix("ema."): name for name in averaged}
    kind = "averaged" if averaged and config.weights != "raw" else "raw"
    return f"the {kind} weights of {found.path}", {own: stored.whole(name) for own, name in names.items()}


def load_into(network: nn.Module, config: StartConfig, world: World) -> None:
    """Gives an unwrapped `network` the weights that `config` names, and says which it did not take.

    A dense network takes a classifier's, too, as its backbone. All ranks call it; rank 0 alone finds and verifies them.
    Raises CheckpointError naming the first tensor that does not fit, and both shapes.
    """
    source, given = read_on_all(config, world.on_main(lambda: find(Path(config.path))), world)
    if isinstance(network, DenseNetwork):
        return load_into_dense(network, source, given)
    own = network.state_dict()
    if not any(name in own for name in given) and any(name.startswith(BACKBONE) for name in given):
        raise CheckpointError(
            f"start.path: {source} holds a dense network; export its backbone with launch/export.py --part backbone"
        )
    classifiers = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ([classifiers] if isinstance(classifiers, str) else classifiers))
    refuse_misfits(source, own, given, prefixes)
    taken = {name: given[name] for name in own if fits(name, own, given)}
    network.load_state_dict(taken, strict=False)
    log.info("starting from %s: %d of %d tensors", source, len(taken), len(own))
    for name in [name for name in own if name not in taken]:
        shape = tuple(given[name].shape) if name in given else "absent"
        log.info("  %s is drawn anew: %s there, %s here", name, shape, tuple(own[name].shape))


def load_into_dense(network: DenseNetwork, source: str, given: Mapping[str, Tensor]) -> None:
    """Gives a dense network what fits of `given`, the weights of another one or of a classifier, and says what did not.

    The backbone must fit, or CheckpointError is raised as by `load_into`; all else that does not is drawn anew.
    """
    own = network.state_dict()
    if not any(name.startswith(BACKBONE) for name in given):
        given = {BACKBONE + name: tensor for name, tensor in given.items()}
    behind = (f"{BACKBONE}norm.", f"{BACKBONE}head.")  # what a classifier has behind its stages
    wanted = {name: tensor for name, tensor in own.items() if name.startswith(BACKBONE)}
    there = {name: tensor for name, tensor in given.items() if name.startswith(BACKBONE)}
    refuse_misfits(source, wanted, {n: t for n, t in there.items() if not n.startswith(behind)}, ())
    taken = {name: given[name] for name in own if fits(name, own, given)}
    network.load_state_dict(taken, strict=False)
    log.info("starting from %s: %d of %d tensors", source, len(taken), len(own))
    log.info("  taken: %s", by_module(taken))
    if new := own.keys() - taken.keys():
        log.info("  drawn anew: %s", by_module(new))
    if left := given.keys() - taken.keys():
        log.info("  there, and not taken: %s", by_module(left))


def refuse_misfits(source: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor], but: tuple[str, ...]) -> None:
    """Raises CheckpointError for the first tensor that is on one side only or of two shapes; `but`: prefixes of those
    that may be so."""
    if wrong := next((name for name in own if not fits(name, own, given) and not name.startswith(but)), None):
        there = f"has the shape {tuple(given[wrong].shape)} there" if wrong in given else "is not there"
        raise CheckpointError(f"start.path: {source}: {wrong} {there} and has the shape {tuple(own[wrong].shape)} here")
    if foreign := next((name for name in given if name not in own and not name.startswith(but)), None):
        raise CheckpointError(
            f"start.path: {source}: {foreign} of shape {tuple(given[foreign].shape)} is not known here"
        )


def by_module(names: Iterable[str]) -> str:
    """How many of the `names` belong to each part of a dense network, in words: "backbone (310), norms (8)"."""
    counts = Counter(part_of(name) for name in names)
    return ", ".join(f"{part} ({count})" for part, count in sorted(counts.items()))


def part_of(name: str) -> str:
    """The part of a dense network that a tensor belongs to; a classifier's norm and head are none of the backbone."""
    first, *rest = name.split(".")
    is_behind = first == "backbone" and rest[0] not in ("stem", "stages")
    return f"a classifier's {rest[0]}" if is_behind else first


def fits(name: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> bool:
    """Whether there is a tensor of this name and of the same shape."""
    return name in given and given[name].shape == own[name].shape
