from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.shards import set_index, shard_index
from data_pipeline.shards.source import DataError
from data_pipeline.shards.writer import EncodedSample, member_bytes, tar_header, write_shard


def _sample(key: str, image: bytes, label: int = 0, extension: str = "jpg") -> EncodedSample:
    return EncodedSample(key, extension, image, label, width=40, height=30, subsampling="420")


def _all_samples(folder: Path, split: str) -> dict[str, tuple[bytes, int]]:
    """key -> (image bytes, label), read from the tars with the standard library, not with our reader."""
    found = {}
    for path in sorted((folder / split).glob("*.tar")):
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
        for name, content in files.items():
            key, extension = name.split(".")
            if extension != "cls":
                found[key] = (content, int(files[f"{key}.cls"]))
    return found


def test_webdataset_reads_and_decodes_every_sample_of_the_shards(shard_folder: Path, shard_source: Path) -> None:
    wds = pytest.importorskip("webdataset")
    shards = sorted(str(path) for path in (shard_folder / "train").glob("*.tar"))
    dataset = wds.WebDataset(shards, shardshuffle=False).decode("rgb8").to_tuple("__key__", "jpg", "cls")
    found = {key: (image, label) for key, image, label in dataset}
    assert len(found) == 24
    for label, name in enumerate(("bird", "cat", "dog")):
        for path in (shard_source / "train" / name).iterdir():
            image, found_label = found[f"{name}/{path.stem}"]
            assert found_label == label
            np.testing.assert_array_equal(image, np.asarray(Image.open(path)))


def test_members_are_the_untouched_source_files_with_fixed_owner_and_time(
    shard_folder: Path, shard_source: Path
) -> None:
    samples = _all_samples(shard_folder, "val")
    expected = {
        f"{name}/{path.stem}": (path.read_bytes(), label)
        for label, name in enumerate(("bird", "cat", "dog"))
        for path in (shard_source / "val" / name).iterdir()
    }
    assert samples == expected
    with tarfile.open(shard_folder / "val" / "shard-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode, m.isreg()) for m in tar} == {(0, 0, 0, "", 0o644, True)}


def test_index_tells_place_checksum_label_and_size_of_every_image(shard_folder: Path) -> None:
    for path in (shard_folder / "train").glob("*.tar"):
        index = shard_index.load(path.with_suffix(".idx"))
        data = path.read_bytes()
        assert index.header.samples == 6
        assert (index.header.tar_bytes, index.header.tar_sha256) == (len(data), hashlib.sha256(data).digest())
        with tarfile.open(path) as tar:
            images = [member for member in tar.getmembers() if member.name.endswith(".jpg")]
        assert [member.name for member in images] == [f"{key}.jpg" for key in index.keys]
        for member, record in zip(images, index.records, strict=True):
            image = data[member.offset_data : member.offset_data + member.size]
            with Image.open(io.BytesIO(image)) as opened:
                assert (record["width"], record["height"]) == opened.size
            assert record["offset"] == member.offset_data
            assert record["offset"] - record["header"] == member.offset
            assert (record["size"], record["crc32"]) == (member.size, zlib.crc32(image))
            assert shard_index.SUBSAMPLINGS[record["subsampling"]] == "420"


@pytest.mark.parametrize("name", ["a/b.jpg", "x" * 100, "x" * 101, "ä" * 50, "ä" * 51, "klasse/ü.cls"])
@pytest.mark.parametrize("size", [0, 511, 8**11 - 1])
def test_tar_header_equals_the_one_of_the_standard_library(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    assert tar_header(name, size) == info.tobuf(tarfile.GNU_FORMAT, "utf-8")


def test_names_beyond_100_bytes_keep_image_and_label(tmp_path: Path) -> None:
    key = "klässe/" + "x" * 180
    write_shard(tmp_path / "shard-000000.tar", [_sample("short", b"one", 1), _sample(key, b"two", 2)])
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        assert [member.name for member in tar] == ["short.jpg", "short.cls", f"{key}.jpg", f"{key}.cls"]
        assert tar.extractfile(f"{key}.jpg").read() == b"two"
    record = shard_index.load(tmp_path / "shard-000000.idx").records[1]
    data = (tmp_path / "shard-000000.tar").read_bytes()
    assert data[record["offset"] : record["offset"] + record["size"]] == b"two"


@pytest.mark.parametrize("size", [0, 1, 512, 513])
def test_member_bytes_is_what_a_sample_takes_in_the_tar(tmp_path: Path, size: int) -> None:
    samples = [_sample(f"k{number}", bytes(size)) for number in range(40)]
    end_of_archive = 1024
    written = write_shard(tmp_path / "s.tar", samples)
    assert written.tar_bytes == -(-(40 * member_bytes(size) + end_of_archive) // 10240) * 10240


@pytest.mark.parametrize("keys", [["a.b"], [""], ["same", "same"]])
def test_a_key_that_webdataset_would_mistake_is_refused_and_leaves_no_file(tmp_path: Path, keys: list[str]) -> None:
    with pytest.raises(ValueError, match="key"):
        write_shard(tmp_path / "s.tar", [_sample(key, b"x") for key in keys])
    assert list(tmp_path.iterdir()) == []


def test_an_empty_shard_is_a_tar_without_members(tmp_path: Path) -> None:
    assert write_shard(tmp_path / "s.tar", []).samples == 0
    with tarfile.open(tmp_path / "s.tar") as tar:
        assert tar.getmembers() == []
    assert shard_index.load(tmp_path / "s.idx").keys == ()


def test_every_changed_byte_and_every_length_of_an_index_is_noticed(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", [_sample("cat/1", b"one", 1), _sample("dog/2", b"two", 2)])
    whole = (tmp_path / "s.idx").read_bytes()
    broken = tmp_path / "broken.idx"
    for position in range(len(whole)):
        broken.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        with pytest.raises(DataError, match=r"broken\.idx cannot be used"):
            shard_index.load(broken)
        broken.write_bytes(whole[:position])
        with pytest.raises(DataError, match=r"broken\.idx cannot be used"):
            shard_index.load(broken)


def test_set_index_survives_writing_and_reading(shard_folder: Path, tmp_path: Path) -> None:
    index = set_index.load(shard_folder)
    (tmp_path / "index.json").write_bytes(set_index.to_bytes(index))
    assert (tmp_path / "index.json").read_bytes() == (shard_folder / "index.json").read_bytes()
    again = set_index.load(tmp_path)
    assert again.classes == ("bird", "cat", "dog")
    assert again.splits["train"].samples.tolist() == [6, 6, 6, 6]
    assert again.splits["val"].total == 11
    assert again.fingerprint("train") == index.fingerprint("train") != index.fingerprint("val")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("splits", "train", "shards", "sha256"), "0" * 64 * 4),
        (("splits", "train", "shards", "sha256"), "0" * 65),
        (("splits", "train", "shards", "samples", 0), 5),
        (("splits", "train", "shards", "samples"), [6]),
        (("splits", "train", "shards", "name", 0), "../elsewhere.tar"),
        (("splits", "train", "shards"), None),
        (("classes",), ["bird", "dog", "cat"]),
        (("fingerprint",), "0" * 64),
        (("format",), "something else"),
        (("version",), 99),
    ],
)
def test_an_edited_set_index_is_refused_by_name(
    shard_folder: Path, tmp_path: Path, place: tuple[str | int, ...], value: object
) -> None:
    content = json.loads((shard_folder / "index.json").read_text())
    target = content
    for step in place[:-1]:
        target = target[step]
    target[place[-1]] = value
    (tmp_path / "index.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"index\.json"):
        set_index.load(tmp_path)
