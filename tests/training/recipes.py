"""One small recipe under any engine: the same weights, samples and draws whatever the number of ranks."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.config import DataConfig
from dgt.models import ModelConfig
from dgt.tasks import ClassificationConfig, Inputs, build_task
from dgt.training.draws import drop_path_keys
from dgt.training.mixing import MixingConfig, draw_pairs, mix
from dgt.training.optim import OptimizerConfig
from dgt.training.parallel import Engine, EngineConfig, build_engine
from dgt.training.parallel.config import DeepSpeedConfig, FsdpConfig
from dgt.training.pieces import Piece
from dgt.training.world import World

BATCH = 24
"""Samples of a step; divides by 1, 2, 3 and 4 ranks."""
MICRO = 8
"""Two ranks have 12 samples each: their second micro-batch is smaller than the first."""

Routes = dict[tuple[int, int], tuple[Tensor, Tensor]]
"""Grouping by (step, block) of all samples of the step."""


def config_of(label: str, **options: Any) -> EngineConfig:
    """ddp, fsdp, hybrid (shards of two ranks), zero1, zero2 or zero3; float32 unless `options` say otherwise."""
    options = {"precision": "fp32"} | options
    if label.startswith("zero"):
        stage: Any = int(label[-1])
        return EngineConfig(name="deepspeed", deepspeed=DeepSpeedConfig(stage=stage), **options)
    if label == "hybrid":
        return EngineConfig(name="fsdp", fsdp=FsdpConfig(shard_size=2), **options)
    return EngineConfig(name=label, **options)  # type: ignore[arg-type]


def always(loss: float, norm: float) -> bool:
    """Every step is good."""
    return True


def assembled(pieces: Mapping[str, Piece], world: World) -> dict[str, Tensor]:
    """The whole tensors, from the pieces of all ranks."""
    result = {}
    for name, piece in pieces.items():
        tensor = torch.full((math.prod(piece.shape),), torch.nan, dtype=piece.local.dtype)
        for start, elements in world.gather((piece.start, piece.local.reshape(-1))):
            tensor[start : start + elements.numel()] = elements
        result[name] = tensor.view(piece.shape)
    return result


class Recipe:
    """dgt_nano at 32 pixels with drop path and mixing, labels that can be learned; `ulp` perturbs the first weights."""

    def __init__(self, world: World, config: EngineConfig, optimizer: OptimizerConfig | None = None, ulp: int = 0):
        self.world, self.step = world, 0
        self.task = build_task(
            ClassificationConfig(), ModelConfig(name="dgt_nano", drop_path_rate=0.2), DataConfig(num_classes=5)
        )
        torch.manual_seed(0)
        network = self.task.build_model()
        if ulp:
            perturb(network, ulp)
        self.engine: Engine = build_engine(network, world, config, optimizer or OptimizerConfig(clip_grad_norm=1.0))
        rng = torch.Generator().manual_seed(1)
        self.labels = torch.randint(0, 5, (BATCH,), generator=rng)
        self.images = torch.randn(BATCH, 3, 32, 32, generator=rng) + self.labels.view(-1, 1, 1, 1)
        share = BATCH // world.size
        self.positions = torch.arange(world.rank * share, (world.rank + 1) * share)
        self.router = Router()

    def loss(self, model: nn.Module, at: Tensor) -> Tensor:
        """The samples' share of the batch's mean loss."""
        self.router.at, self.router.step, self.router.calls = at, self.step, 0
        mixed = mix(self.images[at], self.labels[at], at, draw_pairs(0, self.step, BATCH, MixingConfig()))
        keys = drop_path_keys(0, self.step, at, BATCH)
        inputs = Inputs(mixed.images, self.labels[at], keys, mixed.partner_labels, mixed.share)
        return self.task.loss(model, inputs) / BATCH

    def run(self, steps: int, lr: float = 1e-3) -> list[tuple[float, float]]:
        """Loss and gradient norm of each of the next `steps`."""
        results = []
        for _ in range(steps):
            result = self.engine.train_step(list(self.positions.split(MICRO)), self.loss, lr, always)
            results.append((result.loss, result.grad_norm))
            self.step += 1
        return results


def perturb(network: nn.Module, seed: int) -> None:
    """Moves every weight to a neighbouring float32 number, up or down by chance."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            up = torch.randint(0, 2, p.shape, generator=rng).bool()
            p.copy_(torch.nextafter(p, torch.where(up, torch.inf, -torch.inf)))


class Router:
    """Records the grouping that the network chooses, or replays a recorded one."""

    def __init__(self) -> None:
        self.at, self.step, self.calls = torch.arange(0), 0, 0
        self.recorded: Routes = {}
        self.replayed: Routes | None = None

    @contextmanager
    def recording(self) -> Iterator[Routes]:
        """The groupings of the steps taken meanwhile."""
        with self.interposed():
            yield self.recorded

    @contextmanager
    def replaying(self, routes: Routes) -> Iterator[None]:
        """Computes with these groupings."""
        self.replayed = routes
        with self.interposed():
            yield
        self.replayed = None

    @contextmanager
    def interposed(self) -> Iterator[None]:
        attention: Any = sys.modules["dgt.ops.dg_attention"]
        route = attention.route

        def routed(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
            key = (self.step, self.calls)
            self.calls += 1
            if self.replayed is not None:
                assignment, indices = self.replayed[key]
                return assignment[self.at], indices[self.at]
            own = route(q, *args)
            if key not in self.recorded:
                self.recorded[key] = (
                    own[0].new_zeros(BATCH, *own[0].shape[1:]),
                    own[1].new_zeros(BATCH, *own[1].shape[1:]),
                )
            for whole, part in zip(self.recorded[key], own, strict=True):
                whole[self.at] = part
            return own

        attention.route = routed
        try:
            yield
        finally:
            attention.route = route


def losses(results: Sequence[tuple[float, float]]) -> Tensor:
    """(steps,) float64."""
    return torch.tensor([loss for loss, _ in results], dtype=torch.float64)
