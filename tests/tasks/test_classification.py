from __future__ import annotations

import pytest
import torch
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.config import DataConfig
from data_pipeline.shards.source import DataError
from dgt.models import ModelConfig
from dgt.tasks import Classification, ClassificationConfig, Inputs


class Fixed(nn.Module):
    """Answers with logits given beforehand, image i with row i."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        return self.logits[: len(images)]


def task(smoothing: float = 0.1, classes: int = 8) -> Classification:
    result = Classification(
        ClassificationConfig(label_smoothing=smoothing), ModelConfig(name="dgt_nano"), DataConfig(num_classes=classes)
    )
    result.build_model()
    return result


def test_the_loss_is_a_sum_so_that_parts_of_a_batch_add_up() -> None:
    logits, labels, keys = torch.randn(6, 8), torch.arange(6), torch.zeros(6, dtype=torch.int64)
    images = torch.zeros(6, 3, 4, 4)
    whole = task().loss(Fixed(logits), Inputs(images, labels, keys))
    first = task().loss(Fixed(logits[:4]), Inputs(images[:4], labels[:4], keys[:4]))
    rest = task().loss(Fixed(logits[4:]), Inputs(images[4:], labels[4:], keys[4:]))
    torch.testing.assert_close(whole, first + rest)
    target = F.one_hot(labels, 8) * 0.9 + 0.1 / 8
    torch.testing.assert_close(whole, -(target * logits.log_softmax(1)).sum())


def test_padding_and_ties_count_exactly_as_defined() -> None:
    logits = torch.tensor(
        [
            [9.0, 1, 1, 1, 1, 1, 1, 1],  # right at the first guess
            [0.0, 9, 8, 7, 6, 5, 4, 3],  # label 5 is the fifth guess
            [0.0, 9, 8, 7, 6, 5, 4, 3],  # label 6 is the sixth: neither
            [1.0, 1, 1, 1, 1, 1, 1, 1],  # all equal: the lowest class is the guess
            [9.0, 0, 0, 0, 0, 0, 0, 0],  # padding, right, not counted
        ]
    )
    labels, valid = torch.tensor([0, 5, 6, 0, 0]), torch.tensor([True, True, True, True, False])
    totals = task().totals(Fixed(logits), torch.zeros(5, 3, 4, 4), labels, valid)
    assert totals.dtype == torch.float64
    metrics = task().metrics(totals)
    assert metrics["samples"] == 4
    assert metrics["top1"] == 50.0
    assert metrics["top5"] == 75.0
    assert metrics["loss"] == pytest.approx(float(F.cross_entropy(logits[:4], labels[:4])), rel=1e-6)


def test_an_evaluation_of_damaged_samples_alone_is_an_error_in_one_sentence() -> None:
    nothing = torch.zeros(3, dtype=torch.bool)
    totals = task().totals(Fixed(torch.randn(3, 8)), torch.zeros(3, 3, 4, 4), torch.arange(3), nothing)
    with pytest.raises(DataError, match=r"nothing could be evaluated: every sample .* is damaged"):
        task().metrics(totals)


def test_a_network_whose_drop_path_cannot_be_repeated_is_refused() -> None:
    swin = ModelConfig(name="swin_tiny_patch4_window7_224", drop_path_rate=0.1)
    with pytest.raises(ValueError, match="draws its drop-path masks from a global generator"):
        Classification(ClassificationConfig(), swin, DataConfig(num_classes=8)).build_model()


@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("summed", [False, True])
def test_binary_cross_entropy_is_timms_with_the_target_mixed_and_smoothed(
    threshold: float | None, summed: bool
) -> None:
    config = ClassificationConfig(loss="bce", label_smoothing=0.1, bce_threshold=threshold, bce_sum=summed)
    binary = Classification(config, ModelConfig(name="dgt_nano"), DataConfig(num_classes=8))
    binary.build_model()
    labels, share = torch.tensor([3, 5]), torch.tensor([0.7, 0.7])
    logits, images, keys = torch.randn(2, 8), torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)
    reference = BinaryCrossEntropy(smoothing=0.1, target_threshold=threshold, sum_classes=summed)
    plain = binary.loss(Fixed(logits), Inputs(images, labels, keys))
    torch.testing.assert_close(plain / 2, reference(logits, labels))
    # timm mixes with the reversed batch, which for two samples is the neighbour.
    target = mixup_target(labels, 8, share[:, None], 0.1)
    mixed = binary.loss(Fixed(logits), Inputs(images, labels, keys, labels.flip(0), share))
    torch.testing.assert_close(mixed / 2, reference(logits, target))


def test_options_of_binary_cross_entropy_are_refused_without_it() -> None:
    with pytest.raises(ValueError, match="are for loss: bce"):
        ClassificationConfig(bce_threshold=0.2)
