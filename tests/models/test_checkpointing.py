"""Activation checkpointing changes memory and nothing else; the routing runs once; blocks compile in one graph."""

from collections import Counter

import pytest
import timm
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import dgt  # noqa: F401  (registers the models)
from dgt.models import CHECKPOINT_MODES, DGTBlock

KEYS = torch.tensor([3, 2**32 - 1, 77, 5])


class CountOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def two_threads(one_thread):
    torch.set_num_threads(2)


def build() -> torch.nn.Module:
    torch.manual_seed(0)
    # Rate 0.5 at the last block: with four samples, some branch of every later block is dropped for somebody.
    return timm.create_model("dgt_nano", num_classes=10, drop_path_rate=0.5).train()


def gradients(mode: str | None, keys: torch.Tensor | None = KEYS) -> tuple[list[torch.Tensor], Counter]:
    model = build()
    if mode:
        model.set_grad_checkpointing(mode=mode)
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    with CountOps() as ops:
        model(x, keys).square().sum().backward()
    return [p.grad for p in model.parameters()], ops.calls


@pytest.mark.parametrize("keys", [KEYS, None], ids=["keyed", "generator"])
@pytest.mark.parametrize("mode", [None, *CHECKPOINT_MODES])
def test_gradients_are_bitwise_those_without_checkpointing_and_the_routing_runs_once(two_threads, mode, keys):
    expected, _ = gradients(None, keys)
    actual, calls = gradients(mode, keys)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert calls[torch.ops.dgt.route.default] == 2  # the two stages that group at 64 pixels, one block each


def test_full_mode_computes_the_matrix_products_again_and_selective_mode_does_not():
    products = {mode: gradients(mode)[1][torch.ops.aten.addmm.default] for mode in (None, "full", "selective")}
    attention = {
        mode: gradients(mode)[1][torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default]
        for mode in (None, "full", "selective")
    }
    assert products["selective"] == products[None] < products["full"]
    assert attention["selective"] == attention[None] < attention["full"]


def saved_bytes(mode: str | None) -> int:
    """Bytes that autograd keeps for one block's backward pass, its parameters excluded."""
    block = DGTBlock(64, build().arch, drop_path=0.5)
    block.checkpointing = mode
    parameters = {p.data_ptr() for p in block.parameters()}
    x = torch.randn(2, 16, 16, 64, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(x, KEYS[:2])
    del y
    return sum(kept.values())


def test_full_mode_keeps_less_than_a_fifth_of_what_autograd_keeps():
    assert saved_bytes("full") < saved_bytes(None) / 5


def test_checkpointing_can_be_switched_off_and_unknown_modes_are_refused():
    model = build()
    model.set_grad_checkpointing(mode="selective")
    assert {m.checkpointing for m in model.modules() if isinstance(m, DGTBlock)} == {"selective"}
    model.set_grad_checkpointing(False)
    assert {m.checkpointing for m in model.modules() if isinstance(m, DGTBlock)} == {None}
    with pytest.raises(ValueError, match=r"sometimes.*full, selective"):
        model.set_grad_checkpointing(mode="sometimes")


@pytest.mark.parametrize("mode", [None, *CHECKPOINT_MODES])
def test_a_block_compiles_in_one_graph_with_sample_keys(mode):
    torch.compiler.reset()
    torch.manual_seed(0)
    block = DGTBlock(32, build().arch, index=2, drop_path=0.5).train()
    block.checkpointing = mode
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    for forward in (block, compiled):
        x = torch.randn(4, 8, 8, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = forward(x, KEYS)
        y.square().sum().backward()
        results.append((y, x.grad, *[p.grad.clone() for p in block.parameters()]))
        block.zero_grad()
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-5)


def test_a_compiled_block_with_checkpointing_routes_once():
    torch.compiler.reset()
    block = DGTBlock(32, build().arch, index=2, drop_path=0.5).train()
    block.checkpointing = "full"
    graphs = []

    def record(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        graphs.append(sum(node.target is torch.ops.dgt.route.default for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=record, bw_compiler=record, partition_fn=min_cut_rematerialization_partition)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    compiled(torch.randn(4, 8, 8, 32, requires_grad=True), KEYS).sum().backward()
    assert graphs == [1, 0]  # forward, backward
