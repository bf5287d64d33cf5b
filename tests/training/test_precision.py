"""What 16 bits change: the loss scale's policy, the gradient it leaves, and the dtype in which gradients meet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from recipes import config_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dgt.training.optim import OptimizerConfig
from dgt.training.parallel import Engine, StepResult, build_engine
from dgt.training.parallel.precision import LossScale, LossScaleConfig, allow_tf32
from dgt.training.world import joined

ENGINES = ("ddp", "fsdp")
ZERO = ("zero1", "zero2", "zero3")
SAMPLES = 14


def test_the_scale_halves_down_to_its_minimum_and_doubles_after_good_steps() -> None:
    scale = LossScale(LossScaleConfig(initial=8, growth_interval=2, minimum=2))
    assert [(scale.lower(), scale.value) for _ in range(3)] == [(True, 4), (True, 2), (False, 2)]
    values = []
    for _ in range(5):
        scale.note_good()
        values.append(scale.value)
    assert values == [2, 4, 4, 8, 8]
    scale.lower()
    scale.note_good()
    assert scale.value == 4, "an overflow starts the count again"


def test_a_restored_scale_goes_on_where_it_was() -> None:
    scale, restored = LossScale(LossScaleConfig(growth_interval=3)), LossScale(LossScaleConfig(growth_interval=3))
    scale.lower()
    scale.note_good()
    for name, piece in restored.pieces(0, 1).items():
        piece.copy_from(scale.pieces(0, 1)[name].local)
    for _ in range(2):
        restored.note_good()
    assert restored.value == 65536


@pytest.mark.parametrize(("initial", "minimum", "interval"), [(1, 2, 1), (1, 0, 1), (1, 1, 0)])
def test_a_scale_that_cannot_work_is_refused(initial: float, minimum: float, interval: int) -> None:
    with pytest.raises(ValueError, match=r"minimum|growth_interval"):
        LossScaleConfig(initial=initial, minimum=minimum, growth_interval=interval)


def test_fp32_leaves_no_tf32() -> None:
    for allowed in (True, False):
        allow_tf32(allowed)
        assert torch.backends.cuda.matmul.allow_tf32 == allowed
        assert torch.backends.cudnn.allow_tf32 == allowed


class Regression(nn.Module):
    """Two layers of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()).float()


def engine_of(world: Any, label: str, precision: str, scale: LossScaleConfig, clip: float = 0.0) -> Engine:
    torch.manual_seed(0)
    config = config_of(label, precision=precision, loss_scale=scale)
    return build_engine(Regression(), world, config, OptimizerConfig(clip_grad_norm=clip))


def steps(engine: Engine, count: int, cut: int, first: int) -> list[StepResult]:
    """Of rank 0 on the samples before `cut` and rank 1 on those behind, in micro-batches of `first` and the rest."""
    data = torch.randn(SAMPLES, 5, generator=torch.Generator().manual_seed(1))
    own = data[:cut] if engine.world.rank == 0 else data[cut:]
    parts = [own[:first], own[first:]]
    if engine.world.size == 1:
        parts = [data]

    def loss_of(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - 1).square().sum() / SAMPLES

    return [engine.train_step(parts, loss_of, 1e-3, lambda loss, norm: norm < float("inf")) for _ in range(count)]


def scaled(labels: tuple[str, ...]) -> dict[str, Any]:
    """Each engine from a scale that overflows to one that does not; ranks have 9 and 5 samples, cut 2 + 7 and 2 + 3."""
    found = {}
    with joined() as world:
        for label in labels:
            engine = engine_of(world, label, "fp16", LossScaleConfig(initial=2.0**24, growth_interval=2), clip=1.0)
            before = {name: piece.clone().local for name, piece in engine.state().items()}
            outcomes = []
            for _ in range(30):
                results = steps(engine, 1, cut=9, first=2)
                state = engine.state()
                outcomes.append((results[0], float(state["precision.scale"].local)))
                if results[0].taken:
                    break
                changed = [n for n, p in state.items() if not torch.equal(before[n], p.local)]
                assert set(changed) <= {"precision.scale"}, (label, changed)
            found[label] = (outcomes, [r.taken for r in steps(engine, 1, cut=9, first=2)], engine.loss_scale.value)  # type: ignore[union-attr]
    return found


def unscaled() -> StepResult:
    with joined() as world:
        return steps(engine_of(world, "ddp", "fp32", LossScaleConfig()), 1, cut=0, first=0)[0]


