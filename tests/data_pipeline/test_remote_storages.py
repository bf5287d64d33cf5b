"""Sets in other storage than HTTP servers: a real S3 server on loopback, and whatever else fsspec knows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.shards import open_source, transport
from data_pipeline.shards.source import DataError

pytest.importorskip("aiohttp")
from remote_sets import TAR, config, epoch, opened, samples, whole_files
from servers import serving

pytestmark = pytest.mark.usefixtures("quick_retries")


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


def test_an_index_without_an_end_is_refused(tmp_path: Path, in_memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MOST_WHOLE_BYTES", 500)
    with pytest.raises(DataError, match=r"index\.json cannot be fetched: it has more than 500 bytes"):
        open_source(config("memory://the-set", tmp_path), "train")
