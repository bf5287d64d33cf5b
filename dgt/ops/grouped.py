"""DG-Attention in vectorised PyTorch, for any device: attention of every query to the keys of its group.

The queries are sorted by group and laid out in tiles of T queries that belong to one group each. The number of tiles
is bounded by floor(L/T) + G, so every shape is known without looking at the data; a tile that the bound provides but
the groups do not need, or a slot after a group's last query, computes a row that nothing reads. Short sequences take
dense attention with a mask instead, where that is less work; memory is linear in L either way.

Forward and backward are one custom op each: the layout may then depend on the sizes without a recompilation of what
surrounds it, and the sums over keys that several groups selected are taken in a fixed order (on a GPU: with
`torch.use_deterministic_algorithms`).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_TILE, LARGEST_TILE = 16, 128


def tile_size(length: int, num_groups: int) -> int:
    """Queries per tile: half the mean group size, rounded down to a power of two, within 16..128."""
    half_group = max(1, length // (2 * num_groups))
    return min(max(1 << (half_group.bit_length() - 1), SMALLEST_TILE), LARGEST_TILE)


def _prefers_mask(length: int, num_groups: int, top_k: int) -> bool:
    """Whether dense attention with a mask is less work than tiles, which cost about twice as much per score."""
    slots = length + num_groups * tile_size(length, num_groups)
    return length * length <= 2 * slots * top_k


@dataclass(frozen=True)
class Tiles:
    """Where the rows of N = B*H heads, flattened to (N*L, D), go in the tiles, and which keys each tile attends to."""

    shape: tuple[int, int, int]  # N, tiles per head, queries per tile
    query_of_slot: Tensor  # (N * tiles * T,) int64, row of the query; any row of the same head for an unused slot
    slot_of_query: Tensor  # (N * L,) int64
    key_of_slot: Tensor  # (N * tiles * K,) int64, row of the key


def _tiles(assignment: Tensor, indices: Tensor) -> Tiles:
    """Lay out the queries in tiles of one group each. assignment: (N, L), indices: (N, G, K)."""
    n, length = assignment.shape
    num_groups = indices.shape[1]
    size = tile_size(length, num_groups)
    num_tiles = length // size + num_groups

    group, query = assignment.sort(dim=1, stable=True)
    group = group.long()
    counts = torch.zeros(n, num_groups, dtype=torch.int64, device=group.device)
    counts.scatter_add_(1, group, torch.ones_like(group))
    tiles = (counts + (size - 1)).div_(size, rounding_mode="floor")
    first_slot = (tiles.cumsum(1) - tiles) * size
    first_position = counts.cumsum(1) - counts
    slot = (first_slot - first_position).gather(1, group).add_(torch.arange(length, device=group.device))

    # Unused slots read the head's first query, unused tiles the keys of its first group: nothing leaves the image.
    query_of_slot = torch.zeros(n, num_tiles * size, dtype=torch.int64, device=group.device).scatter_(1, slot, query)
    group_of_tile = torch.zeros(n, num_tiles, dtype=torch.int64, device=group.device)
    group_of_tile.scatter_(1, slot.div(size, rounding_mode="floor"), group)
    slot_of_query = torch.empty_like(slot).scatter_(1, query, slot)

    head = torch.arange(n, device=group.device)[:, None]
    keys = (indices + head[:, :, None] * length).flatten(0, 1)
    return Tiles(
        shape=(n, num_tiles, size),
        query_of_slot=(query_of_slot + head * length).flatten(),
        slot_of_query=(slot_of_query + head * (num_tiles * size)).flatten(),
        key_of_slot=keys.index_select(0, (group_of_tile + head * num_groups).flatten()).flatten(),
    )


def _excluded(assignment: Tensor, indices: Tensor) -> Tensor:
    """Mask (N, L, L) bool that is True where a query's group did not select the key."""
    n, length = assignment.shape
    num_groups = indices.shape[1]
    excluded = torch.ones(n, num_groups, length, dtype=torch.bool, device=assignment.device)
    excluded.scatter_(2, indices.long(), False)
    rows = assignment + num_groups * torch.arange(n, device=assignment.device)[:, None]
    return excluded.flatten(0, 1).index_select(0, rows.flatten()).view(n, length, length)


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of softmax(scale * q k^T) v for batches of matrices (N, rows, D); the probabilities are recomputed."""
    scores = torch.bmm(q * scale, k.transpose(1, 2))
    if excluded is not None:
        scores.masked_fill_(excluded, float("-inf"))
    p = scores.softmax(-1)
    dv = torch.bmm(p.transpose(1, 2), grad)
    dp = torch.bmm(grad, v.transpose(1, 2))
    ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
    dk = torch.bmm(ds.transpose(1, 2), q).mul_(scale)
    return torch.bmm(ds, k).mul_(scale), dk, dv


def _forward_masked(q: Tensor, k: Tensor, v: Tensor, assignment: Tensor, indices: Tensor, scale: float) -> Tensor:
    n, length = assignment.shape
    bias = q.new_zeros(n, length, length).masked_fill_(_excluded(assignment, indices), float("-inf"))
    q, k, v = (x.view(n, 1, length, -1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None], scale=scale)


def _forward_tiled(q: Tensor, k: Tensor, v: Tensor, assignment: Tensor, indices: Tensor, scale: float) -> Tensor:
    tiles = _tiles(assignment, indices)
    n, num_tiles, size = tiles.shape
    out = F.scaled_dot_product_attention(
        q.index_select(0, tiles.query_of_slot).view(n, num_tiles, size, -1),
        k.index_select(0, tiles.key_of_slot).view(n, num_tiles, indices.shape[2], -1),
        v.index_select(0, tiles.key_of_slot).view(n, num_tiles, indices.shape[2], -1),
        scale=scale,
    )
    return out.reshape(n * num_tiles * size, -1).index_select(0, tiles.slot_of_query)


@torch.library.custom_op("dgt::grouped_attention", mutates_args=())
def grouped_attention(q: Tensor, k: Tensor, v: Tensor, assignment: Tensor, indices: Tensor, scale: float) -> Tensor:
    """Attend with every query to the keys that its group selected.

    q, k, v: (B, H, L, D) of one float dtype, contiguous; assignment: (B, H, L) int32; indices: (B, H, G, K) int32 as
    `dgt::route` returns them. Returns (B, H, L, D); differentiable in q, k and v.
    """
    shape = q.shape
    _, _, num_groups, top_k = indices.shape
    forward = _forward_masked if _prefers_mask(shape[2], num_groups, top_k) else _forward_tiled
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (x.reshape(-1, shape[3]) for x in (q, k, v))
        out = forward(q, k, v, assignment.flatten(0, 1), indices.flatten(0, 1), scale)
    return out.reshape(shape).contiguous()


@grouped_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, assignment: Tensor, indices: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("dgt::grouped_attention_backward", mutates_args=())
def grouped_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, assignment: Tensor, indices: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `grouped_attention` in q, k and v, given that in its output; computed in float32 or float64."""
    shape = q.shape
    _, _, num_groups, top_k = indices.shape
    dtype, compute_dtype = q.dtype, torch.promote_types(q.dtype, torch.float32)
    grad, q, k, v = (x.reshape(-1, shape[3]).to(compute_dtype) for x in (grad, q, k, v))
    assignment, indices = assignment.flatten(0, 1), indices.flatten(0, 1)
    with torch.autocast(q.device.type, enabled=False):
        if _prefers_mask(shape[2], num_groups, top_k):
            grad, q, k, v = (x.view(-1, *shape[2:]) for x in (grad, q, k, v))
            grads = _attend_backward(grad, q, k, v, scale, _excluded(assignment, indices))
        else:
            grads = _backward_tiled(grad, q, k, v, _tiles(assignment, indices), scale)
    dq, dk, dv = (x.reshape(shape).to(dtype) for x in grads)
    return dq, dk, dv


