"""What a data path names, and what is said where it cannot be used."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.config import CacheConfig
from data_pipeline.shards import set_index
from data_pipeline.shards.source import DataError
from data_pipeline.shards.storage import LocalFolder, SetFile, is_url, open_storage, without_secrets

SHA = "ab" * 32


@pytest.mark.parametrize(
    ("path", "remote"),
    [
        ("/data/imagenet", False),
        ("data/set:1", False),
        ("../a//b", False),
        ("~/x", False),
        ("http://host/x", True),
        ("HTTPS://host", True),
        ("s3://bucket/x", True),
        ("gs://bucket", True),
        ("abfs+x://container", True),
        ("simplecache::s3://bucket", True),
    ],
)
def test_a_path_is_a_url_where_it_has_a_protocol(path: str, remote: bool) -> None:
    assert is_url(path) is remote


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://host/set", "https://host/set"),
        ("https://user:pass@host:8080/set?sig=secret#x", "https://host:8080/set"),
        ("https://user:p@ss@host/a@b/set", "https://host/a@b/set"),
        ("ftp://user@host", "ftp://host"),
        ("s3://bucket/in/here", "s3://bucket/in/here"),
        ("blockcache::https://user:pass@host/set?token=t", "blockcache::https://host/set"),
        ("https://host/set?next=https://x/y&sig=secret", "https://host/set"),
        ("zip://in::https://user:pass@host/a.zip?sig=https://x@y/", "zip://in::https://host/a.zip"),
    ],
)
def test_secrets_are_left_out_of_what_is_shown(url: str, shown: str) -> None:
    assert without_secrets(url) == shown


def test_a_folder_s_files_are_its_own_and_stay_when_closed(shard_folder: Path) -> None:
    storage = open_storage(str(shard_folder), CacheConfig())
    assert isinstance(storage, LocalFolder)
    held = storage.hold(SetFile("train/shard-000000.tar", 1, SHA))
    assert held.path == shard_folder / "train/shard-000000.tar"
    held.close()
    held.close()
    assert held.path.is_file()
    assert storage.stats() == {}
    assert storage.shown("train/x") == f"{shard_folder}/train/x"
    assert set_index.load(storage).fingerprint("train") == set_index.load(shard_folder).fingerprint("train")


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    storage = open_storage(f"file://{tmp_path}/with%20space", CacheConfig())
    assert isinstance(storage, LocalFolder)
    assert storage.folder == tmp_path / "with space"


def test_a_file_s_address_says_what_it_contains_and_not_where_it_is() -> None:
    assert SetFile("a/x.tar", 5, SHA).address == SetFile("b/y.tar", 5, SHA).address == f"{SHA}.tar"
    assert SetFile("a/x.idx", 7, SHA).address == f"{SHA}-7.idx"
    assert SetFile("a/x.idx", 8, SHA).address != SetFile("a/x.idx", 7, SHA).address


@pytest.mark.parametrize(
    ("url", "folder", "message"),
    [
        ("https://user:pass@host/set", "", r"^https://host/set is remote: set data\.cache\.folder"),
        ("nonsense://x", "/cache", r"^nonsense://x cannot be read: Protocol not known: nonsense"),
        ("dropbox://x", "/cache", r"^dropbox://x needs a package that is not installed .*dropbox"),
    ],
)
def test_a_url_that_cannot_be_read_says_what_to_do(url: str, folder: str, message: str) -> None:
    pytest.importorskip("fsspec")
    with pytest.raises(DataError, match=message):
        open_storage(url, CacheConfig(folder=folder))


@pytest.mark.parametrize(
    ("url", "missing"),
    [("https://host/x", "fsspec"), ("https://host/x", "aiohttp"), ("s3://bucket/x", "s3fs")],
)
def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, url: str, missing: str) -> None:
    pytest.importorskip("fsspec")
    known = importlib.import_module("fsspec.registry")._registry
    for protocol in ("http", "https", "s3"):
        monkeypatch.delitem(known, protocol, raising=False)
    for name in list(sys.modules):
        if name in ("fsspec.implementations.http", "s3fs", "s3fs.core"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(DataError, match=r"^\w+://\w+/x needs .* pip install 'dgt\[remote\]'$"):
        open_storage(url, CacheConfig(folder="/cache"))


def test_reading_a_folder_needs_no_package_for_remote_storage(shard_folder: Path) -> None:
    program = f"""
import sys
for name in ("fsspec", "aiohttp", "s3fs"):
    sys.modules[name] = None
from data_pipeline.config import DataConfig
from data_pipeline.shards import open_source
print(len(open_source(DataConfig(path={str(shard_folder)!r}, num_classes=3), "train").read(0).image) > 0)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr) == ("True\n", "")
