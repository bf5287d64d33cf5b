"""Saving beside the training: nothing waits for the disk, all ranks hear the same, and no kill leaves half a save."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kills import kill_at
from ranks import run_ranks

from dgt.training import checkpoint, files, retention, tensor_files
from dgt.training.checkpoint import CheckpointConfig
from dgt.training.interrupt import SupersededError
from dgt.training.pieces import Piece, Pieces
from dgt.training.saver import SMALL, HostMemory, Saver, side_stream
from dgt.training.world import World, joined

ALONE = World(0, 1, torch.device("cpu"), None)  # type: ignore[arg-type]


def weights(value: float, rank: int = 0, world_size: int = 1) -> Pieces:
    return {
        "model.w": Piece(torch.full((5, 3), value), (5, 3), 0, rank, world_size),
        "optimizer.groups.0.step": Piece(torch.tensor(value, dtype=torch.float64), (), 0, rank, world_size),
    }


def facts(best_step: int | None = None) -> dict[str, Any]:
    return {"progress": {"best_step": best_step, "data": {"consumed": 1}}}


def saver(folder: Path, world: World = ALONE, permit: Callable[[], None] = lambda: None, **settings: Any) -> Saver:
    return Saver(folder, world, permit, CheckpointConfig(**settings))


def saved(one: Saver, step: int, **about: Any) -> str | None:
    one.begin(step, weights(float(step), one.world.rank, one.world.size), facts(**about))
    ended = one.finish()
    assert ended is not None
    return ended.error


def steps(folder: Path) -> list[int]:
    """Of the committed checkpoints, newest first, each of which must verify and hold what was saved."""
    found = [checkpoint.verify(path) for path in checkpoint.committed(folder)]
    for one in found:
        assert (checkpoint.tensors_in(one).whole("model.w") == one.step).all()
    return [one.step for one in found]


@contextmanager
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writing waits for the event."""
    go, write = threading.Event(), tensor_files.write

    def waiting(*args: Any) -> Any:
        assert go.wait(60)
        return write(*args)

    monkeypatch.setattr(tensor_files, "write", waiting)
    yield go
    go.set()


def test_training_goes_on_while_the_disk_is_written_and_changes_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held(monkeypatch) as go:
        one, pieces, about = saver(tmp_path), weights(4.0), facts()
        one.begin(4, pieces, about)
        assert not one.is_done()
        one.let_change()
        pieces["model.w"].local.fill_(-1)
        about["progress"]["data"]["consumed"] = 2
        assert checkpoint.committed(tmp_path) == []
        go.set()
        ended = one.finish()
    assert ended is not None
    assert (ended.step, ended.error) == (4, None)
    assert ended.stall > 0
    assert ended.seconds > 0
    assert one.finish() is None, "a save is reported once"
    assert steps(tmp_path) == [4]
    assert checkpoint.verify(tmp_path / "step_00000004").manifest["progress"]["data"] == {"consumed": 1}


def test_what_is_saved_may_change_only_when_it_is_copied_but_what_a_forward_pass_changes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, go, copy, events = saver(tmp_path), threading.Event(), HostMemory.copy, []

    def late_copy(*args: Any) -> Any:
        assert go.wait(60)
        copies = copy(*args)
        events.append("copied")
        return copies

    monkeypatch.setattr(HostMemory, "copy", late_copy)
    pieces = {"model.w": Piece(torch.ones(SMALL + 1), (SMALL + 1,)), "model.mean": Piece(torch.ones(4), (4,))}
    one.begin(1, pieces, facts())
    pieces["model.mean"].local.fill_(-1)
    threading.Thread(target=go.set).start()
    one.let_change()
    assert events == ["copied"]
    pieces["model.w"].local.fill_(-1)
    ended = one.finish()
    assert ended is not None
    assert ended.error is None
    stored = checkpoint.tensors_in(checkpoint.verify(tmp_path / "step_00000001"))
    assert (stored.whole("model.w") == 1).all()
    assert (stored.whole("model.mean") == 1).all()


def test_the_buffers_of_one_save_serve_the_next(tmp_path: Path) -> None:
    one = saver(tmp_path)
    assert saved(one, 1) is None
    before = {name: buffer.data_ptr() for name, buffer in one.host.buffers.items()}
    assert saved(one, 2) is None
    assert {name: buffer.data_ptr() for name, buffer in one.host.buffers.items()} == before
    assert steps(tmp_path) == [2, 1]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("error", [MemoryError("no memory"), OSError(5, "Input/output error"), RuntimeError("other")])
