"""Grouping of the queries and selection of each group's keys: which query attends to which keys.

Both are piecewise constant in q and k, so nothing here has a gradient, and both are discontinuous: a rounding
difference can move a query to another group. They are therefore computed in float32 (float64 for float64 inputs)
whatever the outer precision, and they are one custom op, `dgt::route`, whose small integer outputs a recomputation
can keep (save `torch.ops.dgt.route.default` in a selective checkpoint policy) instead of computing them again.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Autocast off and, for float32 products, neither TF32 nor bfloat16 for the duration of the block.

    torch keeps the precision of products for the whole process; it is touched only where somebody has lowered it.
    """
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    matmul = getattr(backend, "matmul")  # noqa: B009, the type stubs do not know it
    allowed = matmul.fp32_precision
    lowered = allowed not in ("ieee", "none")
    if lowered:
        matmul.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if lowered:
            matmul.fp32_precision = allowed


def _rows(x: Tensor) -> Tensor:
    """(B, H, L, D) of any strides and float dtype -> (B*H, L, D), contiguous, in the dtype of the routing."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32)).flatten(0, 1).contiguous()


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Inner products (N, A, B) of the rows of a (N, A, D) and b (N, B, D)."""
    if a.dtype == torch.float64:
        # A float64 matmul rounds equal rows differently at the edges of its blocks; float64 is there to be compared
        # with the definition, ties included.
        return torch.stack([(a[:, i, None] * b).sum(-1) for i in range(a.shape[1])], 1)
    return torch.bmm(a, b.transpose(1, 2))


def _first_largest(scores: Tensor) -> Tensor:
    """Index (N, L) int64 of the first largest of scores (N, G, L) along G; always in range, also for NaN.

    The same as `argmax(1)`, which is an order of magnitude slower on CPU along a dimension that is not the last.
    Overwrites the scores: a comparison that writes floats is the fast one.
    """
    num_groups = scores.shape[1]
    countdown = torch.arange(num_groups, 0, -1, device=scores.device, dtype=scores.dtype)
    is_largest = scores.eq_(scores.amax(1, keepdim=True))
    first = is_largest.mul_(countdown[:, None]).amax(1)
    return (num_groups - first.long()).clamp_(max=num_groups - 1)


