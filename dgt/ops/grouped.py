"""DG-Attention in vectorised PyTorch, for any device: attention of every query to the keys of its group.

The queries are sorted by group and laid out in tiles of T queries that belong to one group each. The number of tiles
is bounded by floor(L/T) + G, so every shape is known without looking at the data; a tile that the bound provides but
the groups do not need, or a slot after a group's last query, computes a row that nothing reads. Short sequences take
dense attention with a mask instead, where that is less work; memory is linear in L either way.

Forward and backward are one custom op each: the layout may then depend on the sizes without a recompilation of what
surrounds it, and the sums over keys that several groups selected are taken in a fixed order (on a GPU: with
`torch.use_deterministic_algorithms`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_TILE, LARGEST_TILE = 16, 128

# On CPU the heads are taken a few at a time: temporaries of about this many elements per thread (2 MB in float32) stay
# near the cache and in memory that the allocator reuses. All heads at once took up to three times as long.
CPU_CHUNK_ELEMENTS = 512 * 1024

LARGEST_BATCH = 32768
"""Heads that one call works on: a GPU's grid has room for 65535 in a dimension."""


def tile_size(length: int, num_groups: int) -> int:
    """Queries per tile: half the mean group size, rounded down to a power of two, within 16..128."""
    half_group = max(1, length // (2 * num_groups))
    return min(max(1 << (half_group.bit_length() - 1), SMALLEST_TILE), LARGEST_TILE)


def _num_tiles(length: int, num_groups: int) -> int:
    return length // tile_size(length, num_groups) + num_groups


def _prefers_mask(length: int, num_groups: int, top_k: int) -> bool:
    """Whether dense attention with a mask is less work than tiles, which cost about twice as much per score."""
    slots = length + num_groups * tile_size(length, num_groups)
    return length * length <= 2 * slots * top_k


def _chunks(q: Tensor, num_groups: int, top_k: int) -> Iterator[slice]:
    """Slices of the N heads of q (N, L, D) to work on at a time; no head's result depends on the slicing."""
    n, length, head_dim = q.shape
    step = min(max(n, 1), LARGEST_BATCH)
    if q.device.type == "cpu":
        if _prefers_mask(length, num_groups, top_k):
            largest = length * length
        else:
            largest = _num_tiles(length, num_groups) * top_k * max(head_dim, tile_size(length, num_groups))
        step = max(1, CPU_CHUNK_ELEMENTS * torch.get_num_threads() // largest)
    return (slice(start, start + step) for start in range(0, n, step))


@dataclass(frozen=True)
class Tiles:
    """Where the rows of N heads, flattened to (N*L, D), go in the tiles, and which keys each tile attends to."""

    size: int  # T, queries per tile
    top_k: int  # K, keys per tile
    query_of_slot: Tensor  # (N * tiles * T,) int64, row of the query; any row of the same head for an unused slot
    slot_of_query: Tensor  # (N * L,) int64
    group_of_tile: Tensor  # (N * tiles,) int64, g + G * head; any group of the same head for an unused tile
    key_of_group: Tensor  # (N * G * K,) int64, row of the key

    def gather_queries(self, x: Tensor) -> Tensor:
        """Rows (N*L, D) of the queries -> (N * tiles, T, D)."""
        return x.index_select(0, self.query_of_slot).view(-1, self.size, x.shape[1])

    def scatter_queries(self, x: Tensor) -> Tensor:
        """(N * tiles, T, D) -> rows (N*L, D)."""
        return x.reshape(-1, x.shape[-1]).index_select(0, self.slot_of_query)

    def gather_keys(self, x: Tensor) -> Tensor:
        """Rows (N*L, D) of the keys -> (N * tiles, K, D): gathered once per group, then copied to its tiles whole."""
        groups = x.index_select(0, self.key_of_group).view(-1, self.top_k * x.shape[1])
        return groups.index_select(0, self.group_of_tile).view(-1, self.top_k, x.shape[1])

    def sum_keys(self, x: Tensor, num_groups: int, num_rows: int) -> Tensor:
        """The adjoint of `gather_keys`: (N * tiles, K, D) summed per group (N*G), then per row (N*L, D)."""
        groups = x.new_zeros(num_groups, self.top_k * x.shape[2]).index_add_(0, self.group_of_tile, x.flatten(1))
        return x.new_zeros(num_rows, x.shape[2]).index_add_(0, self.key_of_group, groups.view(-1, x.shape[2]))


def _tiles(assignment: Tensor, indices: Tensor) -> Tiles:
    """Lay out the queries in tiles of one group each. assignment: (N, L), indices: (N, G, K)."""
    n, length = assignment.shape
    num_groups, device = indices.shape[1], indices.device
    size, num_tiles = tile_size(length, num_groups), _num_tiles(length, num_groups)
    head = torch.arange(n, device=device)[:, None]

    group, query = assignment.long().sort(dim=1, stable=True)
    counts = torch.zeros(n, num_groups, dtype=torch.int64, device=device)
    counts.scatter_add_(1, group, torch.ones_like(group))
    tiles = (counts + (size - 1)).div_(size, rounding_mode="floor")
    first_slot = (tiles.cumsum(1) - tiles).mul_(size)
    first_position = counts.cumsum(1) - counts
    slot = (first_slot - first_position).gather(1, group).add_(torch.arange(length, device=device))

    # Unused slots read the head's first query, unused tiles its first group's keys: nothing crosses between images.
    query_of_slot = torch.zeros(n, num_tiles * size, dtype=torch.int64, device=device).scatter_(1, slot, query)
    group_of_tile = torch.zeros(n, num_tiles, dtype=torch.int64, device=device)
    group_of_tile.scatter_(1, slot.div(size, rounding_mode="floor"), group)
    slot_of_query = torch.empty_like(slot).scatter_(1, query, slot)
    return Tiles(
        size=size,
        top_k=indices.shape[2],
        query_of_slot=query_of_slot.add_(head * length).flatten(),
        slot_of_query=slot_of_query.add_(head * (num_tiles * size)).flatten(),
        group_of_tile=group_of_tile.add_(head * num_groups).flatten(),
        key_of_group=(indices + head[:, :, None] * length).flatten(),
    )


def _bias(assignment: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """Added to the scores (N, L, L): -inf where a query's group did not select the key, else 0."""
    n, length = assignment.shape
    num_groups = indices.shape[1]
    of_group = torch.full((n, num_groups, length), float("-inf"), dtype=dtype, device=indices.device)
    of_group.scatter_(2, indices.long(), 0.0)
    group = assignment + num_groups * torch.arange(n, device=assignment.device)[:, None]
    return of_group.flatten(0, 1).index_select(0, group.flatten()).view(n, length, length)


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of softmax(scale * q k^T + bias) v for batches of matrices (N, rows, D); overwrites the bias.

    The probabilities are computed again: keeping them would cost K numbers per query.
    """
    q = q * scale
    scores = torch.bmm(q, k.transpose(1, 2)) if bias is None else bias.baddbmm_(q, k.transpose(1, 2))
    p = scores.softmax(-1)
    dv = torch.bmm(p.transpose(1, 2), grad)
    dp = torch.bmm(grad, v.transpose(1, 2))
    ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
    return torch.bmm(ds, k).mul_(scale), torch.bmm(ds.transpose(1, 2), q), dv


def _forward_masked(q: Tensor, k: Tensor, v: Tensor, assignment: Tensor, indices: Tensor, scale: float) -> Tensor:
    q, k, v, bias = (x.unsqueeze(1) for x in (q, k, v, _bias(assignment, indices, q.dtype)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).squeeze(1)


def _forward_tiled(q: Tensor, k: Tensor, v: Tensor, assignment: Tensor, indices: Tensor, scale: float) -> Tensor:
    tiles = _tiles(assignment, indices)
    q_tiles = tiles.gather_queries(q.flatten(0, 1))
    k_tiles, v_tiles = tiles.gather_keys(k.flatten(0, 1)), tiles.gather_keys(v.flatten(0, 1))
    # Images as the batch and tiles as its heads: a GPU's grid has no room for more than 65535 in the batch.
    q_tiles, k_tiles, v_tiles = (x.view(q.shape[0], -1, *x.shape[1:]) for x in (q_tiles, k_tiles, v_tiles))
    return tiles.scatter_queries(F.scaled_dot_product_attention(q_tiles, k_tiles, v_tiles, scale=scale)).view(q.shape)


def _backward_masked(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, assignment: Tensor, indices: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _attend_backward(grad, q, k, v, scale, _bias(assignment, indices, q.dtype))


def _backward_tiled(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, assignment: Tensor, indices: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = _tiles(assignment, indices)
    # An unused slot must not add to the keys' gradients: nothing read its output.
    grad_tiles = grad.new_zeros(tiles.query_of_slot.shape[0], grad.shape[2])
    grad_tiles.index_copy_(0, tiles.slot_of_query, grad.flatten(0, 1))
    dq, dk, dv = _attend_backward(
        grad_tiles.view(-1, tiles.size, grad.shape[2]),
        tiles.gather_queries(q.flatten(0, 1)),
        tiles.gather_keys(k.flatten(0, 1)),
        tiles.gather_keys(v.flatten(0, 1)),
        scale,
    )
    num_groups, num_rows = indices.shape[0] * indices.shape[1], assignment.numel()
    dk, dv = (tiles.sum_keys(x, num_groups, num_rows).view(k.shape) for x in (dk, dv))
    return tiles.scatter_queries(dq).view(q.shape), dk, dv


@torch.library.custom_op("dgt::grouped_attention", mutates_args=())
def grouped_attention(q: Tensor, k: Tensor, v: Tensor, assignment: Tensor, indices: Tensor, scale: float) -> Tensor:
    """Attend with every query to the keys that its group selected.

    q, k, v: (B, H, L, D) of one float dtype, contiguous; assignment: (B, H, L) int32; indices: (B, H, G, K) int32 as
    `dgt::route` returns them. Returns (B, H, L, D); differentiable in q, k and v.
    """
    sizes = q.shape[2], indices.shape[2], indices.shape[3]
    forward = _forward_masked if _prefers_mask(*sizes) else _forward_tiled
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    q, k, v, assignment, indices = (x.flatten(0, 1) for x in (q, k, v, assignment, indices))
    with torch.autocast(q.device.type, enabled=False):
        for heads in _chunks(q, *sizes[1:]):
            part = forward(q[heads], k[heads], v[heads], assignment[heads], indices[heads], scale)
            out.flatten(0, 1)[heads] = part
    return out


@grouped_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, assignment: Tensor, indices: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("dgt::grouped_attention_backward", mutates_args=())
def grouped_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, assignment: Tensor, indices: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `grouped_attention` in q, k and v, given that in its output; computed in float32 or float64."""
    sizes = q.shape[2], indices.shape[2], indices.shape[3]
    compute_dtype = torch.promote_types(q.dtype, torch.float32)
    grads = tuple(torch.empty_like(q, memory_format=torch.contiguous_format) for _ in range(3))
    grad, q, k, v, assignment, indices = (x.flatten(0, 1) for x in (grad, q, k, v, assignment, indices))
    backward = _backward_masked if _prefers_mask(*sizes) else _backward_tiled
    with torch.autocast(q.device.type, enabled=False):
        for heads in _chunks(q, *sizes[1:]):
            g1, q1, k1, v1 = (x[heads].to(compute_dtype) for x in (grad, q, k, v))
            parts = backward(g1, q1, k1, v1, assignment[heads], indices[heads], scale)
            for whole, part in zip(grads, parts, strict=True):
                whole.flatten(0, 1)[heads] = part
    return grads[0], grads[1], grads[2]


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
