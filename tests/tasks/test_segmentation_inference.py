"""Inference of segmentation and what is counted of it, each against a direct computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from segmentation_small import CLASSES, task
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional

from data_pipeline.batch import Batch
from data_pipeline.config import DataConfig
from data_pipeline.shards.source import DataError
from data_pipeline.transforms import normalize
from dgt.tasks.pixels import PixelCounts
from dgt.tasks.segmentation_config import SegmentationInferenceConfig
from dgt.tasks.segmentation_inference import window_starts


class Patches(nn.Module):
    """A network whose cells see their own 4 x 4 pixels, each pixel with its own weight, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.weight = torch.randn(CLASSES, 3, 4, 4, generator=generator) / 2
        self.passes: list[tuple[int, int]] = []

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        self.passes.append((height, width))
        return F.conv2d(F.pad(images, (0, -width % 4, 0, -height % 4)), self.weight, stride=4)


def photograph(height: int, width: int, seed: int = 3) -> Tensor:
    coarse = torch.rand(1, 3, 5, 6, generator=torch.Generator().manual_seed(seed)) * 255
    return F.interpolate(coarse, size=(height, width), mode="bicubic")[0].clamp(0, 255).byte().permute(1, 2, 0)


def shrunk(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(1, 3, h, w): resized and normalised."""
    pixels = functional.resize(image.permute(2, 0, 1), list(size), antialias=True)
    data = DataConfig()
    return normalize(pixels.permute(1, 2, 0)[None], data.mean, data.std)


def probabilities(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, H, W) of an image whose sides are multiples of 4."""
    return F.interpolate(Patches()(x), size=size, mode="bilinear").softmax(dim=1)[0]


def agrees(answer: Tensor, expected: Tensor) -> bool:
    """Whether the answer has the largest probability everywhere; rounding may choose among equal ones."""
    assert answer.dtype == torch.uint8
    assert answer.shape == expected.shape[1:]
    of_answer = expected.gather(0, answer.long()[None])[0]
    return bool((of_answer >= expected.amax(dim=0) - 1e-5).all()) and len(answer.unique()) > 2


@pytest.mark.parametrize(("height", "width", "size"), [(32, 48, (32, 48)), (64, 96, (32, 48)), (20, 35, (32, 56))])
def test_a_whole_image_is_answered_at_its_own_size(height: int, width: int, size: tuple[int, int]) -> None:
    image = photograph(height, width)
    answer = task().answer(Patches(), image)
    assert agrees(answer, probabilities(shrunk(image, size), (height, width)))


def test_the_long_side_limits_the_size() -> None:
    network = Patches()
    task(short=64, long=96).answer(network, photograph(40, 120))
    assert network.passes == [(32, 96)]


def test_scales_and_mirror_images_are_averaged_as_probabilities() -> None:
    image, network = photograph(40, 60), Patches()
    inference = SegmentationInferenceConfig(scales=(0.5, 1.0, 2.0), flip=True)
    answer = task(short=40, inference=inference).answer(network, image)
    assert network.passes == [(20, 30), (20, 30), (40, 60), (40, 60), (80, 120), (80, 120)]
    total = torch.zeros(CLASSES, 40, 60)
    for size in ((40, 60), (80, 120)):
        x = shrunk(image, size)
        total += probabilities(x, (40, 60)) + probabilities(x.flip(-1), (40, 60)).flip(-1)
    x = shrunk(image, (20, 30))
    total += reference(image, [(x, (0, 0), False), (x.flip(-1), (0, 0), True)], (20, 30)) * 2
    assert agrees(answer, total)


@pytest.mark.parametrize("stride", [16, 20, 32])
def test_windows_are_averaged_where_they_overlap(stride: int) -> None:
    image, network = photograph(32, 68), Patches()
    inference = SegmentationInferenceConfig(mode="slide", stride=stride)
    answer = task(inference=inference).answer(network, image)
    starts = [*range(0, 36, stride), 36]
    assert network.passes == [(32, 32)] * len(starts)
    total, times = torch.zeros(CLASSES, 32, 68), torch.zeros(68)
    x = shrunk(image, (32, 68))
    for start in starts:
        total[:, :, start : start + 32] += probabilities(x[..., start : start + 32], (32, 32))
        times[start : start + 32] += 1
    assert agrees(answer, total / times)


def reference(image: Tensor, views: list[tuple[Tensor, tuple[int, int], bool]], size: tuple[int, int]) -> Tensor:
    """(C, H, W) mean probabilities, pixel by pixel, of views (pixels, their upper left corner, mirrored)."""
    height, width = image.shape[:2]
    result = np.zeros((CLASSES, height, width))
    answers = [(Patches()(x)[0].numpy(), x.shape[-2:], corner, mirrored) for x, corner, mirrored in views]
    for y in range(height):
        for x in range(width):
            seen = []
            for logits, (rows, columns), (top, left), mirrored in answers:
                at_y = (y + 0.5) * size[0] / height - top
                at_x = (x + 0.5) * size[1] / width
                at_x = (size[1] - at_x if mirrored else at_x) - left
                if 0 <= at_y < rows and 0 <= at_x < columns:
                    seen.append(softmax(bilinear(logits, at_y / 4 - 0.5, at_x / 4 - 0.5)))
            result[:, y, x] = np.mean(seen, axis=0)
    return torch.from_numpy(result).float()


def bilinear(cells: np.ndarray, y: float, x: float) -> np.ndarray:
    y, x = np.clip(y, 0, cells.shape[1] - 1), np.clip(x, 0, cells.shape[2] - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, cells.shape[1] - 1), min(left + 1, cells.shape[2] - 1)
    upper = cells[:, top, left] * (1 - (x - left)) + cells[:, top, right] * (x - left)
    lower = cells[:, bottom, left] * (1 - (x - left)) + cells[:, bottom, right] * (x - left)
    return upper * (1 - (y - top)) + lower * (y - top)


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum()


def test_windows_of_a_resized_and_mirrored_image_of_odd_size_are_put_back_in_their_places(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dgt.tasks.segmentation_inference._BAND", 7 * 21 * CLASSES)  # several bands
    image = photograph(30, 21)
    inference = SegmentationInferenceConfig(mode="slide", flip=True, scales=(1.0, 1.5))
    answer = task(short=33, inference=inference).answer(Patches(), image)
    total = torch.zeros(CLASSES, 30, 21)
    for size in ((47, 33), (71, 50)):
        for mirrored in (False, True):
            x = shrunk(image, size).flip(-1) if mirrored else shrunk(image, size)
            tops, lefts = window_starts(size[0], 32, 21), window_starts(size[1], 32, 21)
            corners = [(top, left) for top in tops for left in lefts]
            parts = [(x[..., top : top + 32, left : left + 32], (top, left), mirrored) for top, left in corners]
            total += reference(image, parts, size)
    assert agrees(answer, total)


def test_windows_cover_an_image_and_the_last_one_ends_with_it() -> None:
    assert window_starts(100, 32, 20) == [0, 20, 40, 60, 68]
    assert window_starts(72, 32, 20) == [0, 20, 40]
    assert window_starts(32, 32, 20) == window_starts(20, 32, 20) == [0]


def evaluated(*shapes: tuple[int, int], valid: tuple[bool, ...], first: int = 0) -> Batch:
    rng, n = np.random.default_rng(1), len(shapes)
    targets = [rng.choice([0, 1, 3, 255], shape).astype(np.uint8) for shape in shapes]
    return Batch(
        images=[photograph(*shape, seed=i) for i, shape in enumerate(shapes)],
        labels=torch.zeros(n, dtype=torch.int64),
        ids=torch.tensor([first + i if ok else -1 for i, ok in enumerate(valid)]),
        copies=torch.zeros(n, dtype=torch.int64),
        positions=torch.arange(n),
        valid=torch.tensor(valid),
        changes=[],
        sizes=list(shapes),
        targets=[target if ok else None for target, ok in zip(targets, valid, strict=True)],
    )


def test_evaluation_equals_a_plain_confusion_matrix_and_counts_valid_places_only() -> None:
    what, network = task(), Patches()
    batch = evaluated((32, 40), (50, 30), (64, 64), valid=(True, True, False), first=10)
    found = what.found(network, batch, torch.device("cpu"))
    assert len(network.passes) == 3
    confusion = np.zeros((CLASSES, CLASSES), np.int64)
    for i in range(2):
        answer = what.answer(Patches(), batch.images[i]).numpy()
        known = batch.targets[i] != 255
        np.add.at(confusion, (batch.targets[i][known], answer[known]), 1)
    assert what.confusion(found.totals).tolist() == confusion.tolist()
    assert found.totals.dtype == torch.float64
    assert found.pictures == found.records == {}
    right, truth, guessed = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    union = truth + guessed - right
    metrics = what.metrics(found.totals, found.records)
    assert metrics == pytest.approx(
        {
            "miou": 100 * np.mean(right[union > 0] / union[union > 0]),
            "macc": 100 * np.mean(right[truth > 0] / truth[truth > 0]),
            "pixel_acc": 100 * right.sum() / truth.sum(),
            "samples": 2,
        }
    )


def test_totals_of_parts_add_up_to_those_of_the_whole_exactly() -> None:
    what = task()
    shapes = ((32, 40), (50, 30), (33, 35))
    whole = what.found(Patches(), evaluated(*shapes, valid=(True,) * 3, first=10), torch.device("cpu"))
    counted = [
        what.found(Patches(), evaluated(*shapes, valid=tuple(j == i for j in range(3)), first=10), torch.device("cpu"))
        for i in range(3)
    ]
    assert torch.equal(whole.totals, counted[0].totals + counted[1].totals + counted[2].totals)


def test_the_first_samples_are_drawn() -> None:
    batch = evaluated((32, 40), (50, 30), valid=(True, True), first=3)
    found = task().found(Patches(), batch, torch.device("cpu"))
    assert list(found.pictures) == [3]
    assert found.pictures[3].dtype == np.uint8
    assert found.pictures[3].shape[2] == 3


def test_what_counted_pixels_say_of_each_class() -> None:
    counts = PixelCounts(4)
    truth = torch.tensor([[0, 0, 0, 1], [1, 255, 255, 1]], dtype=torch.uint8)
    answer = torch.tensor([[0, 0, 1, 1], [2, 0, 1, 1]], dtype=torch.uint8)
    said = counts.read(counts.of(answer, truth) + counts.of(answer, truth))
    assert said.confusion.tolist() == [[4, 2, 0, 0], [0, 4, 2, 0], [0] * 4, [0] * 4]
    assert said.confusion.dtype == np.int64
    np.testing.assert_allclose(said.iou, [2 / 3, 2 / 4, 0, np.nan])
    np.testing.assert_allclose(said.accuracy, [2 / 3, 2 / 3, np.nan, np.nan])
    np.testing.assert_allclose(said.precision, [1, 2 / 3, 0, np.nan])
    assert said.miou == pytest.approx((2 / 3 + 1 / 2) / 3)
    assert said.macc == pytest.approx(2 / 3)
    assert said.pixel_accuracy == pytest.approx(2 / 3)
    assert said.images == 2


def test_images_without_any_labelled_pixel_count_as_0_percent() -> None:
    counts = PixelCounts(2)
    nothing = counts.of(torch.zeros(2, 2, dtype=torch.uint8), torch.full((2, 2), 255, dtype=torch.uint8))
    assert counts.read(nothing).metrics == {"miou": 0.0, "macc": 0.0, "pixel_acc": 0.0, "samples": 1.0}


def test_counts_that_cannot_be_right_are_refused() -> None:
    counts, classes = PixelCounts(2), torch.zeros(2, 2, dtype=torch.uint8)
    with pytest.raises(DataError, match="nothing could be evaluated"):
        counts.read(counts.nothing())
    with pytest.raises(ValueError, match="class map"):
        counts.of(classes, torch.zeros(2, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="a class above 1"):
        counts.of(classes, classes + 2)
    with pytest.raises(ValueError, match="1 to 255 classes"):
        PixelCounts(256)
