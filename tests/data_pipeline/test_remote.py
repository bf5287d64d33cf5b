"""Sets behind URLs, against real servers on loopback."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import hashlib
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline import build_loader
from data_pipeline.config import CacheConfig, DataConfig
from data_pipeline.shards import fetch, open_source, remote, set_index, transport
from data_pipeline.shards.source import DataError

pytest.importorskip("aiohttp")
from servers import FaultyServer, serving

TAR = "train/shard-000001.tar"
INDEX = "train/shard-000001.idx"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(fetch, "LONGEST_PAUSE", 0.02)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server(shard_folder: Path) -> Iterator[FaultyServer]:
    with serving(shard_folder) as running:
        yield running


def config(path: object, cache: Path, order: str = "block", **changes: Any) -> DataConfig:
    fetching = CacheConfig(folder=str(cache), **{"max_gb": 1, "ahead": 1, "attempts": 3, "timeout": 10, **changes})
    return DataConfig(
        path=str(path), num_classes=3, image_size=16, order=order, block_shards=2, num_threads=2, cache=fetching
    )


@contextlib.contextmanager
def opened(path: object, cache: Path, split: str = "train", **changes: Any) -> Iterator[Any]:
    with contextlib.closing(open_source(config(path, cache, **changes), split)) as source:
        yield source


def samples(source: Any) -> list[tuple[str, bytes, int]]:
    return [(sample.key, sample.image, sample.label) for sample in map(source.read, range(len(source)))]


def epoch(settings: DataConfig) -> list[tuple[list[int], int]]:
    with build_loader(settings, "train", train=True, global_batch_size=4, rank=0, world_size=1, seed=3) as loader:
        return [(batch.ids.tolist(), int(batch.images.sum())) for batch in loader]


def whole_files(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if path.suffix in (".tar", ".idx")}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("order", ["block", "global"])
def test_an_epoch_from_a_url_equals_the_one_from_the_folder(
    shard_folder: Path, server: FaultyServer, tmp_path: Path, order: str
) -> None:
    expected = epoch(config(shard_folder, tmp_path, order))
    assert len(expected) == 6
    assert epoch(config(server.url, tmp_path / "cache", order)) == expected
    assert all(count == 1 for path, count in server.gets.items() if path != "index.json")
    assert epoch(config(server.url, tmp_path / "cache", order)) == expected
    assert set(server.gets) == {"index.json"} | {
        f"train/shard-00000{number}.{kind}" for number in range(4) for kind in ("tar", "idx")
    }
    assert server.gets.total() == 2 + 8


def test_cached_names_are_digests_of_content_and_other_splits_are_left_alone(
    shard_folder: Path, server: FaultyServer, tmp_path: Path
) -> None:
    with opened(server.url, tmp_path) as source:
        samples(source)
    tars = {f"{sha256(path)}.tar" for path in (shard_folder / "train").glob("*.tar")}
    assert {name for name in whole_files(tmp_path) if name.endswith(".tar")} == tars
    assert not list(tmp_path.glob("*.part"))


FAULTS = ("500", "503", "429", "408", "reset", "truncate", "trickle", "hang", "wrong", "longer")


@pytest.mark.parametrize(
    ("path", "fault"),
    # index.json has no digest anywhere else, so that other bytes of it are no passing fault
    [*((path, fault) for path in (TAR, INDEX) for fault in FAULTS), *(("index.json", fault) for fault in FAULTS[:-2])],
)
def test_a_passing_fault_costs_a_counted_and_logged_retry(
    shard_folder: Path,
    server: FaultyServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    path: str,
    fault: str,
) -> None:
    server.misbehave(path, fault)
    timeout = 0.3 if fault in ("trickle", "hang") else 10
    with opened(shard_folder, tmp_path) as local, opened(server.url, tmp_path / "cache", timeout=timeout) as source:
        assert samples(source) == samples(local)
        assert source.stats()["fetch_retries"] == 1
    assert server.gets[path] == 2
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.getMessage().startswith(f"{server.url}/{path}: ")
    assert "try 2 of 3 in 0.0" in record.getMessage()
    if fault.isdecimal():
        assert f"the server answers {fault}" in record.getMessage()


@pytest.fixture(scope="module")
def large_set(image_tree: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 classes, one training shard of about 2 MB: more than a connection has under way."""
    from data_pipeline.prepare import main

    folder = tmp_path_factory.mktemp("large")
    images = image_tree(folder / "images", {"train": {"a": 2, "b": 1, "c": 1}, "val": {"a": 1, "b": 1, "c": 1}})
    noise = np.random.Generator(np.random.PCG64(0))
    for path in (images / "train").rglob("*.jpg"):
        Image.fromarray(noise.integers(0, 256, (600, 800, 3), dtype=np.uint8)).save(path, quality=95)
    assert main(["imagefolder", "--src", str(images), "--out", str(folder / "set"), "--jobs", "1"]) == 0
    return folder / "set"


