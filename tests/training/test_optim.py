"""Every optimizer offered: fresh state, exact continuation, sharded parameters, and what it changes how fast."""

from __future__ import annotations

import inspect
import re
from types import MappingProxyType
from typing import Any, get_args

import pytest
import timm
import torch
from timm.optim import get_optimizer_class
from torch import Tensor, nn

import dgt.models  # noqa: F401  (registers the networks with timm)
from dgt.training import optim
from dgt.training.optim import (
    FROM_APEX,
    WITH_FUSED,
    WITHOUT_FOREACH,
    OptimizerConfig,
    adopt_numbers,
    build_optimizer,
    make_state,
    set_learning_rate,
    state_pieces,
)
from dgt.training.pieces import Pieces

NAMES = [name for name in get_args(optim.OptimizerName) if name not in FROM_APEX]


class Small(nn.Module):
    """One of each kind: a convolution, a depth-wise one, a norm, a wide and a last linear layer."""

    pretrained_cfg = MappingProxyType({"classifier": "head"})

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.depthwise(self.conv(images)).mean((2, 3))
        return self.head(self.linear(self.norm(x)).relu())


def small() -> Small:
    torch.manual_seed(0)
    return Small()


def config(name: str, **options: Any) -> OptimizerConfig:
    return OptimizerConfig(name=name, **{"lr": 1e-2, **options})  # type: ignore[arg-type]


