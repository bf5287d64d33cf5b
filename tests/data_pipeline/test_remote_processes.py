"""Several threads and processes that fetch from one set: ahead of need, side by side, killed, forked, ended early."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data_pipeline.shards import open_source
from data_pipeline.shards.source import DataError

pytest.importorskip("aiohttp")
from remote_sets import INDEX, TAR, config, opened, samples, sha256, until, whole_files
from servers import FaultyServer

pytestmark = pytest.mark.usefixtures("quick_retries")


def reader_process(url: str, cache: Path, ids: list[int]) -> subprocess.Popen[str]:
    """A process that prints "opened", and then the keys of these samples."""
    program = f"""
from data_pipeline.config import CacheConfig, DataConfig
from data_pipeline.shards import open_source, transport
transport.HTTP_PIECE_BYTES = 256
cache = CacheConfig(folder={str(cache)!r}, max_gb=1)
source = open_source(DataConfig(path={url!r}, num_classes=3, order="block", block_shards=2, cache=cache), "train")
print("opened", flush=True)
print([source.read(number).key for number in {ids}], flush=True)
"""
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_that_want_one_shard_fetch_it_once(
    shard_folder: Path, server: FaultyServer, tmp_path: Path
) -> None:
    server.misbehave(TAR, "gate")
    readers = [reader_process(server.url, tmp_path, [6, 7]) for _ in range(2)]
    assert all(reader.stdout is not None and reader.stdout.readline() == "opened\n" for reader in readers)
    assert server.half_sent.wait(60)
    server.gate.set()
    with opened(shard_folder, tmp_path) as local:
        expected = f"{[local.read(number).key for number in (6, 7)]}\n"
    for reader in readers:
        assert reader.communicate(timeout=60) == (expected, "")
    assert server.gets[TAR] == server.gets[INDEX] == 1


def test_when_a_downloading_process_is_killed_a_waiting_one_goes_on_where_it_stopped(
    shard_folder: Path, server: FaultyServer, tmp_path: Path
) -> None:
    half = (shard_folder / TAR).stat().st_size // 2
    server.misbehave(TAR, "gate", "fine")
    first = reader_process(server.url, tmp_path, [6])
    try:
        assert server.half_sent.wait(60)
        until(lambda: sum(part.stat().st_size for part in tmp_path.glob("*.tar.*.part")) > half - 256)
        second = reader_process(server.url, tmp_path, [6])
        assert second.stdout is not None
        assert second.stdout.readline() == "opened\n"
        assert not list(tmp_path.glob("*.tar"))
    finally:
        first.kill()
        first.communicate(timeout=60)
    output, errors = second.communicate(timeout=60)
    assert (second.returncode, errors) == (0, "")
    assert output.startswith("['")
    assert sha256(tmp_path / f"{sha256(shard_folder / TAR)}.tar") == sha256(shard_folder / TAR)
    assert not list(tmp_path.glob("*.part"))
    first_asked, second_asked = (asked for path, asked in server.requests if path == TAR)
    assert first_asked == ""
    assert half - 256 < int(second_asked.removeprefix("bytes=").rstrip("-")) <= half


def test_shards_are_fetched_ahead_soonest_first_and_no_more_than_allowed_at_once(
    server: FaultyServer, tmp_path: Path
) -> None:
    with opened(server.url, tmp_path, ahead=2) as source:
        source.expect([2, 0, 3, 1])
        until(lambda: len(whole_files(tmp_path)) == 8)
        assert server.gets.total() == 9
        assert server.most_at_once <= 2
        first = [path for path, _ in server.requests[1:] if path.endswith("tar")]
        assert set(first[:2]) == {"train/shard-000002.tar", "train/shard-000000.tar"}
        samples(source)
        assert server.gets.total() == 9
        stats = source.stats()
        assert (stats["cache_hits"], stats["cache_misses"], stats["fetch_retries"]) == (4, 0, 0)
        assert stats["fetched_bytes"] == sum((tmp_path / name).stat().st_size for name in whole_files(tmp_path))
        assert source.stats()["fetched_bytes"] == 0


def test_expecting_returns_at_once_and_an_error_ahead_is_raised_only_when_the_shard_is_read(
    server: FaultyServer, tmp_path: Path
) -> None:
    server.misbehave(TAR, "gate", *["404"] * 9)
    server.misbehave("train/shard-000002.tar", *["404"] * 9)
    with opened(server.url, tmp_path, ahead=2) as source:
        source.expect([1, 2, 3])
        assert server.half_sent.wait(60)  # shard 1 is under way, and nobody waited for it
        until(lambda: server.gets["train/shard-000003.tar"])
        assert source.read(18).key
        assert source.read(0).key
        with pytest.raises(DataError, match=r"shard-000002\.tar cannot be fetched: there is no such file"):
            source.read(12)
        server.gate.set()
        assert source.read(6).key


def test_closing_ends_fetches_under_way_and_nothing_is_left_locked(server: FaultyServer, tmp_path: Path) -> None:
    for number in range(4):
        server.misbehave(f"train/shard-00000{number}.tar", "hang" if number % 2 else "500")
    source = open_source(config(server.url, tmp_path, ahead=4, timeout=300), "train")
    source.expect(range(4))
    until(lambda: sum(server.gets[f"train/shard-00000{number}.tar"] for number in range(4)) >= 4)
    failed: list[BaseException] = []

    def read() -> None:
        try:
            source.read(6)
        except ValueError as error:
            failed.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    source.close()
    reader.join(60)
    assert [str(error) for error in failed] == ["the source was closed"]
    ours = [thread for thread in threading.enumerate() if thread.name == "fetch ahead"]
    assert ours == []
    with pytest.raises(ValueError, match="the source was closed"):
        source.read(0)
    with opened(server.url, tmp_path) as again:
        assert len(samples(again)) == 24


@pytest.mark.parametrize(
    "ending",
    [
        "pass",
        "source.close()",
        "raise SystemExit(0)",
        """
