"""Sets behind URLs, against a real HTTP server on loopback: what is read, what may go wrong, what is said."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import build_loader
from data_pipeline.shards import fetch, open_source, set_index, transport
from data_pipeline.shards.source import DataError

pytest.importorskip("aiohttp")
from remote_sets import INDEX, TAR, config, epoch, opened, samples, sha256, whole_files
from servers import FaultyServer, serving

pytestmark = pytest.mark.usefixtures("quick_retries")


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


def test_a_library_s_error_is_told_without_the_url_s_secrets() -> None:
    url = "https://annabel:pass%20word@host/set?sig=sEcReT%2Fx"
    failing = transport.Remote(url, 1.0)
    told = str(failing._explained(OSError(f"cannot reach {url} as annabel with 'pass word' and sig=sEcReT/x")))
    assert told.startswith("OSError: cannot reach https://")
    for secret in ("annabel", "pass", "word", "sEcReT"):
        assert secret not in told


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


def test_a_server_may_compress_what_it_sends(shard_folder: Path, server: FaultyServer, tmp_path: Path) -> None:
    for path in ("index.json", TAR, INDEX):
        server.misbehave(path, "gzip")
    with opened(server.url, tmp_path) as source, opened(shard_folder, tmp_path) as local:
        assert samples(source) == samples(local)
        assert source.stats()["fetch_retries"] == 0


def test_a_compressed_part_of_a_file_is_not_gone_on_with(
    shard_folder: Path, server: FaultyServer, tmp_path: Path
) -> None:
    tar = shard_folder / TAR
    (tmp_path / f"{sha256(tar)}.tar.{tar.stat().st_size}.part").write_bytes(tar.read_bytes()[:5000])
    server.misbehave(TAR, "gzip", "gzip")
    with opened(server.url, tmp_path) as source:
        assert source.read(6).key
        assert [asked for path, asked in server.requests if path == TAR] == ["bytes=5000-", ""]


def test_redirects_are_followed_and_what_they_sign_is_not_shown(
    shard_folder: Path, server: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.misbehave("index.json", "elsewhere")
    server.misbehave(TAR, "elsewhere", *["elsewhere"] * 99)
    server.misbehave(f"elsewhere/{TAR}", "reset", *["elsewhere"] * 99)  # and then round and round
    with opened(server.url, tmp_path) as source, pytest.raises(DataError, match="cannot be fetched") as raised:
        source.read(6)
    assert "siGnEd" not in caplog.text + str(raised.value)
    assert "sig=siGnEd" in server.queries
    told = str(transport.Remote("https://host/set", 1.0)._explained(OSError("no https://u:p@x/y?sig=siGnEd, 'a'")))
    assert told == "OSError: no https://x/y 'a'"


def test_an_index_without_an_end_is_refused(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "MOST_WHOLE_BYTES", 500)
    with pytest.raises(DataError, match=r"index\.json cannot be fetched: it has more than 500 bytes"):
        open_source(config(server.url, tmp_path), "train")
    assert server.gets["index.json"] == 1


def test_names_with_spaces_and_other_scripts_are_found(shard_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(shard_folder, tmp_path / "root" / "ein Satz" / "\u96c6 %41")
    with serving(tmp_path / "root") as server, opened(shard_folder, tmp_path) as local:
        for place in ("ein Satz/\u96c6 %2541", "ein%20Satz/%E9%9B%86%20%2541/"):
            with opened(f"{server.url}/{place}", tmp_path / "cache") as source:
                assert samples(source) == samples(local)
