"""Batches of a data set, in an order that can be resumed anywhere: the one iterable that a training loop sees.

What is served is a function of (seed, epoch, position); threads only decide when it is ready. The state is six small
values. It counts the samples that were handed over, not those decoded ahead.
"""

from __future__ import annotations

import functools
import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from data_pipeline.batch import Batch, EpochReader, Report
from data_pipeline.config import DataConfig
from data_pipeline.order import Batching, EpochOrder, Mode
from data_pipeline.shards.source import DataError, Source
from data_pipeline.transforms import eval_transform, train_transform

logger = logging.getLogger(__name__)

STATE_VERSION = 1
# Samples a thread takes at a time: enough to hide the cost of a task, few enough to share a batch evenly.
_MAX_TASK = 16


class Loader:
    """This rank's batches of a data set. Iterating serves what remains of the current epoch.

    A batch counts as consumed once it is handed over, so a state saved while the consumer works on a batch continues
    with the next one. When an iteration runs to its end, the loader moves to the next epoch, which the next iteration
    serves; an iteration that is left early, or a state saved with an epoch's last batch, stays in its epoch. Threads
    live only as long as an iteration. The loader owns `source` and closes it.

    Damaged samples: in training the next readable sample by id takes the place (with the augmentation of the place); in
    evaluation the place is marked invalid. Each is reported once, and more than `config.max_bad_samples` different ones
    end the iteration with DataError.
    """

    def __init__(self, source: Source, config: DataConfig, batching: Batching, *, train: bool, seed: int) -> None:
        """Raises DataError if an epoch has no batch, ValueError for a RandAugment string that is not understood."""
        self._source, self._config, self._batching, self._seed = source, config, batching, seed
        self._train = train
        self._mode: Mode = config.order if train else "sequential"
        self._transform = train_transform(config) if train else eval_transform(config)
        self._num_threads = _resolve_threads(config.num_threads)
        self._epoch, self._consumed = 0, 0
        self._running: weakref.ref[Generator[Batch, None, None]] | None = None
        self._bad_ids: set[int] = set()
        self._wait_seconds = self._decode_seconds = 0.0
        self._samples, self._bad_samples = 0, 0
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
        batches from there. Raises DataError where the order would not be the same: another data set, seed or mode.
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
        `samples` handed over to this rank, `bad_samples` replaced or marked invalid."""
        stats = {
            "wait_seconds": self._wait_seconds,
            "decode_seconds": self._decode_seconds,
            "samples": self._samples,
            "bad_samples": self._bad_samples,
        }
        self._wait_seconds = self._decode_seconds = 0.0
        self._samples = self._bad_samples = 0
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
        return f"block/{self._config.block_shards}" if self._mode == "block" else self._mode

    def _stop_running(self) -> None:
        running = self._running() if self._running is not None else None
        if running is not None:
            running.close()
        self._running = None

    def _serve(self) -> Generator[Batch, None, None]:
        """Keep `prefetch` batches in the making while the consumer works on one."""
        order = EpochOrder(
            self._mode,
            _shard_sizes(self._source, self._mode),
            self._seed,
            self._epoch,
            block_shards=self._config.block_shards,
        )
        reader = EpochReader(self._source, self._transform, self._seed, self._epoch, substitute=self._train)
        pool = ThreadPoolExecutor(self._num_threads, "data_pipeline") if self._num_threads else None
        ahead = self._config.prefetch if pool else 0
        first, step = self._consumed, self._batching.global_batch_size
        pending: deque[tuple[int, Batch, list[Callable[[], Report]]]] = deque()
        try:
            for index in range(self._batching.num_batches(len(order) - first)):
                start = first + index * step
                batch = self._empty_batch(order, start)
                pending.append((min(start + step, len(order)), batch, self._start(pool, reader, batch)))
                if len(pending) > ahead:
                    yield self._hand_over(*pending.popleft())
            while pending:
                yield self._hand_over(*pending.popleft())
        finally:
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)
        self._epoch, self._consumed = self._epoch + 1, 0

    def _empty_batch(self, order: EpochOrder, start: int) -> Batch:
        ids, valid = self._batching.rank_ids(order, start)
        size = self._config.image_size
        # Fresh memory for each batch rather than a ring of buffers: torch recycles pinned memory itself, once the
        # copies to the GPU that were queued from it are done, and a consumer may keep a batch as long as it likes.
        pin = torch.cuda.is_available()
        return Batch(
            images=torch.empty((len(ids), size, size, 3), dtype=torch.uint8, pin_memory=pin),
            labels=torch.zeros(len(ids), dtype=torch.int64, pin_memory=pin),
            ids=torch.from_numpy(ids),
            positions=torch.from_numpy(self._batching.positions),
            valid=torch.from_numpy(valid),
        )

    def _start(self, pool: ThreadPoolExecutor | None, reader: EpochReader, batch: Batch) -> list[Callable[[], Report]]:
        """Begin to fill a batch; calling the results waits for them (or does the work, without threads)."""
        count = len(batch.ids)
        if pool is None:
            return [functools.partial(reader.fill, batch, range(count))]
        task = max(1, min(_MAX_TASK, count // (2 * self._num_threads)))
        slots = (range(start, min(start + task, count)) for start in range(0, count, task))
        return [pool.submit(reader.fill, batch, part).result for part in slots]

    def _hand_over(self, consumed: int, batch: Batch, results: list[Callable[[], Report]]) -> Batch:
        started = time.perf_counter()
        reports = [result() for result in results]
        self._wait_seconds += time.perf_counter() - started
        self._decode_seconds += sum(report.decode_seconds for report in reports)
        self._samples += int(batch.valid.sum())
        for report in reports:
            self._count_damaged(report)
        self._consumed = consumed
        return batch

    def _count_damaged(self, report: Report) -> None:
        self._bad_samples += len(report.damaged)
        for sample_id, error in report.damaged:
            if sample_id in self._bad_ids:
                continue
            self._bad_ids.add(sample_id)
            logger.warning("%s; %s", error, "another sample takes its place" if self._train else "it is left out")
            if len(self._bad_ids) > self._config.max_bad_samples:
                raise DataError(
                    f"{len(self._bad_ids)} damaged samples are more than max_bad_samples = "
                    f"{self._config.max_bad_samples}; the last: {error}. Check the shards with "
                    "`python -m data_pipeline.inspect`, or raise the limit"
                ) from error


def build_loader(
    config: DataConfig,
    split: str,
    *,
    train: bool,
    global_batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
) -> Loader:
    """Open a split and serve it to one rank.

    Training: shuffled, augmented, an incomplete last batch is dropped. Evaluation: in order, central crop, the last
    batch padded with places marked invalid, so that every sample is seen once and all ranks have as many batches.
    Raises DataError where the data cannot be used, ValueError for settings that do not fit together.
    """
    batching = Batching(global_batch_size, rank, world_size, tail="drop" if train else "mask")
    return Loader(open_split(config, split), config, batching, train=train, seed=seed)


def open_split(config: DataConfig, split: str) -> Source:
    """The samples of one split, whatever the backend. Raises DataError where the data cannot be used."""
    if config.backend == "synthetic":
        from data_pipeline.synthetic import SyntheticSource

        return SyntheticSource(config, split)
    if config.backend == "ffcv":
        from data_pipeline.shards.beton import open_beton

        return open_beton(config, split)
    from data_pipeline.shards import open_source

    return open_source(config, split)


def _shard_sizes(source: Source, mode: Mode) -> npt.NDArray[np.int64]:
    if mode != "block":
        return np.array([len(source)], np.int64)
    sizes = getattr(source, "shard_sizes", None)
    if sizes is None:
        raise DataError("order 'block' shuffles shards, and this source has none: use order 'global'")
    return np.asarray(sizes, np.int64)


def _resolve_threads(num_threads: int) -> int:
    """Threads of this rank; -1 shares the cores that the process may use among the ranks of the machine."""
    if num_threads >= 0:
        return num_threads
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