@pytest.mark.parametrize("labels", [ENGINES, pytest.param(ZERO, marks=pytest.mark.deepspeed)], ids=lambda v: v[0])
def test_an_overflow_lowers_the_scale_on_all_ranks_and_leaves_the_true_gradient(labels: tuple[str, ...]) -> None:
    exact = run_ranks(1, unscaled)[0].value
    for result in run_ranks(2, scaled, labels):
        for label, (outcomes, later, scale) in result.value.items():
            *overflowed, (taken, last) = outcomes
            assert overflowed, f"{label}: nothing overflowed, so that nothing was tested"
            assert all(r.rescaled and not r.taken for r, _ in overflowed), label
            assert [s for _, s in outcomes] == [2.0 ** (23 - i) for i in range(len(overflowed))] + [last], label
            assert [r.loss_scale for r, _ in outcomes] == [2.0 ** (24 - i) for i in range(len(outcomes))], label
            assert taken.taken, label
            assert not taken.rescaled, label
            # float16 keeps 11 bits, and the network is three roundings deep.
            assert taken.loss == pytest.approx(exact.loss, rel=3 * 2**-11), label
            assert taken.grad_norm == pytest.approx(exact.grad_norm, rel=6 * 2**-11), label
            assert later == [True], label
            assert scale == 2 * last, f"{label}: two good steps double it"


def at_the_minimum() -> list[tuple[bool, bool, float]]:
    with joined() as world:
        engine = engine_of(world, "ddp", "fp16", LossScaleConfig(initial=2.0**30, minimum=2.0**30))
        result = steps(engine, 1, cut=0, first=0)[0]
        return [(result.taken, result.rescaled, engine.loss_scale.value)]  # type: ignore[union-attr]


def test_an_overflow_at_the_smallest_scale_is_a_bad_step() -> None:
    assert run_ranks(1, at_the_minimum)[0].value == [(False, False, 2.0**30)]


def a_gradient_that_no_scale_saves() -> list[tuple[bool, bool, float]]:
    """A finite loss whose gradient is not, tried again as long as the scale is lowered; the state before and after."""
    with joined() as world:
        engine = engine_of(world, "ddp", "fp16", LossScaleConfig(initial=8.0, growth_interval=9))
        steps(engine, 2, cut=0, first=0)
        states = [{name: piece.clone().local for name, piece in engine.state().items()}]

        def loss_of(model: nn.Module, x: Tensor) -> Tensor:
            return (model(x) * 0.0).abs().sum().sqrt()

        results: list[StepResult] = []
        while not results or results[-1].rescaled:
            accept = lambda loss, norm: norm < float("inf")  # noqa: E731
            results.append(engine.train_step([torch.ones(2, 5)], loss_of, 1e-3, accept))
        states.append({name: piece.local for name, piece in engine.state().items()})
        changed = [name for name, was in states[0].items() if not torch.equal(was, states[1][name])]
        return [[r.rescaled for r in results], changed, float(states[1]["precision.scale"])]  # type: ignore[list-item]


def test_a_bad_step_leaves_the_loss_scale_as_it_was_before_lower_ones_were_tried() -> None:
    assert run_ranks(1, a_gradient_that_no_scale_saves)[0].value == [[True, True, True, False], [], 8.0]


def reduced_dtypes(labels: tuple[str, ...]) -> dict[str, set[torch.dtype]]:
    """Dtypes of what a step's gradients are added up in over ranks."""
    found: dict[str, set[torch.dtype]] = {}
    seen: set[torch.dtype] = set()
    with joined() as world:
        for name in ("reduce_scatter_tensor", "all_reduce", "reduce"):
            setattr(dist, name, spied(getattr(dist, name), seen))
        for label in labels:
            engine = engine_of(world, label, "bf16", LossScaleConfig())
            if isinstance(engine.model, DistributedDataParallel):  # reduces without a call from Python
                engine.model.register_comm_hook(None, average)
            seen.clear()
            steps(engine, 1, cut=7, first=4)
            found[label] = set(seen)
    return found


def average(_, bucket):  # type: ignore[no-untyped-def]
    """DDP's own reduction, by a call that can be seen."""
    work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def spied(reduce: Any, seen: set[torch.dtype]) -> Any:
    """`reduce`, noting the dtype of what it adds up, if that is more than a number or two."""

    def seeing(*args: Any, **kwargs: Any) -> Any:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        seen.update(t.dtype for t in tensors if t.numel() > 2)
        return reduce(*args, **kwargs)

    return seeing


@pytest.mark.parametrize("labels", [ENGINES, pytest.param(ZERO, marks=pytest.mark.deepspeed)], ids=lambda v: v[0])
def test_gradients_meet_in_float32_under_bf16(labels: tuple[str, ...]) -> None:
    for result in run_ranks(2, reduced_dtypes, labels):
        assert result.value == {label: {torch.float32} for label in labels}
