"""Pictures say what they were drawn from: colours and places by value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.targets.instances import Instances
from dgt.tasks import Inputs
from dgt.tasks.drawing import colours
from dgt.training import pictures
from dgt.training.pictures import RIGHT, WHITE, cell_colours, confusion, nice_step, reliability, samples, shares_of


def test_right_answers_are_blue_by_their_share_and_mistakes_red() -> None:
    share = np.array([[1.0, 0.0], [0.5, 0.25]])
    colours = cell_colours(share, cell=450)
    assert colours[0, 0].tolist() == list(RIGHT)
    assert colours[0, 1].tolist() == list(WHITE)
    assert colours[1, 1].tolist() == [round(255 + 0.25 * (c - 255)) for c in RIGHT]
    red, green, blue = colours[1, 0].tolist()
    assert red > green > blue


def test_a_single_mistake_among_a_thousand_classes_shows_over_nine_pixels() -> None:
    counts = np.diag(np.full(1000, 50))
    counts[700, 200] = 1
    drawn = confusion(counts)
    reddish = (drawn[..., 0].astype(int) - drawn[..., 2] > 30).nonzero()
    assert len(reddish[0]) == 9
    top, left = int(reddish[0].min()), int(reddish[1].min())
    assert top - left == 699 - 199 + 64 - 90  # the matrix begins 64 pixels from above and 90 from the left
    assert drawn.dtype == np.uint8


@pytest.mark.parametrize("classes", [1, 2, 10, 21, 41, 300])
def test_a_confusion_matrix_of_any_size_can_be_drawn(classes: int) -> None:
    drawn = confusion(np.zeros((classes, classes), np.int64), [f"class {i}" for i in range(classes)])
    assert drawn.shape[2] == 3
    assert min(drawn.shape[:2]) >= 900 - classes


def test_names_and_counts_stand_in_small_matrices_only(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    real = pictures.ImageDraw.ImageDraw.text

    def text(self: Any, at: Any, words: str, *rest: Any, **options: Any) -> None:
        written.append(words)
        real(self, at, words, *rest, **options)

    monkeypatch.setattr(pictures.ImageDraw.ImageDraw, "text", text)
    confusion(np.array([[123, 4], [0, 56]]), ["cat", "dog"])
    assert {"123", "4", "56", "cat", "dog", "179 of 183 right"} <= set(written)
    assert "0" not in written
    written.clear()
    confusion(np.full((50, 50), 77), [f"class {i}" for i in range(50)])
    assert "77" not in written
    assert [w for w in written if w.startswith("class ")] == [f"class {i}" for i in range(0, 50, 5) for _ in range(2)]


def test_steps_between_ticks_are_round() -> None:
    assert [nice_step(n) for n in (41, 100, 101, 300, 1000, 2048)] == [5, 10, 20, 50, 100, 500]


@pytest.mark.parametrize(("right", "confidence", "colour"), [(50, 75, pictures.CLAIMED), (100, 75, pictures.DOUBTED)])
def test_reliability_bars_reach_accuracy_and_the_gap_reaches_confidence(
    right: int, confidence: int, colour: tuple[int, int, int]
) -> None:
    bins = np.zeros((10, 3))
    bins[7] = (100, right, confidence)
    drawn = reliability(bins, 25.0)
    column = drawn[64 : 64 + 561, 76 + round(7.3 * 56)]  # beside the line of equal values
    blue = (column == pictures.RIGHT).all(axis=1).sum()
    gap = (column == colour).all(axis=1).sum()
    assert blue == pytest.approx(560 * min(right, confidence) / 100, abs=4)  # lines of the grid, outlines
    assert gap == pytest.approx(560 * 0.25, abs=6)


def test_samples_are_denormalised_and_labelled_with_their_shares() -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
    pixels = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    shape = (1, 3, 1, 1)
    images = (pixels - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    inputs = Inputs(images, torch.arange(6), torch.zeros(6, dtype=torch.int64))
    drawn = samples(inputs, mean, std)
    assert drawn.shape == (8 + 2 * (160 + 40), 8 + 4 * (160 + 8), 3)
    second_row = drawn[8 + 200 : 8 + 360 : 5, 8 + 168 : 8 + 328 : 5]  # image 5, five pixels for one
    np.testing.assert_allclose(second_row, pixels[5].permute(1, 2, 0).numpy() * 255, atol=1)
    assert shares_of(inputs, 3, ["a", "b", "c", "d"]) == ["d"]
    mixed = Inputs(images, inputs.labels, inputs.sample_keys, inputs.labels ^ 1, torch.tensor([0.7, 0.7, 1, 1, 1, 1]))
    assert shares_of(mixed, 0, ["cat", "dog"]) == ["cat  0.70", "dog  0.30"]
    assert shares_of(mixed, 2, ["cat", "dog"]) == ["2"]


def dense_inputs(pixels: torch.Tensor, sizes: list[tuple[int, int]], targets: list[Any]) -> Inputs:
    """Of images in units of a mean of 0.5 and a standard deviation of 0.25."""
    nothing = torch.zeros(len(pixels), dtype=torch.int64)
    return Inputs((pixels - 0.5) / 0.25, nothing, nothing, sizes=sizes, targets=targets)


def test_class_maps_of_training_are_drawn_over_four_images_without_padding() -> None:
    pixels = torch.full((6, 3, 64, 96), 0.4)
    classes = np.full((64, 96), 255, np.uint8)
    classes[:, 48:] = 1
    drawn = samples(
        dense_inputs(pixels, [(64, 96), *[(48, 80)] * 5], [classes] * 6), (0.5,) * 3, (0.25,) * 3, ["sky", "road"]
    )
    assert drawn.shape == (64 * 4 + 3 * 10 + 20, (96 * 4 + 20) + 3 * (80 * 4 + 20), 3)
    assert drawn[10 + 100, 10 + 100].tolist() == [102] * 3
    for x in (10 + 300, 404 + 10 + 300):
        assert drawn[10 + 100, x].tolist() == (0.45 * 102 + 0.55 * colours(2)[1]).round().tolist()
    assert (drawn[10 + 48 * 4 + 1, 404:] == 255).all()  # below the second image


def test_instances_of_training_are_drawn_over_large_images_shrunk() -> None:
    target = Instances(np.array([[0, 0, 512, 512]], np.float32), np.array([2]), (np.ones((512, 512), np.uint8),))
    inputs = dense_inputs(torch.full((1, 3, 1024, 1024), 0.4), [(1024, 1024)], [target])
    drawn = samples(inputs, (0.5,) * 3, (0.25,) * 3, ["a", "b", "c"])
    assert drawn.shape == (512 + 3 * 10 + 20, 512 + 20, 3)
    assert drawn[10 + 200, 10 + 200].tolist() == (102 + 0.45 * (colours(3)[2] - 102.0)).round().tolist()
    assert drawn[10 + 300, 10 + 300].tolist() == [102] * 3
