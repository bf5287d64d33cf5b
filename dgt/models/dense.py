"""What networks for dense prediction share: a DGT backbone whose four maps are normalised and read by heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from dgt.models.blocks import NORM_EPS
from dgt.models.build import ModelConfig, build_model
from dgt.models.dgt import DGT

STRIDES = (4, 8, 16, 32)
"""Pixels of the image per cell of each map."""


class DenseNetwork(nn.Module):
    """A backbone without classifier, and a LayerNorm behind each of its stages; subclasses add their heads.

    Engines ask `heads` what to shard beside the backbone's blocks; timm's optimizers ask `group_matcher` and
    `no_weight_decay`. Parameters of the backbone have the names that they have in a classifier, after "backbone.".
    """

    def __init__(self, config: ModelConfig) -> None:
        """Raises ValueError for a model that is not a DGT."""
        super().__init__()
        backbone = build_model(config, num_classes=0)
        if not isinstance(backbone, DGT):
            raise ValueError(f"{config.name} is no backbone for dense prediction; use a dgt_* model")
        backbone.prune_intermediate_layers(len(backbone.stages), prune_norm=True, prune_head=True)
        self.backbone = backbone
        self.norms = nn.ModuleList(LayerNorm2d(dim, eps=NORM_EPS) for dim in backbone.arch.embed_dims)

    def features(self, images: Tensor, sample_keys: Tensor | None = None) -> list[Tensor]:
        """(n, 3, H, W) float, any H and W -> four maps (n, C_i, H / s, W / s), rounded up, s being each of STRIDES.

        `sample_keys` as in `DGT.forward`.
        """
        maps = self.backbone.forward_intermediates(images, intermediates_only=True, sample_keys=sample_keys)
        return [norm(x) for norm, x in zip(self.norms, maps, strict=True)]

    def heads(self) -> Sequence[nn.Module]:
        """The parts beside the backbone that a sharding engine gathers one at a time, each called once per pass."""
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True, mode: str = "full", every: int = 1) -> None:
        """Recompute the backbone's blocks in the backward pass; as `DGT.set_grad_checkpointing`."""
        self.backbone.set_grad_checkpointing(enable, mode, every)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters beyond biases and norms that weight decay must spare."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """As `DGT.group_matcher`: everything beside the backbone's stem and blocks is the last layer."""
        blocks = r"^backbone\.stages\.(\d+)"
        per_block = [
            (r"^backbone\.stages\.(\d+)\.downsample", (0,)),
            (r"^backbone\.stages\.(\d+)\.blocks\.(\d+)", None),
        ]
        return {"stem": r"^backbone\.stem", "blocks": blocks if coarse else per_block}