def _group_sums(q: Tensor, assignment: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Sums (N, G, D) and counts (N, G, 1) of the queries of each group, added up in a fixed order."""
    n, _, d = q.shape
    if q.device.type == "cpu":
        rows = (assignment + num_groups * torch.arange(n)[:, None]).flatten()
        sums = q.new_zeros(n * num_groups, d).index_add_(0, rows, q.flatten(0, 1))
        counts = torch.bincount(rows, minlength=n * num_groups)
        return sums.view(n, num_groups, d), counts.view(n, num_groups, 1)
    # index_add_ adds with atomics, in any order, on a GPU.
    groups = torch.arange(num_groups, device=q.device)
    members = (assignment[:, None, :] == groups[:, None]).to(q.dtype)
    return torch.bmm(members, q), members.sum(-1, keepdim=True)


def _assign(q: Tensor, num_groups: int, num_iters: int) -> tuple[Tensor, Tensor]:
    """k-means of q (N, L, D): assignment (N, L) int64 and centroids (N, G, D)."""
    length = q.shape[1]
    start = (2 * torch.arange(num_groups, device=q.device) + 1) * length // (2 * num_groups)
    centroids = q.index_select(1, start)
    for _ in range(num_iters):
        # The smallest |q - c|^2 is the largest q.c - |c|^2 / 2.
        scores = _products(centroids, q).sub_(centroids.square().sum(-1, keepdim=True).mul_(0.5))
        assignment = _first_largest(scores)
        sums, counts = _group_sums(q, assignment, num_groups)
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
    return assignment, centroids


def _largest(scores: Tensor, count: int) -> Tensor:
    """Indices (..., count) int64 of the largest scores (..., L), in any order; the lowest of those that tie.

    Overwrites the scores.
    """
    if scores.dtype == torch.float64:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    # top-k breaks ties as it likes. So rank one integer that holds the score in its upper half, mapped so that integers
    # compare as the floats do, and the inverted index in its lower half.
    length = scores.shape[-1]
    bits = scores.add_(0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0: the two zeros tie
    bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))
    inverted_index = torch.arange(length - 1, -1, -1, device=scores.device)
    ranked = bits.long().bitwise_left_shift_(32).bitwise_or_(inverted_index)
    top = ranked.topk(count, sorted=False).values
    return (length - 1) - top.bitwise_and_(0xFFFFFFFF)


def _check(name: str, x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"{name} must have 4 dimensions (batch, heads, length, head_dim), got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


@torch.no_grad()
def assign_groups(q: Tensor, num_groups: int, num_iters: int = 3) -> tuple[Tensor, Tensor]:
    """Group the queries of every image and head by k-means.

    Starts from the queries at floor((2g+1)L / 2G); then `num_iters` times assigns every query to the nearest centroid
    (the lowest index among equals) and sets every centroid to the mean of its members (an empty group keeps its own).

    q: (B, H, L, D), any float dtype. G is `num_groups`, at most L.
    Returns the last assignment (B, H, L) int32, and the centroids after it (B, H, G, D) in float32, or float64 for
    float64 queries. Nothing is differentiable. Raises ValueError or TypeError for a wrong shape, dtype or count.
    """
    _check("q", q)
    _check_positive(num_groups=num_groups, num_iters=num_iters, length=q.shape[2])
    b, h, length, d = q.shape
    num_groups = min(num_groups, length)
    with full_precision(q.device):
        assignment, centroids = _assign(_rows(q), num_groups, num_iters)
    return assignment.view(b, h, length).int(), centroids.view(b, h, num_groups, d)


@torch.no_grad()
def select_keys(centroids: Tensor, k: Tensor, top_k: int) -> Tensor:
    """Select for every group the `top_k` keys with the largest inner product with its centroid.

    centroids: (B, H, G, D) in float32 or float64; k: (B, H, L, D), any float dtype.
    Returns indices (B, H, G, min(top_k, L)) int32, distinct and in no particular order; of keys that tie for the last
    place, those with the lowest indices. Raises ValueError or TypeError for a wrong shape, dtype or count.
    """
    _check("centroids", centroids)
    _check("k", k)
    _check_positive(top_k=top_k, length=k.shape[2])
    b, h, num_groups, d = centroids.shape
    if (k.shape[0], k.shape[1], k.shape[3]) != (b, h, d):
        raise ValueError(
            "centroids and k must agree in batch, heads and head_dim, "
            f"got {tuple(centroids.shape)} and {tuple(k.shape)}"
        )
    top_k = min(top_k, k.shape[2])
    with full_precision(k.device):
        rows = _rows(k)
        indices = _largest(_products(centroids.flatten(0, 1).to(rows.dtype), rows), top_k)
    return indices.view(b, h, num_groups, top_k).int()


@torch.library.custom_op("dgt::route", mutates_args=())
def route(q: Tensor, k: Tensor, num_groups: int, top_k: int, num_iters: int) -> tuple[Tensor, Tensor]:
    """Group the queries and select every group's keys, as one operation that a compiler or checkpoint sees whole.

    q, k: (B, H, L, D), any float dtype, detached. Returns the assignment (B, H, L) int32 and the indices
    (B, H, G, K) int32 with G = min(num_groups, L) and K = min(top_k, L); see `assign_groups` and `select_keys`.
    """
    assignment, centroids = assign_groups(q, num_groups, num_iters)
    return assignment, select_keys(centroids, k, top_k)


@route.register_fake
def _(q: Tensor, k: Tensor, num_groups: int, top_k: int, num_iters: int) -> tuple[Tensor, Tensor]:
    b, h, length, _ = q.shape
    assignment = q.new_empty((b, h, length), dtype=torch.int32)
    return assignment, q.new_empty((b, h, min(num_groups, length), min(top_k, length)), dtype=torch.int32)
