"""What is said of each region: class, box, mask; in one stage, or in a cascade of stages.

Built from torchvision's parts. Losses are those of each image, so that nothing depends on batch-mates; a cascade
(Cascade R-CNN, arXiv 1906.09756) has box heads whose regions are the boxes that the stage before has refined.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, remove_small_boxes

from dgt.models.mask_targets import mask_targets
from dgt.models.rcnn_config import RCNNConfig
from dgt.models.region_sampling import MASK_DRAW, REGION_DRAW, KeyedSampler
from dgt.models.roi_align import RegionPool

BOX_CELLS, MASK_CELLS = 7, 14
"""Cells a side into which a region is pooled for the box head and for the mask head, whose answer has twice as many."""

_CODER_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
_SMOOTH_L1_BETA = 1 / 9  # torchvision's, as in the first implementations of Faster R-CNN
_FLAT = 1e-2  # pixels; torchvision gives no detection that is narrower

Sizes = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Truth:
    """The k objects of one image, on the device of the network."""

    boxes: Tensor
    """(k, 4) float."""
    labels: Tensor
    """(k,) int64 classes from 1 on; 0 is the background."""
    crops: tuple[npt.NDArray[np.uint8], ...]
    """Masks, on the host, as `data_pipeline.targets.instances.Instances.masks`; () where there are none."""
    corners: tuple[tuple[int, int], ...]
    """(top, left) of each crop."""


@dataclass(frozen=True)
class Stage:
    """One stage's own settings."""

    iou: float
    """Overlap from which on a region shows an object."""
    weight: float
    """Of its losses."""
    coder: BoxCoder
    """Scale of its box regression."""


class BoxHead(nn.Module):
    """Class and box of pooled regions: (r, C, 7, 7) -> logits (r, 1 + classes), deltas (r, 4 x boxes)."""

    def __init__(self, channels: int, hidden: int, num_classes: int, per_class: bool) -> None:
        """`per_class`: a box for each class and the background; else one for all."""
        super().__init__()
        self.head = TwoMLPHead(channels * BOX_CELLS**2, hidden)
        self.predictor = FastRCNNPredictor(hidden, num_classes + 1)
        if not per_class:
            self.predictor.bbox_pred = nn.Linear(hidden, 4)

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """What is said of each region: (r, 1 + classes) logits, the background first, and (r, 4 x boxes) deltas."""
        logits, deltas = self.predictor(self.head(regions))
        return logits, deltas


class MaskHead(nn.Sequential):
    """Masks of pooled regions, one for each class: (r, C, 14, 14) -> logits (r, classes, 28, 28)."""

    def __init__(self, channels: int, num_classes: int, options: RCNNConfig, norm: Any) -> None:
        width = options.heads.mask_channels
        convolutions = MaskRCNNHeads(channels, [width] * options.heads.mask_convs, 1, norm_layer=norm)
        super().__init__(convolutions, MaskRCNNPredictor(width, width, num_classes))


@dataclass(frozen=True)
class Matched:
    """What the regions of one image are to be taken for."""

    labels: Tensor
    """(r,) int64: class from 1 on, 0 = background."""
    objects: Tensor
    """(r,) int64: the object of most overlap; meaningless for the background."""


