"""A run that goes on with other numbers of ranks, or under another engine: the same samples, the same pixels, the same
learning rates, and losses as close as rounding and a discontinuous grouping let them be."""

from __future__ import annotations

import hashlib
import math
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from small import small_config

from benchmarks.chaos.evidence import losses
from data_pipeline.config import SyntheticConfig
from dgt.config import Config
from dgt.training.checkpoint import CheckpointConfig
from dgt.training.draws import drop_path_keys
from dgt.training.inputs import StepInputs
from dgt.training.interrupt import Interruption
from dgt.training.keeper import Keeper
from dgt.training.mixing import MixingConfig, draw_pairs
from dgt.training.parallel.config import DeepSpeedConfig, EngineConfig
from dgt.training.steps import StepsConfig
from dgt.training.trainer import Trainer, train

SAMPLES, BATCH, STEPS, FIRST_CHANGE = 48, 12, 8, 3


def config_of(folder: Path, engine: str = "ddp") -> Config:
    """Two epochs of four steps; 12 samples divide by 1, 2 and 3 ranks into whole pairs."""
    config = small_config(
        folder,
        steps=StepsConfig(epochs=2, global_batch_size=BATCH, micro_batch_size=4),
        checkpoint=CheckpointConfig(every_steps=2, asynchronous=False),
    )
    data = replace(config.data, synthetic=SyntheticConfig(train_samples=SAMPLES, val_samples=7))
    parallel = EngineConfig(name=engine, precision="fp32", threads=1, deepspeed=DeepSpeedConfig(stage=2))  # type: ignore
    return replace(config, data=data, engine=parallel, monitor=replace(config.monitor, tensorboard=False))


def train_part(config: Config, stop_at: int, ulp: int = 0) -> dict[tuple[int, int], tuple[Any, ...]]:
    """Trains up to step `stop_at`, from weights moved to neighbouring numbers where `ulp` is a seed.

    Returns all that the network was given of each sample, by step and position in the global batch.
    """
    given: dict[tuple[int, int], tuple[Any, ...]] = {}
    call, step, resume, interruption = StepInputs.__call__, Trainer.step, Keeper.resume, Interruption()

    def noting_call(self: StepInputs, batch: Any, part: slice) -> Any:
        inputs = call(self, batch, part)
        for i, position in enumerate(batch.positions[part].tolist()):
            pixels = hashlib.sha256(inputs.images[i].contiguous().numpy().tobytes()).hexdigest()
            numbers = (inputs.labels, inputs.sample_keys, inputs.partner_labels, inputs.share)
            ids = (int(batch.ids[part][i]), int(batch.copies[part][i]))
            given[self.step, position] = (*ids, pixels, *(float(n[i]).hex() for n in numbers))
        return inputs

    def stopping_step(self: Trainer, *args: Any) -> bool:
        taken = step(self, *args)
        if self.progress.step >= stop_at:
            interruption.note(signal.SIGTERM, None)
        return taken

    def perturbing_resume(self: Keeper) -> bool:
        found = resume(self)
        rng = torch.Generator().manual_seed(ulp)
        for piece in self.engine.weights().values() if ulp else ():
            up = torch.where(torch.rand(piece.local.shape, generator=rng) < 0.5, math.inf, -math.inf)
            piece.local.copy_(torch.nextafter(piece.local, up))
        return found

    StepInputs.__call__, Trainer.step, Keeper.resume = noting_call, stopping_step, perturbing_resume  # type: ignore
    outcome = train(config, interruption)
    assert outcome.step == min(stop_at, STEPS)
    return given


def rows(config: Config, name: str) -> dict[int, float]:
    """One logged number by step."""
    return {row["step"]: row[name] for row in losses(config.run_dir) if name in row}


def in_parts(config: Config, parts: Sequence[tuple[str, int, int]]) -> dict[tuple[int, int], tuple[Any, ...]]:
    """Trains part by part, each an engine, a number of ranks and the step to stop at; what all were given."""
    given: dict[tuple[int, int], tuple[Any, ...]] = {}
    for engine, ranks, stop_at in parts:
        part = replace(config, engine=replace(config.engine, name=engine))
        for rank in run_ranks(ranks, train_part, part, stop_at):
            assert not given.keys() & rank.value.keys(), "no place of a batch is computed twice"
            given |= rank.value
    return given


