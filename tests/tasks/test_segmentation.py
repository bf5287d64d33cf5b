"""The task of segmentation: its loss, its inference and its counts, each against a direct computation."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional

from data_pipeline.batch import Batch
from data_pipeline.config import DataConfig, SegmentationDataConfig
from data_pipeline.shards.source import DataError
from data_pipeline.transforms import normalize
from dgt.models import ModelConfig
from dgt.tasks import Inputs, SegmentationConfig
from dgt.tasks.pixels import PixelCounts
from dgt.tasks.segmentation import Segmentation
from dgt.tasks.segmentation_config import SegmentationInferenceConfig, UPerNetConfig
from dgt.tasks.segmentation_inference import window_starts

CLASSES = 5
HEAD = UPerNetConfig(channels=16, auxiliary_channels=8, norm_groups=4)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def task(crop: int = 32, short: int = 32, long: int = 128, **options) -> Segmentation:
    data = SegmentationDataConfig(crop_size=crop, short_side=short, long_side=long)
    config = SegmentationConfig(head=options.pop("head", HEAD), **options)
    return Segmentation(
        config, ModelConfig(name="dgt_nano", drop_path_rate=0.2), DataConfig(num_classes=CLASSES, segmentation=data)
    )


def inputs(n: int = 4, side: int = 32, seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)
    targets = [rng.integers(0, CLASSES, (side, side)).astype(np.uint8) for _ in range(n)]
    for i, target in enumerate(targets):
        target[: i * side // n] = 255
    images = torch.from_numpy(rng.standard_normal((n, 3, side, side)).astype(np.float32))
    return Inputs(images, torch.zeros(n, dtype=torch.int64), torch.arange(n) * 77, targets=targets)


def part(whole: Inputs, chosen: list[int]) -> Inputs:
    return replace(
        whole,
        images=whole.images[chosen],
        labels=whole.labels[chosen],
        sample_keys=whole.sample_keys[chosen],
        targets=[whole.targets[i] for i in chosen],
    )


class Fixed(nn.Module):
    """Answers with given logits, of the decode head and of the auxiliary head."""

    def __init__(self, logits: Tensor, auxiliary: Tensor | None = None):
        super().__init__()
        self.answer = (logits, auxiliary)

    def forward(self, images: Tensor, sample_keys: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return self.answer


def pixel_losses(logits: Tensor, targets: list[np.ndarray]) -> Tensor:
    """(n, pixels): negative log-probability of each pixel's class, 0 where none is labelled."""
    labels = torch.from_numpy(np.stack(targets)).long()
    log = F.interpolate(logits, size=labels.shape[1:], mode="bilinear").log_softmax(dim=1)
    own = log.gather(1, labels.clamp(max=CLASSES - 1)[:, None])[:, 0]
    return torch.where(labels == 255, 0.0, -own).flatten(1)


def test_the_loss_sums_over_samples_the_mean_over_pixels_of_both_heads() -> None:
    given = inputs()
    logits = torch.randn(4, CLASSES, 8, 8).contiguous(memory_format=torch.channels_last)
    auxiliary = torch.randn(4, CLASSES, 2, 2)
    ours = task().loss(Fixed(logits, auxiliary), given)
    expected = pixel_losses(logits, given.targets).mean(1).sum()
    torch.testing.assert_close(ours, expected + 0.4 * pixel_losses(auxiliary, given.targets).mean(1).sum())
    torch.testing.assert_close(task().loss(Fixed(logits), given), expected)


def test_class_weights_multiply_the_loss_of_each_classs_pixels() -> None:
    given, weights = inputs(), (0.0, 1.0, 2.0, 0.5, 3.0)
    logits = torch.randn(4, CLASSES, 8, 8)
    labels = torch.from_numpy(np.stack(given.targets)).long().flatten(1)
    factor = torch.tensor([*weights, *[0.0] * 251])[labels]
    expected = (pixel_losses(logits, given.targets) * factor).mean(1).sum()
    torch.testing.assert_close(task(class_weights=weights).loss(Fixed(logits), given), expected)


