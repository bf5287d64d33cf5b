"""Dynamic Group Transformer: a hierarchical backbone whose attention groups queries by content.

Liu, Wu, Liu, Guo, "Dynamic Group Transformer: A General Vision Transformer Backbone with Dynamic Group Attention",
IJCAI 2022, arXiv 2203.03937. There is no public code.

From the paper: convolutional stem, four stages at strides 4, 8, 16 and 32, blocks of a conditional position embedding,
DG-Attention and an inverted residual feed-forward network (IRFFN, as in CMT, arXiv 2107.06263), and the published sizes
of about 24M/4.3G, 52M/9.4G and 90M/16.4G (parameters / multiply-accumulates at 224).

Our choices, where its text does not settle the matter:
- depths (1, 2, 18, 2), mlp ratio 4, G = 48 and k = 98 are fitted to these sizes; `dgt_nano` is ours altogether;
- LayerNorm over channels everywhere (also after the strided convolution that starts a stage, as after the stem), none
  inside the IRFFN. No BatchNorm: an image must not depend on its batch-mates. The norm at a stage's start also keeps
  the residual stream in float32 under CUDA's autocast, where convolutions answer in bfloat16 and norms in float32;
- the IRFFN has one GELU, after the depth-wise convolution and its shortcut, as in the Mix-FFN of SegFormer
  (arXiv 2105.15203): each hidden unit has seen its neighbours when it is gated, for one pass over the wide tensor.

Layout: tensors between stages are (B, C, H, W) with channels last in memory, tensors inside a stage are the same memory
seen as (B, H, W, C). On one CPU thread, depth-wise 3x3 convolutions (forward and backward, 32 to 512 channels, maps of
4 to 16 pixels) took 0.2 to 0.6 of the time that they take on contiguous (B, C, H, W) tensors.
"""

from dataclasses import fields, replace
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, LayerNorm2d, lecun_normal_, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from dgt.models.architecture import Architecture
from dgt.models.blocks import NORM_EPS, DepthwiseConv, DGTBlock
from dgt.models.checkpointing import checkpoint_contexts
from dgt.models.macs import StageGrouping, backbone_macs, stage_groupings


