from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.inspect import main
from data_pipeline.shards import shard_index
from data_pipeline.shards.writer import tar_header


@pytest.fixture
def copy(shard_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(shard_folder, tmp_path / "copy")
    return tmp_path / "copy"


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x01
    path.write_bytes(data)


def _damages(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("damaged: ")]


def test_a_sound_folder_is_counted_and_called_sound(shard_folder: Path) -> None:
    command = [sys.executable, "-m", "data_pipeline.inspect", str(shard_folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[0].endswith("3 classes, splits train, val")
    assert lines[1] == "classes 0 bird, 1 cat, 2 dog"
    assert "train: 24 images in 4 shards, 0.1 MB" in lines
    assert "per class 7 to 9 (median 8) images" in lines
    assert "shards 5 to 6 (median 6) images each" in lines
    assert "image width 33 to 41 (median 37) pixels" in lines
    assert "subsampling 420 (24)" in lines
    assert lines[-1] == "sound: every shard, tar header, image and label is as it was written"


def test_every_kind_of_flipped_byte_is_found_with_its_shard_and_key(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "train" / "shard-000002.tar"
    index = shard_index.load(path.with_suffix(".idx"))
    offset, size = int(index.records[4]["offset"]), int(index.records[4]["size"])
    label_header = offset + -(-size // 512) * 512
    intact = path.read_bytes()
    for position, message in [
        (offset + size // 2, "the image's bytes were changed"),
        (offset - 512 + 3, "the tar header of the image is damaged"),
        (offset - 512 + 126, "the tar header of the image is damaged"),
        (label_header + 2, "the tar header of the label is damaged"),
        (label_header + 150, "the tar header of the label is damaged"),
        (label_header + 512, "the label is b"),
    ]:
        path.write_bytes(intact)
        _flip(path, position)
        assert main([str(copy)]) == 1
        (damage,) = _damages(capsys)
        assert damage.startswith(f"damaged: train/shard-000002.tar: '{index.keys[4]}': {message}"), position
        assert main([str(copy), "--no-verify"]) == 0
        capsys.readouterr()


def test_a_flipped_byte_between_files_damages_the_shard_but_no_sample(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "val" / "shard-000000.tar"
    _flip(path, path.stat().st_size - 1)
    assert main([str(copy)]) == 1
    (damage,) = _damages(capsys)
    assert damage.startswith("damaged: val/shard-000000.tar: bytes outside of the images")


def test_a_cut_shard_is_named_with_the_keys_that_are_lost(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "train" / "shard-000000.tar"
    index = shard_index.load(path.with_suffix(".idx"))
    os.truncate(path, int(index.records[4]["offset"]) + 5)
    for arguments, lost in (([], index.keys[4:]), (["--no-verify"], ())):
        assert main([str(copy), *arguments]) == 1
        damages = _damages(capsys)
        assert damages[0].startswith("damaged: train/shard-000000.tar: is cut short (")
        assert damages[1:] == [
            f"damaged: train/shard-000000.tar: '{key}': lost: the shard ends before it" for key in lost
        ]


def test_missing_and_damaged_indexes_are_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "train" / "shard-000001.tar").unlink()
    (copy / "train" / "shard-000002.idx").unlink()
    _flip(copy / "train" / "shard-000003.idx", 100)
    assert main([str(copy)]) == 1
    damages = _damages(capsys)
    assert [damage.split(": ", 2)[1] for damage in damages] == [
        "train/shard-000001.tar",
        "train/shard-000002.idx",
        "train/shard-000003.tar",
    ]
    assert "checksum differs" in damages[2]


def test_what_is_no_shard_folder_is_said_in_one_sentence(
    tmp_path: Path, shard_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 1
    assert "holds no index.json" in capsys.readouterr().err
    assert main([str(shard_folder / "train")]) == 1
    assert "is one split of a data set" in capsys.readouterr().err


def test_every_byte_of_a_small_shard_matters(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "val" / "shard-000001.tar"
    intact = path.read_bytes()
    for position in np.linspace(0, len(intact) - 1, 60, dtype=int).tolist():
        path.write_bytes(intact)
        _flip(path, position)
        assert main([str(copy)]) == 1, position
        assert len(_damages(capsys)) == 1, position


def test_a_header_that_is_valid_but_another_file_s_is_found(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "train" / "shard-000000.tar"
    index = shard_index.load(path.with_suffix(".idx"))
    begin = int(index.records[1]["offset"]) - 512
    data = path.read_bytes()
    path.write_bytes(data[:begin] + tar_header("other/0001.jpg", int(index.records[1]["size"])) + data[begin + 512 :])
    assert main([str(copy)]) == 1
    (damage,) = _damages(capsys)
    assert damage == f"damaged: train/shard-000000.tar: '{index.keys[1]}': the tar header of the image is damaged"
