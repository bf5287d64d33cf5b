"""Image classification."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.config import DataConfig
from dgt.models import DGT, ModelConfig, build_model
from dgt.tasks.counts import MAX_CONFUSION_CLASSES, Counts
from dgt.tasks.task import Inputs


@dataclass(frozen=True)
class ClassificationConfig:
    """One label per image."""

    name: Literal["classification"] = "classification"
    """The task."""
    label_smoothing: float = 0.1
    """Share of the target that is spread evenly over all classes (training only)."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: must lie in [0, 1), got {self.label_smoothing}")


class Classification:
    """Cross-entropy training; accuracy, loss and calibration error in evaluation."""

    best_metric = "top1"

    def __init__(self, config: ClassificationConfig, model: ModelConfig, data: DataConfig):
        self.config = config
        self.model_config = model
        self.num_classes = data.num_classes
        self.counts = Counts(data.num_classes, confusion=data.num_classes <= MAX_CONFUSION_CLASSES)

    def build_model(self) -> nn.Module:
        """The configured network with one output per class.

        Raises ValueError for a network that takes no sample keys but drops paths: its masks would come from a global
        generator, which a resumed run cannot repeat.
        """
        model = build_model(self.model_config, self.num_classes)
        self.keyed = "sample_keys" in inspect.signature(model.forward).parameters
        if not self.keyed and self.model_config.drop_path_rate > 0:
            raise ValueError(
                f"model.drop_path_rate: {self.model_config.name} draws its drop-path masks from a global generator, "
                "which a resumed run cannot repeat; set it to 0 or use a DGT model"
            )
        return model

    def macs(self, network: nn.Module, image_size: int) -> int | None:
        """Multiply-accumulates of one square image; None for networks that are not ours."""
        return network.macs(image_size, image_size) if isinstance(network, DGT) else None

    def loss(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Sum over samples of the smoothed cross-entropy; a mixed sample's target is the mixture of both labels.

        Cross-entropy is linear in the target, so the mixture of targets is the mixture of losses.
        """
        keys = {"sample_keys": inputs.sample_keys} if self.keyed else {}
        logits = model(inputs.images, **keys).float()
        smoothing = self.config.label_smoothing
        own = F.cross_entropy(logits, inputs.labels, reduction="none", label_smoothing=smoothing)
        if inputs.share is None or inputs.partner_labels is None:
            return own.sum()
        partner = F.cross_entropy(logits, inputs.partner_labels, reduction="none", label_smoothing=smoothing)
        return (inputs.share * own + (1 - inputs.share) * partner).sum()

    def totals(self, model: nn.Module, images: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """What dgt/tasks/counts.py counts: samples, guesses, losses, confidences and classes, (m,) float64."""
        return self.counts.of(model(images).float(), labels, valid)

    def metrics(self, totals: Tensor) -> dict[str, float]:
        """top1, top5 and calibration error in percent, mean loss, and the number of samples they were counted over."""
        return self.counts.read(totals).metrics

    def confusion(self, totals: Tensor) -> np.ndarray | None:
        """Samples by class and by first guess, int64 (classes, classes); None where there are too many classes."""
        return self.counts.read(totals).confusion
