"""Faster, Mask and Cascade Mask R-CNN on the four maps of a DGT, from torchvision's parts.

What torchvision has no use for: losses come for each image, normalised by that image alone; draws are keyed by the
sample; masks are crops; images come normalised and padded. Boxes, anchors and losses are computed in float32, whatever
the precision of the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from dgt.models.build import ModelConfig
from dgt.models.dense import STRIDES, DenseNetwork
from dgt.models.macs import stage_resolutions
from dgt.models.rcnn_config import RCNNConfig
from dgt.models.roi_heads import MASK_CELLS, RegionHeads, Sizes, Truth
from dgt.models.rpn import ProposalNetwork

if TYPE_CHECKING:
    from data_pipeline.targets.instances import Instances

COUNTED_REGIONS, COUNTED_MASKS = 1000, 100
"""Regions and masks of an image in a count of multiply-accumulates, as in mmdetection's."""

PADDING = -2.0
"""Value of normalised pixels beyond an image: about black.

Zeros would stay zeros through a stem whose biases begin at 0, and the LayerNorm behind it would multiply their gradient
by 1 / sqrt(eps) = 1000: on a canvas of 96 x 64, the first gradient of a 67 x 64 image had the norm 1763 instead of 2.2.
"""

_NORM_GROUPS = 32  # GroupNorm, arXiv 1803.08494, table 3