def test_any_error_of_a_save_is_told_in_its_words_and_the_next_save_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, asynchronous: bool
) -> None:
    def failing(*_: Any) -> None:
        raise error

    one = saver(tmp_path, asynchronous=asynchronous)
    with monkeypatch.context() as patched:
        patched.setattr(tensor_files, "write", failing)
        assert str(error) in (saved(one, 1) or "")
    with monkeypatch.context() as patched:
        patched.setattr(one.host, "copy", failing)
        assert (str(error) in (saved(one, 2) or "")) == asynchronous
    assert saved(one, 3) is None
    assert steps(tmp_path)[0] == 3


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("allowed", [0, 1])
def test_a_run_that_is_not_its_own_any_more_commits_nothing_and_says_so(
    tmp_path: Path, allowed: int, asynchronous: bool
) -> None:
    looks: list[int] = []

    def refuse() -> None:
        looks.append(len(list(tmp_path.iterdir())))
        if len(looks) > allowed:
            raise SupersededError("another attempt has taken this run over")

    with pytest.raises(SupersededError, match="another attempt has taken this run over"):
        saved(saver(tmp_path, permit=refuse, asynchronous=asynchronous), 1)
    assert looks == [0, 1][: allowed + 1], "asked before the folder is made, and before the commit"
    assert list(tmp_path.iterdir()) == []


def test_an_attempt_that_has_been_replaced_harms_no_save_of_the_one_that_replaced_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old attempt saves step 1 to its end, in vain, while the new one is about to commit the same step."""
    is_current = [True]

    def refuse() -> None:
        if not is_current[0]:
            raise SupersededError("another attempt has taken this run over")

    old, new = saver(tmp_path, permit=refuse), saver(tmp_path)
    with held(monkeypatch) as go_old:
        old.begin(1, weights(-1.0), facts())
        while not list(tmp_path.glob("*.saving")):
            pass
        with held(monkeypatch) as go_new:
            new.begin(1, weights(1.0), facts())
            while len(list(tmp_path.glob("*.saving"))) < 2:
                assert new.thread is not None
                assert new.thread.is_alive()
            is_current[0] = False
            go_old.set()
            with pytest.raises(SupersededError):
                old.finish()
            go_new.set()
            ended = new.finish()
    assert ended is not None
    assert ended.error is None
    assert steps(tmp_path) == [1], "with the weights of the new attempt"
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def save_on_two_ranks(folder: Path) -> list[Any]:
    """One rank's memory runs out; then it is slow to write, and training has its own collectives meanwhile."""
    with joined() as world:
        one = saver(folder, world)
        copy, write = one.host.copy, tensor_files.write
        if world.rank == 1:
            one.host.copy = lambda *_: (_ for _ in ()).throw(MemoryError("rank 1 is full"))  # type: ignore
        answers: list[Any] = [saved(one, 1)]
        one.host.copy = copy  # type: ignore[method-assign]
        go = threading.Event()
        if world.rank == 1:
            tensor_files.write = lambda *args: write(*args) if go.wait(60) else None  # type: ignore
        one.begin(2, weights(2.0, world.rank, world.size), facts())
        for number in range(200):
            assert world.agree_max(number + world.rank) == number + 1
            assert world.gather(number) == [number, number]
        answers.append(one.is_done())
        go.set()
        ended = one.finish()
        assert ended is not None
        answers += [ended.error, one.finish()]
        one.begin(3, weights(3.0, world.rank, world.size), facts())
        while not one.is_done():
            pass
        assert one.thread is not None
        one.thread.join()
        ended = one.finish()
        assert ended is not None
        return [*answers, ended.step]


def test_ranks_agree_on_every_save_while_training_has_collectives_of_its_own(tmp_path: Path) -> None:
    first, second = (result.value for result in run_ranks(2, save_on_two_ranks, tmp_path))
    assert first == second
    assert "step 1 could not be copied to host memory: MemoryError: rank 1 is full" in first[0]
    assert first[1:] == [False, None, None, 3]
    assert steps(tmp_path) == [3, 2]


def test_a_full_disk_fails_the_save_beside_the_training_and_keeps_the_previous_one(small_disk: Path) -> None:
    one = saver(small_disk)
    large = {"model.w": Piece(torch.zeros(3_000_000), (3_000_000,))}
    for step, error in ((1, None), (2, "No space left on device"), (3, None)):
        if error:
            (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 6_000_000))
        one.begin(step, large, facts())
        ended = one.finish()
        assert ended is not None
        assert (error in ended.error and "MB free" in ended.error) if error and ended.error else ended.error is None
        assert sorted(path.name for path in small_disk.glob("step*")) == [f"step_{s:08d}" for s in (1, 3) if s <= step]
        (small_disk / "filler").unlink(missing_ok=True)


