"""Which anchors and regions are learned from: torchvision's balanced draw, as a pure function of the sample.

torchvision draws from torch's global generator, so that an image's draw depends on what came before it. Here the draw
orders candidates by a hash of (the sample's key, the draw's own number, the candidate's index), so that a resumed run,
another cut into micro-batches and other ranks draw the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgt.models.drop_path import hash_uint32

# Counters of hash_uint32 that no drop path has: these count from 0 on, two for each block.
ANCHOR_DRAW = 1 << 20
REGION_DRAW = ANCHOR_DRAW + 1
MASK_DRAW = ANCHOR_DRAW + 2


class KeyedSampler:
    """Chooses at most so many candidates of each image, a fixed share of them positive if there are enough."""

    def __init__(self, count: int, positive_share: float, draw: int) -> None:
        """`draw`: number of this draw; others of the same sample are independent of it."""
        self.count = count
        self.positive_share = positive_share
        self.draw = draw

    def __call__(self, labels: list[Tensor], keys: Tensor) -> list[Tensor]:
        """For each image the chosen indices, int64, rising.

        Args:
            labels: of each image (m,): from 1 on positive, 0 negative, below 0 never chosen.
            keys: (n,) int64 in [0, 2**32), one for each image.
        """
        return [self.of_image(of_image, key) for of_image, key in zip(labels, keys, strict=True)]

    def of_image(self, labels: Tensor, key: Tensor) -> Tensor:
        """The same of one image; `key`: () int64."""
        positive, negative = self.positives(labels, key), torch.where(labels == 0)[0]
        left = min(len(negative), self.count - len(positive))
        return torch.cat([positive, self.some(negative, left, key)]).sort().values

    def positives(self, labels: Tensor, key: Tensor) -> Tensor:
        """The chosen positive candidates of one image alone, as indices that rise."""
        positive = torch.where(labels >= 1)[0]
        most = min(len(positive), int(self.count * self.positive_share))
        return self.some(positive, most, key).sort().values

    def some(self, candidates: Tensor, count: int, key: Tensor) -> Tensor:
        """`count` of the `candidates`, (m,) different int64 indices in [0, 2**32)."""
        # The hash is one-to-one in its key: no two candidates tie, so that any way to sort them gives the same.
        order = hash_uint32(candidates ^ hash_uint32(key, self.draw), 0)
        return candidates[order.topk(count, largest=False).indices]
