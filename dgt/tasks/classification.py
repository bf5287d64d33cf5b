"""Image classification."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.config import DataConfig
from dgt.models import DGT, ModelConfig, build_model
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
    """Cross-entropy training; top-1, top-5 and loss in evaluation."""

    best_metric = "top1"

    def __init__(self, config: ClassificationConfig, model: ModelConfig, data: DataConfig):
        self.config = config
        self.model_config = model
        self.num_classes = data.num_classes

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
        """(4,) float64: samples, correct at the first guess, correct within five guesses, summed cross-entropy."""
        logits = model(images).float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        # A stable sort: equal logits rank by class, so the count does not depend on the device's top-k.
        ranked = logits.argsort(dim=1, descending=True, stable=True)[:, :5]
        hits = ranked == labels[:, None]
        per_sample = torch.stack([torch.ones_like(losses), hits[:, 0].float(), hits.any(dim=1).float(), losses], dim=1)
        return (per_sample.double() * valid[:, None]).sum(dim=0)

    def metrics(self, totals: Tensor) -> dict[str, float]:
        """top1 and top5 in percent, mean loss, and the number of samples they were counted over."""
        samples, top1, top5, loss = totals.tolist()
        return {"top1": 100 * top1 / samples, "top5": 100 * top5 / samples, "loss": loss / samples, "samples": samples}
