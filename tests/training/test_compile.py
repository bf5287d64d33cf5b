"""Blocks compile in place: one graph for all blocks of a kind, the same gradients, whatever is computed again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, fx, nn

from dgt.models import ModelConfig
from dgt.models.upernet import UPerNet
from dgt.training.parallel.blocks import compile_blocks

KEYS = torch.tensor([1, 2**31, 77])


class Counting:
    """A compiler that changes nothing and counts the graphs it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: fx.GraphModule, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


def network(depths: tuple[int, ...] = (1, 1, 9, 1)) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("dgt_nano", depths=depths, drop_path_rate=0.5, num_classes=3)


def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_all_blocks_of_a_stage_share_one_graph() -> None:
    torch.compiler.reset()
    model, compiler = network(), Counting()
    names = list(model.state_dict())
    compile_blocks(model, backend=compiler, fullgraph=True)
    assert list(model.state_dict()) == names
    model(images(), KEYS).sum().backward()
    # One per stage; the first of nine blocks may get its input from the convolution in another layout.
    assert 4 <= compiler.graphs <= 5
    model.eval()
    with torch.no_grad():
        model(images())  # no drop path, no gradients: others, and more in all than torch's own limit lets pass
    assert 8 <= compiler.graphs <= 10
    assert all(p.grad is not None for p in model.parameters())


def gradients(model: nn.Module) -> list[Tensor]:
    loss = (model(images(), KEYS) * torch.tensor([1.0, -2.0, 3.0])).sum()
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_what_is_computed_again_is_the_same_with_drop_path_eager_and_compiled(mode: str) -> None:
    torch.compiler.reset()
    depths = (1, 1, 2, 1)
    expected = gradients(network(depths))
    eager, partly, compiled = network(depths), network(depths), network(depths)
    eager.set_grad_checkpointing(mode=mode)  # type: ignore[operator]
    partly.set_grad_checkpointing(mode=mode, every=2)  # type: ignore[operator]
    compiled.set_grad_checkpointing(mode=mode)  # type: ignore[operator]
    compile_blocks(compiled, backend="aot_eager", fullgraph=True)
    for model in (eager, partly):
        assert all(map(torch.equal, gradients(model), expected))
    for found, wanted in zip(gradients(compiled), expected, strict=True):
        # The compiler may take sums in another order; the scale is that of the largest element.
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * max(1.0, float(wanted.abs().max())))


def test_every_other_block_is_computed_again() -> None:
    model = network()
    model.set_grad_checkpointing(mode="full", every=2)  # type: ignore[operator]
    modes = [m.checkpointing for m in model.modules() if hasattr(m, "checkpointing")]
    assert modes == ["full" if i % 2 == 0 else None for i in range(12)]


def test_a_dense_network_compiles_a_graph_for_each_training_size_and_evaluates_any_size_without() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model, compiler = UPerNet(ModelConfig("dgt_nano"), 3, 8, (1,), 0, norm_groups=4), Counting()
    reference = copy.deepcopy(model)
    compile_blocks(model, backend=compiler, fullgraph=True)
    for expected, side in ((4, 32), (8, 64), (8, 32)):
        x = torch.randn(1, 3, side, side)
        torch.testing.assert_close(model(x, KEYS[:1])[0], reference(x, KEYS[:1])[0])
        assert expected <= compiler.graphs <= expected * 5 // 4, "one per stage and size"
    graphs = compiler.graphs
    model.eval()
    for side in (32, 40, 72):
        model(torch.randn(1, 3, side, side))
    assert compiler.graphs == graphs
