from __future__ import annotations

import functools
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty

import pytest
import torch

from data_pipeline import workers
from data_pipeline.buffers import Buffers
from data_pipeline.workers import Pending, StalledError, Workers

SECONDS = 30.0  # ends a hang; nothing that works takes so long


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("pool")]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert names() == []


def test_results_come_in_the_order_of_the_tasks() -> None:
    later = threading.Event()
    tasks: list[Callable[[], object]] = [lambda: later.wait(SECONDS), lambda: later.set() or 1, lambda: 2]
    with Workers(3, "pool") as pool:
        assert names() == ["pool-0", "pool-1", "pool-2"]
        assert pool.start(tasks).results(SECONDS) == [True, 1, 2]
    assert names() == []


def test_without_threads_tasks_run_when_results_are_asked_for() -> None:
    done: list[int] = []
    with Workers(0, "pool") as pool:
        pending = pool.start([functools.partial(done.append, number) for number in range(3)])
        assert done == []
        pending.results(SECONDS)
    assert done == [0, 1, 2]


@pytest.mark.parametrize("error", [KeyError("x"), SystemExit(3), KeyboardInterrupt()])
def test_first_task_s_error_reaches_the_consumer_and_threads_go_on(error: BaseException) -> None:
    def fail(what: BaseException) -> None:
        raise what

    with Workers(2, "pool") as pool:
        pending = pool.start([lambda: None, lambda: fail(error), lambda: fail(OSError("later"))])
        with pytest.raises(type(error)) as caught:
            pending.results(SECONDS)
        assert caught.value is error
        assert pool.start([lambda: 5]).results(SECONDS) == [5]


def stuck_in_here(release: threading.Event) -> None:
    release.wait(SECONDS)


def test_work_that_is_not_done_in_time_is_reported_with_the_stacks_of_all_threads() -> None:
    release = threading.Event()
    with Workers(2, "pool") as pool:
        pending = pool.start([functools.partial(stuck_in_here, release), lambda: None])
        with pytest.raises(StalledError, match=r"(?s)thread pool-\d:.*in stuck_in_here.*release\.wait") as caught:
            pending.results(0.05)
        assert "thread MainThread:" in str(caught.value)
        release.set()


class Clock:
    """A queue whose `get` is told when to time out, and what comes then."""

    def __init__(self, answers: list[object]) -> None:
        self.answers = answers
        self.timeouts: list[float] = []

    def get(self, timeout: float) -> object:
        self.timeouts.append(timeout)
        answer = self.answers.pop(0)
        if answer is None:
            raise Empty
        return answer


def test_waiting_begins_anew_with_each_result_and_each_sign_of_life() -> None:
    pending = Pending([lambda: 0] * 3, in_threads=True)
    first, second, third = ((number, number, None) for number in range(3))
    signs = iter([False, True, False, False])
    pending._done = Clock([None, None, None, first, None, second, third])  # type: ignore[assignment]
    assert pending.results(0.8, lambda: next(signs)) == [0, 1, 2]
    steps = [0.5, 0.3, 0.5, 0.3, 0.5, 0.3, 0.5]
    # the second step was the last one, but for the sign of life after it
    assert pending._done.timeouts == pytest.approx(steps)  # type: ignore[attr-defined]


def test_time_in_which_the_process_was_suspended_is_no_waiting() -> None:
    program = """
import sys
from data_pipeline.workers import Workers
with Workers(1, "pool") as pool:
    pending = pool.start([sys.stdin.readline])
    print("begun", flush=True)
    print(pending.results(4.0))
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        assert running.stdout.readline() == "begun\n"
        running.send_signal(signal.SIGSTOP)
        time.sleep(4.5)  # longer than it may wait
        running.send_signal(signal.SIGCONT)
        assert running.communicate("done\n", timeout=SECONDS)[0] == "['done\\n']\n"


def test_an_error_is_not_held_up_by_another_task_that_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_ERROR_SECONDS", 0.05)
    release = threading.Event()
    with Workers(2, "pool") as pool:
        pending = pool.start([functools.partial(stuck_in_here, release), lambda: 1 // 0])
        with pytest.raises(ZeroDivisionError):
            pending.results(1e6)
        release.set()


def test_a_stuck_thread_is_left_behind(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(workers, "_STOP_SECONDS", 0.05)
    release, begun = threading.Event(), threading.Event()
    pool = Workers(2, "pool")
    pool.start([lambda: begun.set() or stuck_in_here(release)])
    begun.wait(SECONDS)
    with caplog.at_level(logging.WARNING):
        pool.stop()
    assert "left behind, as they did not stop within 0.05 seconds: pool-" in caplog.text
    release.set()
    for left in [thread for thread in threading.enumerate() if thread.name.startswith("pool")]:
        left.join(SECONDS)


def test_what_has_not_begun_is_dropped() -> None:
    release, begun, done = threading.Event(), threading.Event(), list[int]()
    pool = Workers(1, "pool")
    pool.start([lambda: begun.set() or release.wait(SECONDS), *[functools.partial(done.append, n) for n in range(9)]])
    begun.wait(SECONDS)
    stopping = threading.Thread(target=pool.stop)
    stopping.start()
    while not pool._shared.stopping:
        pass
    release.set()
    stopping.join(SECONDS)
    assert done == []


class Large:
    """Something that a task works on."""


def test_threads_that_wait_keep_nothing_of_their_last_task() -> None:
    with Workers(1, "pool") as pool:
        worked_on = Large()
        alive = weakref.ref(worked_on)
        pool.start([functools.partial(isinstance, worked_on, Large)]).results(SECONDS)
        del worked_on
        deadline = time.monotonic() + SECONDS
        while alive() is not None and time.monotonic() < deadline:
            pass  # until the thread has come back to its queue
        assert alive() is None


@pytest.mark.filterwarnings("error")  # an exception in a finalizer is a warning
def test_threads_end_when_the_pool_is_forgotten_even_in_one_of_them() -> None:
    pool = Workers(2, "pool")
    assert len(names()) == 2
    del pool
    gc.collect()
    assert names() == []

    holder = [Workers(2, "pool")]
    threads = list(holder[0]._threads)
    holder[0].start([holder.clear])  # the last reference goes in a thread of the pool
    for thread in threads:
        thread.join(SECONDS)
    assert names() == []


@pytest.mark.parametrize("ending", ["pass", "raise SystemExit(7)", "os.kill(os.getpid(), signal.SIGINT)"])
@pytest.mark.parametrize("stuck_in", ["threading.Event().wait()", "os.read(os.pipe()[0], 1)"])
def test_program_ends_though_a_thread_is_stuck_for_ever(ending: str, stuck_in: str) -> None:
    program = f"""
