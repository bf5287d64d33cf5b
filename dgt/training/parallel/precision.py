"""Precisions of the arithmetic: what TF32 may touch, and the scale that keeps gradients inside of float16's range."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dgt.training.pieces import Piece, Pieces

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtypes of the precisions that compute in 16 bits."""


@dataclass(frozen=True)
class LossScaleConfig:
    """The factor on the loss under `precision: fp16`; the other precisions need none.

    Micikevicius et al., "Mixed Precision Training", arXiv 1710.03740, section 3.2.
    """

    initial: float = 65536.0
    """The first scale. Powers of two scale without rounding."""
    growth_interval: int = 2000
    """It doubles after this many steps in a row without an overflow."""
    minimum: float = 1.0
    """It is never lowered below; what overflows even here is a bad step, as in any precision."""

    def __post_init__(self) -> None:
        if not 0 < self.minimum <= self.initial:
            raise ValueError(f"minimum: must lie in (0, initial = {self.initial:g}], got {self.minimum:g}")
        if self.growth_interval < 1:
            raise ValueError(f"growth_interval: must be at least 1, got {self.growth_interval}")


def allow_tf32(allowed: bool) -> None:
    """Whether a GPU may round the factors of float32 products and convolutions to TF32 (10 bits of mantissa)."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


class LossScale:
    """A dynamic loss scale: halves at an overflow, doubles after enough steps without one; equal on all ranks."""

    def __init__(self, config: LossScaleConfig):
        self.config = config
        self._scale = torch.tensor(config.initial, dtype=torch.float64)
        self._good_steps = torch.tensor(0, dtype=torch.int64)
        self._before: tuple[float, int] | None = None

    @property
    def value(self) -> float:
        """The factor on the loss."""
        return float(self._scale)

    def lower(self) -> bool:
        """Follows up on an overflow; False where the scale is as low as it may get."""
        self._before = self._before or (self.value, int(self._good_steps))
        self._good_steps.zero_()
        if self.value <= self.config.minimum:
            return False
        self._scale.div_(2).clamp_(min=self.config.minimum)
        return True

    def note_good(self) -> None:
        """A step was taken."""
        self._before = None
        self._good_steps.add_(1)
        if self._good_steps >= self.config.growth_interval:
            self._scale.mul_(2)
            self._good_steps.zero_()

    def note_bad(self) -> None:
        """A step was bad whatever the scale: what was tried for it is undone."""
        if self._before:
            self._scale.fill_(self._before[0])
            self._good_steps.fill_(self._before[1])
            self._before = None

    def pieces(self, rank: int, world_size: int) -> Pieces:
        """Its state; shares memory with it."""
        state = {"scale": self._scale, "good_steps": self._good_steps}
        return {name: Piece(tensor, (), 0, rank, world_size) for name, tensor in state.items()}
