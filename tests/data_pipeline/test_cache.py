"""The cache folder: who may remove what, and when."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.shards import cache as cache_module
from data_pipeline.shards.cache import Cache, Claim, NoRoomError
from data_pipeline.shards.source import DataError


def name(number: int) -> str:
    return f"{number:064x}.tar"


def opened(folder: Path, max_bytes: int = 1000) -> Cache:
    cache = Cache(str(folder), max_bytes)
    assert cache.prepare() == ""
    return cache


def claimed(cache: Cache, number: int, size: int, wanted: dict[str, int] | None = None, rank: int = 0) -> Claim:
    claim = cache.claim(name(number), size, wanted or {}, rank)
    assert claim is not None
    return claim


def put(cache: Cache, number: int, size: int = 300, used: int | None = None) -> None:
    claim = claimed(cache, number, size)
    claim.write(bytes([number]) * size)
    claim.commit().close()
    if used is not None:
        os.utime(cache.folder / name(number), (used, used))


def numbers(cache: Cache) -> set[int]:
    return {int(path.stem, 16) for path in cache.folder.glob("?" * 64 + ".tar")}


def test_the_coldest_unused_files_make_room_and_no_more_of_them_than_needed(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    for number, used in ((1, 30), (2, 10), (3, 20)):
        put(cache, number, used=used)
    put(cache, 4)  # 900 + 300 > 1000: one must go
    assert numbers(cache) == {1, 3, 4}
    put(cache, 5, size=700)
    assert numbers(cache) == {4, 5}


def test_a_use_makes_a_file_warm(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    for number, used in ((1, 10), (2, 20), (3, 30)):
        put(cache, number, used=used)
    held = cache.hold(name(1), 300)
    assert held is not None
    held.close()
    put(cache, 4)
    assert numbers(cache) == {1, 3, 4}


def test_a_held_file_is_never_removed_by_any_process(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    for number, used in ((1, 10), (2, 20), (3, 30)):
        put(cache, number, used=used)
    first, again = cache.hold(name(1), 300), cache.hold(name(1), 300)
    assert first is not None
    assert again is not None
    os.utime(cache.folder / name(1), (1, 1))  # the coldest by far
    program = f"""
from data_pipeline.shards.cache import Cache
cache = Cache({str(tmp_path)!r}, 1000)
cache.prepare()
claim = cache.claim({name(4)!r}, 300, {{}}, 0)
claim.write(bytes(300))
claim.commit().close()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert numbers(cache) == {1, 3, 4}
    first.close()
    os.utime(cache.folder / name(1), (1, 1))
    put(cache, 5)
    assert numbers(cache) == {1, 4, 5}  # still held once
    again.close()
    os.utime(cache.folder / name(1), (1, 1))
    put(cache, 6)
    assert numbers(cache) == {4, 5, 6}