def test_retention_keeps_the_newest_the_best_and_every_nth(tmp_path: Path) -> None:
    one = saver(tmp_path, keep_last=2, keep_every_steps=4)
    for step in range(1, 12):
        assert saved(one, step, best_step=3 if step >= 3 else step) is None
    assert steps(tmp_path) == [11, 10, 8, 4, 3]


def test_retention_spares_the_checkpoint_that_a_run_has_gone_back_to(tmp_path: Path) -> None:
    one = saver(tmp_path, keep_last=4)
    for step in (1, 2, 3):
        assert saved(one, step) is None
    assert saved(saver(tmp_path, keep_last=1), 1) is None
    assert steps(tmp_path) == [3, 1]


def test_retention_spares_the_best_of_every_checkpoint_that_a_run_may_fall_back_to(tmp_path: Path) -> None:
    one = saver(tmp_path, keep_last=2)
    for step in (1, 2, 3, 4):
        assert saved(one, step, best_step=1) is None
    assert saved(one, 5, best_step=5) is None
    assert steps(tmp_path) == [5, 4, 1], "should 5 be damaged, 4 still knows its best"
    assert saved(one, 6, best_step=5) is None
    assert steps(tmp_path) == [6, 5]


def test_of_the_damaged_and_of_the_abandoned_the_newest_is_kept(tmp_path: Path) -> None:
    for name in ("1.damaged", "2.damaged", "3.abandoned", "4.abandoned"):
        (tmp_path / f"step_0000000{name}").mkdir()
    assert saved(saver(tmp_path), 5) is None
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step_00000002.damaged", "step_00000004.abandoned", "step_00000005"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_folder_that_cannot_be_looked_through_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, asynchronous: bool
) -> None:
    def stale(_: Path) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    one = saver(tmp_path, asynchronous=asynchronous)
    with monkeypatch.context() as patched:
        patched.setattr(retention, "committed", stale)
        assert saved(one, 1) is None
    assert "could not be looked through: [Errno 116] Stale file handle" in caplog.text
    with monkeypatch.context() as patched:
        patched.setattr(Path, "exists", stale)
        assert "step_00000002 cannot be looked for: [Errno 116] Stale file handle" in (saved(one, 2) or "")
    assert steps(tmp_path) == [1]


def test_a_rank_that_fails_gives_its_save_some_seconds_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = saver(tmp_path)
    with held(monkeypatch) as go:
        one.begin(1, weights(1.0), facts())
        monkeypatch.setattr("dgt.training.saver.SECONDS_AT_EXIT", 0.0)
        one.close()
        assert steps(tmp_path) == [], "it does not wait for what takes longer"
        threading.Thread(target=go.set).start()
        monkeypatch.setattr("dgt.training.saver.SECONDS_AT_EXIT", 60.0)
        one.close()
        assert steps(tmp_path) == [1]


