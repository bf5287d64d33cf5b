"""The shape of a Dynamic Group Transformer, as one immutable value."""

from dataclasses import dataclass


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

    def __post_init__(self) -> None:
        if len(self.embed_dims) != len(self.depths):
            raise ValueError(f"embed_dims {self.embed_dims} and depths {self.depths} must have one entry per stage")
        for name in ("num_groups", "top_k", "num_iters"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if any(dim % self.head_dim for dim in self.embed_dims):
            raise ValueError(f"embed_dims {self.embed_dims} must be multiples of head_dim {self.head_dim}")