@pytest.mark.parametrize("fault", ["reset", "truncate"])
def test_a_broken_download_goes_on_where_it_stopped(large_set: Path, tmp_path: Path, fault: str) -> None:
    tar = "train/shard-000000.tar"
    size = (large_set / tar).stat().st_size
    with serving(large_set) as server, opened(server.url, tmp_path, attempts=4) as source:
        server.misbehave(tar, "truncate", fault, "truncate")
        assert source.read(0).image == (large_set / tar).read_bytes()[512:][: len(source.read(0).image)]
        fetched = source.stats()["fetched_bytes"] - (large_set / "train/shard-000000.idx").stat().st_size
    asked = [asked for path, asked in server.requests if path == tar]
    starts = [int(asked.removeprefix("bytes=").rstrip("-") or 0) for asked in asked]
    assert asked[0] == ""
    assert len(starts) == 4
    assert starts == sorted(starts)
    assert size / 4 < starts[1] < starts[3] < size
    # what the client's kernel and connection still held when it broke is fetched again
    assert fetched == size


def test_a_server_without_ranges_is_read_from_the_beginning_again(large_set: Path, tmp_path: Path) -> None:
    tar = "train/shard-000000.tar"
    with (
        serving(large_set, ranges=False) as server,
        opened(large_set, tmp_path) as local,
        opened(server.url, tmp_path / "cache") as source,
    ):
        server.misbehave(tar, "truncate")
        assert samples(source) == samples(local)
        assert [bool(asked) for path, asked in server.requests if path == tar] == [False, True]
        assert source.stats()["fetch_retries"] == 1


@pytest.mark.parametrize(
    ("fault", "tries", "message"),
    [
        ("404", 1, r"there is no such file \(404\)"),
        ("403", 1, r"access is denied \(403 Forbidden\)"),
        ("401", 1, r"access is denied \(401 Unauthorized\)"),
        ("400", 1, r"the server answers 400"),
        ("500", 3, r"the server answers 500 .*\(tried 3 times\)"),
        ("trickle", 3, r"nothing, or too little, came within 0\.3 seconds \(tried 3 times\)"),
        ("longer", 3, r"it has [\d,]+ bytes; expected are [\d,]+ \(tried 3 times\)"),
    ],
)
def test_a_lasting_fault_is_an_error_with_the_url_after_the_tries_that_make_sense(
    server: FaultyServer, tmp_path: Path, fault: str, tries: int, message: str
) -> None:
    server.misbehave(TAR, *[fault] * 20)
    with opened(server.url, tmp_path, timeout=0.3) as source:
        with pytest.raises(DataError, match=rf"^{server.url}/{TAR} cannot be fetched: {message}"):
            source.read(6)
        assert server.gets[TAR] == tries
        assert source.stats()["fetch_retries"] == tries - 1
        assert len(source.read(0).image) > 0
    assert not [name for name in whole_files(tmp_path) if name.startswith(source._shards.sha256[1]) and "tar" in name]


def test_wrong_bytes_are_named_with_both_digests_and_never_visible(
    shard_folder: Path, server: FaultyServer, tmp_path: Path
) -> None:
    server.misbehave(TAR, *["wrong"] * 3)
    expected = sha256(shard_folder / TAR)
    found = hashlib.sha256(bytes(255 - byte for byte in (shard_folder / TAR).read_bytes())).hexdigest()
    with opened(server.url, tmp_path) as source:
        with pytest.raises(DataError, match=rf"{TAR} .*SHA-256 is {found}; expected is {expected}.*tried 3 times"):
            source.read(6)
        assert f"{expected}.tar" not in whole_files(tmp_path)
        assert source.read(6).key  # the fault is over, and nothing of it is left
    assert sha256(tmp_path / f"{expected}.tar") == expected