def test_what_keeps_the_ranks_from_agreeing_is_raised_where_the_save_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: Any) -> None:
        raise ConnectionError("rank 1 is lost")

    one = saver(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(World, "gather", lost)
        one.begin(1, weights(1.0), facts())
        one.let_change()
        with pytest.raises(ConnectionError, match="rank 1 is lost"):
            one.finish()
    assert one.finish() is None
    assert saved(one, 2) is None, "nothing of it is left"


def test_an_error_in_the_copy_leaves_no_copies_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    stream = SimpleNamespace(wait_event=lambda _: done.append("wait"), synchronize=lambda: done.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    ready = side_stream()
    with pytest.raises(MemoryError), ready():
        raise MemoryError
    assert done == ["wait", "synchronize"]


@pytest.mark.parametrize("damage", ["cut", "no file", "no manifest"])
def test_retention_does_not_count_what_is_not_whole(tmp_path: Path, damage: str) -> None:
    one = saver(tmp_path, keep_last=2)
    for step in (1, 2, 3):
        assert saved(one, step) is None
    data = tmp_path / "step_00000003" / "rank-00000.safetensors"
    if damage == "cut":
        os.truncate(data, 10)
    else:
        (data if damage == "no file" else data.with_name("manifest.json")).unlink()
    (tmp_path / "step_00000009.saving").mkdir()
    (tmp_path / "step_00000008.damaged").mkdir()
    assert saved(one, 4) is None
    names = sorted(path.name for path in checkpoint.committed(tmp_path))
    assert names == ["step_00000002", "step_00000003", "step_00000004"], "2 and 4 are whole, and 3 is left to be seen"


# Kills. A child process has two ranks as threads, so that one SIGKILL ends both as a power failure would.


class Threads:
    """What two ranks in one process agree over."""

    def __init__(self, size: int):
        self.barrier, self.values = threading.Barrier(size), [None] * size


@dataclass(frozen=True)
class ThreadWorld(World):
    """A rank that is a thread."""

    threads: Threads

    def gather(self, value: Any) -> list[Any]:
        self.threads.values[self.rank] = value
        self.threads.barrier.wait(60)
        values = list(self.threads.values)
        self.threads.barrier.wait(60)
        return values

    def agree_max(self, value: int) -> int:
        return max(self.gather(value))


def save_as_two_ranks(folder: Path, step: int, asynchronous: bool) -> None:
    """Saves and lets go of what is older than two checkpoints."""
    shared = Threads(2)

    def rank(number: int) -> None:
        world = ThreadWorld(number, 2, torch.device("cpu"), None, shared)  # type: ignore[arg-type]
        one = saver(folder, ALONE, keep_last=2, asynchronous=asynchronous)
        one.world = one.writers = world
        assert saved(one, step) is None

    ranks = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()


def killed_saves(folder: Path, asynchronous: bool, when: str) -> int:
    """Saves a third step once per call that changes the disk, killed at that call; the number of kills.

    After each: what has a committed name is whole, the newest is the second or the third, and the next save succeeds.
    """
    start = folder / "start"
    for step in (1, 2):
        save_as_two_ranks(start, step, asynchronous)
    for call in range(1, 1000):
        place = folder / str(call)
        shutil.copytree(start, place)
        child = os.fork()
        if child == 0:
            kill_at(call, when)
            save_as_two_ranks(place, 3, asynchronous)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL), (call, status)
        found = steps(place)
        assert found[0] in (2, 3), (call, found)
        assert set(found) >= ({2} if found[0] == 2 else {2, 3}), (call, found)
        newest = checkpoint.newest(place, print)
        assert newest is not None
        assert newest.step == found[0]
        retention.discard_unfinished(place)
        assert sorted(path.name for path in place.iterdir()) == sorted(f"step_{step:08d}" for step in found)
        save_as_two_ranks(place, 4, asynchronous)
        assert steps(place) == [4, found[0]]
        shutil.rmtree(place)
        if status == 0:
            assert found == [3, 2]
            return call - 1
    raise AssertionError("the save never came to its end")


@pytest.mark.parametrize("when", ["before", "within", "after"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_a_kill_at_every_write_flush_and_rename_leaves_whole_checkpoints(
    tmp_path: Path, asynchronous: bool, when: str
) -> None:
    (result,) = run_ranks(1, killed_saves, tmp_path, asynchronous, when)
    # mkdir; per rank header, data, file and folder flushed; manifest written, flushed, replaced, folder flushed;
    # rename and folder flushed; the oldest checkpoint renamed, its three files unlinked, and itself.
    assert result.value >= (5 if when == "within" else 20)


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "manifest.json"])
def test_a_changed_byte_anywhere_is_noticed(tmp_path: Path, name: str) -> None:
    assert saved(saver(tmp_path), 1) is None
    path = tmp_path / "step_00000001"
    whole, expected = (path / name).read_bytes(), checkpoint.verify(path).manifest
    for place in range(len(whole)):
        for bit in (0, 5):
            content = bytearray(whole)
            content[place] ^= 1 << bit
            (path / name).write_bytes(content)
            try:
                found = checkpoint.verify(path).manifest
            except checkpoint.DamagedError:
                continue
            # JSON can spell the same content in several ways, such as 1e-05 and 1E-05.
            assert name == "manifest.json"
            assert found == expected


@pytest.mark.parametrize("name", ["../rank-00000.safetensors", "/etc/passwd", "a/rank-00000.safetensors", "x.pkl", ""])
def test_a_manifest_that_names_foreign_files_is_not_read(tmp_path: Path, name: str) -> None:
    assert saved(saver(tmp_path), 1) is None
    path = tmp_path / "step_00000001"
    body = checkpoint.read_manifest(path)
    body["files"] = {name: next(iter(body["files"].values()))}
    checkpoint.write_manifest(path, body)
    with pytest.raises(checkpoint.CheckpointError, match="a file that no save writes; it is not read") as raised:
        checkpoint.newest(tmp_path, print)
    assert repr(name) in str(raised.value)


def test_a_file_of_another_rank_that_cannot_be_seen_fails_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = tensor_files.write
    monkeypatch.setattr(files, "PATIENCE", 0.0)
    monkeypatch.setattr(tensor_files, "write", lambda *args: write(*args) | {"size": 5})
    assert "not seen here with the 5 bytes that another rank wrote" in (saved(saver(tmp_path), 1) or "")
    assert list(tmp_path.iterdir()) == []
