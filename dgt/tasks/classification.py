"""Image classification."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.batch import Batch
from data_pipeline.config import DataConfig, Kind
from data_pipeline.transforms import normalize
from dgt.models import DGT, ModelConfig, build_model, freeze
from dgt.tasks.counts import MAX_CONFUSION_CLASSES, Counts
from dgt.tasks.distillation import DistillationConfig, Teacher
from dgt.tasks.task import Findings, Inputs


@dataclass(frozen=True)
class ClassificationConfig:
    """One label per image."""

    name: Literal["classification"] = "classification"
    """The task."""
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    """"cross_entropy" of the softmax, or "bce": binary cross-entropy of each class on its own ("ResNet strikes back",
    arXiv 2110.00476, DeiT III, 2204.07118)."""
    label_smoothing: float = 0.1
    """Share of the target that is spread evenly over all classes (training only)."""
    bce_threshold: float | None = None
    """Under "bce", targets above it count as 1 and the others as 0: with 0.2 both halves of most mixed images are full
    targets; null = targets as they are mixed and smoothed."""
    bce_sum: bool = False
    """Under "bce", sum the classes' losses instead of taking their mean (to be clipped and tuned accordingly)."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    """A teacher, whose answers are learned beside the labels."""

    def __post_init__(self) -> None:
        if self.loss != "bce" and (self.bce_threshold is not None or self.bce_sum):
            raise ValueError("bce_threshold, bce_sum: are for loss: bce")
        if self.bce_threshold is not None and not 0 <= self.bce_threshold < 1:
            raise ValueError(f"bce_threshold: must lie in [0, 1), got {self.bce_threshold}")
        if self.loss == "bce" and self.distillation.teacher and self.distillation.kind == "soft":
            raise ValueError(
                "distillation.kind: a soft teacher answers for all classes together, which no weight sets against the "
                "loss of each class on its own; set it to hard, or loss to cross_entropy"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: must lie in [0, 1), got {self.label_smoothing}")


class Classification:
    """Training on labels and on a teacher, if there is one; accuracy, loss and calibration error in evaluation."""

    kind: Kind = "classification"
    best_metric = "top1"

    def __init__(self, config: ClassificationConfig, model: ModelConfig, data: DataConfig):
        self.config = config
        self.model_config = model
        self.data = data
        self.num_classes = data.num_classes
        self.teacher = Teacher(config.distillation, data) if config.distillation.teacher else None
        self.counts = Counts(data.num_classes, confusion=data.num_classes <= MAX_CONFUSION_CLASSES)

    def build_model(self) -> nn.Module:
        """The configured network with one output per class.

        Raises ValueError for a network that takes no sample keys but drops paths: its masks would come from a global
        generator, which a resumed run cannot repeat.
        """
        model = build_model(self.model_config, self.num_classes)
        freeze(model, self.model_config.freeze)
        self.keyed = "sample_keys" in inspect.signature(model.forward).parameters
        if not self.keyed and self.model_config.drop_path_rate > 0:
            raise ValueError(
                f"model.drop_path_rate: {self.model_config.name} draws its drop-path masks from a global generator, "
                "which a resumed run cannot repeat; set it to 0 or use a DGT model"
            )
        return model

    def train_size(self, epoch: int) -> tuple[int, int]:
        """(height, width) of training images in an epoch, in pixels."""
        side = self.data.train_image_size(epoch)
        return side, side

    def macs(self, network: nn.Module, height: int, width: int) -> int | None:
        """Multiply-accumulates of one image; None for networks that are not ours."""
        return network.macs(height, width) if isinstance(network, DGT) else None

    def loss(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Sum over samples of the loss against the smoothed target, mixed of both labels where the image is mixed.

        With a teacher, its share of every sample's loss is against the teacher's answer to the same image.
        """
        keys = {"sample_keys": inputs.sample_keys} if self.keyed else {}
        logits = model(inputs.images, **keys).float()
        losses = (
            self.binary_losses(logits, inputs) if self.config.loss == "bce" else self.softmax_losses(logits, inputs)
        )
        if self.teacher:
            weight = self.config.distillation.weight
            losses = (1 - weight) * losses + weight * self.taught_losses(self.teacher, logits, inputs.images)
        return losses.sum()

    def taught_losses(self, teacher: Teacher, logits: Tensor, images: Tensor) -> Tensor:
        """(n,): against what the teacher answers; a hard one's guess is learned as a label is, without smoothing."""
        answers = teacher.logits(images)
        if self.config.distillation.kind == "soft":
            return teacher.divergences(logits, answers)
        guess = answers.argmax(dim=1)
        if self.config.loss == "bce":
            return self.over_classes(logits, F.one_hot(guess, self.num_classes).to(logits.dtype))
        return F.cross_entropy(logits, guess, reduction="none")

    def softmax_losses(self, logits: Tensor, inputs: Inputs) -> Tensor:
        """(n,): cross-entropy is linear in the target, so the mixture of targets is the mixture of losses."""
        smoothing = self.config.label_smoothing
        own = F.cross_entropy(logits, inputs.labels, reduction="none", label_smoothing=smoothing)
        if inputs.share is None or inputs.partner_labels is None:
            return own
        partner = F.cross_entropy(logits, inputs.partner_labels, reduction="none", label_smoothing=smoothing)
        return inputs.share * own + (1 - inputs.share) * partner

    def binary_losses(self, logits: Tensor, inputs: Inputs) -> Tensor:
        """(n,): a threshold is no linear function, so targets are mixed and smoothed before it."""
        target = F.one_hot(inputs.labels, self.num_classes).to(logits.dtype)
        if inputs.share is not None and inputs.partner_labels is not None:
            share = inputs.share[:, None]
            target = share * target + (1 - share) * F.one_hot(inputs.partner_labels, self.num_classes)
        smoothing = self.config.label_smoothing
        target = (1 - smoothing) * target + smoothing / self.num_classes
        if self.config.bce_threshold is not None:
            target = (target > self.config.bce_threshold).to(logits.dtype)
        return self.over_classes(logits, target)

    def over_classes(self, logits: Tensor, target: Tensor) -> Tensor:
        """(n,): sum or mean over classes of each one's binary cross-entropy."""
        losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return losses.sum(dim=1) if self.config.bce_sum else losses.mean(dim=1)

    def found(self, model: nn.Module, batch: Batch, device: torch.device) -> Findings:
        """The totals of a batch."""
        assert isinstance(batch.images, Tensor)
        images = normalize(batch.images.to(device, non_blocking=True), self.data.mean, self.data.std)
        return Findings(self.totals(model, images, batch.labels.to(device), batch.valid.to(device)))

    def totals(self, model: nn.Module, images: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """What dgt/tasks/counts.py counts: samples, guesses, losses, confidences and classes, (m,) float64."""
        return self.counts.of(model(images).float(), labels, valid)

    def metrics(self, totals: Tensor, records: Mapping[int, Any] | None = None) -> dict[str, float]:
        """top1, top5 and calibration error in percent, mean loss, and the number of samples they were counted over."""
        return self.counts.read(totals).metrics

    def confusion(self, totals: Tensor) -> np.ndarray | None:
        """Samples by class and by first guess, int64 (classes, classes); None where there are too many classes."""
        return self.counts.read(totals).confusion
