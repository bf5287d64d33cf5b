"""The exponential moving average of the weights, sharded exactly as the weights are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dgt.training.pieces import Pieces, locals_of


@dataclass(frozen=True)
class EmaConfig:
    """Averaged weights, evaluated and exported in place of the raw ones."""

    decay: float = 0.9999
    """Share of the average that one step keeps; 0 switches the average off."""
    warmup: bool = True
    """Let the decay grow as (1 + step) / (10 + step) until it reaches `decay`, so that early weights are forgotten."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay: must lie in [0, 1), got {self.decay}")

    @property
    def enabled(self) -> bool:
        """Whether an average is kept at all."""
        return self.decay > 0


def decay_at(step: int, config: EmaConfig) -> float:
    """The decay that the average uses after optimizer step `step` (0 is the first)."""
    return min(config.decay, (1 + step) / (10 + step)) if config.warmup else config.decay


class Ema:
    """One average per piece of a weight; elementwise, so pieces average like the whole."""

    def __init__(self, weights: Pieces, config: EmaConfig):
        self.config = config
        self.weights = weights
        self.averages: Pieces = {name: piece.clone() for name, piece in weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average += (1 - decay) (weights - average), after optimizer step `step`."""
        weight = 1.0 - decay_at(step, self.config)
        torch._foreach_lerp_(locals_of(self.averages), locals_of(self.weights), weight)
