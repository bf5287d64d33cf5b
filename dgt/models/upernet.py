"""UPerNet: semantic segmentation from the four maps of a DGT.

Xiao, Liu, Zhou, Jiang, Sun, "Unified Perceptual Parsing for Scene Understanding", ECCV 2018, arXiv 1807.10221, in the
form in which backbones are compared (the UPerHead and the auxiliary FCNHead of mmsegmentation, and its initialisation):
a pyramid pooling module (PSPNet, arXiv 1612.01105) on the last map, a feature pyramid that adds each map to the
enlarged one above it, and a fusion of all four at stride 4.

Our choices:
- GroupNorm in the place of BatchNorm, so that an image does not depend on its batch-mates, nor on how a batch is cut;
- an enlarged map's cells stay in their places where an odd size was rounded up on the way down; for images whose sides
  are multiples of 32 that is the same as stretching the map to the larger one's size;
- dropped channels follow from the sample's key, as dropped paths do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgt.models.build import ModelConfig
from dgt.models.dense import DenseNetwork
from dgt.models.drop_path import hash_uint32
from dgt.models.macs import stage_resolutions
from dgt.models.resampling import enlarge, pool, resize

AUXILIARY_STAGE = 2
"""Index of the map that the auxiliary head reads."""

# Counters of the hash: drop paths use those from 0 on, two for each block.
_DROPOUT_COUNTERS = 2**20
_COUNTERS_PER_HEAD = 2**16


class ConvNorm(nn.Module):
    """Convolution, GroupNorm, ReLU: (n, in_channels, H, W) -> (n, channels, H, W)."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int, norm_groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.GroupNorm(norm_groups, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, H, W) -> (n, channels, H, W), in the convolution's dtype."""
        x = self.conv(x)
        # Under autocast the norm answers in float32; what is kept for the backward pass need not be that large.
        return F.relu(self.norm(x).to(x.dtype))


class PyramidPooling(nn.Module):
    """The map beside its own means over grids of some sizes, fused: (n, in_channels, H, W) -> (n, channels, H, W)."""

    def __init__(self, in_channels: int, channels: int, pool_scales: Sequence[int], norm_groups: int) -> None:
        super().__init__()
        self.pool_scales = tuple(pool_scales)
        self.branches = nn.ModuleList(ConvNorm(in_channels, channels, 1, norm_groups) for _ in pool_scales)
        self.fusion = ConvNorm(in_channels + len(self.pool_scales) * channels, channels, 3, norm_groups)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, H, W) -> (n, channels, H, W)."""
        size = (x.shape[-2], x.shape[-1])
        parts = [x]
        for cells, branch in zip(self.pool_scales, self.branches, strict=True):
            parts.append(resize(branch(pool(x, cells)), size))
        return self.fusion(torch.cat([part.to(parts[-1].dtype) for part in parts], dim=1))


class Classifier(nn.Module):
    """Dropout of channels and a 1x1 convolution: (n, channels, H, W) -> (n, num_classes, H, W).

    Args:
        channels: of the map.
        num_classes: of the answer.
        dropout: probability of dropping a channel, in [0, 1).
        head: number of the head in the network; it gives each head its own random numbers.
    """

    def __init__(self, channels: int, num_classes: int, dropout: float, head: int) -> None:
        super().__init__()
        self.dropout = dropout
        self.head = head
        self.conv = nn.Conv2d(channels, num_classes, kernel_size=1)

    def forward(self, x: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        """`sample_keys` (n,) int64 in [0, 2**32), or None to draw from torch's generator; used in training only."""
        if self.training and self.dropout > 0:
            first = _DROPOUT_COUNTERS + self.head * _COUNTERS_PER_HEAD
            x = (x * channel_scale(x, self.dropout, sample_keys, first)).to(x.dtype)
        return self.conv(x)


