"""Object detection and instance segmentation: Faster, Mask and Cascade Mask R-CNN on a DGT."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.batch import Batch
from data_pipeline.config import DataConfig, Kind
from data_pipeline.transforms import normalize
from dgt.models import ModelConfig, freeze
from dgt.models.rcnn import RCNN
from dgt.tasks.detection_config import DetectionConfig
from dgt.tasks.detections import Detected, Judged
from dgt.tasks.mask_pasting import encoded
from dgt.tasks.segmentation_inference import resize_image
from dgt.tasks.task import Findings, Inputs

PICTURES = 4
"""Evaluated images that are drawn with their detections: those with the lowest sample ids."""

CANVAS_MULTIPLE = 32
"""Pixels of which the sides of what the network sees are a multiple, as in training."""

_STAND_IN = (64, 64)
"""Height and width of the black image that is answered in an invalid place."""


class Detection:
    """Training on boxes and masks; average precision as COCO has it in evaluation."""

    kind: Kind = "detection"

    def __init__(self, config: DetectionConfig, model: ModelConfig, data: DataConfig):
        self.config = config
        self.model_config = model
        self.data = data
        self.best_metric = "mask_ap" if config.has_masks else "box_ap"

    def build_model(self) -> nn.Module:
        """The configured detector."""
        model = RCNN(self.model_config, self.data.num_classes, self.config)
        freeze(model, self.model_config.freeze)
        return model

    def train_size(self, epoch: int) -> tuple[int, int]:
        """(height, width) of the largest landscape images of training, in pixels."""
        detection = self.data.detection
        return rounded_up(max(detection.short_sides)), rounded_up(detection.long_side)

    def macs(self, network: nn.Module, height: int, width: int) -> int | None:
        """Multiply-accumulates of one image, as `RCNN.macs` counts them."""
        return network.macs(height, width) if isinstance(network, RCNN) else None

    def loss(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Sum over samples and over the parts of the loss."""
        losses = model(inputs.images, inputs.sizes, inputs.targets, inputs.sample_keys)
        return torch.stack(list(losses.values())).sum()

    def answer(self, model: nn.Module, image: Tensor) -> Detected:
        """What the network, in evaluation mode, finds in an image.

        Args:
            model: the network.
            image: (H, W, 3) uint8, at its original size, on the network's device.

        Returns:
            Boxes and masks in pixels of the original image.
        """
        from data_pipeline.dense_geometry import fitted

        size, config = (image.shape[0], image.shape[1]), self.data.detection
        seen = fitted(size, config.eval_short_side, config.long_side)
        pixels = normalize(resize_image(image, seen)[None], self.data.mean, self.data.std)
        pixels = F.pad(pixels, (0, rounded_up(seen[1]) - seen[1], 0, rounded_up(seen[0]) - seen[0]))
        found = model(pixels.contiguous(memory_format=torch.channels_last), [seen])[0]
        scale = torch.tensor([size[1] / seen[1], size[0] / seen[0]] * 2, dtype=torch.float64)
        boxes = (found["boxes"].cpu().double() * scale).float().numpy()
        masks = encoded(found["masks"][:, 0].float().cpu().numpy(), boxes, size) if "masks" in found else None
        return Detected(boxes, found["scores"].float().cpu().numpy(), found["labels"].cpu().numpy(), masks)

    def found(self, model: nn.Module, batch: Batch, device: torch.device) -> Findings:
        """Detections beside what is annotated, and pictures of the first samples."""
        findings = Findings(torch.zeros(1, dtype=torch.float64, device=device))
        for place, sample in enumerate(batch.ids.tolist()):
            if not batch.valid[place]:
                self.answer(model, torch.zeros(*_STAND_IN, 3, dtype=torch.uint8, device=device))
                continue
            detected = self.answer(model, batch.images[place].to(device, non_blocking=True))
            findings.totals += 1
            findings.records[sample] = Judged(detected, batch.targets[place])
            if sample < PICTURES:
                findings.pictures[sample] = self.picture(batch.images[place].numpy(), findings.records[sample])
        return findings

    def picture(self, image: np.ndarray, judged: Judged) -> np.ndarray:
        """uint8 (h, w, 3): what is annotated, and beside it the likely detections, drawn onto their image."""
        from dgt.tasks import drawing

        annotated = drawing.objects(image, judged.truth, self.names)
        return drawing.beside([annotated, drawing.detections(image, judged.detected, self.names)])

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Of the classes, as the data set has them; () where there is no data set to ask."""
        from data_pipeline.shards.reader import read_index

        return read_index(self.data).classes if self.data.path else ()

    def metrics(self, totals: Tensor, records: Mapping[int, Any]) -> dict[str, float]:
        """Average precision in percent (see `dgt.tasks.average_precision.metrics_of`) and the number of images.

        Raises DataError where no image could be evaluated.
        """
        from dgt.tasks.average_precision import metrics_of

        category_ids = range(1, self.data.num_classes + 1)
        found = metrics_of(records, category_ids, self.config.has_masks, self.config.max_detections)
        return found | {"samples": float(totals[0])}

    def confusion(self, totals: Tensor) -> np.ndarray | None:
        """None: objects that are not found have no other class."""
        return None


def rounded_up(side: int) -> int:
    """A side of the canvas that holds so many pixels."""
    return -(-side // CANVAS_MULTIPLE) * CANVAS_MULTIPLE
