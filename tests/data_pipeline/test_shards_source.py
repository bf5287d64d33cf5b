from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.config import DataConfig
from data_pipeline.shards import DamagedSampleError, DataError, Source, reader, shard_index
from data_pipeline.shards.reader import TarSource, open_source


def _config(folder: Path, num_classes: int = 3) -> DataConfig:
    return DataConfig(path=str(folder), num_classes=num_classes)


def test_source_serves_every_image_of_the_folder_with_its_label(shard_folder: Path, shard_source: Path) -> None:
    source = open_source(_config(shard_folder), "train")
    assert isinstance(source, Source)
    assert (len(source), source.num_classes, source.class_names) == (24, 3, ("bird", "cat", "dog"))
    assert source.shard_sizes.tolist() == [6, 6, 6, 6]
    samples = [source.read(index) for index in range(24)]
    assert [sample.shard for sample in samples] == [f"train/shard-{index // 6:06d}.tar" for index in range(24)]
    assert len({sample.key for sample in samples}) == 24
    for sample in samples:
        assert sample.image == (shard_source / "train" / f"{sample.key}.jpg").read_bytes()
        assert source.class_names[sample.label] == sample.key.split("/")[0]
    assert {sample.label for sample in samples[:6]} != {samples[0].label}, "classes are not mixed"


@pytest.mark.parametrize("index", [-1, 24, 10**12])
def test_an_index_out_of_range_is_an_index_error(shard_folder: Path, index: int) -> None:
    with pytest.raises(IndexError, match="of 24"):
        open_source(_config(shard_folder), "train").read(index)


def test_empty_and_unequal_shards_are_counted_through(tmp_path: Path, image_file, image_tree) -> None:
    from data_pipeline.prepare import main

    source = image_tree(tmp_path / "source", {"train": {"cat": 7}, "val": {"cat": 1}})
    for path in (source / "train").rglob("*.jpg"):
        if path.stem not in ("0000", "0003"):
            path.write_bytes(b"no image")
    out = tmp_path / "out"
    assert main(["imagefolder", "--src", str(source), "--out", str(out), "--shard-size", "1", "--jobs", "1"]) == 3
    opened = open_source(_config(out, 1), "train")
    assert sorted(opened.shard_sizes.tolist()) == [0, 0, 0, 0, 0, 1, 1]
    assert {opened.read(0).key, opened.read(1).key} == {"cat/0000", "cat/0003"}


def test_many_threads_read_right_samples_while_shards_are_closed_under_them(
    shard_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [open_source(_config(shard_folder), "train").read(index) for index in range(24)]
    monkeypatch.setattr(reader, "max_open_shards", lambda: 1)
    source = open_source(_config(shard_folder), "train")
    wrong: list[int] = []

    def read_all(stride: int) -> None:
        for step in range(480):
            index = step * stride % 24
            if source.read(index) != expected[index]:
                wrong.append(index)

    threads = [threading.Thread(target=read_all, args=(stride,)) for stride in (1, 5, 7, 11)]
    before = len(os.listdir("/proc/self/fd"))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    source.close()
    assert len(os.listdir("/proc/self/fd")) <= before
    with pytest.raises(ValueError, match="closed"):
        source.read(0)


def test_fingerprint_depends_on_the_data_and_not_on_the_place(shard_folder: Path, copy: Path) -> None:
    train = open_source(_config(shard_folder), "train").fingerprint
    assert open_source(_config(copy), "train").fingerprint == train
    assert open_source(_config(shard_folder), "val").fingerprint != train


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), "is cut short"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "has .* bytes instead of"),
    ],
)
@pytest.mark.parametrize("name", ["shard-000002.tar", "shard-000001.idx"])
def test_opening_names_the_shard_that_is_missing_empty_or_cut(copy: Path, damage, message: str, name: str) -> None:
    damage(copy / "train" / name)
    with pytest.raises(DataError, match=f"{name} {message}.*Run the prepare command") as caught:
        open_source(_config(copy), "train")
    assert str(caught.value).count("shard-") == 1
    assert len(open_source(_config(copy), "val")) == 11


def test_opening_what_is_no_prepared_folder_says_what_it_is(shard_folder: Path, tmp_path: Path) -> None:
    cases = {
        "": "set the data path",
        str(tmp_path / "nowhere"): "There is no folder",
        str(tmp_path): r"holds no index\.json.*interrupted",
        str(shard_folder / "train"): "is one split of a data set",
    }
    for path, message in cases.items():
        with pytest.raises(DataError, match=message):
            open_source(DataConfig(path=path), "train")
    with pytest.raises(DataError, match="no split 'test'; it has train, val"):
        open_source(_config(shard_folder), "test")
    with pytest.raises(DataError, match="has 3 classes, but the configuration says 10"):
        open_source(_config(shard_folder, 10), "train")