@pytest.mark.parametrize(("threshold", "least"), [(0.2, 1), (0.05, 300), (0.05, 100_000), (0.9, 10)])
def test_hard_example_mining_keeps_improbable_pixels_of_each_crop_and_a_least_number(
    threshold: float, least: int
) -> None:
    given = inputs()
    logits = torch.randn(4, CLASSES, 8, 8)
    expected = 0.0
    for losses, target in zip(pixel_losses(logits, given.targets), given.targets, strict=True):
        hardest = sorted(losses[torch.from_numpy(target.flatten() != 255)].tolist(), reverse=True)
        last = hardest[min(least, len(hardest)) - 1]  # at the border, where logits repeat, others may equal it
        expected += sum(loss for loss in hardest if math.exp(-loss) < threshold or loss >= last) / losses.numel()
    ours = task(ohem_threshold=threshold, ohem_min_kept=least).loss(Fixed(logits), given)
    assert ours.item() == pytest.approx(expected, rel=1e-5)


def test_any_cut_into_micro_batches_gives_the_same_sum_and_gradients() -> None:
    what = task(ohem_threshold=0.25, ohem_min_kept=50)
    network, given = what.build_model().double().train(), inputs()
    given = replace(given, images=given.images.double())
    results = []
    for cut in ([[0, 1, 2, 3]], [[2], [0, 3], [1]]):
        network.zero_grad()
        losses = [what.loss(network, part(given, chosen)) for chosen in cut]
        for loss in losses:
            loss.backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
        results.append((sum(loss.item() for loss in losses), gradients))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    # the loss itself is computed in float32, whatever the network's dtype
    torch.testing.assert_close(*(gradients for _, gradients in results), rtol=1e-4, atol=1e-6)


def test_a_crop_without_labelled_pixels_gives_0_and_gradients_of_0() -> None:
    given = inputs(2)
    for target in given.targets:
        target[:] = 255
    what = task(ohem_threshold=0.7, class_weights=(1.0,) * CLASSES)
    network = what.build_model()
    loss = what.loss(network, given)
    loss.backward()
    assert loss.item() == 0.0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in network.parameters())


def test_nothing_of_the_size_of_a_large_crops_logits_is_kept_for_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dgt.tasks.segmentation._KEPT", CLASSES * 32 * 32 - 1)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    logits = torch.randn(2, CLASSES, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = task().loss(Fixed(logits), inputs(2))
    assert max(kept) < CLASSES * 32 * 32
    expected = torch.autograd.grad(pixel_losses(logits, inputs(2).targets).mean(1).sum(), logits)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected)


def test_the_loss_is_float32_under_autocast() -> None:
    given = inputs(2)
    logits = torch.randn(2, CLASSES, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = task().loss(Fixed(logits), given)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, pixel_losses(logits, given.targets).mean(1).sum())


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


def test_the_confusion_matrix_is_shown_up_to_a_hundred_classes() -> None:
    data = DataConfig(num_classes=101)
    many = Segmentation(SegmentationConfig(), ModelConfig(name="dgt_nano"), data)
    assert many.confusion(many.counts.nothing() + 1) is None


def test_options_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="2 weights for 5 classes"):
        task(class_weights=(1.0, 2.0))
    for options, name in (
        ({"channels": 30}, "channels"),
        ({"auxiliary_channels": 20}, "auxiliary_channels"),
        ({"channels": 32, "auxiliary_channels": 32}, "norm_groups"),
        ({"dropout": 1.0}, "dropout"),
        ({"pool_scales": ()}, "pool_scales"),
        ({"auxiliary_weight": -1.0}, "auxiliary_weight"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            UPerNetConfig(**options)
    for options, name in (({"stride": -1}, "stride"), ({"scales": ()}, "scales"), ({"scales": (0.0,)}, "scales")):
        with pytest.raises(ValueError, match=f"^{name}: "):
            SegmentationInferenceConfig(**options)
    for options, name in (
        ({"ohem_threshold": 1.0}, "ohem_threshold"),
        ({"ohem_min_kept": 0}, "ohem_min_kept"),
        ({"class_weights": (-1.0,)}, "class_weights"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            SegmentationConfig(**options)


def test_the_task_tells_sizes_and_arithmetic() -> None:
    what = task()
    network = what.build_model()
    assert what.train_size(3) == (32, 32)
    assert what.macs(network, 64, 96) == network.macs(64, 96)
    assert what.macs(nn.Linear(2, 2), 64, 96) is None


def test_a_frozen_backbone_leaves_the_heads_and_norms_to_learn() -> None:
    what = Segmentation(
        SegmentationConfig(head=HEAD), ModelConfig(name="dgt_nano", freeze=("backbone",)), DataConfig(num_classes=2)
    )
    frozen = {name.split(".")[0] for name, p in what.build_model().named_parameters() if not p.requires_grad}
    assert frozen == {"backbone"}