class RegionHeads(nn.Module):
    """All that happens to regions."""

    def __init__(self, options: RCNNConfig, num_classes: int, norm: Any) -> None:
        super().__init__()
        heads, channels = options.heads, options.fpn_channels
        cascade = options.detector == "cascade_mask_rcnn"
        self.options = options
        ious, weights = (heads.cascade_ious, heads.cascade_weights) if cascade else ((0.5,), (1.0,))
        self.stages = [
            Stage(iou, weight, BoxCoder(_CODER_WEIGHTS[min(i, len(_CODER_WEIGHTS) - 1)]))
            for i, (iou, weight) in enumerate(zip(ious, weights, strict=True))
        ]
        self.box_heads = nn.ModuleList(
            BoxHead(channels, heads.hidden_features, num_classes, not cascade) for _ in self.stages
        )
        self.mask_head = MaskHead(channels, num_classes, options, norm) if options.has_masks else None
        self.box_pool, self.mask_pool = RegionPool(BOX_CELLS), RegionPool(MASK_CELLS)
        self.sampler = KeyedSampler(heads.rois_per_image, heads.positive_share, REGION_DRAW)
        self.mask_sampler = KeyedSampler(heads.rois_per_image, heads.positive_share, MASK_DRAW)

    def losses(
        self, maps: Sequence[Tensor], regions: list[Tensor], sizes: Sizes, truths: list[Truth], keys: Tensor
    ) -> dict[str, Tensor]:
        """(n,) losses "box_class", "box" and, with masks, "mask"; regions as proposed, keys as `KeyedSampler` has them.

        `maps` (n, C, h, w) in float32 or better, the finest first, at the backbone's four strides.
        """
        regions = [torch.cat([boxes, truth.boxes]) for boxes, truth in zip(regions, truths, strict=True)]
        matched = self.match(regions, truths, self.stages[0].iou)
        chosen = self.sampler([found.labels for found in matched], keys)
        regions = [boxes[at] for boxes, at in zip(regions, chosen, strict=True)]
        classes, boxes = torch.zeros(2, len(sizes), dtype=maps[0].dtype, device=maps[0].device)
        for stage, own, logits, deltas in self.passes(maps, regions, sizes):
            matched = self.match(own, truths, stage.iou)
            classes = classes + stage.weight * class_losses(logits, matched)
            boxes = boxes + stage.weight * box_losses(deltas, stage.coder, own, matched, truths)
        losses = {"box_class": classes, "box": boxes}
        if self.mask_head is not None:
            losses["mask"] = self.mask_losses(maps, own, sizes, matched, truths, keys)
        return losses

    def match(self, regions: Sequence[Tensor], truths: Sequence[Truth], iou: float) -> list[Matched]:
        """What each region shows, where it overlaps with an object by `iou` or more."""
        matcher, found = Matcher(iou, iou, allow_low_quality_matches=False), []
        for boxes, truth in zip(regions, truths, strict=True):
            if not len(truth.boxes) or not len(boxes):
                nothing = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
                found.append(Matched(nothing, nothing))
                continue
            objects = matcher(box_iou(truth.boxes, boxes))
            near = objects.clamp(min=0)
            found.append(Matched(torch.where(objects >= 0, truth.labels[near], 0), near))
        return found

    def passes(
        self, maps: Sequence[Tensor], regions: list[Tensor], sizes: Sizes
    ) -> Iterator[tuple[Stage, list[Tensor], Tensor, Tensor]]:
        """Each stage with its regions, and what its head answers: logits and deltas in the precision of `maps`."""
        for stage, head in zip(self.stages, self.box_heads, strict=True):
            logits, deltas = head(self.box_pool(maps, regions))
            logits, deltas = logits.to(maps[0].dtype), deltas.to(maps[0].dtype)
            yield stage, regions, logits, deltas
            if stage is not self.stages[-1]:
                regions = self.refined(regions, deltas, sizes, stage)

    def refined(self, regions: list[Tensor], deltas: Tensor, sizes: Sizes, stage: Stage) -> list[Tensor]:
        """The boxes that a stage of a cascade makes of its regions, without gradient."""
        boxes = stage.coder.decode_single(deltas.detach(), torch.cat(regions)).nan_to_num()
        parts = boxes.split([len(own) for own in regions])
        return [clip_boxes_to_image(own, size) for own, size in zip(parts, sizes, strict=True)]

    def mask_losses(
        self,
        maps: Sequence[Tensor],
        regions: list[Tensor],
        sizes: Sizes,
        matched: list[Matched],
        truths: list[Truth],
        keys: Tensor,
    ) -> Tensor:
        """(n,): the mean of each image's positive regions; 0 (with a gradient of zeros) where there are none.

        At most the configured share of the regions learned from is taken, by a draw of its own: the last stage of a
        cascade may have made all of them positive.
        """
        positive = [self.mask_sampler.positives(found.labels, key) for found, key in zip(matched, keys, strict=True)]
        regions = [boxes[at] for boxes, at in zip(regions, positive, strict=True)]
        labels = torch.cat([found.labels[at] for found, at in zip(matched, positive, strict=True)])
        logits = self.masked(maps, regions, labels)
        targets = [
            mask_targets(truth.crops, truth.corners, size, boxes, found.objects[at], logits.shape[-1])
            for truth, size, boxes, found, at in zip(truths, sizes, regions, matched, positive, strict=True)
        ]
        losses = F.binary_cross_entropy_with_logits(logits, torch.cat(targets), reduction="none").mean(dim=(1, 2))
        return per_image(losses, [len(at) for at in positive])

    def masked(self, maps: Sequence[Tensor], regions: list[Tensor], labels: Tensor) -> Tensor:
        """(r, 28, 28) logits of the mask of each region's own class; `labels`: (r,) from 1 on."""
        assert self.mask_head is not None
        pooled = self.mask_pool(maps, regions)
        logits = self.mask_head(pooled).to(pooled.dtype)
        return logits[torch.arange(len(labels), device=labels.device), labels - 1]

    def detections(self, maps: Sequence[Tensor], regions: list[Tensor], sizes: Sizes) -> list[dict[str, Tensor]]:
        """What is found in each image: boxes (d, 4), scores (d,), labels (d,) from 0 on, masks (d, 1, 28, 28).

        The most likely first; "masks" are probabilities within the boxes. Every head is called once, whatever is found.
        """
        passes = list(self.passes(maps, regions, sizes))
        scores = torch.stack([logits.softmax(dim=-1) for _, _, logits, _ in passes]).mean(dim=0)
        stage, regions, _, deltas = passes[-1]
        boxes = stage.coder.decode_single(deltas, torch.cat(regions)).unflatten(1, (-1, 4))
        counts = [len(own) for own in regions]
        found = [self.best(*parts) for parts in zip(boxes.split(counts), scores.split(counts), sizes, strict=True)]
        if self.mask_head is not None:
            labels = torch.cat([own["labels"] for own in found]) + 1
            logits = self.masked(maps, [own["boxes"] for own in found], labels)
            for own, masks in zip(found, logits.sigmoid().split([len(own["boxes"]) for own in found]), strict=True):
                own["masks"] = masks[:, None]
        return found

    def best(self, boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """The most likely of an image's boxes (r, 1 + classes or 1, 4) by scores (r, 1 + classes)."""
        scores = scores[:, 1:]
        boxes = boxes[:, 1:] if boxes.shape[1] > 1 else boxes.expand(-1, scores.shape[1], 4)
        region, label = torch.where(scores > self.options.score_threshold)
        boxes, scores = clip_boxes_to_image(boxes[region, label], size), scores[region, label]
        wide = remove_small_boxes(boxes, _FLAT)
        boxes, scores, label = boxes[wide], scores[wide], label[wide]
        kept = batched_nms(boxes, scores, label, self.options.nms_threshold)[: self.options.max_detections]
        return {"boxes": boxes[kept], "scores": scores[kept], "labels": label[kept]}


def class_losses(logits: Tensor, matched: Sequence[Matched]) -> Tensor:
    """(n,): mean cross-entropy of each image's regions."""
    labels = torch.cat([found.labels for found in matched])
    return per_image(F.cross_entropy(logits, labels, reduction="none"), [len(found.labels) for found in matched])


def box_losses(
    deltas: Tensor, coder: BoxCoder, regions: Sequence[Tensor], matched: Sequence[Matched], truths: Sequence[Truth]
) -> Tensor:
    """(n,): smooth L1 of each image's positive regions, summed and divided by the number of all its regions."""
    counts = [len(found.labels) for found in matched]
    deltas = deltas.unflatten(1, (-1, 4))
    losses = []
    for own, boxes, found, truth in zip(deltas.split(counts), regions, matched, truths, strict=True):
        positive = torch.where(found.labels > 0)[0]
        wanted = coder.encode_single(truth.boxes[found.objects[positive]], boxes[positive])
        column = found.labels[positive] if own.shape[1] > 1 else torch.zeros_like(positive)
        total = F.smooth_l1_loss(own[positive, column], wanted, beta=_SMOOTH_L1_BETA, reduction="sum")
        losses.append(total / max(len(boxes), 1))
    return torch.stack(losses)


def per_image(losses: Tensor, counts: list[int]) -> Tensor:
    """(n,): means of consecutive parts of `losses`; 0 for an empty one."""
    return torch.stack([own.sum() / max(len(own), 1) for own in losses.split(counts)])