import os, signal, threading
from data_pipeline import workers
workers._STOP_SECONDS = 0.05
begun = threading.Event()
pool = workers.Workers(2, "pool")
pool.start([lambda: begun.set() or {stuck_in}])
begun.wait()
{ending}
"""
    ended = subprocess.run([sys.executable, "-c", program], timeout=120, capture_output=True, text=True, check=False)
    assert ended.returncode == {"pass": 0, "raise SystemExit(7)": 7}.get(ending, -2), ended.stderr


def test_interrupt_reaches_a_consumer_that_waits() -> None:
    program = """
import os, signal, threading
from data_pipeline import workers
workers._STOP_SECONDS = 0.05
def work():
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait()
with workers.Workers(1, "pool") as pool:
    pool.start([work]).results(3600)
"""
    ended = subprocess.run([sys.executable, "-c", program], timeout=120, capture_output=True, text=True, check=False)
    assert ended.returncode == -2
    assert "KeyboardInterrupt" in ended.stderr


def test_a_fork_leaves_the_parent_s_threads_alone_and_starts_its_own() -> None:
    program = """
import os, threading
from data_pipeline.workers import Workers
release, begun = threading.Event(), threading.Event()
pool = Workers(2, "pool")
pending = pool.start([lambda: begun.set() or release.wait(), lambda: 8])
begun.wait()
child = os.fork()
if child == 0:
    pool.stop()  # at once, though the parent's thread is at work
    with Workers(2, "pool") as own:
        os._exit(own.start([lambda: 7]).results(60)[0])
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
release.set()
assert pending.results(60) == [True, 8]
pool.stop()
"""
    ended = subprocess.run([sys.executable, "-c", program], timeout=120, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_cores_are_those_of_the_affinity_and_of_the_control_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    for quota, cores in ((float("inf"), 12), (3.5, 3), (0.5, 1), (64.0, 12)):
        monkeypatch.setattr(workers, "_cgroup_cores", lambda quota=quota: quota)
        assert workers.available_cores() == cores


def test_quota_of_a_control_group_is_read_in_both_versions(tmp_path: Path) -> None:
    assert workers._quota(tmp_path) == float("inf")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert workers._quota(tmp_path) == float("inf")
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert workers._quota(tmp_path) == 2.5
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "cpu.cfs_quota_us").write_text("-1\n")
    assert workers._quota(tmp_path) == float("inf")
    (tmp_path / "cpu.cfs_quota_us").write_text("400000\n")
    assert workers._quota(tmp_path) == 4.0
    assert workers._cgroup_cores() > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="pinned memory is recycled by torch")
def test_memory_comes_back_when_the_last_tensor_over_it_dies_and_not_before() -> None:
    buffers = Buffers(kept=2)
    first = buffers.take((4, 5))
    assert (first.shape, first.dtype) == ((4, 5), torch.uint8)
    address = first.data_ptr()
    view = first[2:].numpy()[0]  # keeps the memory through numpy, torch and a slice
    del first
    second = buffers.take((4, 5))
    assert second.data_ptr() != address
    view[:] = 9
    del view
    third = buffers.take((2, 10))  # as many bytes
    assert third.data_ptr() == address
    assert third[1, 0] == 9


@pytest.mark.skipif(torch.cuda.is_available(), reason="pinned memory is recycled by torch")
def test_a_smaller_tensor_takes_a_part_of_the_memory_of_a_larger_one() -> None:
    buffers = Buffers(kept=2)
    address = buffers.take((4, 5)).data_ptr()
    smaller = buffers.take((3, 5))
    assert (smaller.data_ptr(), smaller.shape) == (address, (3, 5))
    del smaller
    assert buffers.take((4, 5)).data_ptr() == address


@pytest.mark.skipif(torch.cuda.is_available(), reason="pinned memory is recycled by torch")
def test_memory_that_is_too_small_and_of_a_hoard_is_let_go() -> None:
    buffers = Buffers(kept=2)
    hoard = [buffers.take((8,)) for _ in range(5)]
    addresses = {tensor.data_ptr() for tensor in hoard}
    assert len(addresses) == 5
    hoard.clear()
    assert len(buffers._free) == 2
    old = buffers.take((8,))
    larger = buffers.take((9,))
    del old
    assert (len(buffers._free), larger.shape) == (0, (9,))
    thread = threading.Thread(target=lambda tensors: tensors.clear(), args=([buffers.take((9,))],))
    thread.start()
    thread.join()
    assert len(buffers._free) == 1