class Stem(nn.Module):
    """Two strided 3x3 convolutions to stride 4: (B, in_chans, H, W) -> (B, dim, H/4, W/4), rounded up."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, kernel_size=3, stride=2, padding=1)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, kernel_size=3, stride=2, padding=1)
        self.norm = LayerNorm2d(dim, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return self.norm(self.conv2(self.act(self.conv1(x))))


class DGTStage(nn.Module):
    """Blocks at one resolution, behind a strided convolution in all but the first: (B, C_in, H, W) -> (B, C, H', W').

    Args:
        in_dim: channels of the previous stage; None for the first stage, which has no convolution before it.
        dim: channels.
        arch: attention and feed-forward settings.
        index: the stage's number, from 0.
        drop_paths: drop probability of each block; their number is the stage's depth.
    """

    def __init__(self, in_dim: int | None, dim: int, arch: Architecture, index: int, drop_paths: list[float]) -> None:
        super().__init__()
        self.downsample: nn.Module = nn.Identity()
        if in_dim is not None:
            conv = nn.Conv2d(in_dim, dim, kernel_size=3, stride=2, padding=1)
            self.downsample = nn.Sequential(conv, LayerNorm2d(dim, eps=NORM_EPS))
        first = sum(arch.depths[:index])
        self.blocks = nn.ModuleList(
            DGTBlock(dim, arch, first + i, drop_path, index) for i, drop_path in enumerate(drop_paths)
        )

    def forward(self, x: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x, sample_keys)
        return x.permute(0, 3, 1, 2)


class DGT(nn.Module):
    """Dynamic Group Transformer with timm's interface.

    Args:
        cfg: the architecture.
        in_chans: channels of the input image.
        num_classes: outputs of the classifier, 0 for none.
        global_pool: timm's pooling name, '' for none.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, in [0, 1); earlier blocks rise to it linearly from zero.

    Raises:
        ValueError: for a drop_path_rate outside of [0, 1).
    """

    def __init__(
        self,
        cfg: Architecture,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {drop_path_rate}")
        self.arch = cfg
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.stem = Stem(in_chans, cfg.embed_dims[0])
        num_blocks = sum(cfg.depths)
        drop_paths = [drop_path_rate * i / max(num_blocks - 1, 1) for i in range(num_blocks)]
        self.stages = nn.Sequential()
        self.feature_info: list[dict[str, Any]] = []
        for i, dim in enumerate(cfg.embed_dims):
            in_dim = cfg.embed_dims[i - 1] if i else None
            first = sum(cfg.depths[:i])
            self.stages.append(DGTStage(in_dim, dim, cfg, i, drop_paths[first : first + cfg.depths[i]]))
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"})
        self.num_features = self.head_hidden_size = cfg.embed_dims[-1]
        self.norm: nn.Module = LayerNorm2d(self.num_features, eps=NORM_EPS)
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.head_hidden_size = self.head.num_features
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise every parameter from torch's generator; call it after `to_empty` on a meta-device model."""
        self.apply(_init_weights)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters beyond biases and norms that weight decay must spare: none."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that order parameters by depth, per block or (coarse) per stage, for layer-wise decay."""
        per_block = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else per_block}

    def set_grad_checkpointing(self, enable: bool = True, mode: str = "full", every: int = 1) -> None:
        """Recompute each block's activations in the backward pass; the routing is saved, never recomputed.

        Args:
            enable: switch on or off.
            mode: "full" saves nothing else, "selective" also matrix products and attention results.
            every: do so in every this manieth block only, the network's first one included.

        Raises:
            ValueError: for an unknown mode.
        """
        checkpoint_contexts(mode)
        for module in self.modules():
            if isinstance(module, DGTBlock):
                module.checkpointing = mode if enable and module.index % every == 0 else None

    def get_classifier(self) -> nn.Module:
        """The classifier's linear layer, or an identity where there is none."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier (0 classes: none) and, unless None, a new pooling ('' for none) behind the backbone."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features)
        self.head_hidden_size = self.head.num_features
        self.head.apply(_init_weights)

    def macs(self, height: int, width: int) -> int:
        """Multiply-accumulates of one image's forward pass, sizes in pixels; `dgt.models.macs` says what counts."""
        return backbone_macs(self.arch, self.in_chans, self.num_classes, height, width)

    def grouping(self, height: int, width: int) -> list[StageGrouping]:
        """Per stage: tokens, groups, keys per group, and "grouped" or "dense", for an image of this size in pixels."""
        return stage_groupings(self.arch, height, width)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        sample_keys: Tensor | None = None,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of chosen stages.

        Args:
            x: (B, in_chans, H, W) float.
            indices: the last n stages if an integer, all if None, these stages if a list.
            norm: apply the final norm to the last stage's feature.
            stop_early: stop after the last chosen stage.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return the intermediates without the final feature.
            sample_keys: as in `forward`.

        Returns:
            The list of intermediates, or (final feature, list of intermediates); the final feature is always NCHW.

        Raises:
            ValueError: for another output_fmt.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC, got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        intermediates = []
        x = self.stem(x)
        for i, stage in enumerate(list(self.stages)[: max_index + 1 if stop_early else None]):
            x = stage(x, sample_keys)
            if i in take_indices:
                feature = self.norm(x) if norm and i == last else x
                intermediates.append(feature if output_fmt == "NCHW" else feature.permute(0, 2, 3, 1))
        if intermediates_only:
            return intermediates
        if not stop_early or max_index == last:
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages behind the last chosen one, and the norm and head that they fed; return the chosen."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        cut = max_index < len(self.stages) - 1
        if cut:
            kept = slice(max_index + 1)
            self.stages = nn.Sequential(*list(self.stages)[kept])
            self.arch = replace(self.arch, embed_dims=self.arch.embed_dims[kept], depths=self.arch.depths[kept])
            self.num_features = self.arch.embed_dims[-1]
        if cut or prune_norm:
            self.norm = nn.Identity()
        if cut or prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        """(B, in_chans, H, W) -> normalised final feature map (B, num_features, H/32, W/32), rounded up."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x, sample_keys)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify a feature map; with `pre_logits` the pooled (B, head_hidden_size) features."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        """Classify images.

        Args:
            x: (B, in_chans, H, W) float, any H and W.
            sample_keys: (B,) int64, a key in [0, 2**32) per sample, from which the drop-path masks of all blocks follow
                whatever its batch-mates; None draws them from torch's generator. Used in training only.

        Returns:
            (B, num_classes) logits.
        """
        return self.forward_head(self.forward_features(x, sample_keys))


def _init_weights(module: nn.Module) -> None:
    """Linear layers and convolutions with a shortcut start small; strided convolutions keep their input's variance."""
    if isinstance(module, nn.Linear | DepthwiseConv):
        trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        lecun_normal_(module.weight)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
    if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _create_dgt(variant: str, pretrained: bool, arch: Architecture, **kwargs: Any) -> DGT:
    overrides = {field.name: kwargs.pop(field.name) for field in fields(Architecture) if field.name in kwargs}
    return build_model_with_cfg(
        DGT,
        variant,
        pretrained,
        model_cfg=replace(arch, **overrides),
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter", "flatten_sequential": True},
        **kwargs,
    )