@dataclass(frozen=True)
class Expected:
    """What the changed runs are compared with."""

    whole: Config
    """One process from beginning to end."""
    given: dict[tuple[int, int], tuple[Any, ...]]
    begun: Config
    """Two ranks up to the first change."""
    given_begun: dict[tuple[int, int], tuple[Any, ...]]
    going_on: torch.Tensor
    """Losses of one process from there on, float64."""
    moved: torch.Tensor
    """How far one rounding of the weights moves each of them, or one before: the largest of five runs."""


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    folder = tmp_path_factory.mktemp("expected")
    whole, begun = config_of(folder / "whole"), config_of(folder / "begun")
    given = in_parts(whole, [("ddp", 1, STEPS)])
    given_begun = in_parts(begun, [("ddp", 2, FIRST_CHANGE)])
    runs = []
    for ulp in range(6):
        copy = config_of(folder / f"ulp{ulp}")
        shutil.copytree(begun.run_dir, copy.run_dir)
        run_ranks(1, train_part, copy, STEPS, ulp)
        found = rows(copy, "train/loss")
        runs.append(torch.tensor([found[s] for s in range(FIRST_CHANGE + 1, STEPS + 1)], dtype=torch.float64))
    moved = torch.stack([(run - runs[0]).abs() for run in runs[1:]]).amax(0).cummax(0).values
    return Expected(whole, given, begun, given_begun, runs[0], moved)


PATHS = {
    "2-3-1": [("ddp", 3, 5), ("ddp", 1, STEPS)],
    "ddp-fsdp-zero": [("fsdp", 3, 5), ("deepspeed", 2, STEPS)],
}


@pytest.mark.parametrize("path", [
    "2-3-1", pytest.param("ddp-fsdp-zero", marks=pytest.mark.deepspeed),
])  # fmt: skip
def test_other_ranks_and_engines_go_on_with_the_same_samples_rates_and_losses(
    tmp_path: Path, expected: Expected, path: str
) -> None:
    if "zero" in path:
        pytest.importorskip("deepspeed")
    config = config_of(tmp_path)
    shutil.copytree(expected.begun.run_dir, config.run_dir)
    given = expected.given_begun | in_parts(config, PATHS[path])

    assert given == expected.given, "pixels after augmentation and mixing, labels, shares, drop path, by step and place"
    for epoch in range(2):
        steps = range(epoch * STEPS // 2, (epoch + 1) * STEPS // 2)
        ids = [given[step, position][0] for step in steps for position in range(BATCH)]
        assert sorted(ids) == list(range(SAMPLES)), "every sample exactly once an epoch"
    assert rows(config, "train/lr") == rows(expected.whole, "train/lr")
    assert list(rows(config, "train/loss")) == list(range(1, STEPS + 1))

    found = rows(config, "train/loss")
    off = (torch.tensor([found[s] for s in range(FIRST_CHANGE + 1, STEPS + 1)]) - expected.going_on).abs()
    assert off[0] <= 1e-6 * expected.going_on[0]
    assert (off <= expected.moved.clamp_min(1e-6 * float(expected.going_on[0]))).all(), f"{off} > {expected.moved}"


def test_pairs_are_neighbours_of_the_global_batch_and_their_draws_know_no_ranks() -> None:
    """The canonical pairs by value: a pair's draw is that of its place, whoever computes it."""
    draws = draw_pairs(3, 7, BATCH, MixingConfig())
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([3, 7, 1])))
    mixed, cut = rng.random(6) < 1.0, rng.random(6) < 0.5
    rng.random((6, 2))
    mixup, cutmix = rng.beta(0.8, 0.8, 6), rng.beta(1.0, 1.0, 6)
    assert mixed.all()
    np.testing.assert_array_equal(draws.share, np.where(cut, cutmix, mixup))
    keys = drop_path_keys(3, 7, torch.arange(BATCH), BATCH)
    for ranks in (2, 3):
        share = BATCH // ranks
        for rank in range(ranks):
            positions = torch.arange(rank * share, (rank + 1) * share)
            assert (positions[0::2] % 2 == 0).all()
            assert torch.equal(drop_path_keys(3, 7, positions, BATCH), keys[positions])