class AuxiliaryHead(nn.Module):
    """A fully convolutional head of one 3x3 convolution: (n, in_channels, H, W) -> (n, num_classes, H, W)."""

    def __init__(self, in_channels: int, channels: int, num_classes: int, norm_groups: int, dropout: float) -> None:
        super().__init__()
        self.conv = ConvNorm(in_channels, channels, 3, norm_groups)
        self.classifier = Classifier(channels, num_classes, dropout, head=1)

    def forward(self, x: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        """`sample_keys` as in `Classifier.forward`."""
        return self.classifier(self.conv(x), sample_keys)


class UPerNet(DenseNetwork):
    """A DGT with UPerNet's heads.

    Args:
        config: the backbone.
        num_classes: classes of a pixel.
        channels: of the pyramid and of the fused map.
        pool_scales: cells a side of the pyramid pooling module's grids.
        auxiliary_channels: of the auxiliary head on stage 3, which is there in training only; 0 = no such head.
        norm_groups: groups of every GroupNorm, a divisor of both numbers of channels.
        dropout: probability of dropping a channel before a classifier, in [0, 1).

    Raises:
        ValueError: for a model that is no DGT.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_classes: int,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        auxiliary_channels: int = 256,
        norm_groups: int = 32,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(config)
        dims = self.backbone.arch.embed_dims
        self.pyramid = PyramidPooling(dims[-1], channels, pool_scales, norm_groups)
        self.laterals = nn.ModuleList(ConvNorm(dim, channels, 1, norm_groups) for dim in dims[:-1])
        self.smoothers = nn.ModuleList(ConvNorm(channels, channels, 3, norm_groups) for _ in dims[:-1])
        self.fusion = ConvNorm(len(dims) * channels, channels, 3, norm_groups)
        self.classifier = Classifier(channels, num_classes, dropout, head=0)
        self.auxiliary: AuxiliaryHead | None = None
        if auxiliary_channels:
            self.auxiliary = AuxiliaryHead(dims[AUXILIARY_STAGE], auxiliary_channels, num_classes, norm_groups, dropout)
        for head in self.heads():
            head.apply(_init_weights)

    def heads(self) -> list[nn.Module]:
        """The parts beside the backbone, each called once a pass (the auxiliary head in training only)."""
        parts = [self.pyramid, *self.laterals, *self.smoothers, self.fusion, self.classifier]
        return parts if self.auxiliary is None else [*parts, self.auxiliary]

    def forward(self, images: Tensor, sample_keys: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor | None]:
        """Classify pixels.

        Args:
            images: (n, 3, H, W) float, any H and W.
            sample_keys: (n,) int64, a key in [0, 2**32) per sample, from which its dropped paths and channels follow;
                None draws them from torch's generator. Used in training only.

        Returns:
            Logits (n, num_classes, H / 4, W / 4), rounded up. In training a pair: these, and the auxiliary head's at
            stride 16, None where there is no such head.
        """
        maps = self.features(images, sample_keys)
        logits = self.classifier(self.fused(maps), sample_keys)
        if not self.training:
            return logits
        return logits, self.auxiliary(maps[AUXILIARY_STAGE], sample_keys) if self.auxiliary is not None else None

    def fused(self, maps: Sequence[Tensor]) -> Tensor:
        """The backbone's four maps -> (n, channels, H / 4, W / 4)."""
        levels = [self.pyramid(maps[-1])]
        for lateral, x in zip(reversed(self.laterals), reversed(maps[:-1]), strict=True):
            own = lateral(x)
            levels.insert(0, own + enlarge(levels[0], 2, _size(own)).to(own.dtype))
        size = _size(levels[0])
        smooth = [smoother(x) for smoother, x in zip(self.smoothers, levels[:-1], strict=True)]
        smooth.append(levels[-1])
        return self.fusion(torch.cat([enlarge(x, 2**i, size) for i, x in enumerate(smooth)], dim=1))

    def macs(self, height: int, width: int) -> int:
        """Multiply-accumulates of the evaluation of one image of that many pixels.

        Of the heads, convolutions are counted; the auxiliary head is not there in evaluation, and enlarging and pooling
        are left out, as is usual.
        """
        dims = self.backbone.arch.embed_dims
        pixels = [h * w for h, w in stage_resolutions(len(dims), height, width)]
        channels, scales = self.fusion.conv.out_channels, self.pyramid.pool_scales
        total = self.backbone.macs(height, width)
        total += channels * dims[-1] * sum(cells * cells for cells in scales)
        total += 9 * channels * (dims[-1] + len(scales) * channels) * pixels[-1]
        for dim, count in zip(dims[:-1], pixels[:-1], strict=True):
            total += (dim + 9 * channels) * channels * count
        return total + (9 * len(dims) * channels + self.classifier.conv.out_channels) * channels * pixels[0]


def channel_scale(x: Tensor, dropout: float, sample_keys: Tensor | None, first: int) -> Tensor:
    """Factor of each channel of each sample: 0 where it is dropped, else 1 / (1 - dropout).

    Args:
        x: (n, C, H, W); it lends sizes and device.
        dropout: probability of dropping a channel, in [0, 1).
        sample_keys: (n,) int64 keys in [0, 2**32), or None to draw from torch's generator as `dropout2d` does.
        first: counter of the hash for channel 0; channel c has `first` + c.

    Returns:
        (n, C, 1, 1), float32 (float64 for a float64 x).
    """
    n, channels = x.shape[:2]
    dtype = torch.promote_types(x.dtype, torch.float32)
    if sample_keys is None:
        kept = x.new_empty((n, channels), dtype=dtype).bernoulli_(1 - dropout)
    else:
        counters = torch.arange(first, first + channels, device=sample_keys.device)
        kept = (hash_uint32(sample_keys[:, None], counters) >= round(dropout * 2**32)).to(dtype)
    return kept.div(1 - dropout)[:, :, None, None]


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[-2], x.shape[-1]


def _init_weights(module: nn.Module) -> None:
    """As mmsegmentation: classifiers start small, other convolutions as He et al. (arXiv 1502.01852) for their outputs.

    A GroupNorm starts as the identity, as torch leaves it.
    """
    if isinstance(module, Classifier):
        nn.init.normal_(module.conv.weight, std=0.01)
        if module.conv.bias is not None:
            nn.init.zeros_(module.conv.bias)
    elif isinstance(module, ConvNorm):
        nn.init.kaiming_normal_(module.conv.weight, mode="fan_out", nonlinearity="relu")
