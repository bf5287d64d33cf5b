"""Grouping and selection against the definition, with ties, empty groups, low precision and odd values."""

import pytest
import torch

from dgt.ops import assign_groups, select_keys
from dgt.ops.reference import reference_assign_groups, reference_select_keys
from dgt.ops.routing import _first_largest, _largest, full_precision, route


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def as_sets(indices):
    return indices.sort(-1).values


@pytest.mark.parametrize("num_iters", [1, 3])
@pytest.mark.parametrize(("length", "num_groups"), [(1, 1), (7, 3), (50, 50), (50, 80), (196, 48), (300, 1)])
def test_groups_are_those_of_the_definition(length, num_groups, num_iters):
    q = normal(2, 2, length, 8)
    assignment, centroids = assign_groups(q, num_groups, num_iters)
    assert assignment.dtype == torch.int32
    assert centroids.dtype == torch.float64
    for b in range(2):
        for h in range(2):
            expected, means = reference_assign_groups(q[b, h], min(num_groups, length), num_iters)
            assert torch.equal(assignment[b, h].long(), expected)
            torch.testing.assert_close(centroids[b, h], means, rtol=1e-12, atol=1e-12)


def test_centroids_are_the_means_of_the_returned_assignment():
    q = normal(1, 1, 200, 8)
    assignment, centroids = assign_groups(q, 10, 3)
    for g in range(10):
        torch.testing.assert_close(centroids[0, 0, g], q[0, 0][assignment[0, 0] == g].mean(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_empty_group_keeps_its_centroid_and_equal_distances_go_to_the_lowest_group(dtype):
    q = torch.ones(1, 1, 12, 4, dtype=dtype)
    assignment, centroids = assign_groups(q, 3, 3)
    assert torch.equal(assignment, torch.zeros(1, 1, 12, dtype=torch.int32))
    assert torch.equal(centroids, torch.ones(1, 1, 3, 4, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_query_half_way_between_two_centroids_joins_the_first(dtype):
    # Centroids start at the queries 1 (value -2) and 4 (value 2); the zeros are half-way.
    q = torch.tensor([0.0, -2.0, 0.0, 0.0, 2.0, 0.0], dtype=dtype).view(1, 1, 6, 1)
    assignment, centroids = assign_groups(q, 2, 1)
    assert assignment.flatten().tolist() == [0, 0, 0, 0, 1, 0]
    torch.testing.assert_close(centroids.flatten(), torch.tensor([-0.4, 2.0], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("length", "top_k"), [(10, 1), (64, 16), (300, 98), (49, 49), (20, 30)])
def test_selected_keys_are_those_of_the_definition(length, top_k, dtype):
    centroids, k = normal(2, 2, 5, 8, dtype=dtype), normal(2, 2, length, 8, seed=1, dtype=dtype)
    indices = select_keys(centroids, k, top_k)
    assert indices.shape == (2, 2, 5, min(top_k, length))
    assert indices.dtype == torch.int32
    for b in range(2):
        for h in range(2):
            for g in range(5):
                expected = reference_select_keys(centroids[b, h, g], k[b, h], top_k)
                assert torch.equal(as_sets(indices[b, h, g].long()), as_sets(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keys_that_tie_are_selected_by_lowest_index(dtype):
    scores = torch.tensor([1.0, 3.0, 2.0, 2.0, -1.0, 2.0, 2.0], dtype=dtype)
    indices = select_keys(torch.ones(1, 1, 1, 1, dtype=dtype), scores.view(1, 1, 7, 1), 3)
    assert as_sets(indices).flatten().tolist() == [1, 2, 3]
    negative = select_keys(-torch.ones(1, 1, 1, 1, dtype=dtype), scores.view(1, 1, 7, 1), 4)
    assert as_sets(negative).flatten().tolist() == [0, 2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_positive_and_negative_zero_tie(dtype):
    scores = torch.tensor([-0.0, 0.0, -0.0, 0.0, -1.0], dtype=dtype)
    assert _largest(scores, 3).sort().values.tolist() == [0, 1, 2]


def test_order_of_extreme_scores_is_that_of_the_floats():
    values = [1e38, 1.0, 1e-45, 0.0, -1e-45, -1.0, -1e38, float("inf"), -float("inf")]
    ranking = [7, 0, 1, 2, 3, 4, 5, 6, 8]
    for top_k in range(1, 9):
        indices = select_keys(torch.ones(1, 1, 1, 1), torch.tensor(values).view(1, 1, 9, 1), top_k)
        assert as_sets(indices).flatten().tolist() == sorted(ranking[:top_k])


@pytest.mark.parametrize("num_groups", [1, 2, 255, 256, 300])
def test_first_largest_is_argmax(num_groups):
    scores = torch.randint(0, 40, (3, num_groups, 50), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(_first_largest(scores.clone()), scores.argmax(1))
    scores[0, :, 3] = float("nan")
    assert _first_largest(scores).max() < num_groups


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_routed_as_the_same_values_in_float32(autocast):
    q, k = (normal(2, 2, 200, 16, seed=s).bfloat16() for s in (0, 1))
    expected = route(q.float(), k.float(), 16, 24, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        actual = route(q, k, 16, 24, 3)
        assignment, centroids = assign_groups(q, 16, 3)
    assert centroids.dtype == torch.float32
    assert torch.equal(assignment, expected[0])
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_float32_queries_are_routed_in_float32_under_autocast_and_reduced_matmul_precision():
    q, k = normal(2, 2, 200, 16, dtype=torch.float32), normal(2, 2, 200, 16, seed=1, dtype=torch.float32)
    expected = route(q, k, 16, 24, 3)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = route(q, k, 16, 24, 3)
        with full_precision(torch.device("cpu")):
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_routing_has_no_gradient_and_leaves_its_inputs_alone():
    q, k = normal(1, 1, 60, 8).requires_grad_(), normal(1, 1, 60, 8, seed=1).requires_grad_()
    before = q.detach().clone(), k.detach().clone()
    assignment, centroids = assign_groups(q, 4)
    select_keys(centroids, k, 8)
    assert not centroids.requires_grad
    assert not assignment.requires_grad
    assert torch.equal(q, before[0])
    assert torch.equal(k, before[1])


def test_route_is_assign_then_select():
    q, k = normal(2, 2, 100, 8, dtype=torch.float32), normal(2, 2, 100, 8, seed=1, dtype=torch.float32)
    assignment, centroids = assign_groups(q, 6, 2)
    expected = assignment, select_keys(centroids, k, 9)
    for a, e in zip(torch.ops.dgt.route(q, k, 6, 9, 2), expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: assign_groups(x[0], 2), ValueError, r"q must have 4 dimensions .* got shape \(2, 8, 4\)"),
        (lambda x: assign_groups(x.long(), 2), TypeError, "q must be a floating-point tensor, got torch.int64"),
        (lambda x: assign_groups(x, 0), ValueError, "num_groups must be at least 1, got 0"),
        (lambda x: assign_groups(x[:, :, :0], 2), ValueError, "length must be at least 1, got 0"),
        (lambda x: select_keys(x, x[..., :2], 2), ValueError, r"agree in batch, heads and head_dim"),
        (lambda x: select_keys(x, x, 0), ValueError, "top_k must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(1, 2, 8, 4))