def test_the_index_of_another_shard_is_refused(shard_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shard_folder, tmp_path / "set")
    content = json.loads((copy / "index.json").read_bytes())
    shutil.copy(copy / "train/shard-000000.idx", copy / INDEX)
    content["splits"]["train"]["shards"]["index_bytes"][1] = (copy / INDEX).stat().st_size
    (copy / "index.json").write_text(json.dumps(content))
    with serving(copy) as server, opened(server.url, tmp_path / "cache") as source:  # noqa: SIM117
        with pytest.raises(DataError, match=rf"{INDEX} .* it is the index of a tar with SHA-256 \w+; expected is"):
            source.read(6)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("404", r"index.json cannot be fetched: there is no such file \(404\).*URL of the folder with index.json"),
        ("403", r"index.json cannot be fetched: access is denied"),
        ("wrong", r"index.json is damaged"),
    ],
)
def test_an_index_that_cannot_be_read_says_so(server: FaultyServer, tmp_path: Path, fault: str, message: str) -> None:
    server.misbehave("index.json", fault)
    with pytest.raises(DataError, match=message):
        open_source(config(server.url, tmp_path), "train")


def test_a_page_that_is_no_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"login": "please"}')
    with serving(tmp_path) as server, pytest.raises(DataError, match=rf"^{server.url}/index.json is not the index"):
        open_source(config(server.url, tmp_path / "cache"), "train")


def test_a_set_that_was_prepared_anew_is_seen_at_the_next_opening_and_refuses_to_resume(
    shard_folder: Path, tmp_path: Path
) -> None:
    live = shutil.copytree(shard_folder, tmp_path / "live")
    with serving(live) as server:
        settings = config(server.url, tmp_path / "cache")
        with build_loader(settings, "train", train=True, global_batch_size=4, rank=0, world_size=1, seed=3) as loader:
            list(loader)
            state = loader.state_dict()
        for name in ("shard-000000", "shard-000001"):  # the first two shards change places
            for kind in ("tar", "idx"):
                (live / "train" / f"{name}.{kind}").rename(live / "train" / f"{name}.{kind}.old")
        for name, other in (("shard-000000", "shard-000001"), ("shard-000001", "shard-000000")):
            for kind in ("tar", "idx"):
                (live / "train" / f"{other}.{kind}.old").rename(live / "train" / f"{name}.{kind}")
        index = set_index.load(live)
        split = index.splits["train"]
        turned = [1, 0, 2, 3]
        changed = replace(
            split,
            samples=split.samples[turned],
            tar_bytes=split.tar_bytes[turned],
            index_bytes=split.index_bytes[turned],
            sha256=tuple(split.sha256[number] for number in turned),
        )
        (live / "index.json").write_bytes(set_index.to_bytes(replace(index, splits={**index.splits, "train": changed})))
        with build_loader(settings, "train", train=True, global_batch_size=4, rank=0, world_size=1, seed=3) as loader:  # noqa: SIM117
            with pytest.raises(DataError, match="the data set has changed"):
                loader.load_state_dict(state)
        with opened(server.url, tmp_path / "cache") as source, opened(live, tmp_path) as local:
            assert samples(source) == samples(local)
        assert server.gets[TAR] == 1  # the old content is the new shard 0's: it was found by its digest


def test_the_same_name_under_two_prefixes_is_two_files_in_one_cache(
    shard_folder: Path, image_tree: Callable[..., Path], tmp_path: Path
) -> None:
    from data_pipeline.prepare import main

    classes = {"ant": 4, "bee": 3, "cow": 2}
    images = image_tree(tmp_path / "images", {"train": classes, "val": classes})
    assert main(["imagefolder", "--src", str(images), "--out", str(tmp_path / "root" / "b"), "--jobs", "1"]) == 0
    shutil.copytree(shard_folder, tmp_path / "root" / "a")
    with serving(tmp_path / "root") as server:
        for prefix in ("a", "b", "a"):
            local_set = tmp_path / "root" / prefix
            with opened(f"{server.url}/{prefix}", tmp_path / "cache") as source, opened(local_set, tmp_path) as local:
                assert samples(source) == samples(local)
        assert server.gets[f"a/{TAR}"] == server.gets["b/train/shard-000000.tar"] == 1


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