def take_steps(network: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        images = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        set_learning_rate(optimizer, 1e-2 / (1 + step))
        network(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def bits(network: nn.Module) -> list[list[int]]:
    return [p.detach().reshape(-1).view(torch.int32).tolist() for p in network.parameters()]


def copied(pieces: Pieces) -> dict[str, Tensor]:
    return {name: piece.local.clone() for name, piece in pieces.items()}


@pytest.mark.parametrize("name", NAMES)
def test_state_made_beforehand_leaves_the_weights_and_every_later_step_as_they_were(name: str) -> None:
    plain, prepared = small(), small()
    untouched, ours = build_optimizer(plain, config(name)), build_optimizer(prepared, config(name))
    before = bits(prepared)
    make_state(ours)
    assert bits(prepared) == before
    assert all(p.grad is None for p in prepared.parameters())
    assert all(not piece.local.any() for piece in state_pieces(prepared, ours, 0, 1).values())
    keys = state_pieces(prepared, ours, 0, 1).keys()
    take_steps(plain, untouched, 0, 3)
    take_steps(prepared, ours, 0, 3)
    assert bits(prepared) == bits(plain) != before
    assert state_pieces(prepared, ours, 0, 1).keys() == keys, "all state was there before the first step"


@pytest.mark.parametrize("name", NAMES)
def test_a_run_restored_from_its_pieces_goes_on_bit_for_bit(name: str) -> None:
    whole = small()
    optimizer = build_optimizer(whole, config(name))
    make_state(optimizer)
    take_steps(whole, optimizer, 0, 3)
    saved = copied(state_pieces(whole, optimizer, 0, 1))
    weights = {key: value.clone() for key, value in whole.state_dict().items()}
    take_steps(whole, optimizer, 3, 6)

    resumed = Small()
    resumed.load_state_dict(weights)
    again = build_optimizer(resumed, config(name))
    make_state(again)
    pieces = state_pieces(resumed, again, 0, 1)
    assert pieces.keys() == saved.keys()
    for key, piece in pieces.items():
        piece.copy_from(saved[key])
    adopt_numbers(resumed, again, pieces)
    take_steps(resumed, again, 3, 6)
    assert bits(resumed) == bits(whole)
    ended = copied(state_pieces(whole, optimizer, 0, 1))
    assert all(torch.equal(piece.local, ended[key]) for key, piece in state_pieces(resumed, again, 0, 1).items())


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Any:
    store = tmp_path_factory.mktemp("mesh") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", NAMES)
def test_sharded_parameters_change_as_whole_ones_do(name: str, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    plain, sharded = small(), small()
    fully_shard(sharded, mesh=mesh)
    for network in (plain, sharded):
        optimizer = build_optimizer(network, config(name))
        make_state(optimizer)
        take_steps(network, optimizer, 0, 3)
    moments = state_pieces(sharded, optimizer, 0, 1)
    assert moments[
        "linear.weight." + ("exp_avg" if "linear.weight.exp_avg" in moments else "momentum_buffer")
    ].shape == (
        12,
        8,
    )
    # One rank holds everything: sums may only be taken in another order. Muon multiplies matrices five times in
    # bfloat16 (2**-8), which enlarges small singular values, and so their rounding, up to fourfold each time.
    for (key, whole), part, start in zip(
        plain.named_parameters(), sharded.parameters(), small().parameters(), strict=True
    ):
        change, other = whole - start, part.full_tensor() - start  # type: ignore[attr-defined]
        tolerance = 0.1 if name == "muon" else 1e-4
        assert (change - other).norm() <= tolerance * change.norm(), key


@pytest.mark.parametrize("name", NAMES)
def test_implementations_are_those_that_the_optimizer_has(name: str) -> None:
    known = inspect.signature(get_optimizer_class(name, bind_defaults=False)).parameters
    assert ("foreach" in known) == (name not in WITHOUT_FOREACH)
    assert ("fused" in known) == (name in WITH_FUSED)


@pytest.mark.parametrize(("name", "implementation"), [("adamw", "fused"), ("sgd", "fused"), ("lamb", "for-loop")])
def test_implementations_agree(name: str, implementation: str) -> None:
    results = []
    for way in ("foreach", implementation):
        network = small()
        optimizer = build_optimizer(network, config(name, implementation=way))
        make_state(optimizer)
        take_steps(network, optimizer, 0, 3)
        results.append(network)
    for one, other in zip(results[0].parameters(), results[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_each_layer_learns_at_the_decayed_rate_of_the_one_above_it() -> None:
    with torch.device("meta"):
        network = timm.create_model("dgt_tiny", num_classes=10)
    optimizer = build_optimizer(network, OptimizerConfig(lr=1.0, layer_decay=0.5))
    set_learning_rate(optimizer, 2.0)
    names = {parameter: name for name, parameter in network.named_parameters()}
    rates = {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decayed = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    blocks = [f"stages.{stage}.blocks.{i}" for stage, depth in enumerate((1, 2, 18, 2)) for i in range(depth)]
    expected = {"stem": 2.0 * 0.5**24, "head": 2.0, "norm": 1.0}
    expected |= {block: 2.0 * 0.5 ** (23 - i) for i, block in enumerate(blocks)}
    expected |= {f"stages.{i}.downsample": expected[f"stages.{i}.blocks.0"] for i in (1, 2, 3)}
    assert rates == {name: next(r for part, r in expected.items() if name.startswith(part + ".")) for name in rates}
    assert len(rates) == len(names)
    assert decayed == {name: 0.05 if p.ndim > 1 else 0.0 for p, name in names.items()}


def test_muon_leaves_the_classifier_and_what_is_no_matrix_to_adamw() -> None:
    network = small()
    optimizer = build_optimizer(network, config("muon"))
    make_state(optimizer)
    names = {parameter: name for name, parameter in network.named_parameters()}
    by_muon = {names[p] for p, state in optimizer.state.items() if "momentum_buffer" in state}
    assert by_muon == {"conv.weight", "linear.weight"}


def test_lamb_does_not_clip_on_its_own() -> None:
    network = small()
    optimizer = build_optimizer(network, config("lamb", weight_decay=0.0))
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 1e3)
    optimizer.step()
    assert optimizer.state[network.head.weight]["exp_avg"].mean().item() == pytest.approx(1e2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr: must not be negative"),
        ({"betas": (0.9,)}, "betas: adamw has 2 of them, got [0.9]; null takes its own"),
        ({"name": "sgd", "betas": (0.9, 0.99)}, "betas: sgd has 0 of them"),
        ({"name": "adan", "betas": (0.9, 0.99)}, "betas: adan has 3 of them"),
        ({"betas": (0.9, 1.0)}, "betas: must lie in [0, 1)"),
        ({"momentum": 0.9}, "momentum: lies in [0, 1) and is for sgd, lars, muon; got 0.9"),
        ({"name": "lion", "eps": 1e-8}, "eps: must not be negative, and lion, sgd have none"),
        ({"layer_decay": 0.0}, "layer_decay: must lie in (0, 1], got 0.0"),
        (
            {"name": "lion", "implementation": "fused"},
            "implementation: 'fused' is there for adam, adamw, sgd, not lion",
        ),
        ({"name": "muon", "implementation": "foreach"}, "implementation: 'foreach' is not there for muon"),
    ],
)
def test_options_that_an_optimizer_does_not_have_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        OptimizerConfig(**options)


@pytest.mark.parametrize("name", sorted(FROM_APEX))
def test_apexs_optimizers_say_what_they_need_where_it_is_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim.importlib.util, "find_spec", lambda package: None)  # type: ignore[attr-defined]
    plain = name.removeprefix("fused_")
    with pytest.raises(
        ValueError, match=rf"optimizer.name: {name} is part of NVIDIA's apex.*{plain} computes the same"
    ):
        build_optimizer(small(), config(name))
