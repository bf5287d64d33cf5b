"""The shape of a Dynamic Group Transformer, as one immutable value."""

import math
from dataclasses import dataclass

MOST_GROUPS = 256
"""No growth leads beyond: clustering costs as many distances for each query, in each iteration."""


@dataclass(frozen=True)
class Architecture:
    """Widths, depths and attention settings of a backbone."""

    embed_dims: tuple[int, ...]
    """Channels of each stage, multiples of `head_dim`."""
    depths: tuple[int, ...]
    """Blocks of each stage."""
    head_dim: int = 32
    """Channels of an attention head; a stage has embed_dim / head_dim heads."""
    mlp_ratio: float = 4.0
    """Hidden channels of the feed-forward network over the block's channels."""
    num_groups: int = 48
    """Query groups per head, G; at most the number of tokens is used."""
    top_k: int = 98
    """Keys that each group attends to, k; attention is dense where k reaches the number of tokens."""
    num_iters: int = 3
    """k-means iterations, T."""
    group_growth: float = 0.0
    """Exponent p with which groups grow beyond 224 pixels: num_groups (L / L0)^p for L tokens, L0 being the stage's at
    224 pixels, up to 256; 0 = the same number for all sizes."""
    key_growth: float = 0.0
    """The same for top_k, without a bound."""

    def __post_init__(self) -> None:
        if len(self.embed_dims) != len(self.depths):
            raise ValueError(f"embed_dims {self.embed_dims} and depths {self.depths} must have one entry per stage")
        for name in ("num_groups", "top_k", "num_iters"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("group_growth", "key_growth"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if any(dim % self.head_dim for dim in self.embed_dims):
            raise ValueError(f"embed_dims {self.embed_dims} must be multiples of head_dim {self.head_dim}")

    def groups_and_keys(self, stage: int, tokens: int) -> tuple[int, int]:
        """G and k of a `stage`, counted from 0, on a map of so many tokens; either may exceed the tokens."""
        if not self.group_growth and not self.key_growth:
            return self.num_groups, self.top_k
        ratio = max(1.0, tokens / tokens_at_224(stage))
        groups = round(self.num_groups * ratio**self.group_growth)
        return max(self.num_groups, min(groups, MOST_GROUPS)), round(self.top_k * ratio**self.key_growth)


def tokens_at_224(stage: int) -> int:
    """Tokens of a stage, counted from 0, at 224 x 224 pixels: 3136, 784, 196, 49."""
    return math.ceil(56 / 2**stage) ** 2
