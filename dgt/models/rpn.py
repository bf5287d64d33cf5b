"""Region proposals: torchvision's network, with losses for each image and draws that are keyed by the sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import box_iou

from dgt.models.rcnn_config import RPNConfig
from dgt.models.region_sampling import ANCHOR_DRAW, KeyedSampler

PYRAMID_STRIDES = (4, 8, 16, 32, 64)
"""Pixels of the image per cell of each level of the pyramid."""

_FOREGROUND_IOU, _BACKGROUND_IOU = 0.7, 0.3  # Faster R-CNN, section 3.1.2
_SMOOTH_L1_BETA = 1 / 9  # torchvision's, as in the first implementations of Faster R-CNN
_ANCHORS_AT_ONCE = 1 << 15  # of which overlaps are computed: box_iou's intermediate results are five times its answer


class PyramidAnchors(AnchorGenerator):
    """Anchors of all levels, whose strides are those of the pyramid whatever the image's size.

    torchvision divides the image's side by the map's instead, and so is off by some pixels at the far side of an image
    on the last level, where that is an odd number of cells halved.
    """

    def of_maps(self, sizes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> Tensor:
        """(anchors, 4) left, top, right, bottom for maps of these (height, width), the finest first."""
        self.set_cell_anchors(dtype, device)
        strides = [[torch.tensor(stride, device=device)] * 2 for stride in PYRAMID_STRIDES]
        return torch.cat(self.grid_anchors([list(size) for size in sizes], strides))


@dataclass(frozen=True)
class Proposed:
    """What the network says of a batch of n images with a anchors each, in float32 or better."""

    anchors: Tensor
    """(a, 4)"""
    objectness: Tensor
    """(n, a) logits."""
    deltas: Tensor
    """(n, a, 4)"""
    boxes: list[Tensor]
    """Of each image (p, 4) in pixels, without gradient, the most likely first."""


class ProposalNetwork(RegionProposalNetwork):
    """The head that looks at every cell of the pyramid, and what becomes of its answers."""

    def __init__(self, channels: int, options: RPNConfig) -> None:
        levels = len(PYRAMID_STRIDES)
        anchors = PyramidAnchors(tuple((side,) for side in options.anchor_sizes), (options.aspect_ratios,) * levels)
        super().__init__(
            anchors,
            RPNHead(channels, len(options.aspect_ratios)),
            _FOREGROUND_IOU,
            _BACKGROUND_IOU,
            options.anchors_per_image,
            positive_fraction=0.5,
            pre_nms_top_n={"training": options.pre_nms, "testing": options.pre_nms // 2},
            post_nms_top_n={"training": options.post_nms, "testing": options.post_nms},
            nms_thresh=options.nms_threshold,
        )
        self.box_similarity = overlaps
        self.fg_bg_sampler: Any = KeyedSampler(options.anchors_per_image, 0.5, ANCHOR_DRAW)

    def forward(self, maps: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Proposed:
        """Proposes regions.

        Args:
            maps: five levels (n, C, h, w), the finest first.
            sizes: (height, width) of each image, beyond which no box reaches.
        """
        objectness, deltas = self.head(list(maps))
        shapes = [level.shape[-3:] for level in objectness]
        logits, deltas = concat_box_prediction_layers(objectness, deltas)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logits, deltas = logits.to(dtype), deltas.to(dtype)
        anchors = self.anchor_generator.of_maps([tuple(shape[1:]) for shape in shapes], dtype, logits.device)
        n = len(maps[0])
        # A network that diverges answers nan. Its loss says so; a box becomes a point, which is not proposed.
        boxes = self.box_coder.decode(deltas.detach(), [anchors] * n).view(n, -1, 4).nan_to_num()
        found, _ = self.filter_proposals(boxes, logits, list(sizes), [shape.numel() for shape in shapes])
        return Proposed(anchors, logits.view(n, -1), deltas.view(n, -1, 4), found)

    def losses(
        self, proposed: Proposed, sizes: Sequence[tuple[int, int]], truths: Sequence[Tensor], keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(n,) losses of objectness and (n,) of boxes, each image's by the number of its own anchors learned from.

        Args:
            proposed: what `forward` gave.
            sizes: (height, width) of each image; the background is learned from anchors with their centre in it.
            truths: of each image (k, 4) the boxes of its objects.
            keys: (n,) int64 keys of the draw of anchors.
        """
        anchors = proposed.anchors
        labels, matched = self.assign_targets_to_anchors(
            [anchors] * len(truths), [{"boxes": boxes} for boxes in truths]
        )
        labels = [on_image(own, anchors, size) for own, size in zip(labels, sizes, strict=True)]
        chosen = self.fg_bg_sampler(labels, keys)
        objectness, box = [], []
        for i, at in enumerate(chosen):
            count = max(len(at), 1)
            logits, positive = proposed.objectness[i, at], at[labels[i][at] >= 1]
            wanted = self.box_coder.encode_single(matched[i][positive], anchors[positive])
            differences = F.smooth_l1_loss(proposed.deltas[i, positive], wanted, beta=_SMOOTH_L1_BETA, reduction="sum")
            answers = labels[i][at].to(logits.dtype)
            objectness.append(F.binary_cross_entropy_with_logits(logits, answers, reduction="sum") / count)
            box.append(differences / count)
        return torch.stack(objectness), torch.stack(box)

    def _get_top_n_idx(self, objectness: Tensor, num_anchors_per_level: list[int]) -> Tensor:
        """The most likely anchors of each level; among equals, of which 16-bit logits have many, the first ones.

        torch's topk leaves open which of equals it takes, and on a GPU that depends on how many images there are.
        """
        chosen, begin = [], 0
        for logits in objectness.split(num_anchors_per_level, dim=1):
            count = min(self.pre_nms_top_n(), logits.shape[1])
            chosen.append(logits.sort(dim=1, descending=True, stable=True).indices[:, :count] + begin)
            begin += logits.shape[1]
        return torch.cat(chosen, dim=1)


def on_image(labels: Tensor, anchors: Tensor, size: tuple[int, int]) -> Tensor:
    """(a,) labels of (a, 4) anchors, 0 = background, of which those with their centre beyond the image become -1: they
    are not learned from, or an image on a canvas much larger than itself would teach mostly what padding looks like."""
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    beyond = (centre[:, 0] >= size[1]) | (centre[:, 1] >= size[0])
    return torch.where(beyond & (labels == 0), -1, labels)


def overlaps(boxes: Tensor, anchors: Tensor) -> Tensor:
    """(k, a) intersection over union of (k, 4) and (a, 4) boxes, as torchvision's `box_iou`, in less memory."""
    return torch.cat([box_iou(boxes, some) for some in anchors.split(_ANCHORS_AT_ONCE)], dim=1)
