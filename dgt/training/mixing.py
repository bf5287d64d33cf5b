"""Mixup and CutMix with keyed draws.

Canonical pairs: the samples at positions 2i and 2i+1 of the global batch are mixed with each other, with one draw per
pair. The order of samples is a random permutation, so neighbours are random partners; and because a pair never leaves
its rank, the result does not depend on the number of ranks or on micro-batches (both halves are even).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dgt.training.draws import Purpose, generator


@dataclass(frozen=True)
class MixingConfig:
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019)."""

    mixup_alpha: float = 0.8
    """Mixup's share is drawn from Beta(alpha, alpha); 0 = no mixup."""
    cutmix_alpha: float = 1.0
    """CutMix's area is drawn from Beta(alpha, alpha); 0 = no CutMix."""
    prob: float = 1.0
    """Probability that a pair is mixed at all."""
    switch_prob: float = 0.5
    """Probability of CutMix rather than mixup where both are on."""
    off_epoch: int = 0
    """From this epoch on (counted from 0) nothing is mixed, so that training ends on whole images; 0 = never."""

    def __post_init__(self) -> None:
        for name in ("mixup_alpha", "cutmix_alpha"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative, got {getattr(self, name)}")
        for name in ("prob", "switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: must lie in [0, 1], got {getattr(self, name)}")

        if self.off_epoch < 0:
            raise ValueError(f"off_epoch: must not be negative, got {self.off_epoch}")

    def mixes_in(self, epoch: int) -> bool:
        """Whether any pair is mixed in this epoch."""
        return self.enabled and not 0 < self.off_epoch <= epoch

    @property
    def enabled(self) -> bool:
        """Whether any pair is ever mixed."""
        return self.prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)


@dataclass(frozen=True)
class PairDraws:
    """The draws of every pair of one global batch; arrays of length global_batch_size / 2."""

    share: np.ndarray
    """float64: how much of each sample stays its own; 1 = not mixed."""
    cutmix: np.ndarray
    """bool: CutMix rather than mixup."""
    centre: np.ndarray
    """float64 (pairs, 2): centre of the pasted box, as fractions of height and width."""


def draw_pairs(seed: int, step: int, global_batch_size: int, config: MixingConfig) -> PairDraws:
    """All draws of a step; every rank computes the same ones and uses those of its positions."""
    pairs = global_batch_size // 2
    rng = generator(seed, step, Purpose.MIXING)
    mixed = rng.random(pairs) < config.prob
    cutmix = rng.random(pairs) < (config.switch_prob if config.mixup_alpha > 0 else 1.0)
    if config.cutmix_alpha == 0:
        cutmix[:] = False
    centre = rng.random((pairs, 2))
    by_mixup = rng.beta(config.mixup_alpha, config.mixup_alpha, pairs) if config.mixup_alpha > 0 else np.ones(pairs)
    by_cutmix = rng.beta(config.cutmix_alpha, config.cutmix_alpha, pairs) if config.cutmix_alpha > 0 else np.ones(pairs)
    share = np.where(mixed, np.where(cutmix, by_cutmix, by_mixup), 1.0)
    return PairDraws(share, cutmix, centre)


def boxes(draws: PairDraws, height: int, width: int) -> np.ndarray:
    """Pasted boxes (top, bottom, left, right) in pixels, int64 (pairs, 4); empty where a pair is not cut.

    The box covers sqrt(1 - share) of each side around the centre and is clipped at the border (CutMix, eq. 2).
    """
    size = np.array([height, width])
    extent = size * np.sqrt(1.0 - np.where(draws.cutmix, draws.share, 1.0))[:, None]
    centre = draws.centre * size
    low = np.clip(np.round(centre - extent / 2), 0, size).astype(np.int64)
    high = np.clip(np.round(centre + extent / 2), 0, size).astype(np.int64)
    return np.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], axis=1)


@dataclass(frozen=True)
class Mixed:
    """Images of whole pairs after mixing; a sample's loss is share * loss(own) + (1 - share) * loss(partner)."""

    images: Tensor
    """(n, C, H, W) float."""
    partner_labels: Tensor
    """(n,) int64: labels of the samples mixed in."""
    share: Tensor
    """(n,) float32: how much of each sample is its own."""


def mix(images: Tensor, labels: Tensor, positions: Tensor, draws: PairDraws) -> Mixed:
    """Mixes (n, C, H, W) float `images` with int64 `labels` (n,), each sample with its neighbour.

    `positions`: (n,) int64 positions in the global batch, on the CPU. Raises ValueError unless they are whole pairs.
    """
    if len(positions) % 2 or (positions[0::2] % 2).any() or (positions[1::2] != positions[0::2] + 1).any():
        raise ValueError(f"mixing needs whole pairs of neighbours in order, got positions {positions.tolist()}")
    pair = positions[0::2].numpy() // 2
    height, width = images.shape[-2:]
    box = boxes(draws, height, width)[pair]
    pasted = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2]) / (height * width)
    share = np.where(draws.cutmix[pair], 1.0 - pasted, draws.share[pair])
    blend = np.where(draws.cutmix[pair], 1.0, draws.share[pair])

    partner = swap_neighbours(images)
    weight = per_sample(blend, images).to(images.dtype).view(-1, 1, 1, 1)
    mixed = images * weight + partner * (1 - weight)
    for i, (top, bottom, left, right) in enumerate(box.tolist()):
        both = slice(2 * i, 2 * i + 2)
        mixed[both, :, top:bottom, left:right] = partner[both, :, top:bottom, left:right]
    return Mixed(mixed, swap_neighbours(labels), per_sample(share, images))


def swap_neighbours(values: Tensor) -> Tensor:
    """(n, ...) with the entries 2i and 2i+1 exchanged; the memory format is kept."""
    order = torch.arange(len(values), device=values.device) ^ 1
    return values[order]


def per_sample(per_pair: np.ndarray, like: Tensor) -> Tensor:
    """(pairs,) float64 -> (2 * pairs,) float32 on the device of `like`."""
    return torch.from_numpy(np.repeat(per_pair, 2).astype(np.float32)).to(like.device, non_blocking=True)
