"""Dense tasks train and evaluate alike under every engine and on any number of ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_small import HELD_OUT, TASKS, dense_config
from ranks import run_ranks
from recipes import always, config_of
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from data_pipeline.batch import Batch
from data_pipeline.loader import Loader, build_loader
from data_pipeline.targets.instances import Instances
from dgt.config import Config
from dgt.tasks import Findings, Task, build_task
from dgt.tasks.detections import Judged
from dgt.training.evaluate import evaluate
from dgt.training.inputs import StepInputs
from dgt.training.optim import OptimizerConfig
from dgt.training.parallel import Engine, build_engine
from dgt.training.world import World, joined

STEPS = 3
OPTIMIZER = OptimizerConfig(lr=1e-3, clip_grad_norm=1.0)


class Recipe:
    """A task of `config` under an engine, from the same weights whatever the world."""

    def __init__(self, config: Config, world: World, label: str, dtype: torch.dtype, precision: Any = "fp32"):
        self.config, self.world, self.dtype = config, world, dtype
        self.task: Task = build_task(config.task, config.model, config.data)
        torch.manual_seed(0)
        network = self.task.build_model().to(dtype)
        options = config_of(label, precision=precision, activation_checkpointing="selective")
        self.engine: Engine = build_engine(network, world, options, OPTIMIZER)

    def loader(self, split: str, batch: int, training: bool) -> Loader:
        """This rank's loader of a split."""
        return build_loader(
            self.config.data, split, kind=self.task.kind, train=training, global_batch_size=batch,
            rank=self.world.rank, world_size=self.world.size, seed=0,
        )  # fmt: skip

    def train(self, steps: int = STEPS, without_objects: bool = False) -> list[tuple[float, float]]:
        """Loss and gradient norm of some steps, or of such whose images, on this rank, have lost their objects."""
        found = []
        with self.loader("train", self.config.steps.global_batch_size, training=True) as loader:
            for step, batch in zip(range(steps), loader, strict=False):
                if without_objects:
                    nothing = Instances(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), ())
                    batch = dataclasses.replace(batch, targets=[nothing] * len(batch.targets))
                result = self.engine.train_step(list(self.parts(batch)), self.loss_at(step, batch), 1e-3, always)
                found.append((result.loss, result.grad_norm))
        return found

    def parts(self, batch: Batch) -> Iterator[slice]:
        """One sample after the other."""
        for i in range(len(batch.labels)):
            yield slice(i, i + 1)

    def loss_at(self, step: int, batch: Batch) -> Any:
        """What the loop calls `loss_of`."""
        prepare = StepInputs(self.config, step, self.world.device, 0)

        def loss_of(model: nn.Module, part: slice) -> Tensor:
            inputs = prepare(batch, part)
            inputs = dataclasses.replace(inputs, images=inputs.images.to(self.dtype))
            return self.task.loss(model, inputs) / self.config.steps.global_batch_size

        return loss_of

    def evaluate(self) -> Findings:
        """What the task finds in the held-out images, with two places a rank."""
        with self.loader("val", 2 * self.world.size, training=False) as loader:
            found = evaluate(self.engine, self.task, loader)
        assert found is not None
        return found


def dtypes_of_regions(network: nn.Module) -> set[torch.dtype]:
    """Filled by each pass of a detector with the types of the maps and boxes that regions are pooled from."""
    seen: set[torch.dtype] = set()

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        seen.update(leaf.dtype for leaf in tree_leaves(given) if isinstance(leaf, Tensor))

    network.get_submodule("roi_heads.box_pool").register_forward_pre_hook(note)
    return seen


def in_world(configs: dict[str, Config], labels: tuple[str, ...], double: bool) -> dict[str, Any]:
    """By task and engine: findings in float32, then losses and norms of some steps, in float64 where it is `double`."""
    found: dict[str, Any] = {}
    with joined() as world:
        torch.set_num_threads(1)
        for task, config in configs.items():
            for label in labels:
                recipe = Recipe(config, world, label, torch.float32)
                evaluated = recipe.evaluate()
                recipe = Recipe(config, world, label, torch.float64) if double else recipe
                found[f"{task} {label}"] = evaluated, recipe.train(STEPS if double else 1)
    return found


def in_half(configs: dict[str, Config]) -> dict[str, Any]:
    """By task: the first step's loss and norm under fsdp in bfloat16, and the types of what losses are made of."""
    found = {}
    with joined() as world:
        torch.set_num_threads(1)
        for task, config in configs.items():
            recipe = Recipe(config, world, "fsdp", torch.float32, "bf16")
            seen: set[torch.dtype] = set()
            if task == "detection":
                seen = dtypes_of_regions(recipe.engine.network)
            else:
                recipe.engine.network.register_forward_hook(
                    lambda module, given, answer, seen=seen: seen.update(tensor.dtype for tensor in answer)  # type: ignore[misc]
                )
            found[task] = recipe.train(1)[0], seen
    return found


