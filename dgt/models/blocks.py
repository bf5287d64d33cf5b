"""Building blocks of the Dynamic Group Transformer, on channels-last maps (B, H, W, C).

A (B, H, W, C) tensor and a channels-last (B, C, H, W) one are views of the same memory: linear layers, norms and
attention read tokens, convolutions read images, and nothing is ever transposed.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, register_notrace_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dgt.models.architecture import Architecture
from dgt.models.checkpointing import checkpoint_contexts
from dgt.models.drop_path import drop_path_scale
from dgt.ops import dg_attention

NORM_EPS = 1e-6


@register_notrace_function
def groups_and_keys(arch: Architecture, stage: int, tokens: int) -> tuple[int, int]:
    """As `Architecture.groups_and_keys`: its roots need a size, which a symbolic trace does not have."""
    return arch.groups_and_keys(stage, tokens)


register_notrace_function(dg_attention)  # its choice of implementation looks at sizes, too


@register_notrace_module  # its path depends on the map's size
class DepthwiseConv(nn.Conv2d):
    """Depth-wise 3x3 convolution of a channels-last map: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, kernel_size=3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        image = x.permute(0, 3, 1, 2)
        if min(image.shape[-2:]) < 3:
            # oneDNN has no fast kernel for a map smaller than the filter: on one CPU thread, forward and backward of a
            # (32, 768, 2, 2) map took 14 ms with implicit padding and 0.8 ms with explicit padding.
            y = F.conv2d(F.pad(image, (1, 1, 1, 1)), self.weight, self.bias, groups=self.groups)
        else:
            y = super().forward(image)
        return y.permute(0, 2, 3, 1)


class DGAttention(nn.Module):
    """Multi-head DG-Attention with its projections: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, arch: Architecture, stage: int = 0) -> None:
        super().__init__()
        self.arch = arch
        self.stage = stage
        self.head_dim = arch.head_dim
        self.num_heads = dim // arch.head_dim
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        qkv = self.qkv(x).reshape(batch, height * width, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        groups, keys = groups_and_keys(self.arch, self.stage, height * width)
        y = dg_attention(q, k, v, num_groups=groups, top_k=keys, num_iters=self.arch.num_iters)
        return self.proj(y.transpose(1, 2).reshape(batch, height, width, dim))


class IRFFN(nn.Module):
    """Inverted residual feed-forward network: 1x1 expand, depth-wise 3x3 with its own shortcut, GELU, 1x1 project."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, hidden_dim)
        self.dwconv = DepthwiseConv(hidden_dim)
        self.act = nn.GELU()
        self.project = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(x)
        return self.project(self.act(x + self.dwconv(x)))


class DGTBlock(nn.Module):
    """Conditional position embedding, DG-Attention and IRFFN, each with its shortcut.

    The block is the unit of sharding, of compilation and of recomputation. The latter two happen inside `forward`, so
    that hooks and wrappers on the block stay outside of them.

    Args:
        dim: channels.
        arch: attention and feed-forward settings.
        index: the block's number in the network; it gives the block's drop paths their own random numbers.
        drop_path: probability of dropping a branch for a sample.
        stage: the stage's number, from 0, on which the growth of groups and keys depends.
    """

    def __init__(self, dim: int, arch: Architecture, index: int = 0, drop_path: float = 0.0, stage: int = 0) -> None:
        super().__init__()
        self.index = index
        self.drop_path = drop_path
        self.checkpointing: str | None = None
        self.cpe = DepthwiseConv(dim)
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = DGAttention(dim, arch, stage)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.ffn = IRFFN(dim, int(dim * arch.mlp_ratio))

    def forward(self, x: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C); `sample_keys` (B,) int64 in [0, 2**32) or None, as in `DGT.forward`."""
        scales: tuple[Tensor, ...] = ()
        if self.training and self.drop_path > 0.0:
            # Drawn outside of what may be recomputed, which therefore needs no generator state.
            scales = (
                drop_path_scale(x, self.drop_path, sample_keys, 2 * self.index),
                drop_path_scale(x, self.drop_path, sample_keys, 2 * self.index + 1),
            )
        return self.body(x, *scales)

    def body(self, x: Tensor, attn_scale: Tensor | None = None, ffn_scale: Tensor | None = None) -> Tensor:
        """What is compiled: it reads nothing that is a block's own, so that the blocks of a stage share one graph."""
        if self.checkpointing is None or not torch.is_grad_enabled():
            return self._residual(x, attn_scale, ffn_scale)
        contexts = checkpoint_contexts(self.checkpointing)
        return checkpoint(
            self._residual, x, attn_scale, ffn_scale, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )

    def compile(self, *args: Any, only_training: bool = False, **kwargs: Any) -> None:
        """Compiles the block in place, with torch.compile's arguments; hooks and drop-path draws stay outside.

        `only_training`: evaluations, whose images may all have sizes of their own, stay as they are.
        """
        plain, compiled = self.body, torch.compile(self.body, *args, **kwargs)
        if only_training:
            self.body = lambda *inputs: (compiled if self.training else plain)(*inputs)  # type: ignore[method-assign]
        else:
            self.body = compiled  # type: ignore[method-assign]

    def _residual(self, x: Tensor, attn_scale: Tensor | None = None, ffn_scale: Tensor | None = None) -> Tensor:
        x = x + self.cpe(x)
        attn = self.attn(self.norm1(x))
        x = x + _scaled(attn, attn_scale)
        ffn = self.ffn(self.norm2(x))
        return x + _scaled(ffn, ffn_scale)

    def extra_repr(self) -> str:
        return f"index={self.index}, drop_path={self.drop_path:.3f}, checkpointing={self.checkpointing}"


def _scaled(branch: Tensor, scale: Tensor | None) -> Tensor:
    """The branch times its drop-path factor, in the branch's dtype."""
    return branch if scale is None else (branch * scale).to(branch.dtype)