def test_a_folder_in_place_of_a_file_and_a_file_in_place_of_a_folder_are_data_errors(copy: Path) -> None:
    with pytest.raises(DataError, match=r"train/shard-000000\.tar/index\.json cannot be read: Not a directory"):
        open_source(_config(copy / "train" / "shard-000000.tar"), "train")
    shutil.rmtree(copy / "train")
    (copy / "train").write_bytes(b"")
    with pytest.raises(DataError, match="copy/train cannot be read: Not a directory"):
        open_source(_config(copy), "train")
    (copy / "index.json").unlink()
    (copy / "index.json").mkdir()
    with pytest.raises(DataError, match=r"copy/index\.json cannot be read: Is a directory"):
        open_source(_config(copy), "val")
    with pytest.raises(DataError, match="copy/val cannot be read: Is a directory"):
        shard_index.load(copy / "val")


def test_a_flipped_byte_in_an_image_is_noticed_with_shard_and_key(copy: Path, shard_folder: Path, flip) -> None:
    index = shard_index.load(copy / "train" / "shard-000001.idx")
    record = index.records[2]
    flip(copy / "train" / "shard-000001.tar", int(record["offset"]) + int(record["size"]) // 2)
    source, intact = open_source(_config(copy), "train"), open_source(_config(shard_folder), "train")
    with pytest.raises(DamagedSampleError, match="checksum") as caught:
        source.read(8)
    assert (caught.value.shard, caught.value.key) == ("train/shard-000001.tar", index.keys[2])
    assert [source.read(index) for index in (7, 9)] == [intact.read(index) for index in (7, 9)]


def test_a_shard_cut_after_opening_damages_only_the_samples_beyond_the_cut(copy: Path) -> None:
    source = open_source(_config(copy), "train")
    index = shard_index.load(copy / "train" / "shard-000000.idx")
    os.truncate(copy / "train" / "shard-000000.tar", int(index.records[3]["offset"]) + 10)
    assert [source.read(row).key for row in range(3)] == list(index.keys[:3])
    for row in (3, 4, 5):
        with pytest.raises(DamagedSampleError, match="cut short") as caught:
            source.read(row)
        assert caught.value.key == index.keys[row]


def test_an_index_of_another_shard_is_refused(copy: Path) -> None:
    path = copy / "train" / "shard-000001.idx"
    index = shard_index.load(path)
    rows = [index.rows_of(number) for number in range(len(index.keys))]
    stale = shard_index.pack(index.records, list(index.keys), rows, index.header.tar_bytes, bytes(32))
    path.write_bytes(stale)
    source = open_source(_config(copy), "train")
    assert source.read(0).shard == "train/shard-000000.tar"
    with pytest.raises(DataError, match=r"shard-000001\.idx belongs to another shard"):
        source.read(6)


def test_a_damaged_sample_error_survives_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(DamagedSampleError("train/s.tar", "cat/1", "why")))
    assert (error.shard, error.key, error.reason) == ("train/s.tar", "cat/1", "why")
    assert str(error) == "sample 'cat/1' in shard train/s.tar: why"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(["shard-000000.tar", "shard-000000.idx"]))
def test_whatever_byte_changes_no_wrong_sample_is_ever_served(
    shard_folder: Path, tmp_path: Path, data, name: str
) -> None:
    intact = [open_source(_config(shard_folder), "train").read(row) for row in range(6)]
    folder = tmp_path / "fuzzed"
    if not folder.exists():
        shutil.copytree(shard_folder, folder)
    whole = (shard_folder / "train" / name).read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    changed = bytes([whole[position] ^ data.draw(st.integers(1, 255))])
    for other in ("shard-000000.tar", "shard-000000.idx"):
        shutil.copy(shard_folder / "train" / other, folder / "train" / other)
    (folder / "train" / name).write_bytes(whole[:position] + changed + whole[position + 1 :])
    source: TarSource = open_source(_config(folder), "train")
    refused = 0
    for row in range(6):
        try:
            assert source.read(row) == intact[row]
        except (DamagedSampleError, DataError):
            refused += 1
    assert refused <= 1 or name.endswith(".idx")