def until(ready: Callable[[], Any], seconds: float = 60) -> None:
    """A bounded wait for what another process or thread does."""
    clock = threading.Event()
    for _ in range(int(seconds * 100)):
        if ready():
            return
        clock.wait(0.01)
    raise AssertionError("it did not happen")


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


def on_disk(cache: Path) -> int:
    """Bytes of all files at one moment: while the lock is held, none comes, goes or changes its name."""
    with open(cache / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(path.stat().st_size for path in cache.iterdir())


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


def open_files() -> list[str]:
    paths = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            paths.append(os.readlink(f"/proc/self/fd/{number}"))
    return paths


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


def test_secrets_of_a_url_are_used_but_never_shown(
    shard_folder: Path, server: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    url = f"http://annabel:pass%20word@127.0.0.1:{server.server_port}/?sig=sEcReT&v=1"
    server.misbehave(TAR, "500", "reset", "404")
    with opened(url, tmp_path) as source, pytest.raises(DataError) as raised:
        source.read(6)
    shown = caplog.text + str(raised.value) + "".join(name for name in os.listdir(tmp_path))
    for secret in ("annabel", "pass", "word", "sEcReT"):
        assert secret not in shown
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__
    assert shown.count(f"http://127.0.0.1:{server.server_port}/{TAR}") == 3
    assert all(headers["Authorization"].startswith("Basic ") for headers in server.headers)
    assert server.queries == {"sig=sEcReT&v=1"}


def test_pauses_grow_and_are_capped_and_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "FIRST_PAUSE", 0.5)
    monkeypatch.setattr(fetch, "LONGEST_PAUSE", 30.0)
    draw = random.Random(0)
    for attempt, longest in enumerate([0.5, 1, 2, 4, 8, 16, 30, 30, 30], start=1):
        pauses = np.array([fetch.pause_before(attempt, 0.0, draw) for _ in range(200)])
        assert longest / 2 <= pauses.min() < 0.6 * longest
        assert 0.9 * longest < pauses.max() <= longest
    assert fetch.pause_before(1, 7.0, draw) == 7.0  # a server's wish counts
    assert fetch.pause_before(1, 3600.0, draw) == 30.0


@pytest.fixture(scope="module")
def s3(shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real S3 server with the set at s3://sets/in/here; its address."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    import boto3

    running = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    address = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_environment(address).items():
            patch.setenv(name, value)
        client = boto3.client("s3", endpoint_url=address)
        client.create_bucket(Bucket="sets")
        for path in shard_folder.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), "sets", f"in/here/{path.relative_to(shard_folder)}")
    yield address
    running.stop()


def s3_environment(address: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }


@pytest.mark.parametrize("order", ["block", "global"])
def test_an_epoch_from_s3_equals_the_one_from_the_folder(
    shard_folder: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    for name, value in s3_environment(s3).items():
        monkeypatch.setenv(name, value)
    expected = epoch(config(shard_folder, tmp_path, order))
    assert epoch(config("s3://sets/in/here", tmp_path / "cache", order)) == expected
    assert len(whole_files(tmp_path / "cache")) == 8


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://sets/in/no", r"s3://sets/in/no/index.json cannot be fetched: there is no such file"),
        ("s3://none/in/here", r"s3://none/in/here/index.json cannot be fetched: there is no such file"),
    ],
)
def test_a_wrong_place_in_s3_is_an_error_with_its_url(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, message: str
) -> None:
    for name, value in s3_environment(s3).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DataError, match=message):
        open_source(config(url, tmp_path), "train")


