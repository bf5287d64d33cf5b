"""Random draws of a training step as pure functions of (seed, step, position in the global batch).

No generator is shared or carried along: a resumed run, another number of ranks or another cut into micro-batches draws
the same numbers for the same sample.
"""

from __future__ import annotations

import enum

import numpy as np
import torch
from torch import Tensor


class Purpose(enum.IntEnum):
    """What a draw is for; keeps the streams of one step apart."""

    DROP_PATH = 0
    MIXING = 1


def generator(seed: int, step: int, purpose: Purpose) -> np.random.Generator:
    """The generator of one step's draws for the whole global batch."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, step, int(purpose)])))


def drop_path_keys(seed: int, step: int, positions: Tensor, global_batch_size: int) -> Tensor:
    """One key in [0, 2**32) per sample, from which the model derives the masks of all its drop paths.

    `positions`: (n,) int64 positions in the global batch. Returns (n,) int64.
    """
    keys = generator(seed, step, Purpose.DROP_PATH).integers(0, 2**32, size=global_batch_size, dtype=np.int64)
    return torch.from_numpy(keys)[positions]