def test_what_is_in_use_or_in_the_making_leaves_no_room_and_nothing_is_written(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    put(cache, 1, size=600)
    held, making = cache.hold(name(1), 600), claimed(cache, 2, 300)
    assert held is not None
    with pytest.raises(NoRoomError, match=r"data\.cache\.max_gb = 1e-06.*Set it higher"):
        cache.claim(name(3), 101, {}, 0)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", name(1), f"{name(2)}.300.part"}
    claimed(cache, 3, 100).close()
    making.close()
    held.close()


def test_no_room_says_whether_anything_has_changed(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    making = claimed(cache, 1, 800)

    def state() -> int:
        with pytest.raises(NoRoomError) as raised:
            cache.claim(name(2), 300, {}, 0)
        return raised.value.state

    before = state()
    assert state() == before
    making.write(b"x")
    assert state() != before
    making.close()


def test_wanted_files_go_last_the_farthest_first_and_never_for_one_that_is_needed_later(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    for number, used in ((1, 10), (2, 20), (3, 30)):
        put(cache, number, used=used)
    wanted = {name(1): 0, name(2): 1, name(4): 2, name(5): 3}
    claimed(cache, 4, 300, wanted, 2).close()
    assert numbers(cache) == {1, 2}
    with pytest.raises(NoRoomError):
        cache.claim(name(5), 800, wanted, 1)  # 2 and the part of 4 could go, but 1 is needed sooner
    claimed(cache, 5, 500, wanted, 0).close()
    assert numbers(cache) == {1}


def test_a_part_is_made_by_one_at_a_time_and_gone_on_with(tmp_path: Path) -> None:
    cache, other = opened(tmp_path), opened(tmp_path)
    claim = claimed(cache, 1, 6)
    claim.write(b"abc")
    assert cache.claim(name(1), 6, {}, 0) is None
    assert other.claim(name(1), 6, {}, 0) is None
    assert cache.hold(name(1), 6) is None
    claim.close()
    claim = claimed(other, 1, 6)
    assert (claim.length, b"".join(claim.read())) == (3, b"abc")
    claim.write(b"def")
    held = claim.commit()
    assert held.path.read_bytes() == b"abcdef"
    assert cache.claim(name(1), 6, {}, 0) is None
    assert {path.name for path in tmp_path.iterdir()} == {".lock", name(1)}
    held.close()


def test_the_part_of_a_killed_process_is_gone_on_with_or_makes_room(tmp_path: Path) -> None:
    program = f"""
import os, signal
from data_pipeline.shards.cache import Cache
cache = Cache({str(tmp_path)!r}, 1000)
cache.prepare()
for name in ({name(1)!r}, {name(2)!r}):
    claim = cache.claim(name, 400, {{}}, 0)
    claim.write(b"half")
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == -9
    cache = opened(tmp_path)
    assert cache.hold(name(1), 400) is None
    again = claimed(cache, 1, 400)
    assert again.length == 4
    claimed(cache, 3, 500).close()
    assert not (tmp_path / f"{name(2)}.400.part").exists()
    again.close()


def test_a_part_longer_than_its_file_is_begun_anew(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    (tmp_path / f"{name(1)}.4.part").write_bytes(b"too long")
    claim = claimed(cache, 1, 4)
    assert claim.length == 0
    claim.close()


def test_a_whole_file_of_another_size_is_not_believed(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    put(cache, 1, size=300)
    os.truncate(tmp_path / name(1), 200)
    assert cache.hold(name(1), 300) is None
    assert numbers(cache) == set()


def test_files_of_others_are_neither_counted_nor_removed(tmp_path: Path) -> None:
    for other in ("notes.txt", "x.tar", f"{name(1)}.part", "0" * 63 + ".tar"):
        (tmp_path / other).write_bytes(bytes(5000))
    cache = opened(tmp_path)
    put(cache, 1, size=900, used=1)
    put(cache, 2, size=900)
    assert numbers(cache) >= {2}
    assert len(list(tmp_path.iterdir())) == 4 + 2


def test_many_threads_that_evict_each_other_never_read_a_removed_or_foreign_file(tmp_path: Path) -> None:
    cache = opened(tmp_path, max_bytes=7 * 50)  # room for seven of ten files, and for what six threads hold
    errors: list[str] = []

    def work(seed: int) -> None:
        for turn in range(60):
            number = (seed * 7 + turn * 3) % 10
            held = None
            while held is None:
                held = cache.hold(name(number), 50)
                with contextlib.suppress(NoRoomError):
                    claim = None if held else cache.claim(name(number), 50, {}, 0)
                    if claim is not None:
                        claim.restart()
                        claim.write(bytes([number]) * 50)
                        held = claim.commit()
            if held.path.read_bytes() != bytes([number]) * 50:
                errors.append(f"{number}")
            held.close()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= 7 * 50


def test_a_full_disk_first_loses_what_is_cold_and_then_is_a_clear_error(small_disk: Path) -> None:
    cache = opened(small_disk / "cache", max_bytes=10**9)
    million = 1 << 20
    put(cache, 1, size=20 * million, used=1)
    put(cache, 2, size=20 * million, used=2)
    put(cache, 3, size=20 * million)  # 60 of 48 MiB: the coldest goes, whatever the budget allows
    assert numbers(cache) == {2, 3}
    held = [cache.hold(name(number), 20 * million) for number in (2, 3)]
    with pytest.raises(NoRoomError, match=r"disk of data\.cache\.folder .* is full: 0\.021 GB more .*max_gb"):
        cache.claim(name(4), 20 * million, {}, 0)
    claim = claimed(cache, 5, 4 * million)
    (small_disk / "of others").write_bytes(bytes(5 * million))  # the disk fills up while a file is being fetched
    with pytest.raises(NoRoomError, match="is full"):
        claim.write(bytes(4 * million))
    claim.close()
    assert not list(cache.folder.glob("*.part"))
    for one in held:
        assert one is not None
        one.close()
    put(cache, 5, size=4 * million)
    assert 5 in numbers(cache)


@pytest.fixture
def read_only(small_disk: Path) -> Iterator[Path]:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    yield small_disk
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)


def test_a_folder_that_cannot_be_written_is_a_clear_error(read_only: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.cache\.folder: .*/cache cannot be used: Read-only file system"):
        Cache(str(read_only / "cache"), 1000).prepare()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache\.folder: .*file cannot be used: File exists"):
        Cache(str(tmp_path / "file"), 1000).prepare()


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(DataError, match=r"without file locks .*use a disk of the node's own"):
        Cache(str(tmp_path), 1000).prepare()


@pytest.mark.parametrize(("kind", "warned"), [("ext4", False), ("tmpfs", False), ("nfs4", True), ("fuse.sshfs", True)])
def test_a_folder_on_remote_storage_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, warned: bool
) -> None:
    monkeypatch.setattr(cache_module, "file_system_kind", lambda folder: kind)
    cache = Cache(str(tmp_path), 1000)
    assert bool(cache.prepare()) is warned
    assert cache.prepare() == ""


def test_the_kind_of_a_file_system_is_found(small_disk: Path) -> None:
    assert cache_module.file_system_kind(small_disk / "cache") == "tmpfs"


def test_variables_in_the_folder_s_name_are_filled_in_on_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache("$NODE_DISK/cache", 1000)
    monkeypatch.delenv("NODE_DISK", raising=False)
    with pytest.raises(DataError, match=r"data\.cache\.folder: \$NODE_DISK/cache names .* variable that is not set"):
        cache.prepare()
    monkeypatch.setenv("NODE_DISK", str(tmp_path))
    cache.prepare()
    assert cache.folder == tmp_path / "cache"


def test_a_file_that_is_removed_while_its_lock_is_awaited_does_not_count_as_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = opened(tmp_path)
    put(cache, 1)
    lock = fcntl.flock

    def after_a_removal(descriptor: int, how: int) -> None:
        if how == fcntl.LOCK_SH:
            (tmp_path / name(1)).unlink()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", after_a_removal)
    assert cache.hold(name(1), 300) is None
