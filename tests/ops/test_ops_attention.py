"""Every backend of dg_attention against the definition, its limits, and its promises about batches and inputs."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from dgt.ops import BACKENDS, dg_attention
from dgt.ops.grouped import _prefers_mask, grouped_attention, tile_size
from dgt.ops.routing import route

# float64 sums of at most a few hundred terms of size about one: some hundred units of 1.1e-16.
EXACT = 1e-12


def random_qkv(shape, *, seed=0, dtype=torch.float64, requires_grad=True):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(requires_grad) for _ in range(3)]


def output_and_grads(qkv, backend, **options):
    out = dg_attention(*qkv, backend=backend, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out.dtype)
    return out, *torch.autograd.grad((out * weight).sum(), qkv)


def assert_all_close(actual, expected, tolerance=EXACT):
    for name, a, e in zip(("output", "dq", "dk", "dv"), actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


SIZES = [
    *itertools.product([1, 49, 100, 200], [1, 16, 48, "L"], [1, 49, 98, "L", "L+1"]),
    (257, 3, 5),
    (512, 4, 8),  # tiles of more than the smallest size
]


@pytest.mark.parametrize(("length", "num_groups", "top_k"), SIZES)
def test_grouped_equals_reference_in_output_and_gradients(length, num_groups, top_k):
    num_groups = length if num_groups == "L" else num_groups
    top_k = {"L": length, "L+1": length + 1}.get(top_k, top_k)
    qkv = random_qkv((1, 2, length, 8))
    options = {"num_groups": num_groups, "top_k": top_k}
    assert_all_close(
        output_and_grads(qkv, "grouped", **options), output_and_grads(qkv, "reference", **options), tolerance=EXACT
    )


def test_sizes_above_cover_masks_and_tiles_of_several_sizes():
    sizes = [(n, g, k) for n, g, k in SIZES if isinstance(g, int) and isinstance(k, int) and g > 1 and k < n]
    assert {_prefers_mask(*size) for size in sizes} == {True, False}
    assert {tile_size(n, g) for n, g, k in sizes if not _prefers_mask(n, g, k)} >= {16, 32, 64}


@pytest.mark.parametrize("backend", ["reference", "grouped"])
@pytest.mark.parametrize(("length", "num_groups", "top_k"), [(9, 3, 4), (40, 4, 2)])
def test_gradcheck(backend, length, num_groups, top_k):
    assert _prefers_mask(length, num_groups, top_k) == (length == 9)
    qkv = random_qkv((1, 1, length, 3))
    torch.autograd.gradcheck(
        lambda *qkv: dg_attention(*qkv, num_groups=num_groups, top_k=top_k, backend=backend), qkv, fast_mode=length > 9
    )


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize(("num_groups", "top_k"), [(4, 30), (4, 31), (1, 5), (40, 30)])
def test_one_group_or_all_keys_is_ordinary_attention(backend, num_groups, top_k):
    qkv = random_qkv((2, 2, 30, 8))
    actual = dg_attention(*qkv, num_groups=num_groups, top_k=top_k, backend=backend)
    expected = F.scaled_dot_product_attention(*qkv)
    assert_all_close(
        (actual, *torch.autograd.grad(actual.square().sum(), qkv)),
        (expected, *torch.autograd.grad(expected.square().sum(), qkv)),
    )


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_single_token_returns_its_value(backend):
    q, k, v = random_qkv((2, 1, 1, 4))
    torch.testing.assert_close(dg_attention(q, k, v, num_groups=8, top_k=16, backend=backend), v, rtol=0, atol=EXACT)


@pytest.mark.parametrize("length", [60, 300])
def test_constant_input_is_finite_and_equals_reference(length):
    v = random_qkv((1, 2, length, 8))[2]
    qkv = [torch.ones_like(v, requires_grad=True), torch.ones_like(v, requires_grad=True), v]
    options = {"num_groups": 4, "top_k": 8}
    actual = output_and_grads(qkv, "grouped", **options)
    assert_all_close(actual, output_and_grads(qkv, "reference", **options))
    # All keys tie, so the eight lowest indices are selected, and they weigh the same.
    torch.testing.assert_close(actual[0], v[:, :, :8].mean(2, keepdim=True).expand_as(v), rtol=0, atol=EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_between_keys_and_between_groups_go_as_in_reference(dtype):
    # Small integers: distances and products are exact, and many of them equal.
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randint(-1, 2, (2, 2, 96, 4), generator=generator).to(dtype) for _ in range(2))
    v = torch.randn(2, 2, 96, 4, generator=generator).to(dtype)
    options = {"num_groups": 6, "top_k": 7, "num_iters": 1}
    expected = dg_attention(q, k, v, backend="reference", **options)
    tolerance = EXACT if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(dg_attention(q, k, v, backend="grouped", **options), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("length", [50, 200])
def test_non_contiguous_inputs_give_the_same_result(length):
    qkv = torch.randn(2, length, 3, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).requires_grad_().unbind(0)
    assert not q.is_contiguous()
    options = {"num_groups": 4, "top_k": 8}
    dense = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    for actual, expected in zip(
        output_and_grads([q, k, v], "grouped", **options), output_and_grads(dense, "grouped", **options), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(("length", "top_k"), [(49, 20), (256, 16)])
def test_output_and_gradients_of_an_image_do_not_depend_on_its_batch_mates(length, top_k):
    qkv = random_qkv((40, 2, length, 16), dtype=torch.float32)
    out = dg_attention(*qkv, num_groups=8, top_k=top_k)
    grads = torch.autograd.grad(out.square().sum(), qkv)
    for image in (0, 17, 39):
        alone = [x[image : image + 1].detach().requires_grad_() for x in qkv]
        out_alone = dg_attention(*alone, num_groups=8, top_k=top_k)
        assert torch.equal(out_alone[0], out[image])
        for grad_alone, grad in zip(torch.autograd.grad(out_alone.square().sum(), alone), grads, strict=True):
            assert torch.equal(grad_alone[0], grad[image])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_image_does_not_spread_to_its_batch_mates(bad):
    qkv = random_qkv((3, 2, 200, 8), dtype=torch.float32)
    expected = output_and_grads(qkv, "grouped", num_groups=4, top_k=8)
    broken = [x.detach().clone() for x in qkv]
    for x in broken:
        x[1, :, 5] = bad
    actual = output_and_grads([x.requires_grad_() for x in broken], "grouped", num_groups=4, top_k=8)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a[[0, 2]], e[[0, 2]])


def test_float32_is_as_close_to_float64_as_rounding_explains_given_the_same_routing():
    qkv64 = random_qkv((2, 2, 300, 16))
    assignment, indices = route(qkv64[0].detach(), qkv64[1].detach(), 8, 24, 3)
    expected = grouped_attention(*qkv64, assignment, indices, 0.25)
    actual = grouped_attention(*(x.float() for x in qkv64), assignment, indices, 0.25)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [49, 300])
def test_bfloat16_gradients_are_rounded_once_from_float32(length):
    qkv = random_qkv((2, 2, length, 16), dtype=torch.bfloat16)
    actual = output_and_grads(qkv, "grouped", num_groups=4, top_k=24)
    expected = output_and_grads([x.detach().float().requires_grad_() for x in qkv], "grouped", num_groups=4, top_k=24)
    assert all(x.dtype == torch.bfloat16 for x in actual)
    for a, e in zip(actual[1:], expected[1:], strict=True):  # rounding to nearest: half of 2^-7
        torch.testing.assert_close(a.float(), e, rtol=2**-8, atol=1e-6)


def test_autocast_attends_in_its_dtype():
    qkv = random_qkv((1, 2, 100, 8), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = dg_attention(*qkv, num_groups=4, top_k=8)
    assert out.dtype == torch.bfloat16
    expected = dg_attention(*qkv, num_groups=4, top_k=8)
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=2**-6 * expected.abs().max().item())


def test_scale_is_that_of_the_scores():
    q, k, v = random_qkv((1, 1, 100, 9), requires_grad=False)
    options = {"num_groups": 4, "top_k": 8}
    assert torch.equal(dg_attention(q, k, v, **options), dg_attention(q, k, v, scale=1 / 3, **options))
    expected = dg_attention(q, k, v, scale=2.0, backend="reference", **options)
    torch.testing.assert_close(dg_attention(q, k, v, scale=2.0, **options), expected, rtol=EXACT, atol=EXACT)


def test_auto_groups_where_there_is_a_choice_and_dense_ignores_it():
    q, k, v = random_qkv((1, 1, 64, 8), requires_grad=False)
    auto, grouped, dense = (
        dg_attention(q, k, v, num_groups=4, top_k=8, backend=b) for b in ("auto", "grouped", "dense")
    )
    assert torch.equal(auto, grouped)
    torch.testing.assert_close(dense, F.scaled_dot_product_attention(q, k, v), rtol=EXACT, atol=EXACT)
    assert not torch.allclose(auto, dense)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_empty_batch_gives_an_empty_batch(backend):
    qkv = random_qkv((0, 2, 100, 8), dtype=torch.float32)
    out = dg_attention(*qkv, num_groups=4, top_k=8, backend=backend)
    assert out.shape == (0, 2, 100, 8)
    assert all(g.shape == (0, 2, 100, 8) for g in torch.autograd.grad(out.sum(), qkv, materialize_grads=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 8, 4)}, ValueError, r"one shape .* got \(2, 8, 4\), \(1, 2, 8, 4\)"),
        ({"k": torch.zeros(1, 2, 7, 4)}, ValueError, r"one shape .* \(1, 2, 7, 4\)"),
        ({"v": torch.zeros(1, 2, 8, 4, dtype=torch.float64)}, TypeError, "torch.float64"),
        ({"v": torch.zeros(1, 2, 8, 4, device="meta")}, ValueError, "one device, got cpu, cpu, meta"),
        ({"num_groups": 0}, ValueError, "num_groups must be at least 1, got 0"),
        ({"top_k": -1}, ValueError, "top_k must be at least 1, got -1"),
        ({"num_iters": 0}, ValueError, "num_iters must be at least 1, got 0"),
        ({"backend": "fast"}, ValueError, "unknown backend 'fast': choose one of auto, reference, grouped, dense"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {name: torch.zeros(1, 2, 8, 4) for name in "qkv"} | {"num_groups": 2, "top_k": 3} | change
    with pytest.raises(error, match=message):
        dg_attention(**arguments)


def test_integer_and_empty_sequences_are_refused():
    integers = torch.zeros(1, 2, 8, 4, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"one floating-point dtype, got torch\.int32"):
        dg_attention(integers, integers, integers, num_groups=2, top_k=3)
    empty = torch.zeros(1, 2, 0, 4)
    with pytest.raises(ValueError, match=r"length and head_dim must be at least 1, got q of shape \(1, 2, 0, 4\)"):
        dg_attention(empty, empty, empty, num_groups=2, top_k=3)


def test_importing_the_operators_imports_nothing_but_torch():
    # Whatever torch itself imports is allowed; the packages of the layers above are not.
    code = """
import sys, torch
before = {name.partition(".")[0] for name in sys.modules}
import dgt.ops.dg_attention
after = {name.partition(".")[0] for name in sys.modules}
print(",".join(sorted(after - before - set(sys.stdlib_module_names))))
"""
    # The package is loaded without running dgt/__init__.py, which registers the models.
    loader = "import sys, types; p = types.ModuleType('dgt'); p.__path__ = [sys.argv[1]]; sys.modules['dgt'] = p\n"
    root = __import__("dgt").__path__[0]
    done = subprocess.run([sys.executable, "-c", loader + code, root], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("", "dgt")
