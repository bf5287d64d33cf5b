"""Semantic segmentation: one class per pixel, by UPerNet on a DGT."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from data_pipeline.batch import Batch
from data_pipeline.config import DataConfig, Kind
from data_pipeline.targets.masks import IGNORED
from data_pipeline.transforms import normalize
from dgt.models import ModelConfig, freeze
from dgt.models.resampling import enlarge, float32_arithmetic
from dgt.models.upernet import UPerNet
from dgt.tasks.counts import MAX_CONFUSION_CLASSES
from dgt.tasks.pixels import PixelCounts
from dgt.tasks.segmentation_config import SegmentationConfig
from dgt.tasks.segmentation_inference import View, classes_of, resize_image, views_of
from dgt.tasks.task import Findings, Inputs

PICTURES = 4
"""Evaluated images that are drawn with their classes: those with the lowest sample ids."""

_STRIDE, _AUXILIARY_STRIDE = 4, 16
_KEPT = 2**22
"""Logits of a crop that are kept for the backward pass rather than made again: 16 MiB."""
_STAND_IN = (64, 64)
"""Height and width of the black image that is answered in an invalid place."""


class Segmentation:
    """Training on class maps; IoU and accuracy from one confusion matrix of pixels in evaluation."""

    kind: Kind = "segmentation"
    best_metric = "miou"

    def __init__(self, config: SegmentationConfig, model: ModelConfig, data: DataConfig):
        """Raises ValueError for more classes than a class map can hold, another number of class weights, or windows of
        inference between which pixels would be left out."""
        self.config = config
        self.model_config = model
        self.data = data
        if len(config.class_weights) not in (0, data.num_classes):
            raise ValueError(f"class_weights: {len(config.class_weights)} weights for {data.num_classes} classes")
        inference, side = config.inference, data.segmentation.crop_size
        if inference.mode == "slide" and inference.stride > side:
            raise ValueError(
                f"inference.stride: {inference.stride} pixels from window to window leave some between windows of "
                f"data.segmentation.crop_size {side}; take {side} or fewer"
            )
        self.counts = PixelCounts(data.num_classes)

    def build_model(self) -> nn.Module:
        """UPerNet on the configured backbone, with one output per class."""
        head = self.config.head
        model = UPerNet(
            self.model_config,
            self.data.num_classes,
            channels=head.channels,
            pool_scales=head.pool_scales,
            auxiliary_channels=head.auxiliary_channels,
            norm_groups=head.norm_groups,
            dropout=head.dropout,
        )
        freeze(model, self.model_config.freeze)
        return model

    def train_size(self, epoch: int) -> tuple[int, int]:
        """(height, width) of training crops, in pixels."""
        side = self.data.segmentation.crop_size
        return side, side

    def macs(self, network: nn.Module, height: int, width: int) -> int | None:
        """Multiply-accumulates of one image, as `UPerNet.macs` counts them: without the auxiliary head."""
        return network.macs(height, width) if isinstance(network, UPerNet) else None

    def loss(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Sum over samples of the loss, to which the auxiliary head's is added with its weight."""
        logits, auxiliary = model(inputs.images, sample_keys=inputs.sample_keys)
        targets = torch.from_numpy(np.stack(inputs.targets)).to(logits.device, non_blocking=True)
        total = self.losses(logits, targets, _STRIDE).sum()
        if auxiliary is not None:
            weight = self.config.head.auxiliary_weight
            total = total + weight * self.losses(auxiliary, targets, _AUXILIARY_STRIDE).sum()
        return total

    def losses(self, logits: Tensor, targets: Tensor, stride: int) -> Tensor:
        """(n,) float32: loss of each sample.

        One sample's logits at the size of the crop are 157 MB (150 classes, 512 x 512), and so are their gradient and
        what the softmax keeps. They are made for one sample at a time, and where they are large, made again in the
        backward pass.

        Args:
            logits: (n, classes, H / stride, W / stride).
            targets: (n, H, W) uint8 class maps.
            stride: pixels per cell of the logits.
        """
        large = logits.shape[1] * targets[0].numel() > _KEPT
        losses = []
        with float32_arithmetic(logits):
            for one, target in zip(logits, targets, strict=True):
                inputs = (one.float().contiguous(), target, stride)
                losses.append(
                    checkpoint(self.sample_loss, *inputs, use_reentrant=False, preserve_rng_state=False)
                    if large
                    else self.sample_loss(*inputs)
                )
        return torch.stack(losses)

    def sample_loss(self, logits: Tensor, target: Tensor, stride: int) -> Tensor:
        """Mean over *all* pixels of the cross-entropy, which is 0 where nothing is labelled or a pixel is too easy.

        That is how the field normalises (mmsegmentation's default, with and without hard example mining): a crop that
        is half unlabelled counts half.
        """
        classes = target.long()
        scores = enlarge(logits[None], stride, (target.shape[0], target.shape[1]))
        # without a reduction: CUDA's own sums and means over maps do not repeat bit for bit
        losses = F.cross_entropy(scores, classes[None], ignore_index=IGNORED, reduction="none").flatten()
        factor = self.pixel_weights(losses.detach(), classes.flatten())
        return (losses if factor is None else losses * factor).sum() / len(losses)

    def pixel_weights(self, losses: Tensor, classes: Tensor) -> Tensor | None:
        """(pixels,) factors from the class weights and hard example mining; None where there are neither."""
        factor = None
        if self.config.class_weights:
            weights = losses.new_tensor(self.config.class_weights)
            factor = weights[classes.clamp(max=len(weights) - 1)]
        if self.config.ohem_threshold > 0:
            # what is not labelled has a loss of 0 and is the last to be kept
            least = losses.topk(min(self.config.ohem_min_kept, len(losses))).values[-1]
            hard = (losses > -math.log(self.config.ohem_threshold)) | (losses >= least)
            factor = hard.to(losses.dtype) if factor is None else factor * hard
        return factor

    def answer(self, model: nn.Module, image: Tensor) -> Tensor:
        """The class of every pixel.

        Args:
            model: the network, in evaluation mode.
            image: (H, W, 3) uint8, at its original size, on the network's device.

        Returns:
            (H, W) uint8.
        """
        from data_pipeline.dense_geometry import fitted

        config, inference = self.data.segmentation, self.config.inference
        height, width = image.shape[:2]
        window = (0, 0)
        if inference.mode == "slide":
            window = (config.crop_size, inference.stride or config.crop_size * 2 // 3)
        groups: list[Sequence[View]] = []
        for scale in inference.scales:
            size = fitted((height, width), config.short_side, config.long_side, scale)
            pixels = normalize(resize_image(image, size)[None], self.data.mean, self.data.std)
            for mirrored in (False, True) if inference.flip else (False,):
                seen = pixels.flip(-1) if mirrored else pixels
                groups.append(views_of(seen, (height, width), mirrored, window, model))
        return classes_of(groups, (height, width))

    def found(self, model: nn.Module, batch: Batch, device: torch.device) -> Findings:
        """Counts of pixels, and pictures of the first samples: the classes as annotated, and as answered."""
        findings = Findings(self.counts.nothing(device))
        for place, sample in enumerate(batch.ids.tolist()):
            if not batch.valid[place]:
                self.answer(model, torch.zeros(*_STAND_IN, 3, dtype=torch.uint8, device=device))
                continue
            answer = self.answer(model, batch.images[place].to(device, non_blocking=True))
            findings.totals += self.counts.of(answer, torch.from_numpy(batch.targets[place]).to(device))
            if sample < PICTURES:
                image, truth = batch.images[place].numpy(), batch.targets[place]
                findings.pictures[sample] = self.picture(image, truth, answer.cpu().numpy())
        return findings

    def picture(self, image: np.ndarray, truth: np.ndarray, answer: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3): two class maps, uint8 (h, w), over their image, side by side."""
        from dgt.tasks import drawing

        return drawing.beside([drawing.class_map(image, classes, self.names) for classes in (truth, answer)])

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Of the classes, as the data set has them; () where there is no data set to ask."""
        from data_pipeline.shards.reader import read_index

        return read_index(self.data).classes if self.data.path else ()

    def metrics(self, totals: Tensor, records: Mapping[int, Any] | None = None) -> dict[str, float]:
        """miou, macc and pixel_acc in percent, and the number of images (samples) that they were counted over."""
        return self.counts.read(totals).metrics

    def confusion(self, totals: Tensor) -> np.ndarray | None:
        """Pixels by class and by answer, int64 (classes, classes); None where there are too many classes to show."""
        return self.counts.read(totals).confusion if self.data.num_classes <= MAX_CONFUSION_CLASSES else None
