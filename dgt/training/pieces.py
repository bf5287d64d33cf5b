"""A rank's part of a tensor, described so that any engine and any number of ranks can put it together again.

Whatever an engine does with a tensor — keep it whole on every rank, cut its rows (FSDP2), cut its flattened form (ZeRO)
— a rank's part is a contiguous range of the whole tensor's elements in row-major order. That is all that a checkpoint
and the average of the weights need to know.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class Piece:
    """The elements [start, start + local.numel()) of a tensor of shape `shape`, row-major."""

    local: Tensor
    """This rank's elements, of any shape and layout; shares memory with what it describes."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int = 0
    """Place of the first element in the whole."""
    replica: int = 0
    """Which of the `replicas` ranks that hold these same elements this one is."""
    replicas: int = 1

    @property
    def stop(self) -> int:
        """Place after the last element."""
        return self.start + self.local.numel()

    def share(self) -> Piece:
        """The range of its elements that this rank saves, one-dimensional: equal ranks save equal shares of it."""
        count = self.local.numel()
        first, last = (count * i // self.replicas for i in (self.replica, self.replica + 1))
        return Piece(self.local.detach().reshape(-1)[first:last], self.shape, self.start + first)

    def copy_from(self, elements: Tensor) -> None:
        """Takes over its elements, given in row-major order."""
        with torch.no_grad():
            self.local.copy_(elements.view(self.local.shape))

    def clone(self) -> Piece:
        """The same range with memory of its own."""
        return Piece(self.local.detach().clone(), self.shape, self.start, self.replica, self.replicas)


Pieces = dict[str, Piece]
"""Pieces by the name of their tensor."""


def piece_of(tensor: Tensor, rank: int, world_size: int) -> Piece:
    """This rank's piece of a tensor that every rank holds whole, or of a DTensor.

    Raises ValueError for a DTensor that is cut along another dimension than its first.
    """
    if not isinstance(tensor, DTensor):
        return Piece(tensor.detach(), tuple(tensor.shape), 0, rank, world_size)
    mesh, placements = tensor.device_mesh, tensor.placements
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    if tuple(shape[1:]) != tuple(tensor.shape[1:]):
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is not cut along its first dimension: {placements}")
    replica, replicas = 0, 1
    for dimension, placement in enumerate(placements):
        if placement.is_replicate():
            replica = replica * mesh.size(dimension) + mesh.get_local_rank(dimension)
            replicas *= mesh.size(dimension)
    start = offset[0] * math.prod(tensor.shape[1:]) if offset else 0
    return Piece(tensor.to_local().detach(), tuple(tensor.shape), start, replica, replicas)


def locals_of(pieces: Mapping[str, Piece]) -> list[Tensor]:
    """The pieces' tensors, for arithmetic on all of them at once."""
    return [piece.local for piece in pieces.values()]