@pytest.fixture(scope="module")
def configs(shapes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    folder = tmp_path_factory.mktemp("runs")
    return {task: dense_config(task, folder, shapes[task]) for task in TASKS}


@pytest.fixture(scope="module")
def alone(configs: dict[str, Config]) -> dict[str, Any]:
    """What a single process comes to."""
    return in_world(configs, ("ddp",), double=True)


FAMILIES = [("ddp", "fsdp"), pytest.param(("zero2", "zero3"), marks=pytest.mark.deepspeed)]


@pytest.mark.parametrize("labels", FAMILIES, ids=lambda labels: labels[0])
def test_two_ranks_of_any_engine_train_and_evaluate_as_one_process_does(
    configs: dict[str, Config], alone: dict[str, Any], labels: tuple[str, ...]
) -> None:
    # In float64 no rounding moves a query to another group, or another region into the proposals. ZeRO has float32
    # only: its first step is compared.
    double = "ddp" in labels
    results = [result.value for result in run_ranks(2, in_world, configs, labels, double)]
    for task in TASKS:
        findings, steps = alone[f"{task} ddp"]
        for label in labels:
            for rank, result in enumerate(results):
                found, got = result[f"{task} {label}"]
                assert got[0] == pytest.approx(steps[0], rel=1e-6 if double else 1e-4), f"{task} {label}"
                expected = [loss for loss, _ in steps[: len(got)]]
                assert [loss for loss, _ in got] == pytest.approx(expected, rel=1e-5), f"{task} {label}"
                assert torch.equal(found.totals, findings.totals), "every image is counted once, whatever the ranks"
                check_records(found.records if rank == 0 else None, findings.records)
            metrics = build_task(configs[task].task, configs[task].model, configs[task].data).metrics
            assert metrics(found.totals, results[0][f"{task} {label}"][0].records) == metrics(
                findings.totals, findings.records
            )
        assert metrics(findings.totals, findings.records)["samples"] == HELD_OUT, "does not divide by ranks or batches"


def check_records(found: dict[int, Judged] | None, expected: dict[int, Judged]) -> None:
    """All detections are the same to the last bit."""
    if found is None:
        return
    assert list(found) == list(expected)
    for sample, judged in expected.items():
        other = found[sample]
        for name in ("boxes", "scores", "labels"):
            assert np.array_equal(getattr(other.detected, name), getattr(judged.detected, name)), (sample, name)
        assert other.detected.masks == judged.detected.masks
    assert any(len(judged.detected.boxes) for judged in expected.values()) == bool(expected)


def test_sharded_networks_compute_in_bfloat16_and_leave_losses_and_geometry_in_float32(
    configs: dict[str, Config], alone: dict[str, Any]
) -> None:
    for result in run_ranks(2, in_half, configs):
        for task, ((loss, norm), dtypes) in result.value.items():
            assert dtypes == {torch.float32}, task
            # bfloat16 keeps 8 bits: loss and gradient of an untrained network agree to some per cent, and are others.
            expected, whole = alone[f"{task} ddp"][1][0]
            assert loss == pytest.approx(expected, rel=0.05)
            assert norm == pytest.approx(whole, rel=0.2)
            assert abs(norm / whole - 1) > 1e-5


def shares_of(config: Config) -> tuple[dict[str, tuple[int, int]], tuple[float, float]]:
    """Weights that this rank holds, and all, by the units of the network that fsdp gathers one at a time; and loss and
    gradient norm of a step of which rank 0 has images without objects."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    with joined() as world:
        recipe = Recipe(config, world, "fsdp", torch.float32)
        network, found = recipe.engine.network, {}
        for name, module in network.named_modules():
            if isinstance(module, FSDPModule):
                weights = list(module.parameters())
                assert all(isinstance(weight, DTensor) for weight in weights)
                here = sum(weight.to_local().numel() for weight in weights)  # type: ignore[attr-defined]
                found[name] = here, sum(weight.numel() for weight in weights)
        return found, recipe.train(1, without_objects=world.is_main)[0]


def test_fsdp_gathers_blocks_and_heads_one_at_a_time_and_trains_where_only_one_rank_has_objects(
    configs: dict[str, Config],
) -> None:
    blocks = {f"backbone.stages.{stage}.blocks.{i}" for stage, depth in enumerate((1, 1, 2, 1)) for i in range(depth)}
    heads = {"fpn", "rpn.head", "roi_heads.box_heads.0", "roi_heads.mask_head"}
    for result in run_ranks(2, shares_of, configs["detection"]):
        shares, (loss, norm) = result.value
        assert 0 < loss < 100
        assert 0 < norm < 1000
        assert shares.keys() == {""} | blocks | heads
        for name, (here, whole) in shares.items():
            assert here <= 0.6 * whole, f"{name} is not cut"
