"""A rank's part of a tensor is a range of the whole; ranks together save each element once."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from dgt.training.pieces import Piece, piece_of
from dgt.training.world import joined

SHAPES = ((7, 5), (2, 3, 4), (1, 9), (), (1,), (0, 3))


def ranges(hybrid: bool) -> list[tuple[int, int, list[float]]]:
    """What this rank saves of one tensor per shape, sharded, or sharded within two groups of replicas."""
    with joined() as world:
        mesh = init_device_mesh("cpu", (2, world.size // 2) if hybrid else (world.size,))
        saved = []
        for shape in SHAPES:
            whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
            placements = [Replicate(), Shard(0)] if hybrid else [Shard(0)]
            cut = distribute_tensor(whole, mesh, placements if shape else [Replicate()] * mesh.ndim)
            share = piece_of(cut, world.rank, world.size).share()
            saved.append((share.start, share.stop, share.local.tolist()))
        return saved


@pytest.mark.parametrize(("world_size", "hybrid"), [(3, False), (4, True)])
def test_ranks_save_each_element_of_a_sharded_tensor_once(world_size: int, hybrid: bool) -> None:
    by_rank = [result.value for result in run_ranks(world_size, ranges, hybrid)]
    for i, shape in enumerate(SHAPES):
        count = torch.Size(shape).numel()
        saved = [
            (start + k, value) for rank in by_rank for start, _, values in [rank[i]] for k, value in enumerate(values)
        ]
        assert sorted(saved) == [(k, float(k)) for k in range(count)], shape


@pytest.mark.parametrize("replicas", [1, 2, 3, 5])
def test_replicas_share_the_work_of_saving_evenly(replicas: int) -> None:
    whole = torch.arange(35.0).view(7, 5)
    shares = [Piece(whole, (7, 5), 0, rank, replicas).share() for rank in range(replicas)]
    assert torch.equal(torch.cat([share.local for share in shares]), whole.view(-1))
    assert [share.start for share in shares] == [0, *(share.stop for share in shares[:-1])]
    assert max(share.local.numel() for share in shares) - min(share.local.numel() for share in shares) <= 1


def test_a_share_is_in_row_major_order_whatever_the_layout_in_memory() -> None:
    images = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert torch.equal(Piece(images, (2, 3, 4, 4)).share().local, torch.arange(96.0))
    loaded = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    Piece(loaded, (2, 3, 4, 4)).copy_from(torch.arange(96.0))
    assert torch.equal(loaded, images)


def columns() -> str:
    with joined() as world:
        mesh = init_device_mesh("cpu", (world.size,))
        with pytest.raises(
            ValueError, match=r"a tensor of shape \(4, 6\) is not cut along its first dimension"
        ) as raised:
            piece_of(distribute_tensor(torch.zeros(4, 6), mesh, [Shard(1)]), world.rank, world.size)
        return str(raised.value)


def test_a_tensor_cut_along_its_columns_is_refused() -> None:
    run_ranks(2, columns)
