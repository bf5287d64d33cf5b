"""Exact evaluation: every sample counted once, whatever the number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline.loader import Batch
from dgt.tasks import Findings, Task
from dgt.training.parallel import EngineConfig
from dgt.training.parallel.precision import HALF, allow_tf32
from dgt.training.world import World

FlipMean = Literal["probabilities", "logits"]


class Evaluated(Protocol):
    """What is evaluated: an engine, or an `Inference`."""

    network: nn.Module
    world: World

    def arithmetic(self) -> AbstractContextManager[Any]:
        """Context of a forward pass."""
        ...


class Batches(Protocol):
    """A loader, as far as an evaluation sees it."""

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch."""
        ...

    def __iter__(self) -> Any: ...


@torch.no_grad()
def evaluate(
    engine: Evaluated, task: Task, loader: Batches, stop_asked: Callable[[], bool] = lambda: False
) -> Findings | None:
    """What the task finds in one pass of `loader`, over all ranks and on the CPU; all ranks call it.

    Totals are the same on every rank; records and pictures are whole on rank 0, in the order of their sample ids, and
    empty on the others. Batches have the same number on every rank (padding does not count), because a sharded network
    computes together. Returns None when all ranks agreed to stop half way.
    """
    found: Findings | None = None
    engine.network.eval()
    loader.set_epoch(0)
    batches: Iterable[Batch] = loader
    for batch in batches:
        if stop_asked():
            return None
        with engine.arithmetic():
            more = task.found(engine.network, batch, engine.world.device)
        if found is None:
            found = more
        else:
            found.add(more)
    if found is None:
        raise ValueError("nothing to evaluate: the evaluation split has no samples")
    return of_all_ranks(found, engine.world)


def of_all_ranks(found: Findings, world: World) -> Findings:
    """The findings of all ranks; all ranks call it."""
    parts: list[Findings] | None = [found]
    if world.size > 1:
        dist.all_reduce(found.totals)
        own = Findings(torch.empty(0), found.records, found.pictures)
        parts = [own] * world.size if world.is_main else None
        dist.gather_object(own, parts, group=world.control)
    whole = Findings(found.totals.cpu())
    for part in parts or ():
        whole.records |= part.records
        whole.pictures |= part.pictures
    whole.records = dict(sorted(whole.records.items()))
    whole.pictures = dict(sorted(whole.pictures.items()))
    return whole


@dataclass
class Inference:
    """A network that is whole on every rank and only evaluated: no optimizer, and no engine's needs."""

    network: nn.Module
    world: World
    config: EngineConfig

    def __post_init__(self) -> None:
        allow_tf32(self.config.precision == "tf32")
        self.network.to(self.world.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def arithmetic(self) -> AbstractContextManager[Any]:
        """The precision that the engine is configured to train in, as ddp does it."""
        half = HALF.get(self.config.precision)
        return torch.autocast(self.world.device.type, half) if half else nullcontext()


class Flipped(nn.Module):
    """The mean answer to an image and to its mirror image (left and right exchanged)."""

    def __init__(self, network: nn.Module, mean_of: FlipMean):
        """`mean_of`: "probabilities" averages what softmax gives, "logits" what the network gives."""
        super().__init__()
        self.network = network
        self.mean_of = mean_of

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, classes) float32 logits of the mean; mean probabilities come as their logarithms."""
        both = torch.stack([self.network(images).float(), self.network(images.flip(-1)).float()])
        if self.mean_of == "logits":
            return both.mean(dim=0)
        return both.log_softmax(dim=-1).logsumexp(dim=0) - math.log(2)
