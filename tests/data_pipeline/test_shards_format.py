from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import jpegs
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.config import DataConfig
from data_pipeline.restart_rows import RestartRows, insert
from data_pipeline.shards import set_index, shard_index
from data_pipeline.shards.reader import TarSource, open_source
from data_pipeline.shards.source import DamagedSampleError, DataError
from data_pipeline.shards.verify import verify_shard
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


def _dense_samples() -> list[EncodedSample]:
    """One with label and target, one with a target alone, one with a label alone; two of them with restart rows."""
    pytest.importorskip("simplejpeg")
    jpeg, rows = insert(jpegs.of_kind("4:2:0"))
    gray, gray_rows = insert(jpegs.of_kind("gray"))
    mask = {"target": b"a mask" * 200, "target_extension": "seg.png"}
    return [
        EncodedSample("both", "jpg", jpeg, 4, 101, 75, "420", 6, restart_rows=rows, **mask),
        EncodedSample("mask", "jpg", jpeg[:700], -1, 101, 75, "420", **mask),
        EncodedSample("label", "jpg", gray, 5, 101, 75, "Gray", 8, restart_rows=gray_rows),
        EncodedSample("boxes", "png", b"x" * 512, -1, 9, 9, "not a JPEG", 1, b"{}", "json"),
    ]


def test_index_tells_target_orientation_and_rows(tmp_path: Path) -> None:
    samples = _dense_samples()
    path = tmp_path / "s.tar"
    written = write_shard(path, samples)
    index, data = shard_index.load(path.with_suffix(".idx")), path.read_bytes()
    assert written.index_bytes == path.with_suffix(".idx").stat().st_size == index.header.file_bytes
    with tarfile.open(path) as tar:
        names = [member.name for member in tar]
    assert names[:7] == ["both.jpg", "both.cls", "both.seg.png", "mask.jpg", "mask.seg.png", "label.jpg", "label.cls"]
    assert names[7:] == ["boxes.png", "boxes.json"]
    for number, sample in enumerate(samples):
        record, rows = index.records[number], index.rows_of(number)
        label = shard_index.NO_LABEL if sample.label < 0 else sample.label
        assert (record["label"], record["orientation"], record["target_size"]) == (
            label,
            sample.orientation,
            len(sample.target or b""),
        )
        begin = record["offset"] + record["size"] + record["target_gap"]
        if sample.target:
            assert data[begin : begin + record["target_size"]] == sample.target
            assert record["target_crc32"] == zlib.crc32(sample.target)
        assert rows["offset"].tolist() == list(sample.restart_rows)
        ends = (*sample.restart_rows[1:], len(sample.image))
        pieces = [sample.image[start:end] for start, end in zip(sample.restart_rows, ends, strict=False)]
        assert rows["crc32"].tolist() == [zlib.crc32(b"".join(pieces[: last + 1])) for last in range(len(pieces))]


@pytest.mark.parametrize(
    "change",
    [
        {"target": b"", "target_extension": "json"},
        {"target": b"{}"},
        {"restart_rows": (1, 2)},
        {"restart_rows": (0, 2, 2)},
        {"restart_rows": (0, 3)},
    ],
)
def test_fields_that_contradict_each_other_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="of 'key'"):
        write_shard(tmp_path / "s.tar", [replace(_sample("key", b"abc"), **change)])
    assert list(tmp_path.iterdir()) == []


