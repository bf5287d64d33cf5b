"""A batch, and how its places are filled: read, decode, augment; safe to run in any thread."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from data_pipeline.augment import SampleDraws
from data_pipeline.changes import UNCHANGED, Changes
from data_pipeline.config import Decoding
from data_pipeline.decode import LARGE_PIXELS, DecodeError, Picture, Scratch, open_image
from data_pipeline.shards.source import DamagedSampleError, DataError, RawSample, Source
from data_pipeline.targets.fault import TargetError
from data_pipeline.transforms import Transform

_MAX_SUBSTITUTES = 8  # damaged samples in a row before something larger than a sample must be wrong


@dataclass(frozen=True)
class Batch:
    """One rank's part of one global batch, in host memory (pinned where there is a GPU).

    The tensors belong to the consumer: they are not written again as long as anything refers to them.
    """

    images: torch.Tensor | list[torch.Tensor]
    """uint8 (n, H, W, 3), RGB; in evaluations of dense tasks, whose images keep sizes of their own, uint8 (H, W, 3)
    each"""

    labels: torch.Tensor
    """int64 (n,); 0 where not valid"""

    ids: torch.Tensor
    """int64 (n,), sample ids as the order has them; -1 for padding"""

    copies: torch.Tensor
    """int64 (n,), which copy of its sample each is under repeated augmentation; else 0"""

    positions: torch.Tensor
    """int64 (n,), places in the global batch"""

    valid: torch.Tensor
    """bool (n,); False for padding at the end of an evaluation and for samples that could not be read there"""

    changes: list[Changes]
    """What is still to be done to each image by data_pipeline.device_changes.apply_changes; empty where there is
    nothing, because the loader's threads have done it"""

    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Of dense tasks: (height, width) of each image in its place, from the upper left corner; the rest is padding"""

    targets: list[Any] = field(default_factory=list)
    """Of dense tasks: what each place is to teach, None where not valid. Segmentation: uint8 maps of class indices,
    targets.masks.IGNORED where a pixel teaches nothing; (H, W) in training, as large as the stored image in evaluation.
    Detection: targets.instances.Instances in training, targets.objects.ImageObjects, as stored, in evaluation"""

    short_side: int = 0
    """Of detection in training: the short side of this batch's images, where the long side is not too long for it"""


@dataclass
class Report:
    """What one task has to tell the consumer."""

    decode_seconds: float = 0.0
    damaged: list[tuple[int, DamagedSampleError]] = field(default_factory=list)


class Placing(Protocol):
    """How the samples of one kind of task are written into a batch; safe to use in any thread."""

    def put(self, batch: Batch, slot: int, picture: Picture, sample: RawSample, rng: np.random.Generator) -> None:
        """Write one sample into its place; `rng`: the place's own draws.

        Raises DecodeError, TargetError, and what Picture.region raises; the place's content is undefined then.
        """
        ...

    def clear(self, batch: Batch, slot: int) -> None:
        """Write nothing into a place that does not count."""
        ...


@dataclass(frozen=True)
class LabelledImages:
    """Classification: an image of the batch's size and a class."""

    transform: Transform

    def put(self, batch: Batch, slot: int, picture: Picture, sample: RawSample, rng: np.random.Generator) -> None:
        """As Placing says."""
        changes = self.transform(picture, rng, batch.images[slot].numpy())
        batch.labels[slot] = sample.label
        if batch.changes:
            batch.changes[slot] = changes or UNCHANGED

    def clear(self, batch: Batch, slot: int) -> None:
        """A black image of class 0."""
        batch.images[slot].numpy()[...] = 0
        batch.labels[slot] = 0


class _Tools(threading.local):
    """What each thread has of its own, from its first task to its end."""

    def __init__(self, seed: int, epoch: int) -> None:
        self.name = threading.current_thread().name
        self.draws = SampleDraws(seed, epoch)
        self.scratch = Scratch()


@dataclass(frozen=True)
class EpochReader:
    """Writes samples of one epoch into batches. What it writes depends on the sample ids, of detection on the
    batch's canvas and short side, and on nothing else."""

    source: Source
    placing: Placing
    seed: int
    epoch: int
    substitute: bool
    """Serve another sample in the place of a damaged one; otherwise mark the place invalid."""

    decoding: Decoding = "fast"

    at_work: dict[str, int] = field(default_factory=dict)
    """Name of a thread -> the sample it has in hand."""

    large: threading.Lock = field(default_factory=threading.Lock)
    """Held while a large image is decoded, so that memory is taken for one at a time."""

    @functools.cached_property
    def _tools(self) -> _Tools:
        return _Tools(self.seed, self.epoch)

    def fill(self, batch: Batch, slots: range) -> Report:
        """Write the given places of `batch`; runs in any thread."""
        started = time.perf_counter()
        report = Report()
        valid, thread = batch.valid.numpy(), self._tools.name
        ids, copies = batch.ids[slots.start : slots.stop].tolist(), batch.copies[slots.start : slots.stop].tolist()
        for slot, sample_id, copy in zip(slots, ids, copies, strict=True):
            self.at_work[thread] = sample_id
            if not (valid[slot] and self._write(sample_id, copy, batch, slot, report)):
                self.placing.clear(batch, slot)
                valid[slot] = False
        self.at_work.pop(thread, None)
        report.decode_seconds = time.perf_counter() - started
        return report

    def whereabouts(self) -> str:
        """Which sample of which shard each thread has in hand, in words."""
        sizes = getattr(self.source, "shard_sizes", None)
        ends = np.cumsum([len(self.source)] if sizes is None else sizes)
        places = [
            f"{thread} is at sample {sample} (shard {int(np.searchsorted(ends, sample, side='right'))}, counted from 0)"
            for thread, sample in sorted(self.at_work.copy().items())
        ]
        return "; ".join(places) or "no thread has a sample in hand"

    def _write(self, sample_id: int, copy: int, batch: Batch, slot: int, report: Report) -> bool:
        """Write one sample into its place; False if it is damaged and nothing may stand in for it."""
        for attempt in range(1 + _MAX_SUBSTITUTES):
            candidate = (sample_id + attempt) % len(self.source)
            try:
                self._put(candidate, self._tools.draws.of(sample_id, copy), batch, slot)
                return True
            except DamagedSampleError as error:
                report.damaged.append((candidate, error))
            if not self.substitute:
                return False
        raise DataError(
            f"{1 + _MAX_SUBSTITUTES} samples in a row are damaged, from sample {sample_id} on; the last: "
            f"{report.damaged[-1][1]}. Check the shards with `python -m data_pipeline.verify`"
        )

    def _put(self, sample_id: int, rng: np.random.Generator, batch: Batch, slot: int) -> None:
        where = f"sample {sample_id}"
        try:
            sample = self.source.read(sample_id)
            where = f"sample '{sample.key}' in shard {sample.shard}"
            try:
                picture = open_image(sample.image, self.decoding, verified=sample.verified, scratch=self._tools.scratch)
                with self.large if picture.stored_pixels > LARGE_PIXELS else contextlib.nullcontext():
                    self.placing.put(batch, slot, picture, sample, rng)
            except (DecodeError, TargetError) as error:
                raise DamagedSampleError(sample.shard, sample.key, str(error)) from error
        except (DamagedSampleError, DataError):
            raise
        except Exception as error:
            raise RuntimeError(f"{where} could not be prepared: {type(error).__name__}: {error}") from error
