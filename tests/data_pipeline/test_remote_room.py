"""Remote sets that are larger than the cache."""

from __future__ import annotations

import contextlib
import gc
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.shards import open_source, reader, remote
from data_pipeline.shards.source import DataError

pytest.importorskip("aiohttp")
from remote_sets import config, epoch, on_disk, open_files, opened, samples, sha256, until, whole_files
from servers import FaultyServer, serving

pytestmark = pytest.mark.usefixtures("quick_retries")


@pytest.mark.parametrize("room", [2, 3])
def test_the_budget_holds_at_every_moment_and_every_sample_still_comes(
    shard_folder: Path, server: FaultyServer, tmp_path: Path, room: int
) -> None:
    largest = sorted((path.stat().st_size for path in (shard_folder / "train").glob("*.tar")), reverse=True)
    indexes = max(path.stat().st_size for path in (shard_folder / "train").glob("*.idx"))
    budget = sum(largest[:room]) + room * indexes
    seen: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            seen.append(on_disk(tmp_path / "cache"))

    (tmp_path / "cache").mkdir()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        settings = config(server.url, tmp_path / "cache", max_gb=budget / 1e9, ahead=2)
        served = [epoch(settings) for _ in range(2)]
    finally:
        over.set()
        watcher.join()
    assert served == [epoch(config(shard_folder, tmp_path))] * 2
    assert 0 < max(seen) <= budget
    assert server.gets.total() > 2 + 8  # it did not all fit


def test_a_shard_that_is_read_is_never_evicted_and_the_coldest_goes_first(
    shard_folder: Path, server: FaultyServer, tmp_path: Path
) -> None:
    sizes = [path.stat().st_size for path in sorted((shard_folder / "train").iterdir())]
    settings = config(server.url, tmp_path, max_gb=(sum(sizes) - 5000) / 1e9)  # all but one fit
    names = [f"{sha256(shard_folder / f'train/shard-00000{number}.tar')}.tar" for number in range(4)]
    with contextlib.closing(open_source(settings, "train")) as reading:
        kept = reading.read(0).image
        with contextlib.closing(open_source(settings, "train")) as other:
            for number in (2, 1):
                other.read(6 * number)
            other.read(12)
        # shard 0 was used first, but is open; 1 is colder than 2, which was used again
        with contextlib.closing(open_source(settings, "train")) as third:
            third.read(18)
            assert names[1] not in whole_files(tmp_path) or names[2] not in whole_files(tmp_path)
            assert names[0] in whole_files(tmp_path)
            assert names[3] in whole_files(tmp_path)
        assert reading.read(0).image == kept
        assert server.gets["train/shard-000000.tar"] == 1


def test_what_is_needed_soon_leaves_after_what_is_cold_and_never_for_what_is_needed_later(
    shard_folder: Path, server: FaultyServer, tmp_path: Path
) -> None:
    total = sum(path.stat().st_size for path in (shard_folder / "train").iterdir())
    names = [f"{sha256(shard_folder / f'train/shard-00000{number}.tar')}.tar" for number in range(4)]
    with opened(server.url, tmp_path, max_gb=1) as source:
        for number in (3, 0, 1):  # from cold to warm
            source.read(6 * number)
    with opened(server.url, tmp_path, max_gb=(total - 5000) / 1e9) as source:
        source.expect([3, 2])  # 3 is here and the coldest; 2 must not push it out
        until(lambda: names[2] in whole_files(tmp_path))
        assert names[3] in whole_files(tmp_path)
        assert names[0] not in whole_files(tmp_path)