def test_an_index_of_version_1_is_refused_by_its_version(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", [])
    data = (tmp_path / "s.idx").read_bytes()
    (tmp_path / "s.idx").write_bytes(data[:8] + (1).to_bytes(4, "little") + data[12:68])
    with pytest.raises(
        DataError, match=r"s\.idx cannot be used: it has format version 1, and this program reads version 2"
    ):
        shard_index.load(tmp_path / "s.idx")


def test_every_changed_byte_and_every_length_of_an_index_is_noticed(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", _dense_samples())
    whole = (tmp_path / "s.idx").read_bytes()
    broken = tmp_path / "broken.idx"
    for position in range(len(whole)):
        broken.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        with pytest.raises(DataError, match=r"broken\.idx cannot be used"):
            shard_index.load(broken)
        broken.write_bytes(whole[:position])
        with pytest.raises(DataError, match=r"broken\.idx cannot be used"):
            shard_index.load(broken)


def test_every_changed_byte_of_a_record_is_noticed_where_one_sample_is_read(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", _dense_samples())
    whole = (tmp_path / "s.idx").read_bytes()
    header = shard_index.parse_header(whole)
    for position in range(shard_index.HEADER.size, len(whole) - 4):
        damaged = whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :]
        wrong = 0
        for row in range(header.samples):
            try:
                record = shard_index.read_record(lambda size, at: damaged[at : at + size], header, row)  # noqa: B023
            except ValueError:
                wrong += 1
                continue
            assert record == shard_index.read_record(lambda size, at: whole[at : at + size], header, row)
        assert wrong == 1


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300), row=st.integers(0, 10), head=st.booleans())
def test_fuzzed_indexes_give_only_the_documented_errors(tmp_path: Path, data: bytes, row: int, head: bool) -> None:
    if head:
        data = shard_index.MAGIC + shard_index.VERSION.to_bytes(4, "little") + data
    (tmp_path / "fuzzed.idx").write_bytes(data)
    with pytest.raises(DataError, match=r"fuzzed\.idx cannot be used"):
        shard_index.load(tmp_path / "fuzzed.idx")
    with pytest.raises(ValueError, match=r"it is|it ends|it has|its header"):
        shard_index.parse_header(data)
    header = shard_index.Header(1 + row, len(data), len(data), 0, bytes(32))
    with pytest.raises(ValueError, match="record"):
        shard_index.read_record(lambda size, at: data[at : at + size], header, row)


def test_verifying_finds_every_changed_byte_of_labels_targets_and_their_headers(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    write_shard(path, _dense_samples())
    index, whole = shard_index.load(path.with_suffix(".idx")), path.read_bytes()
    assert list(verify_shard(path, index, lambda count: None)) == []
    first = index.records[0]
    begin = int(first["offset"] + first["size"])
    end = begin + int(first["target_gap"] + first["target_size"])
    elsewhere = 0  # in padding, which belongs to no sample
    for position in range(begin, end, 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x41]) + whole[position + 1 :])
        found = list(verify_shard(path, index, lambda count: None))
        assert len(found) == 1, f"byte {position - begin}"
        elsewhere += found[0].key == ""
        assert found[0].key in ("both", "")
    assert elsewhere < (end - begin) / 7 / 2


def test_source_gives_targets_and_rows_and_proves_them(tmp_path: Path) -> None:
    samples = _dense_samples()
    written = write_shard(tmp_path / "s.tar", samples)
    whole = (tmp_path / "s.tar").read_bytes()
    index = shard_index.load(tmp_path / "s.idx")

    columns = ([written.samples], [written.tar_bytes], [written.index_bytes])
    split = set_index.SplitIndex(("s.tar",), *map(np.array, columns), (written.sha256,), 0)
    content = set_index.to_bytes(set_index.SetIndex(tuple("abcdefgh"), {"train": split}))
    (tmp_path / "index.json").write_bytes(content)
    (tmp_path / "train").mkdir()
    for name in ("s.tar", "s.idx"):
        (tmp_path / name).rename(tmp_path / "train" / name)
    path = tmp_path / "train" / "s.tar"

    def source() -> TarSource:
        return open_source(DataConfig(path=str(tmp_path), num_classes=8), "train")

    for number, sample in enumerate(samples):
        read = source().read(number)
        assert (read.key, read.label, read.target, read.verified) == (sample.key, sample.label, sample.target, True)
        image = read.image.whole() if isinstance(read.image, RestartRows) else read.image
        assert isinstance(read.image, RestartRows) == bool(sample.restart_rows)
        assert image == sample.image
    both, gap = index.records[0], int(index.records[0]["target_gap"])
    begin, size = int(both["offset"]), int(both["size"])
    rows = samples[0].restart_rows
    for place, what in [
        (begin + rows[3] + 5, "restart row"),
        (begin + size + gap + 7, "the target's bytes were changed"),
    ]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DamagedSampleError, match=what):
            source().read(0).image.whole()
    path.write_bytes(whole[: begin + rows[3] + 5] + b"?" + whole[begin + rows[3] + 6 :])
    image = source().read(0).image
    assert image.read([(0, 3)]) == samples[0].image[: rows[3]]
    with pytest.raises(DamagedSampleError, match=r"'both' in shard .*checksum of a restart row differs"):
        image.read([(3, 4)])


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
