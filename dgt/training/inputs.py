"""From the loader's batch to what the network sees."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data_pipeline.device_changes import apply_changes
from data_pipeline.loader import Batch, Loader
from data_pipeline.transforms import normalize
from dgt.tasks import Inputs
from dgt.training.draws import drop_path_keys
from dgt.training.mixing import PairDraws, draw_pairs, mix

if TYPE_CHECKING:
    from dgt.config import Config


@dataclass(frozen=True)
class StepInputs:
    """Turns parts of one step's batch into what the network sees; all draws are keyed by seed, step and position."""

    config: Config
    step: int
    device: torch.device
    epoch: int

    @cached_property
    def draws(self) -> PairDraws:
        """The mixing draws of the whole global batch."""
        return draw_pairs(self.config.seed, self.step, self.config.steps.global_batch_size, self.config.mixing)

    def __call__(self, batch: Batch, part: slice) -> Inputs:
        """The micro-batch `part` of `batch`, normalised and mixed, on the device."""
        positions = batch.positions[part]
        assert isinstance(batch.images, Tensor)  # lists are for evaluations
        pixels = self.on_device(batch.images[part])
        if batch.changes:
            pixels = apply_changes(pixels, batch.changes[part], self.config.data)
        images = normalize(pixels, self.config.data.mean, self.config.data.std)
        labels = self.on_device(batch.labels[part])
        keys = self.on_device(
            drop_path_keys(self.config.seed, self.step, positions, self.config.steps.global_batch_size)
        )
        if not self.config.mixing.mixes_in(self.epoch):
            return Inputs(images, labels, keys, sizes=batch.sizes[part], targets=batch.targets[part])
        mixed = mix(images, labels, positions, self.draws)
        return Inputs(mixed.images, labels, keys, mixed.partner_labels, mixed.share)

    def on_device(self, tensor: Tensor) -> Tensor:
        """Copies without waiting where the source is pinned."""
        return tensor.to(self.device, non_blocking=True)


def timed(loader: Loader) -> Iterator[tuple[Batch, float]]:
    """The batches of `loader`, each with the seconds that the consumer waited for it."""
    batches = iter(loader)
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - started