@pytest.mark.parametrize(
    ("changes", "environment", "message"),
    [
        ({"order": "global"}, {}, r"reads 4 of its 4 shards at once \(order 'global' .* or use order 'block'"),
        ({"order": "block"}, {}, r"reads 2 of its 4 shards at once \(data.block_shards = 2, .*lower data.block_shards"),
        (
            {"order": "block", "canonical_nodes": 2},
            {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            r"reads 4 of its 4 shards at once \(data.block_shards = 2, data.canonical_nodes = 2",
        ),
        (
            {"order": "block", "canonical_nodes": 2},
            {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
            r"reads 2 of its 4 shards at once",
        ),
    ],
)
def test_a_budget_that_is_too_small_is_an_error_with_a_number_that_is_enough(
    server: FaultyServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    environment: dict[str, str],
    message: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = replace(config(server.url, tmp_path, max_gb=1e-6), **changes)
    with pytest.raises(DataError, match=message) as raised:
        open_source(settings, "train")
    number = float(str(raised.value).partition("Set it to ")[2].partition(",")[0])
    enough = replace(settings, cache=replace(settings.cache, max_gb=number))
    open_source(enough, "train").close()
    assert not list(tmp_path.iterdir())  # opening alone writes nothing


def test_a_budget_without_room_to_fetch_ahead_is_a_warning(
    shard_folder: Path, server: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = sorted(path.stat().st_size for path in (shard_folder / "train").iterdir())
    settings = config(server.url, tmp_path, max_gb=(sum(files) * 0.6) / 1e9, ahead=4)
    open_source(settings, "train").close()
    assert "the run will wait for them, or fetch some more than once" in caplog.text


@pytest.mark.parametrize("fault", ["500", "reset", "truncate", "trickle", "wrong"])
def test_a_fault_that_is_over_keeps_no_shard_in_use(large_set: Path, tmp_path: Path, fault: str) -> None:
    gc.collect()
    gc.disable()  # what only the collector would close stays in use for a long time
    try:
        with serving(large_set) as server, opened(server.url, tmp_path, timeout=0.3) as source:
            server.misbehave("train/shard-000000.tar", fault)
            assert source.read(0).key
            assert source.stats()["fetch_retries"] == 1
            assert source._let_go()
            assert [path for path in open_files() if path.startswith(str(tmp_path))] == []
    finally:
        gc.enable()


def test_a_source_lets_go_of_its_own_idle_shards_where_there_is_no_room(
    shard_folder: Path, server: FaultyServer, tmp_path: Path
) -> None:
    total = sum(path.stat().st_size for path in (shard_folder / "train").iterdir())
    # a process that knows of one node only reads the shards of both streams, and the budget is one node's
    settings = replace(config(server.url, tmp_path / "cache", max_gb=(total * 0.6) / 1e9), canonical_nodes=2)
    with contextlib.closing(open_source(settings, "train")) as source, opened(shard_folder, tmp_path) as local:
        assert samples(source) == samples(local)
        assert on_disk(tmp_path / "cache") <= total * 0.6


def test_a_read_for_which_there_is_no_room_ends_in_an_error_not_in_a_hang(
    shard_folder: Path, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "ROOM_SECONDS", 0.3)
    total = sum(path.stat().st_size for path in (shard_folder / "train").iterdir())
    with opened(server.url, tmp_path) as holding:
        for number in (0, 6):
            holding.read(number)
        with opened(server.url, tmp_path, max_gb=(total * 0.6) / 1e9) as source:  # noqa: SIM117
            with pytest.raises(
                DataError, match=r"the files that are being read or fetched take up data\.cache\.max_gb"
            ):
                source.read(12)


def test_shards_of_a_source_that_stands_still_make_room_for_another(
    shard_folder: Path, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "IDLE_SECONDS", 0.1)
    monkeypatch.setattr(remote, "ROOM_SECONDS", 30.0)
    budget = sum(path.stat().st_size for path in (shard_folder / "train").iterdir())  # all of it is held, or was
    with (
        opened(server.url, tmp_path, order="global", max_gb=budget / 1e9) as training,
        opened(server.url, tmp_path, "val", max_gb=budget / 1e9) as evaluating,
        opened(shard_folder, tmp_path) as local,
        opened(shard_folder, tmp_path, "val") as local_val,
    ):
        for _ in range(2):
            assert samples(training) == samples(local)
            assert samples(evaluating) == samples(local_val)
        until(lambda: not evaluating._open and not training._open)
        until(lambda: not [path for path in open_files() if path.startswith(str(tmp_path))])
        until(lambda: not [thread for thread in threading.enumerate() if thread.name == "close idle"])
