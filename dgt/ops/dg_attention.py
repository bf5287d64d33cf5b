"""The public function `dg_attention` and the table of its backends.

A backend is a function of (q, k, v, num_groups, top_k, num_iters, scale) that computes the same thing; adding one is an
entry in `BACKENDS` and a condition in `choose_backend`. The exception is `dense`, see `dg_attention`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dgt.ops.grouped import grouped_attention
from dgt.ops.reference import reference_attention
from dgt.ops.routing import route

Backend = Callable[[Tensor, Tensor, Tensor, int, int, int, float], Tensor]


def _dense(q: Tensor, k: Tensor, v: Tensor, num_groups: int, top_k: int, num_iters: int, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def _grouped(q: Tensor, k: Tensor, v: Tensor, num_groups: int, top_k: int, num_iters: int, scale: float) -> Tensor:
    if is_dense(q.shape[2], num_groups, top_k):
        return _dense(q, k, v, num_groups, top_k, num_iters, scale)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    assignment, indices = route(q.detach(), k.detach(), num_groups, top_k, num_iters)
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:  # as scaled_dot_product_attention does
        q, k, v = (x.to(torch.get_autocast_dtype(x.device.type)) for x in (q, k, v))
    return grouped_attention(q, k, v, assignment, indices, scale)


BACKENDS: dict[str, Backend] = {"reference": reference_attention, "grouped": _grouped, "dense": _dense}


def is_dense(length: int, num_groups: int, top_k: int) -> bool:
    """Whether DG-Attention of these sizes is ordinary attention: one group, or every key selected."""
    return min(num_groups, length) <= 1 or top_k >= length


def choose_backend(length: int, num_groups: int, top_k: int) -> str:
    """The backend that `auto` stands for."""
    return "dense" if is_dense(length, num_groups, top_k) else "grouped"


def dg_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_groups: int,
    top_k: int,
    num_iters: int = 3,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Dynamic Group Attention: group the queries, select keys per group, attend within the group.

    Every image and head is grouped by itself (k-means, `num_iters` iterations, see `assign_groups`); every group
    selects the `top_k` keys with the largest inner product with its centroid (`select_keys`); every query attends to
    its group's keys with softmax(scale * q k^T) v. Gradients flow through the attention, not through the choices. At
    most L groups are made; with one group, or top_k >= L, the result is `scaled_dot_product_attention`.

    q, k, v: (B, H, L, D), one float dtype and device, any strides. scale defaults to D ** -0.5.
    backend: `reference` (the definition, slow), `grouped`, or `auto`, which picks by size. `dense` attends to all keys
    whatever `top_k` says: the limit of the method and the yardstick for its speed, not the same function.
    Returns (B, H, L, D) in the dtype of q (under autocast, `grouped` and `dense` in autocast's dtype).
    Raises ValueError for wrong shapes, counts or backend names, TypeError for wrong dtypes.
    Source: Liu et al., "Dynamic Group Transformer", IJCAI 2022, arXiv 2203.03937.
    """
    _check(q, k, v, num_groups=num_groups, top_k=top_k, num_iters=num_iters)
    if backend == "auto":
        backend = choose_backend(q.shape[2], num_groups, top_k)
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(['auto', *BACKENDS])}")
    return BACKENDS[backend](q, k, v, num_groups, top_k, num_iters, q.shape[3] ** -0.5 if scale is None else scale)


def _check(q: Tensor, k: Tensor, v: Tensor, **counts: int) -> None:
    if q.dim() != 4 or q.shape != k.shape or q.shape != v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k and v must have one shape (batch, heads, length, head_dim), got {shapes}")
    if q.shape[2] < 1 or q.shape[3] < 1:
        raise ValueError(f"length and head_dim must be at least 1, got q of shape {tuple(q.shape)}")
    if not q.is_floating_point() or q.dtype != k.dtype or q.dtype != v.dtype:
        raise TypeError(f"q, k and v must have one floating-point dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.device != k.device or q.device != v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
