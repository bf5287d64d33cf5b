"""The average of the weights: its decay, and that shards of any cut average like the whole."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from test_tensor_files import CUTS, bits
from torch import Tensor

from dgt.training import tensor_files
from dgt.training.ema import Ema, EmaConfig, decay_at
from dgt.training.tensor_files import TensorFiles

SHAPES = {"odd": (7, 5), "fewer_rows_than_ranks": (1, 9), "number": (), "three": (3,)}
CONFIG = EmaConfig(decay=0.9)


def weights_after(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def test_decay_grows_with_the_steps_up_to_the_configured_one() -> None:
    assert [decay_at(step, CONFIG) for step in (0, 1, 8, 80, 10_000)] == [1 / 10, 2 / 11, 9 / 18, 81 / 90, 0.9]
    assert decay_at(0, EmaConfig(decay=0.9, warmup=False)) == 0.9


def test_average_is_that_of_its_definition() -> None:
    weights = {name: CUTS["whole"](tensor, 0, 1) for name, tensor in weights_after(0).items()}
    ema, expected = Ema(weights, CONFIG), {name: tensor.double() for name, tensor in weights_after(0).items()}
    for step in range(1, 6):
        for name, tensor in weights_after(step).items():
            weights[name].copy_from(tensor.view(-1))
            decay = decay_at(step - 1, CONFIG)
            expected[name] = decay * expected[name] + (1 - decay) * tensor.double()
        ema.update(step - 1)
    for name, piece in ema.averages.items():
        # one rounding of float32 a step, of numbers of order 1
        torch.testing.assert_close(piece.local.double(), expected[name], rtol=0, atol=5 * 2**-22)


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(CUTS, 2)))
def test_sharded_averages_go_on_bit_for_bit_after_every_change_of_cut_and_ranks(
    tmp_path: Path, first: str, second: str
) -> None:
    """Two updates on 2 ranks, two on 3, two on 1, with a checkpoint between, against six on whole tensors."""
    initial = weights_after(0)
    undisturbed = {name: CUTS["whole"](tensor, 0, 1) for name, tensor in initial.items()}
    whole = Ema(undisturbed, CONFIG)
    stored, step = None, 0
    for cut, world_size in ((first, 2), (second, 3), ("whole", 1)):
        paths = [tmp_path / f"{world_size}-{rank}" for rank in range(world_size)]
        for rank, path in enumerate(paths):
            shards = {name: CUTS[cut](tensor, rank, world_size) for name, tensor in weights_after(step).items()}
            ema = Ema(shards, CONFIG)
            if stored is not None:
                stored.fill(ema.averages)
            for later in (step + 1, step + 2):
                for name, tensor in weights_after(later).items():
                    part = CUTS[cut](tensor, rank, world_size)
                    shards[name].local.copy_(part.local)
                ema.update(later - 1)
            tensor_files.write(path, ema.averages)
        for later in (step + 1, step + 2):
            for name, tensor in weights_after(later).items():
                undisturbed[name].copy_from(tensor.view(-1))
            whole.update(later - 1)
        stored, step = TensorFiles(paths, tensor_files.describe(whole.averages)), step + 2
        for name, piece in whole.averages.items():
            assert bits(stored.whole(name)) == bits(piece.local), (name, cut, world_size)