def _backward_tiled(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    n, num_tiles, size = tiles.shape
    # An unused slot must not add to the keys' gradients: its output was never read.
    slot_grad = torch.zeros(n * num_tiles * size, grad.shape[1], dtype=grad.dtype, device=grad.device)
    slot_grad.index_copy_(0, tiles.slot_of_query, grad)
    dq, dk, dv = _attend_backward(
        slot_grad.view(n * num_tiles, size, -1),
        q.index_select(0, tiles.query_of_slot).view(n * num_tiles, size, -1),
        k.index_select(0, tiles.key_of_slot).view(n * num_tiles, -1, k.shape[1]),
        v.index_select(0, tiles.key_of_slot).view(n * num_tiles, -1, v.shape[1]),
        scale,
    )
    return (
        dq.flatten(0, 1).index_select(0, tiles.slot_of_query),
        torch.zeros_like(k).index_add_(0, tiles.key_of_slot, dk.flatten(0, 1)),
        torch.zeros_like(v).index_add_(0, tiles.key_of_slot, dv.flatten(0, 1)),
    )


@grouped_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, assignment: Tensor, indices: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    grads = grouped_attention_backward(grad, *ctx.saved_tensors, ctx.scale)
    return *grads, None, None, None


grouped_attention.register_autograd(_backward, setup_context=_setup_context)