@pytest.mark.parametrize("fault", ["500", "503", "reset", "truncate", "hang", "wrong"])
def test_faults_of_an_s3_server_are_retried_and_counted_by_us_alone(
    shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    pytest.importorskip("s3fs")
    (tmp_path / "root").mkdir()
    shutil.copytree(shard_folder, tmp_path / "root" / "bucket")
    with serving(tmp_path / "root") as server:
        for name, value in s3_environment(server.url).items():
            monkeypatch.setenv(name, value)
        server.misbehave(f"bucket/{TAR}", fault)
        timeout = 1 if fault == "hang" else 10
        with (
            opened("s3://bucket", tmp_path / "cache", timeout=timeout) as source,
            opened(shard_folder, tmp_path) as local,
        ):
            assert samples(source) == samples(local)
            assert source.stats()["fetch_retries"] == 1
        assert server.gets[f"bucket/{TAR}"] == 2


@pytest.fixture
def in_memory(shard_folder: Path) -> Iterator[Any]:
    """fsspec's file system in memory, with the set at memory://the-set."""
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(f"{shard_folder}/", "/the-set", recursive=True)
    yield memory
    memory.rm("/the-set", recursive=True)


def test_any_file_system_of_fsspec_will_do(shard_folder: Path, tmp_path: Path, in_memory: Any) -> None:
    with opened("memory://the-set", tmp_path / "cache") as source, opened(shard_folder, tmp_path) as local:
        assert samples(source) == samples(local)


def test_files_larger_than_a_piece_are_read_in_ranges(
    shard_folder: Path, tmp_path: Path, in_memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "RANGE_PIECE_BYTES", 1000)
    monkeypatch.setattr(transport, "HTTP_PIECE_BYTES", 4000)
    with opened("memory://the-set", tmp_path / "cache") as source, opened(shard_folder, tmp_path) as local:
        assert samples(source) == samples(local)


def test_a_file_that_is_shorter_than_its_index_says_is_an_error_with_both_sizes(
    shard_folder: Path, tmp_path: Path, in_memory: Any
) -> None:
    content = (shard_folder / TAR).read_bytes()
    in_memory.pipe_file(f"/the-set/{TAR}", content[:1000])
    with opened("memory://the-set", tmp_path / "cache") as source:
        with pytest.raises(DataError, match=rf"{TAR} .*it ended after 1,000 bytes; expected are {len(content):,}"):
            source.read(6)
        in_memory.pipe_file(f"/the-set/{TAR}", content)  # put right: what is here is gone on with
        source.stats()
        assert source.read(6).key
        assert source.stats()["fetched_bytes"] == len(content) - 1000


def test_a_part_beyond_the_end_of_the_server_s_file_is_begun_anew(
    shard_folder: Path, server: FaultyServer, tmp_path: Path
) -> None:
    size, digest = (shard_folder / TAR).stat().st_size, sha256(shard_folder / TAR)
    (tmp_path / f"{digest}.tar.{size}.part").write_bytes(bytes(5000))
    server.misbehave(TAR, "416")
    with opened(server.url, tmp_path) as source:
        assert source.read(6).key
        assert [asked for path, asked in server.requests if path == TAR] == ["bytes=5000-", ""]


def test_a_part_with_other_bytes_is_found_out_and_begun_anew(
    shard_folder: Path, server: FaultyServer, tmp_path: Path
) -> None:
    size, digest = (shard_folder / TAR).stat().st_size, sha256(shard_folder / TAR)
    (tmp_path / f"{digest}.tar.{size}.part").write_bytes(bytes(5000))  # such as after a power cut
    with opened(server.url, tmp_path) as source:
        assert source.read(6).key
        assert [asked for path, asked in server.requests if path == TAR] == ["bytes=5000-", ""]
        assert source.stats()["fetch_retries"] == 1


def test_a_library_s_error_is_told_without_the_url_s_secrets() -> None:
    url = "https://annabel:pass%20word@host/set?sig=sEcReT%2Fx"
    failing = transport.Remote(url, 1.0)
    told = str(failing._explained(OSError(f"cannot reach {url} as annabel with 'pass word' and sig=sEcReT/x")))
    assert told.startswith("OSError: cannot reach https://")
    for secret in ("annabel", "pass", "word", "sEcReT"):
        assert secret not in told