class EverySecond(ExtraFPNBlock):
    """The pyramid's last level: every second cell of the one before, as torchvision's `LastLevelMaxPool`.

    That is a pooling of single cells, whose backward pass on a GPU is not there for who wants it to repeat bit for bit.
    """

    def forward(self, x: list[Tensor], y: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Appends a level to `x` and its name to `names`; `y` are the maps that the pyramid was made of."""
        return [*x, x[-1][..., ::2, ::2]], [*names, str(len(names))]


class RCNN(DenseNetwork):
    """A detector; `heads` are gathered whole one after the other."""

    def __init__(self, config: ModelConfig, num_classes: int, options: RCNNConfig) -> None:
        """Raises ValueError for a model that is not a DGT."""
        super().__init__(config)
        norm = norm_layer(options.norm)
        dims = list(self.backbone.arch.embed_dims)
        self.options = options
        self.num_classes = num_classes
        self.fpn = FeaturePyramidNetwork(dims, options.fpn_channels, EverySecond(), norm)
        self.rpn = ProposalNetwork(options.fpn_channels, options.rpn)
        self.roi_heads = RegionHeads(options, num_classes, norm)

    def heads(self) -> Sequence[nn.Module]:
        """The pyramid and every head, each called once per pass, whatever is found."""
        masks = [self.roi_heads.mask_head] if self.roi_heads.mask_head is not None else []
        return [self.fpn, self.rpn.head, *self.roi_heads.box_heads, *masks]

    def forward(
        self,
        images: Tensor,
        sizes: Sizes,
        targets: Sequence[Instances] | None = None,
        sample_keys: Tensor | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training mode, else detections.

        Args:
            images: (n, 3, H, W) float, normalised; what lies beyond an image's size is not looked at.
            sizes: (height, width) of each image.
            targets: in training, the objects of each image.
            sample_keys: in training, (n,) int64 in [0, 2**32): all draws follow from them; None takes keys from
                torch's generator.

        Returns:
            In training a dictionary of (n,) losses: "rpn_objectness", "rpn_box", "box_class", "box", and "mask" of a
            detector with masks. Else for each image a dictionary of "boxes" (d, 4) in pixels, "scores" (d,), "labels"
            (d,) int64 from 0 on, the most likely first, and "masks" (d, 1, 28, 28), probabilities in the boxes.

        Raises:
            ValueError: in training without targets, or for masks that do not fit their boxes, or with
                norm "sync_batch" on another device than a CUDA GPU.
        """
        if self.training and sample_keys is None:
            sample_keys = torch.randint(2**32, (len(images),), device=images.device)
        maps = self.pyramid(without_padding(images, sizes), sample_keys if self.training else None)
        proposed = self.rpn(maps, sizes)
        dtype = torch.promote_types(images.dtype, torch.float32)
        # RoIAlign reads whole rows of channels in float32: made once here, and not in every call of it.
        maps = [level.to(dtype).contiguous(memory_format=torch.channels_last) for level in maps[: len(STRIDES)]]
        if not self.training:
            return self.roi_heads.detections(maps, proposed.boxes, sizes)
        assert sample_keys is not None
        check_norm(self.options, images.device)
        truths = truths_of(targets, len(images), self.options.has_masks, maps[0])
        objectness, box = self.rpn.losses(proposed, sizes, [truth.boxes for truth in truths], sample_keys)
        losses = self.roi_heads.losses(maps, proposed.boxes, sizes, truths, sample_keys)
        return {"rpn_objectness": objectness, "rpn_box": box} | losses

    def pyramid(self, images: Tensor, sample_keys: Tensor | None = None) -> list[Tensor]:
        """(n, 3, H, W) -> maps (n, C, H / s, W / s), rounded up, s being each of `dgt.models.rpn.PYRAMID_STRIDES`."""
        features = self.features(images, sample_keys)
        return list(self.fpn({str(i): feature for i, feature in enumerate(features)}).values())

    def macs(self, height: int, width: int) -> int:
        """Multiply-accumulates of the evaluation of one image of that many pixels, as the field counts them.

        That is with 1,000 regions for each box head and 100 for the mask head, and of all that follows the backbone
        the convolutions and linear layers only.
        """
        sizes = stage_resolutions(len(STRIDES), height, width)
        cells = [h * w for h, w in sizes]
        last = ((sizes[-1][0] + 1) // 2) * ((sizes[-1][1] + 1) // 2)
        total = self.backbone.macs(height, width)
        for lateral, output, count in zip(self.fpn.inner_blocks, self.fpn.layer_blocks, cells, strict=True):
            total += count * (weights_of(lateral) + weights_of(output))
        total += (sum(cells) + last) * weights_of(self.rpn.head)
        total += COUNTED_REGIONS * weights_of(self.roi_heads.box_heads)
        if self.roi_heads.mask_head is not None:
            convolutions, predictor = self.roi_heads.mask_head.children()
            enlarging, _, classifier = predictor.children()  # after which there are four times as many cells
            per_cell = weights_of(convolutions) + weights_of(enlarging) + 4 * weights_of(classifier)
            total += COUNTED_MASKS * MASK_CELLS**2 * per_cell
        return total


def weights_of(module: nn.Module) -> int:
    """Weights of the convolutions and linear layers in a module, each multiplied once per cell or region.

    They are counted from the layers' widths, because a sharding engine may leave a rank with none.
    """
    total = 0
    for part in module.modules():
        if isinstance(part, nn.Linear):
            total += part.in_features * part.out_features
        elif isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            total += part.in_channels * part.out_channels // part.groups * part.kernel_size[0] * part.kernel_size[1]
    return total


def truths_of(targets: Sequence[Instances] | None, count: int, masks: bool, like: Tensor) -> list[Truth]:
    """The objects of `count` images on the device and in the dtype of `like`; raises ValueError as `RCNN.forward`."""
    if targets is None or len(targets) != count:
        raise ValueError(f"training takes the objects of all {count} images, got {targets and len(targets)}")
    return [truth_of(target, masks, like) for target in targets]


def truth_of(target: Instances, masks: bool, like: Tensor) -> Truth:
    """The objects of one image."""
    boxes = torch.from_numpy(target.boxes).to(like)
    labels = torch.from_numpy(target.labels).to(like.device) + 1
    if not masks:
        return Truth(boxes, labels, (), ())
    if target.masks is None:
        raise ValueError("the data set has no masks: train a faster_rcnn, or prepare it without --boxes-only")
    outer = np.concatenate([np.floor(target.boxes[:, :2]), np.ceil(target.boxes[:, 2:])], axis=1).astype(int)
    for (left, top, right, bottom), mask in zip(outer.tolist(), target.masks, strict=True):
        if mask.shape != (bottom - top, right - left):
            raise ValueError(f"a mask of {mask.shape} pixels does not fit its box of {bottom - top, right - left}")
    return Truth(boxes, labels, target.masks, tuple((top, left) for left, top, *_ in outer.tolist()))


def without_padding(images: Tensor, sizes: Sizes) -> Tensor:
    """(n, 3, H, W) with PADDING beyond each image's size."""
    height, width = images.shape[-2:]
    if all(tuple(size) == (height, width) for size in sizes):
        return images
    limits = torch.tensor(sizes, device=images.device)
    rows = torch.arange(height, device=images.device) < limits[:, :1]
    columns = torch.arange(width, device=images.device) < limits[:, 1:]
    return torch.where(rows[:, None, :, None] & columns[:, None, None, :], images, PADDING)


def norm_layer(name: str) -> Any:
    """What makes a norm for a number of channels; None for none."""
    kinds: dict[str, Any] = {
        "none": None,
        "group": group_norm,
        "frozen_batch": FrozenBatchNorm2d,
        "sync_batch": nn.SyncBatchNorm,
    }
    return kinds[name]


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of 32 groups, or of the largest number below that divides the channels."""
    return nn.GroupNorm(next(g for g in range(_NORM_GROUPS, 0, -1) if channels % g == 0), channels)


def check_norm(options: RCNNConfig, device: torch.device) -> None:
    """Raises ValueError where the norm cannot be trained on such a device."""
    if options.norm == "sync_batch" and device.type != "cuda":
        raise ValueError(f"task.norm: sync_batch is for CUDA GPUs, not for {device.type}; use group or frozen_batch")
