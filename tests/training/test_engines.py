"""Any split of a batch over micro-batches and ranks gives the full batch's gradient, norm and averages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ranks import run_ranks
from recipes import BATCH, always, assembled, config_of
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from data_pipeline.config import DataConfig
from dgt.models import ModelConfig
from dgt.tasks import ClassificationConfig, Inputs, build_task
from dgt.training.draws import drop_path_keys
from dgt.training.ema import Ema, EmaConfig, decay_at
from dgt.training.mixing import MixingConfig, draw_pairs, mix
from dgt.training.optim import OptimizerConfig
from dgt.training.parallel import build_engine
from dgt.training.pieces import piece_of
from dgt.training.world import joined


def if_finite(loss: float, norm: float) -> bool:
    return math.isfinite(loss) and math.isfinite(norm)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def one_step(
    engine_name: str, micro_batch_size: int, clip: float, dtype: torch.dtype, precision: Any = "fp32"
) -> dict[str, Any]:
    """Gradient (clipped), norm and loss of one step over 24 samples, cut over this world's ranks and micro-batches."""
    with joined() as world:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        task = build_task(
            ClassificationConfig(), ModelConfig(name="dgt_nano", drop_path_rate=0.3), DataConfig(num_classes=5)
        )
        network = task.build_model().to(dtype)
        config = config_of(engine_name, precision=precision, activation_checkpointing="selective")
        engine = build_engine(network, world, config, OptimizerConfig(clip_grad_norm=clip))

        rng = torch.Generator().manual_seed(1)
        images = torch.randn(BATCH, 3, 32, 32, generator=rng).to(dtype)
        labels = torch.randint(0, 5, (BATCH,), generator=rng)
        draws = draw_pairs(0, 0, BATCH, MixingConfig())
        positions = torch.arange(BATCH)[world.rank * BATCH // world.size : (world.rank + 1) * BATCH // world.size]

        def loss_of(model: nn.Module, at: Tensor) -> Tensor:
            mixed = mix(images[at], labels[at], at, draws)
            keys = drop_path_keys(0, 0, at, BATCH)
            inputs = Inputs(mixed.images, labels[at], keys, mixed.partner_labels, mixed.share)
            return task.loss(model, inputs) / BATCH

        gradients: dict[str, Tensor] = {}
        update = engine.optimizer.step

        def keep_gradients() -> None:
            gradients.update({name: whole(p.grad) for name, p in network.named_parameters()})  # type: ignore[arg-type]
            update()

        engine.optimizer.step = keep_gradients  # type: ignore[method-assign,assignment]
        result = engine.train_step(list(positions.split(micro_batch_size)), loss_of, 1e-3, always)
        dtypes = {p.dtype for p in network.parameters()} | {m.dtype for m in engine.optimizer.state[next(
            iter(network.parameters()))].values() if m.ndim}  # fmt: skip
        return {"loss": result.loss, "norm": result.grad_norm, "gradients": gradients, "dtypes": dtypes}


def unsharded_norm(gradients: dict[str, Tensor]) -> float:
    return float(torch.cat([g.double().flatten() for g in gradients.values()]).norm())


@pytest.fixture(scope="module")
def full_batch() -> dict[str, Any]:
    return run_ranks(1, one_step, "ddp", BATCH, 0.0, torch.float64)[0].value


@pytest.mark.parametrize(
    ("engine", "ranks", "micro_batch_size"),
    [("ddp", 1, 8), ("ddp", 2, 8), ("ddp", 2, 4), ("fsdp", 1, 24), ("fsdp", 2, 8), ("hybrid", 4, 4)],
    ids=lambda v: str(v),
)
def test_any_split_gives_the_full_batchs_gradient(
    full_batch: dict[str, Any], engine: str, ranks: int, micro_batch_size: int
) -> None:
    # Two ranks have 12 samples each and four have 6: micro-batches of 8 or 4 leave a ragged last one.
    for result in run_ranks(ranks, one_step, engine, micro_batch_size, 0.0, torch.float64):
        split = result.value
        # The loss is summed in float32 (the task's logits are float32): its rounding bounds the agreement.
        assert split["loss"] == pytest.approx(full_batch["loss"], rel=1e-6)
        assert split["norm"] == pytest.approx(full_batch["norm"], rel=1e-6)
        assert split["gradients"].keys() == full_batch["gradients"].keys()
        for name, gradient in split["gradients"].items():
            expected = full_batch["gradients"][name]
            assert (gradient - expected).norm() <= 1e-6 * max(float(expected.norm()), 1e-3), name


@pytest.mark.parametrize(("engine", "ranks"), [("ddp", 1), ("fsdp", 2), ("hybrid", 4)])
def test_clipping_uses_the_unsharded_norm(full_batch: dict[str, Any], engine: str, ranks: int) -> None:
    limit = full_batch["norm"] / 3
    clipped = run_ranks(ranks, one_step, engine, 6, limit, torch.float64)[0].value
    assert unsharded_norm(full_batch["gradients"]) == pytest.approx(full_batch["norm"], rel=1e-6)
    assert clipped["norm"] == pytest.approx(full_batch["norm"], rel=1e-6)
    assert unsharded_norm(clipped["gradients"]) == pytest.approx(limit, rel=1e-5)


@pytest.mark.parametrize(("engine", "ranks"), [("ddp", 2), ("fsdp", 2)])
def test_bf16_computes_in_bfloat16_and_keeps_float32_weights_and_moments(
    full_batch: dict[str, Any], engine: str, ranks: int
) -> None:
    result = run_ranks(ranks, one_step, engine, 8, 0.0, torch.float32, "bf16")[0].value
    assert result["dtypes"] == {torch.float32}
    # bfloat16 keeps 8 bits: the loss of an untrained network agrees to a per cent, and is not the float32 one.
    assert result["loss"] == pytest.approx(full_batch["loss"], rel=1e-2)
    assert abs(result["loss"] / full_batch["loss"] - 1) > 1e-6
    gradient = torch.cat([g.double().flatten() for g in result["gradients"].values()])
    expected = torch.cat([g.double().flatten() for g in full_batch["gradients"].values()])
    assert torch.nn.functional.cosine_similarity(gradient, expected, dim=0) > 0.97


class OddShapes(nn.Module):
    """Parameters whose first dimension divides by no world size."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def averages_after_steps(engine_name: str) -> dict[str, Any]:
    """EMA over five steps, what an evaluation computes with it, and that the weights are back afterwards."""
    with joined() as world:
        torch.manual_seed(0)
        engine = build_engine(OddShapes(), world, config_of(engine_name), OptimizerConfig(lr=0.1))
        ema = Ema(engine.weights(), EmaConfig(decay=0.9, warmup=True))
        data = torch.randn(12, 5, generator=torch.Generator().manual_seed(1)).chunk(world.size)[world.rank]
        for step in range(5):
            engine.train_step([data], lambda model, x: model(x).square().sum() / 12, 0.1, always)
            ema.update(step)
        with torch.no_grad():
            before = engine.network(data)
            with engine.averaged_weights(ema):
                averaged = engine.network(data)
            after = engine.network(data)
        assert torch.equal(before, after), "the weights must be back"
        assert not torch.equal(before, averaged)
        gathered = torch.cat(world.gather(averaged))
        return {"ema": assembled(ema.averages, world), "output": gathered}


def test_sharded_averages_equal_unsharded_ones_with_odd_shapes() -> None:
    expected = run_ranks(1, averages_after_steps, "ddp")[0].value
    reference = OddShapes()
    reference.load_state_dict(expected["ema"])
    data = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(expected["output"], reference(data).detach())
    for ranks, engine in ((2, "fsdp"), (3, "fsdp"), (4, "hybrid")):
        sharded = run_ranks(ranks, averages_after_steps, engine)[0].value
        for name, average in sharded["ema"].items():
            torch.testing.assert_close(average, expected["ema"][name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sharded["output"], expected["output"], rtol=1e-5, atol=1e-6)


def test_ema_is_the_recurrence_with_its_warmup() -> None:
    config = EmaConfig(decay=0.5, warmup=True)
    assert [round(decay_at(step, config), 4) for step in (0, 1, 8, 100)] == [0.1, 0.1818, 0.5, 0.5]
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)
    ema = Ema({"weight": piece_of(layer.weight, 0, 1)}, EmaConfig(decay=0.5, warmup=False))
    for step in range(3):
        nn.init.ones_(layer.weight)
        ema.update(step)
    assert ema.averages["weight"].local.item() == 1 - 0.5**3


def step_with_bad_rank(labels: tuple[str, ...]) -> dict[str, Any]:
    """Under each engine one step in which rank 1 alone meets a NaN, then a good one."""
    found = {}
    with joined() as world:
        for label in labels:
            torch.manual_seed(0)
            engine = build_engine(OddShapes(), world, config_of(label), OptimizerConfig(lr=0.1))
            before = {name: piece.clone() for name, piece in engine.state().items()}
            data = torch.ones(6, 5)
            bad = data * float("nan") if world.rank == 1 else data
            taken, unchanged = [], []
            for batch in (bad, data):
                result = engine.train_step([batch], lambda model, x: model(x).square().sum() / 12, 0.1, if_finite)
                taken.append(result.taken)
                unchanged.append(all(torch.equal(before[n].local, p.local) for n, p in engine.state().items()))
            found[label] = (taken, unchanged)
    return found


@pytest.mark.parametrize(
    "labels",
    [("ddp", "fsdp", "hybrid"), pytest.param(("zero1", "zero2", "zero3"), marks=pytest.mark.deepspeed)],
    ids=lambda labels: labels[0],
)
def test_a_nan_on_one_rank_makes_all_ranks_skip_the_step_and_change_nothing(labels: tuple[str, ...]) -> None:
    for result in run_ranks(2, step_with_bad_rank, labels):
        for label, (taken, unchanged) in result.value.items():
            assert taken == [False, True], label
            assert unchanged[0], label
            # a rank may hold nothing of so small a network
        assert result.value.keys() == set(labels)
    assert any(not unchanged[1] for _, unchanged in result.value.values())
