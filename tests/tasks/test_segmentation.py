"""The task of segmentation: its loss and its options, against a direct computation."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from segmentation_small import CLASSES, HEAD, task
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.config import DataConfig
from dgt.models import ModelConfig
from dgt.tasks import Inputs, SegmentationConfig
from dgt.tasks.segmentation import Segmentation
from dgt.tasks.segmentation_config import SegmentationInferenceConfig, UPerNetConfig


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


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


def test_the_confusion_matrix_is_shown_up_to_a_hundred_classes() -> None:
    data = DataConfig(num_classes=101)
    many = Segmentation(SegmentationConfig(), ModelConfig(name="dgt_nano"), data)
    assert many.confusion(many.counts.nothing() + 1) is None


def test_options_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="2 weights for 5 classes"):
        task(class_weights=(1.0, 2.0))
    with pytest.raises(ValueError, match=r"^inference.stride: 33 pixels .*crop_size 32"):
        task(inference=SegmentationInferenceConfig(mode="slide", stride=33))
    task(inference=SegmentationInferenceConfig(stride=33))  # without windows
    for options, name in (
        ({"channels": 30}, "channels"),
        ({"auxiliary_channels": 20}, "auxiliary_channels"),
        ({"channels": 32, "auxiliary_channels": 32}, "norm_groups"),
        ({"dropout": 1.0}, "dropout"),
        ({"pool_scales": ()}, "pool_scales"),
        ({"auxiliary_weight": -1.0}, "auxiliary_weight"),
        ({"auxiliary_weight": math.nan}, "auxiliary_weight"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            UPerNetConfig(**options)
    scales: tuple[tuple[float, ...], ...] = ((), (0.0,), (1.0, math.nan), (math.nan, 1.0), (math.inf,))
    for options, name in (({"stride": -1}, "stride"), *(({"scales": wrong}, "scales") for wrong in scales)):
        with pytest.raises(ValueError, match=f"^{name}: "):
            SegmentationInferenceConfig(**options)
    for options, name in (
        ({"ohem_threshold": 1.0}, "ohem_threshold"),
        ({"ohem_min_kept": 0}, "ohem_min_kept"),
        ({"class_weights": (-1.0,)}, "class_weights"),
        ({"class_weights": (math.nan,)}, "class_weights"),
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
