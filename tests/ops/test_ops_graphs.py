"""The operators under compilation, activation checkpointing and several threads."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dgt.ops import dg_attention
from dgt.ops.routing import route

LENGTH, OPTIONS = 256, {"num_groups": 8, "top_k": 16}  # tiles; the mask is at length 100


def random_qkv(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def gradients(function, qkv):
    return torch.autograd.grad(function(*qkv).square().sum(), qkv)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("length", [100, LENGTH])
def test_gradients_are_bitwise_repeatable_and_equal_those_of_one_thread(length):
    qkv = random_qkv((8, 4, length, 16))
    first = gradients(partial(dg_attention, **OPTIONS), qkv)
    for _ in range(5):
        assert all(map(torch.equal, first, gradients(partial(dg_attention, **OPTIONS), qkv)))
    torch.set_num_threads(1)
    assert all(map(torch.equal, first, gradients(partial(dg_attention, **OPTIONS), qkv)))


def save_only_routing(ctx, op, *args, **kwargs):
    routing = op == torch.ops.dgt.route.default
    return CheckpointPolicy.MUST_SAVE if routing else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("length", [100, LENGTH])
def test_recomputation_gives_bitwise_the_same_gradients_and_does_not_group_again(length, monkeypatch):
    calls = []
    original = torch.ops.dgt.route.default

    class CountCalls(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func is original)
            return func(*args, **(kwargs or {}))

    def block(q, k, v):
        return dg_attention(q * 1.1, torch.tanh(k), v, **OPTIONS)

    def recomputed(q, k, v):
        contexts = partial(create_selective_checkpoint_contexts, save_only_routing)
        return checkpoint(block, q, k, v, use_reentrant=False, context_fn=contexts)

    qkv = random_qkv((8, 4, length, 16))
    expected = gradients(block, qkv)
    with CountCalls():
        actual = gradients(recomputed, qkv)
    assert all(map(torch.equal, actual, expected))
    assert sum(calls) == 1


def test_compiled_whole_with_one_recompilation_for_many_sizes():
    from torch._dynamo.testing import CompileCounterWithBackend

    def attend(q, k, v):
        return dg_attention(q * 1.1, k, v, **OPTIONS)

    counter = CompileCounterWithBackend("inductor")
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    for length in (196, 784, 64, 1024):  # masks and tiles, tiles of several sizes
        qkv = random_qkv((2, 2, length, 16))
        assert torch.equal(compiled(*qkv), attend(*qkv))
        assert all(map(torch.equal, gradients(compiled, qkv), gradients(attend, qkv)))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_custom_ops_satisfy_the_contract_of_the_dispatcher(dtype):
    for shape in ((2, 2, 40, 8), (1, 1, 20, 8)):
        q, k, v = random_qkv(shape, dtype)
        torch.library.opcheck(torch.ops.dgt.route.default, (q.detach(), k.detach(), 4, 6, 2))
        routing = route(q.detach(), k.detach(), 4, 6, 2)
        torch.library.opcheck(torch.ops.dgt.grouped_attention.default, (q, k, v, *routing, 0.3))
        detached = [x.detach() for x in (v, q, k, v)]
        torch.library.opcheck(torch.ops.dgt.grouped_attention_backward.default, (*detached, *routing, 0.3))


def test_fake_route_has_the_shapes_of_the_real_one():
    for length, num_groups, top_k in ((30, 4, 6), (3, 4, 6)):
        q, k, _ = random_qkv((2, 3, length, 8))
        real = route(q.detach(), k.detach(), num_groups, top_k, 2)
        meta = torch.ops.dgt.route(q.detach().to("meta"), k.detach().to("meta"), num_groups, top_k, 2)
        assert [(x.shape, x.dtype, x.stride()) for x in real] == [(x.shape, x.dtype, x.stride()) for x in meta]
