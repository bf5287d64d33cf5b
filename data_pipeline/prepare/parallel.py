"""Running shard jobs in several processes, with a progress bar."""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import Synchronized

from data_pipeline.prepare.make_shard import ShardJob, ShardResult, make_shard
from data_pipeline.progress import progress_bar
from data_pipeline.shards.source import DataError

_REFRESH_SECONDS = 0.2

# In a worker: how many images all of them have done, and whether to give up.
_images_done: Synchronized[int]
_cancelled: ctypes.c_bool


def run_jobs(jobs: list[ShardJob], processes: int) -> list[ShardResult]:
    """Make all shards, in `processes` processes; results come in the order of `jobs`. The first error ends it."""
    total = sum(len(job.items) for job in jobs)
    with progress_bar("preparing", total) as update:
        if processes == 1 or len(jobs) == 1:
            return [make_shard(job, update) for job in jobs]
        return _run_in_pool(jobs, min(processes, len(jobs)), update)


def _run_in_pool(jobs: list[ShardJob], processes: int, update: Callable[[int], None]) -> list[ShardResult]:
    context = multiprocessing.get_context("spawn")  # a fork would copy threads' locks in whatever state they are
    # This process takes no lock that a worker takes: one that is killed while it holds a lock never gives it back.
    counter, cancelled = context.Value("q", 0), context.RawValue(ctypes.c_bool, False)
    pool = ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=(counter, cancelled))
    try:
        futures = [pool.submit(_make_shard_in_worker, job) for job in jobs]
        shown, running = 0, True
        while running:
            running = _still_running(futures)
            done = counter.get_obj().value
            update(done - shown)
            shown = done
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        raise DataError(
            "A worker process died (out of memory?). Run the same command again, with fewer --jobs: "
            "finished shards are kept."
        ) from error
    finally:
        cancelled.value = True
        pool.shutdown(cancel_futures=True)


def _still_running(futures: list[Future[ShardResult]]) -> bool:
    """Wait a moment; False when every job has ended, raises what the first failed one raised."""
    ended, running = wait(futures, timeout=_REFRESH_SECONDS, return_when=FIRST_EXCEPTION)
    for future in ended:
        future.result()
    return bool(running)


def _start_worker(counter: Synchronized[int], cancelled: ctypes.c_bool) -> None:
    global _images_done, _cancelled
    _images_done, _cancelled = counter, cancelled
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which then ends this one
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """A worker whose parent was killed must not write on, unseen, beside the run that continues the work."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _make_shard_in_worker(job: ShardJob) -> ShardResult:
    return make_shard(job, _count)


def _count(images: int) -> None:
    if _cancelled.value:
        raise DataError("cancelled")  # nobody waits for the result any more
    with _images_done.get_lock():
        _images_done.value += images
