"""DG-Attention as it is defined: loops over images, heads and groups. Slow, and what every backend is compared with."""

import torch
from torch import Tensor


def reference_assign_groups(q: Tensor, num_groups: int, num_iters: int) -> tuple[Tensor, Tensor]:
    """Group the queries of one head by k-means that starts from strided queries.

    q: (L, D) float32 or float64. Returns the assignment (L,) int64 and the centroids (G, D): e_g is the mean of
    group g's members, or the last centroid of a group that has none.
    """
    length = q.shape[0]
    centroids = torch.stack([q[(2 * g + 1) * length // (2 * num_groups)] for g in range(num_groups)])
    assignment = torch.zeros(length, dtype=torch.int64, device=q.device)
    for _ in range(num_iters):
        for i in range(length):
            assignment[i] = (centroids - q[i]).square().sum(-1).argmin()  # argmin: the first of equal distances
        for g in range(num_groups):
            members = q[assignment == g]
            if len(members) > 0:
                centroids[g] = members.mean(0)
    return assignment, centroids


def reference_select_keys(centroid: Tensor, k: Tensor, top_k: int) -> Tensor:
    """Indices (top_k,) int64 of the keys with the largest product with one centroid, in descending order.

    centroid: (D,), k: (L, D). The stable sort leaves equal scores in the order of their indices.
    """
    return (k * centroid).sum(-1).sort(dim=-1, descending=True, stable=True).indices[:top_k]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return ((q @ k.T) * scale).softmax(-1) @ v


def _one_head(q: Tensor, k: Tensor, v: Tensor, num_groups: int, top_k: int, num_iters: int, scale: float) -> Tensor:
    length = q.shape[0]
    num_groups = min(num_groups, length)
    if num_groups == 1 or top_k >= length:
        return _attend(q, k, v, scale)
    assignment, centroids = reference_assign_groups(q.detach(), num_groups, num_iters)
    out = torch.zeros_like(q)
    for g in range(num_groups):
        members = (assignment == g).nonzero()[:, 0]
        keys = reference_select_keys(centroids[g], k.detach(), top_k)
        out = out.index_copy(0, members, _attend(q[members], k[keys], v[keys], scale))
    return out


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, num_groups: int, top_k: int, num_iters: int, scale: float
) -> Tensor:
    """DG-Attention of q, k, v (B, H, L, D), computed in float32, or in float64 for float64 inputs.

    Returns (B, H, L, D) in the dtype of q; differentiable in q, k and v. The grouping and the selection see q and k
    detached, because they are piecewise constant. One group, or top_k >= L, is ordinary attention.
    """
    if q.numel() == 0:
        return q.clone()
    compute_dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        heads = zip(*(x.to(compute_dtype).flatten(0, 1) for x in (q, k, v)), strict=True)
        out = [_one_head(q1, k1, v1, num_groups, top_k, num_iters, scale) for q1, k1, v1 in heads]
    return torch.stack(out).view(q.shape).to(q.dtype)