from data_pipeline.loader import Batching, Loader
loader = Loader(source, config, Batching(4, 0, 1, tail="drop"), train=True, seed=0)
batches = iter(loader)
""",
    ],
    ids=["end", "close", "exit", "loader"],
)
def test_a_consumer_that_stops_early_ends_without_a_hang_or_a_word(
    server: FaultyServer, tmp_path: Path, ending: str
) -> None:
    server.misbehave("train/shard-000003.tar", *["hang"] * 9)
    server.misbehave("train/shard-000000.tar", *["hang"] * 9)
    program = f"""
from data_pipeline.config import CacheConfig, DataConfig
from data_pipeline.shards import open_source
cache = CacheConfig(folder={str(tmp_path)!r}, max_gb=1, ahead=4, timeout=300)
config = DataConfig(path={server.url!r}, num_classes=3, image_size=16, order="block", num_threads=2, cache=cache)
source = open_source(config, "train")
source.expect([1, 0, 2, 3])
source.read(6)
{ending}
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_source_opened_before_a_fork_works_in_the_child_and_shares_nothing_with_it(
    shard_folder: Path, server: FaultyServer, tmp_path: Path
) -> None:
    server.misbehave("train/shard-000003.tar", "gate", "fine")
    program = f"""
import os, sys, threading
from data_pipeline.config import CacheConfig, DataConfig
from data_pipeline.shards import open_source
cache = CacheConfig(folder={str(tmp_path)!r}, max_gb=1, ahead=1)
config = DataConfig(path={server.url!r}, num_classes=3, order="block", block_shards=2, cache=cache)
source = open_source(config, "train")
first = source.read(0)
source.expect([3])  # and its thread is in the middle of it when the process forks
while not [name for name in os.listdir({str(tmp_path)!r}) if ".tar." in name]:
    threading.Event().wait(0.01)
child = os.fork()
if child == 0:
    same = source.read(0) == first and source.read(6).key != first.key and source.read(12).key
    source.expect([1])
    print("child", bool(same), len(source._open), flush=True)
    sys.stdin.readline()  # stays, with all it inherited, until the parent is dead
    print("late", bool(source.read(18).key), flush=True)
    source.close()
    os._exit(0)
print("parent", source.read(13).key != first.key, flush=True)
os.waitpid(child, 0)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert {process.stdout.readline() for _ in range(2)} == {"child True 2\n", "parent True\n"}
    assert server.gets["train/shard-000000.tar"] == server.gets["train/shard-000002.tar"] == 1
    process.kill()  # the parent, in the middle of shard 3: its lock must not live on in the child
    output, errors = process.communicate("go on\n", timeout=60)
    assert (output, errors) == ("late True\n", "")
    assert sha256(tmp_path / f"{sha256(shard_folder / 'train/shard-000003.tar')}.tar")


def test_threads_that_wait_for_one_fetch_share_its_failure(server: FaultyServer, tmp_path: Path) -> None:
    server.misbehave(TAR, "hang", *["500"] * 99)
    failures: list[str] = []
    with opened(server.url, tmp_path, attempts=2, timeout=1) as source:

        def read() -> None:
            try:
                source.read(6)
            except DataError as error:
                failures.append(str(error))

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(failures) == 4
        assert len(set(failures)) == 1
        assert server.gets[TAR] == 2
        server.misbehave(TAR)
        assert source.read(6).key  # who comes later tries anew
