from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.inspect import main


def _lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_a_folder_is_described_from_its_indexes(shard_folder: Path) -> None:
    command = [sys.executable, "-m", "data_pipeline.inspect", str(shard_folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = _lines(done.stdout)
    assert lines[0].endswith("set: classification, 3 classes, splits train, val")
    assert lines[1] == "classes 0 bird, 1 cat, 2 dog"
    assert "train: 24 images in 4 shards, 0.1 MB" in lines
    assert "per class 7 to 9 (median 8) images" in lines
    assert "shards 5 to 6 (median 6) images each" in lines
    assert "image width 33 to 41 (median 37) pixels" in lines
    assert "subsampling 420 (24)" in lines
    check = f"python -m data_pipeline.verify {shard_folder}"
    assert lines[-1] == f"all files are there; to read and check everything in them: {check}"


def test_images_are_not_read(copy: Path, flip) -> None:
    flip(copy / "train" / "shard-000000.tar", 700)
    assert main([str(copy)]) == 0


def test_what_is_missing_cut_or_stale_is_named(copy: Path, capsys: pytest.CaptureFixture[str], flip) -> None:
    (copy / "train" / "shard-000001.tar").unlink()
    (copy / "train" / "shard-000002.idx").unlink()
    flip(copy / "train" / "shard-000003.idx", 100)
    path = copy / "val" / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:-1])
    assert main([str(copy)]) == 1
    damages = [line for line in capsys.readouterr().err.splitlines() if line.startswith("damaged: ")]
    assert [damage.split(": ")[1] for damage in damages] == [
        "train/shard-000001.tar",
        "train/shard-000002.idx",
        "train/shard-000003.tar",
        "val/shard-000000.tar",
    ]
    assert "checksum differs" in damages[2]
    assert "is cut short" in damages[3]


def test_what_is_no_shard_folder_is_said_in_one_sentence(
    tmp_path: Path, shard_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 1
    assert "holds no index.json" in capsys.readouterr().err
    assert main([str(shard_folder / "train")]) == 1
    assert "is one split of a data set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["s3://bucket/set"], "s3://bucket/set is remote"),
        (["SET", "--set", "image_size=3", "--epoch", "2"], "--epoch, --set: of use with --grid only"),
        (["SET", "--evaluation"], "--evaluation: of use with --grid only"),
        (["SET", "--grid", "out.gif"], "is no name of a picture"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_is_named(
    shard_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "full.png"
    full.symlink_to("/dev/full")
    assert main([str(shard_folder), "--grid", str(full), "--rows", "1"]) == 1
    assert capsys.readouterr().err == f"error: {full} cannot be used: No space left on device.\n"


def test_the_grid_is_written_with_the_settings_of_a_configuration(
    shard_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base.yaml").write_text("task: {}\ndata:\n  image_size: 64\n  augment:\n    horizontal_flip: 0.0\n")
    (tmp_path / "own.yaml").write_text(
        "base: base.yaml\nname: x\ndata:\n  num_classes: 7\n  augment: {scale: [1, 1]}\n"
    )
    out = tmp_path / "out.png"
    arguments = [str(shard_folder), "--grid", str(out), "--config", str(tmp_path / "own.yaml"), "--rows", "2"]
    assert main([*arguments, "--columns", "3"]) == 0
    assert capsys.readouterr().out == f"{out}: 416x355 pixels\n"  # 64 pixels, shown twice as large
    first = Image.open(out).copy()
    assert first.size == (416, 355)
    assert main([*arguments, "--columns", "3"]) == 0
    assert Image.open(out).tobytes() == first.tobytes()
    assert main([*arguments, "--columns", "3", "--epoch", "1"]) == 0
    assert Image.open(out).tobytes() != first.tobytes()
    assert main([*arguments, "--columns", "3", "--set", "data.image_size=160"]) == 0
    assert Image.open(out).size == (8 + 3 * 168, 17 + 16 + 2 * (160 + 16 + 17))
    assert main([*arguments, "--columns", "50", "--split", "val", "--image-size", "32"]) == 0
    assert Image.open(out).size == (8 + 11 * 136, 17 + 16 + 128 + 16 + 17), "11 images are all there are"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("augment.rand_augmet=x", "unknown key data.augment.rand_augmet; did you mean data.augment.rand_augment?"),
        ("augment=3", "data.augment: expected a section of keys and values, got 3"),
        ("image_size=big", "--set: data.image_size: Input should be a valid integer"),
        ("augment.scale=[1]", "--set: data.augment.scale.1: Field required"),
        ("augment.interpolation=cubic", "--set: data.augment.interpolation: Input should be 'antialias', 'linear'"),
        ("augment.horizontal_flip=2", "--set: data.augment: horizontal_flip: is a probability"),
        ("augment.rand_augment", "override 'data.augment.rand_augment': expected key.sub=value"),
        ("mean=[0.5, 0.5, a", "is not valid YAML"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(
    shard_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    assert main([str(shard_folder), "--grid", str(tmp_path / "out.png"), "--set", setting]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_a_dense_set_is_described_with_its_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from data_pipeline.shards import set_index
    from data_pipeline.shards.set_index import SetIndex

    targets = {"extension": "seg.png", "first_label": 1, "ignore": [0]}
    index = SetIndex(("wall", "sky"), {}, "segmentation", targets)
    (tmp_path / "index.json").write_bytes(set_index.to_bytes(index))
    assert main([str(tmp_path)]) == 0
    lines = _lines(capsys.readouterr().out)
    assert lines[0].endswith(": segmentation, 2 classes, splits")
    assert lines[2] == "targets KEY.seg.png, values 1 to 2 and 0 (ignored)"


def test_a_folder_of_beton_files_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    split = {"samples": 5, "bytes": 9, "sha256": "0" * 64, "digest": "0" * 64, "left_out": 1, "raw": 2, "checksums": ""}
    content = {"format": "ffcv-beton", "version": 1, "kind": "classification", "classes": ["a"]}
    (tmp_path / "index.json").write_text(json.dumps({**content, "splits": {"train": split, "val": split}}))
    (tmp_path / "train.beton").write_bytes(bytes(9))
    assert main([str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "train: 5 images in one file, 0.0 MB; 2 stored as pixels" in printed.out
    assert "damaged: val.beton: is missing" in printed.err
    (tmp_path / "val.beton").write_bytes(bytes(9))
    assert main([str(tmp_path)]) == 0