def _cfg(image_size: int = 224, **kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, image_size, image_size),
        "pool_size": (image_size // 32, image_size // 32),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2203.03937",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "dgt_nano": _cfg(64),
        "dgt_tiny": _cfg(),
        "dgt_small": _cfg(),
        "dgt_base": _cfg(),
        "dgt_base_384": _cfg(384, crop_pct=1.0),
    }
)


@register_model
def dgt_nano(pretrained: bool = False, **kwargs: Any) -> DGT:
    """For tests and small images: at 64 pixels, stages 1 and 2 (256 and 64 tokens) group. Ours, not the paper's."""
    arch = Architecture(embed_dims=(32, 64, 128, 160), depths=(1, 1, 2, 1), num_groups=8, top_k=16)
    return _create_dgt("dgt_nano", pretrained, arch, **kwargs)


@register_model
def dgt_tiny(pretrained: bool = False, **kwargs: Any) -> DGT:
    """23.4 M parameters, 4.36 GMACs at 224 pixels."""
    arch = Architecture(embed_dims=(64, 128, 256, 512), depths=(1, 2, 18, 2))
    return _create_dgt("dgt_tiny", pretrained, arch, **kwargs)


@register_model
def dgt_small(pretrained: bool = False, **kwargs: Any) -> DGT:
    """52 M parameters, 9.38 GMACs at 224 pixels."""
    arch = Architecture(embed_dims=(96, 192, 384, 768), depths=(1, 2, 18, 2))
    return _create_dgt("dgt_small", pretrained, arch, **kwargs)


@register_model
def dgt_base(pretrained: bool = False, **kwargs: Any) -> DGT:
    """92 M parameters, 16.3 GMACs at 224 pixels."""
    arch = Architecture(embed_dims=(128, 256, 512, 1024), depths=(1, 2, 18, 2))
    return _create_dgt("dgt_base", pretrained, arch, **kwargs)


@register_model
def dgt_base_384(pretrained: bool = False, **kwargs: Any) -> DGT:
    """`dgt_base` for 384-pixel images; its weights fit `dgt_base` and the other way round."""
    arch = Architecture(embed_dims=(128, 256, 512, 1024), depths=(1, 2, 18, 2))
    return _create_dgt("dgt_base_384", pretrained, arch, **kwargs)
