"""One recipe, one seed: all engines train alike, as far as a discontinuous grouping lets them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from ranks import run_ranks
from recipes import Recipe, Routes, config_of, losses
from torch import Tensor

from dgt.training.world import joined

STEPS = 20
ENGINES = {"torch": ("ddp", "fsdp", "hybrid"), "zero": ("zero1", "zero2", "zero3")}


@dataclass(frozen=True)
class Reference:
    """The run of a single process, and five of networks whose weights were moved to neighbouring numbers."""

    results: list[tuple[float, float]]
    routes: Routes
    perturbed: list[Tensor]


def single_process() -> Reference:
    with joined() as world:
        torch.set_num_threads(1)
        recipe = Recipe(world, config_of("ddp"))
        with recipe.router.recording() as routes:
            results = recipe.run(STEPS)
        perturbed = [losses(Recipe(world, config_of("ddp"), ulp=seed).run(STEPS)) for seed in range(1, 6)]
        return Reference(results, routes, perturbed)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return run_ranks(1, single_process)[0].value


def every_engine(labels: tuple[str, ...], routes: Routes) -> dict[str, Any]:
    """Losses and norms of each engine with the recorded grouping, and of the first steps with its own."""
    found = {}
    with joined() as world:
        torch.set_num_threads(1)
        for label in labels:
            recipe = Recipe(world, config_of(label))
            with recipe.router.replaying(routes):
                replayed = recipe.run(STEPS)
            found[label] = (replayed, Recipe(world, config_of(label)).run(STEPS) if world.size == 2 else None)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("family", ["torch", pytest.param("zero", marks=pytest.mark.deepspeed)])
def test_engines_agree_over_20_steps(reference: Reference, family: str, ranks: int) -> None:
    expected = losses(reference.results)
    assert expected[-1] < 0.8 * expected[0], "the recipe must learn, or agreement says little"
    # How far one rounding of the weights moves the losses up to each step: the largest of five such runs.
    moved = torch.stack([(run - expected).abs() for run in reference.perturbed]).amax(0).cummax(0).values
    for result in run_ranks(ranks, every_engine, ENGINES[family], reference.routes):
        for label, (replayed, free) in result.value.items():
            torch.testing.assert_close(
                losses(replayed), expected, rtol=1e-5, atol=0, msg=lambda m, x=label: f"{x}: {m}"
            )
            assert replayed[0][1] == pytest.approx(reference.results[0][1], rel=1e-5), f"{label}: norm"
            if free:
                off = (losses(free) - expected).abs()
                assert off[0] <= 1e-6 * expected[0], label
                assert (off <= moved).all(), f"{label}: {off} is outside of {moved}"
