"""Batches of a data set, in an order that can be resumed anywhere: the one iterable that a training loop sees.

What is served is a function of (seed, epoch, position); threads only decide when it is ready. The state is six small
values. It counts the samples that were handed over, not those decoded ahead.
"""

from __future__ import annotations

import functools
import os
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from data_pipeline.batch import Batch, EpochReader, LabelledImages, Placing, Report
from data_pipeline.buffers import Buffers
from data_pipeline.changes import UNCHANGED, recipe_of
from data_pipeline.config import DataConfig, Kind
from data_pipeline.expect import Expectation
from data_pipeline.order import Batching, EpochOrder, Mode, Ordering
from data_pipeline.quarantine import Quarantine
from data_pipeline.shards.source import DataError, Source
from data_pipeline.transforms import eval_transform, train_transform
from data_pipeline.workers import Pending, StalledError, Workers, available_cores

if TYPE_CHECKING:
    from data_pipeline.aspect_order import Aspects

STATE_VERSION = 1
# Samples a thread takes at a time: enough to hide the cost of a task, few enough to share a batch evenly.
_MAX_TASK = 16
_NO_IMAGE = torch.empty((0, 0, 3), dtype=torch.uint8)


class Loader:
    """This rank's batches of a data set. Iterating serves what remains of the current epoch.

    A batch counts as consumed once it is handed over, so a state saved while the consumer works on a batch continues
    with the next one. When an iteration runs to its end, the loader moves to the next epoch, which the next iteration
    serves; an iteration that is left early, or a state saved with an epoch's last batch, stays in its epoch. Threads
    live only as long as an iteration. The loader owns `source` and closes it.

    Damaged samples: in training the next readable sample by id takes the place (with the augmentation of the place); in
    evaluation the place is marked invalid. Each is reported once, and more than `config.max_bad_samples` different ones
    end the iteration with DataError. So do threads that get nothing done for `config.stall_seconds`.

    A loader belongs to one thread; what is handed over belongs to whoever has it.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        batching: Batching,
        *,
        train: bool,
        seed: int,
        kind: Kind = "classification",
        quarantine: Path | None = None,
    ) -> None:
        """`quarantine`: a file that damaged samples are appended to (data_pipeline.quarantine).

        Raises DataError if an epoch has no batch, ValueError for a RandAugment string that is not understood and for
        settings that do not go with `kind`.
        """
        self._source, self._config, self._batching, self._seed = source, config, batching, seed
        self._train = train
        self._mode: Mode = config.order if train else "sequential"
        self._kind = kind
        self._placing = _placing(config, source, kind, train)
        self._aspects = _aspects(config, source) if train and kind == "detection" else None
        labelled = train and kind == "classification"
        self._changes_on_device = labelled and config.augment.place == "device" and recipe_of(config) is not None
        self._num_threads = _resolve_threads(config.num_threads)
        self._epoch, self._consumed = 0, 0
        self._running: weakref.ref[Generator[Batch, None, None]] | None = None
        self._quarantine = Quarantine(
            quarantine,
            batching.rank,
            config.max_bad_samples,
            "another sample takes its place" if train else "it is left out",
        )
        self._wait_seconds = self._decode_seconds = 0.0
        self._samples, self._bad_samples = 0, 0
        self._source_counts: dict[str, float] = {}
        if len(self) == 0:
            raise DataError(
                f"the data set has {len(source)} samples, fewer than one global batch of "
                f"{batching.global_batch_size}; lower the global batch size"
                if len(source)
                else "the data set has no samples"
            )

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return self._batching.num_batches(len(self._source))

    @property
    def source(self) -> Source:
        """The data set that is served."""
        return self._source

    @property
    def epoch(self) -> int:
        """The epoch that is being served or is served next."""
        return self._epoch

    def __iter__(self) -> Iterator[Batch]:
        self._stop_running()
        running = self._serve()
        self._running = weakref.ref(running)  # not kept alive: leaving a for-loop early ends the threads at once
        return running

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; a running iteration ends."""
        self._stop_running()
        self._epoch, self._consumed = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Where this loader is, the same on every rank; small and JSON-able."""
        return {
            "version": STATE_VERSION,
            "seed": self._seed,
            "epoch": self._epoch,
            "consumed": self._consumed,
            "order": self._order_name,
            "fingerprint": self._source.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was saved; a running iteration ends.

        World size, batch size, threads and augmentation may have changed: what remains is order[consumed:], cut into
        batches from there. Raises DataError where the order would not be the same: another data set, seed or mode, and
        another global batch size in training for detection, whose order is made of batches.
        """
        expected = {**self.state_dict(), "epoch": state.get("epoch"), "consumed": state.get("consumed")}
        reasons = {
            "version": "it was saved by another version of the data pipeline",
            "fingerprint": "the data set has changed since it was saved",
            "seed": "the order of samples would change",
            "order": "the order of samples would change",
        }
        for name, reason in reasons.items():
            if state.get(name) != expected[name]:
                raise DataError(
                    f"cannot resume from this loader state, {reason}: {name} is {expected[name]!r} now and was "
                    f"{state.get(name)!r}. Restore the former one or start a new run"
                )
        epoch, consumed = state.get("epoch"), state.get("consumed")
        if not isinstance(epoch, int) or not isinstance(consumed, int) or not 0 <= consumed <= len(self._source):
            raise DataError(
                f"cannot resume from this loader state: epoch {epoch!r}, consumed {consumed!r} is no place in a data "
                f"set of {len(self._source)} samples"
            )
        self._stop_running()
        self._epoch, self._consumed = epoch, consumed

    def stats(self) -> dict[str, float]:
        """Since the last call: `wait_seconds` the consumer waited for batches, `decode_seconds` spent by all threads,
        `samples` handed over to this rank, `bad_samples` replaced or marked invalid; and what the source counts."""
        self._ask_source()
        stats = {
            **self._source_counts,
            "wait_seconds": self._wait_seconds,
            "decode_seconds": self._decode_seconds,
            "samples": self._samples,
            "bad_samples": self._bad_samples,
        }
        self._wait_seconds = self._decode_seconds = 0.0
        self._samples = self._bad_samples = 0
        self._source_counts = {}
        return stats

    def close(self) -> None:
        """End a running iteration and its threads, and close the source. May be called more than once."""
        self._stop_running()
        self._source.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _order_name(self) -> str:
        """What the order depends on beside seed and epoch; the streams and repeats only where there are several."""
        config, repeats = self._config, self._repeats
        if self._aspects is not None:
            return self._aspects.order_name(self._batching.global_batch_size)
        name = f"block/{config.block_shards}" if self._mode == "block" else self._mode
        name += f"/{self._batching.streams}" if self._batching.streams > 1 else ""
        return name + (f" repeats {repeats}" if repeats > 1 else "")

    @property
    def _repeats(self) -> int:
        return self._config.augment.repeats if self._train else 1

    def _order(self, epoch: int) -> Ordering:
        if self._aspects is not None:
            return self._aspects.order(self._batching.global_batch_size, self._seed, epoch)
        return EpochOrder(
            self._mode,
            _shard_sizes(self._source, self._mode),
            self._seed,
            epoch,
            block_shards=self._config.block_shards,
            streams=self._batching.streams,
            repeats=self._repeats,
        )

    def _ask_source(self) -> bool:
        """Add what the source has counted since it was last asked; False where that is nothing."""
        counts: dict[str, float] = getattr(self._source, "stats", dict)()
        for name, count in counts.items():
            self._source_counts[name] = self._source_counts.get(name, 0) + count
        return any(counts.values())

    def _stop_running(self) -> None:
        running = self._running() if self._running is not None else None
        if running is not None:
            running.close()
        self._running = None

    def _serve(self) -> Generator[Batch, None, None]:
        """Keep `prefetch` batches in the making while the consumer works on one."""
        order = self._order(self._epoch)
        reader = EpochReader(
            self._source,
            self._placing,
            self._seed,
            self._epoch,
            substitute=self._train,
            decoding=self._config.decoding,
        )
        expectation = Expectation(self._source, self._batching, order, lambda: self._order(self._epoch + self._train))
        ahead = self._config.prefetch if self._num_threads else 0
        first, step = self._consumed, self._batching.global_batch_size
        buffers = Buffers(ahead + 2)  # free at most: all that were in the making, and two that the consumer had
        making: deque[tuple[int, Batch, Pending[Report]]] = deque()
        with Workers(self._num_threads, "data_pipeline") as workers:
            for index in range(self._batching.num_batches(len(order) - first)):
                start = first + index * step
                expectation.at(start)
                batch = self._empty_batch(order, start, buffers)
                making.append((min(start + step, len(order)), batch, self._start(workers, reader, batch)))
                if len(making) > ahead:
                    yield self._hand_over(reader, *making.popleft())
            while making:
                yield self._hand_over(reader, *making.popleft())
        self._epoch, self._consumed = self._epoch + 1, 0

    def _empty_batch(self, order: Ordering, start: int, buffers: Buffers) -> Batch:
        places = self._batching.rank_places(order, start)
        count, (height, width), short_side = len(places.ids), *self._canvas(order, start)
        dense = self._kind != "classification"
        return Batch(
            images=buffers.take((count, height, width, 3)) if height else [_NO_IMAGE] * count,
            labels=torch.zeros(count, dtype=torch.int64, pin_memory=torch.cuda.is_available()),
            ids=torch.from_numpy(places.ids),
            copies=torch.from_numpy(places.copies),
            positions=torch.from_numpy(self._batching.positions),
            valid=torch.from_numpy(places.valid),
            changes=[UNCHANGED] * (count if self._changes_on_device else 0),
            sizes=[(height, width)] * (count if dense else 0),
            targets=[None] * (count if dense else 0),
            short_side=short_side,
        )

    def _canvas(self, order: Ordering, start: int) -> tuple[tuple[int, int], int]:
        """(height, width) of the images of the global batch that begins at `start`, (0, 0) where each has its own; and
        their short side, 0 where that is not told."""
        if self._kind == "classification":
            side = self._config.train_image_size(self._epoch) if self._train else self._config.image_size
        elif self._aspects is not None:
            batch = np.arange(start, start + self._batching.global_batch_size) % len(order)
            short_side = self._aspects.short_side(self._seed, self._epoch, start)
            return self._aspects.canvas(order.at(batch)[0], short_side), short_side
        else:
            side = self._config.segmentation.crop_size if self._train else 0
        return (side, side), 0

    def _start(self, workers: Workers, reader: EpochReader, batch: Batch) -> Pending[Report]:
        """Begin to fill a batch."""
        count = len(batch.ids)
        task = max(1, min(_MAX_TASK, count // (2 * max(self._num_threads, 1))))
        parts = (range(start, min(start + task, count)) for start in range(0, count, task))
        return workers.start([functools.partial(reader.fill, batch, part) for part in parts])

    def _hand_over(self, reader: EpochReader, consumed: int, batch: Batch, pending: Pending[Report]) -> Batch:
        started = time.perf_counter()
        try:
            reports = pending.results(self._config.stall_seconds, self._ask_source)
        except StalledError as error:
            raise DataError(
                f"nothing was done for {self._config.stall_seconds:g} seconds (data.stall_seconds) in epoch "
                f"{self._epoch} at position {self._consumed}: the storage does not answer, or a thread is stuck. "
                f"{reader.whereabouts()}\n\n{error}"
            ) from None
        self._wait_seconds += time.perf_counter() - started
        for report in reports:
            self._decode_seconds += report.decode_seconds
            self._bad_samples += len(report.damaged)
            for sample_id, damage in report.damaged:
                self._quarantine.note(sample_id, self._epoch, damage)
        self._samples += int(batch.valid.sum())
        self._consumed = consumed
        return batch


def build_loader(
    config: DataConfig,
    split: str,
    *,
    kind: Kind = "classification",
    train: bool,
    global_batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    quarantine: Path | None = None,
) -> Loader:
    """Open a split and serve it to one rank.

    Training: shuffled, augmented, an incomplete last batch is dropped. Evaluation: in order, central crop (of dense
    tasks: whole images at their own sizes), the last batch padded with places marked invalid, so that every sample is
    seen once and all ranks have as many batches.
    Damaged samples are appended to the file `quarantine`. Raises DataError where the data cannot be used, ValueError
    for settings that do not fit together.
    """
    streams = config.canonical_nodes if train and config.order == "block" else 1
    batching = Batching(global_batch_size, rank, world_size, "drop" if train else "mask", streams)
    source = open_split(config, split, kind)
    return Loader(source, config, batching, train=train, seed=seed, kind=kind, quarantine=quarantine)


def open_split(config: DataConfig, split: str, kind: Kind = "classification") -> Source:
    """The samples of one split, whatever the backend; dense tasks have tar shards only.

    Raises DataError where the data cannot be used, or teaches something else.
    """
    if kind != "classification" and config.backend != "webdataset":
        raise DataError(f"data.backend '{config.backend}' has nothing for {kind}: use webdataset")
    if config.backend == "synthetic":
        from data_pipeline.synthetic import SyntheticSource

        return SyntheticSource(config, split)
    if config.backend == "ffcv":
        from data_pipeline.shards.beton import open_beton

        return open_beton(config, split)
    from data_pipeline.shards import open_source

    return open_source(config, split, kind)


def _placing(config: DataConfig, source: Source, kind: Kind, train: bool) -> Placing:
    """How samples are written into batches. Raises ValueError, DataError where the set does not say what its targets
    mean."""
    if kind == "classification":
        return LabelledImages(train_transform(config) if train else eval_transform(config))
    from data_pipeline.dense_targets import dense_placing

    return dense_placing(config, source, kind, train=train)


def _aspects(config: DataConfig, source: Source) -> Aspects:
    from data_pipeline.aspect_order import aspects_of

    return aspects_of(config, source)


def _shard_sizes(source: Source, mode: Mode) -> npt.NDArray[np.int64]:
    sizes = getattr(source, "shard_sizes", None)
    if sizes is None and mode == "block":
        raise DataError("order 'block' shuffles shards, and this source has none: use order 'global'")
    return np.array([len(source)], np.int64) if sizes is None else np.asarray(sizes, np.int64)


def _resolve_threads(num_threads: int) -> int:
    """Threads of this rank; -1 shares the cores that the process may use among the ranks of the machine."""
    if num_threads >= 0:
        return num_threads
    return max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
