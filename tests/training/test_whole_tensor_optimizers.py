"""Optimizers whose update looks at a whole tensor see it whole under fsdp, although each rank holds a part of it."""

from __future__ import annotations

from typing import Any

import torch
from ranks import run_ranks
from recipes import always, assembled, config_of
from torch import Tensor, nn

from dgt.training.optim import OptimizerConfig
from dgt.training.parallel import build_engine
from dgt.training.world import joined

STEPS = 3


def trained(label: str) -> dict[str, dict[str, Tensor]]:
    """Weights before and after some steps under LAMB and under Muon."""
    found: dict[str, Any] = {}
    with joined() as world:
        data = torch.randn(12, 6, generator=torch.Generator().manual_seed(1)).chunk(world.size)[world.rank]
        for name in ("lamb", "muon"):
            torch.manual_seed(0)
            network = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 7))
            optimizer: Any = OptimizerConfig(name=name)  # type: ignore[arg-type]
            engine = build_engine(network, world, config_of(label), optimizer)
            before = assembled(engine.weights(), world)
            for _ in range(STEPS):
                engine.train_step([data], lambda model, x: (model(x) - 1).square().sum() / 12, 0.02, always)
            found[name] = (before, assembled(engine.weights(), world))
    return found


def test_lamb_and_muon_train_under_fsdp_as_in_one_process() -> None:
    expected = run_ranks(1, trained, "ddp")[0].value
    for result in run_ranks(2, trained, "fsdp"):
        for name, (before, after) in result.value.items():
            for key, weight in after.items():
                change, wanted = weight - before[key], expected[name][1][key] - expected[name][0][key]
                # Muon multiplies in bfloat16 (2**-8), five times over, and enlarges small singular values meanwhile.
                tolerance = 0.1 if name == "muon" else 1e-4
                assert (change - wanted).norm() <= tolerance * wanted.norm(), (name, key)
                assert wanted.norm() > 0.01 * before[key].norm(), "it must have moved"
