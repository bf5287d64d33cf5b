from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline import restart_rows
from data_pipeline.prepare.examine import examine
from data_pipeline.shards import set_index, shard_index
from data_pipeline.shards.set_index import SetIndex, SplitIndex
from data_pipeline.shards.writer import EncodedSample, tar_header, write_shard
from data_pipeline.verify import main

MASKS = {"extension": "seg.png", "first_label": 1, "ignore": [0]}
OBJECTS = {"extension": "json", "category_ids": [7, 9], "masks": False}


def _sample(key: str, image: bytes, label: int = 0, target: bytes | None = None, extension: str = "") -> EncodedSample:
    facts = examine(image)
    return EncodedSample(
        key, facts.extension, image, label, facts.width, facts.height, facts.subsampling, facts.orientation,
        target, extension,
    )  # fmt: skip


def _write_set(
    folder: Path, shards: list[list[EncodedSample]], kind: str = "classification", targets: Any = None
) -> Path:
    """A set with the classes "a" and "b" and one split, written without any of prepare's checks."""
    (folder / "train").mkdir(parents=True)
    names = tuple(f"shard-{number:06d}.tar" for number in range(len(shards)))
    written = [write_shard(folder / "train" / name, shard) for name, shard in zip(names, shards, strict=True)]
    numbers = (np.array([getattr(w, name) for w in written]) for name in ("samples", "tar_bytes", "index_bytes"))
    split = SplitIndex(names, *numbers, tuple(shard.sha256 for shard in written), left_out=0)
    index = SetIndex(("a", "b"), {"train": split}, kind, targets or {})
    (folder / "index.json").write_bytes(set_index.to_bytes(index))
    return folder


def _mask(values: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.asarray(values, np.uint8)).save(file, "PNG")
    return file.getvalue()


def _objects(image_id: int, ids: list[int], box: Any = (1, 1, 5, 5), width: int = 40, category: int = 1) -> bytes:
    entries = [{"id": i, "category": category, "bbox": list(box), "area": 25, "iscrowd": 0} for i in ids]
    content = {"image_id": image_id, "file_name": "x.jpg", "width": width, "height": 30, "annotations": entries}
    return json.dumps(content).encode()


def _damages(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("damaged: ")]


def test_a_sound_folder_is_called_sound(shard_folder: Path) -> None:
    command = [sys.executable, "-m", "data_pipeline.verify", str(shard_folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{shard_folder}: classification, samples: train 24, val 11; read in ")
    assert lines[-1] == "sound: every file, image and target is as it must be"


def test_every_kind_of_flipped_byte_is_found_with_its_shard_and_key(
    copy: Path, capsys: pytest.CaptureFixture[str], flip
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
        flip(path, position)
        assert main([str(copy)]) == 1
        (damage,) = _damages(capsys)
        assert damage.startswith(f"damaged: train/shard-000002.tar: '{index.keys[4]}': {message}"), position
        assert main([str(copy), "--no-decode"]) == 1
        assert _damages(capsys) == [damage]


def test_a_flipped_byte_between_files_damages_the_shard_but_no_sample(
    copy: Path, capsys: pytest.CaptureFixture[str], flip
) -> None:
    path = copy / "val" / "shard-000000.tar"
    flip(path, path.stat().st_size - 1)
    assert main([str(copy)]) == 1
    (damage,) = _damages(capsys)
    assert damage.startswith("damaged: val/shard-000000.tar: bytes outside of the images")


def test_a_cut_shard_is_named_with_the_keys_that_are_lost(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "train" / "shard-000000.tar"
    index = shard_index.load(path.with_suffix(".idx"))
    os.truncate(path, int(index.records[4]["offset"]) + 5)
    assert main([str(copy)]) == 1
    damages = _damages(capsys)
    assert damages[0].startswith("damaged: train/shard-000000.tar: is cut short (")
    lost = [f"damaged: train/shard-000000.tar: '{key}': lost: the shard ends before it" for key in index.keys[4:]]
    assert damages[1:] == lost


def test_missing_and_damaged_indexes_are_named(copy: Path, capsys: pytest.CaptureFixture[str], flip) -> None:
    (copy / "train" / "shard-000001.tar").unlink()
    (copy / "train" / "shard-000002.idx").unlink()
    flip(copy / "train" / "shard-000003.idx", 100)
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
    assert main([str(tmp_path)]) == 3
    assert "holds no index.json" in capsys.readouterr().err
    assert main([str(shard_folder / "train")]) == 3
    assert "is one split of a data set" in capsys.readouterr().err


def test_every_byte_of_a_small_shard_matters(copy: Path, capsys: pytest.CaptureFixture[str], flip) -> None:
    path = copy / "val" / "shard-000001.tar"
    intact = path.read_bytes()
    for position in np.linspace(0, len(intact) - 1, 60, dtype=int).tolist():
        path.write_bytes(intact)
        flip(path, position)
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


def test_images_that_do_not_decode_or_are_not_as_stated_are_found_although_their_bytes_are_as_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], image_file
) -> None:
    good = _sample("good", image_file(1))
    cut = replace(_sample("cut", image_file(2)), image=image_file(2)[:-200])
    wide = replace(_sample("wide", image_file(3)), width=41)
    turned = replace(_sample("turned", image_file(3)), orientation=6)
    named = replace(_sample("named", image_file(3)), extension="png")
    out_of_range, no_label = _sample("label", image_file(4), label=2), _sample("none", image_file(5), label=-1)
    folder = _write_set(tmp_path / "set", [[good, cut, wide, turned], [named, out_of_range, no_label]])
    assert main([str(folder)]) == 1
    found = _damages(capsys)
    assert found[0].startswith("damaged: train/shard-000000.tar: 'cut': the image cannot be decoded: ")
    assert [line.removeprefix("damaged: train/shard-00000") for line in found[1:]] == [
        "0.tar: 'wide': the image's width is 40, and 41 is stated",
        "0.tar: 'turned': the image's orientation is 1, and 6 is stated",
        "1.tar: 'named': the image's extension is jpg, and png is stated",
        "1.tar: 'label': its label 2 is none of the 2 classes",
        "1.tar: 'none': it has no label",
    ]
    assert main([str(folder), "--no-decode"]) == 1
    assert [line.split("'")[1] for line in _damages(capsys)] == ["label", "none"]


def test_a_key_that_occurs_in_two_shards_is_found_with_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], image_file
) -> None:
    shards = [[_sample("a", image_file(1)), _sample("b", image_file(2))], [_sample("c", image_file(3))]]
    folder = _write_set(tmp_path / "set", [*shards, [_sample("d", image_file(4)), _sample("b", image_file(5))]])
    assert main([str(folder)]) == 1
    expected = "damaged: train/shard-000000.tar: 'b': occurs again in train/shard-000002.tar"
    assert _damages(capsys) == [expected]


def test_a_shard_that_the_index_does_not_name_is_found(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(copy / "val" / "shard-000000.tar", copy / "val" / "shard-000009.tar")
    assert main([str(copy)]) == 1
    assert _damages(capsys) == [
        "damaged: val/shard-000009.tar: is no part of the set: index.json does not name it"
    ]  # fmt: skip


def test_shards_beside_the_splits_are_found_and_beton_files_among_them(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "old").mkdir()
    shutil.copy(copy / "val" / "shard-000000.tar", copy / "old" / "shard-000000.tar")
    (copy / "train.beton").write_bytes(b"no part of this set")
    assert main([str(copy)]) == 1
    assert _damages(capsys) == [
        "damaged: train.beton: is no part of the set: index.json does not name it",
        "damaged: old/shard-000000.tar: is no part of the set: index.json does not name it",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["https://host/set"], "https://host/set is remote"),
        (["SET", "--json", "/nowhere/report.json"], "/nowhere/report.json cannot be written"),
        (["SET", "--json", "/"], "/ cannot be written"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_read(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_report_that_a_full_disk_refuses_hides_no_damage(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(copy), "--json", "/dev/full"]
    assert main(arguments) == 3
    assert "error: /dev/full cannot be written: No space left on device." in capsys.readouterr().err
    (copy / "val" / "shard-000000.tar").unlink()
    assert main(arguments) == 1
    assert "val/shard-000000.tar: is missing" in capsys.readouterr().err


def test_masks_are_read_and_compared_with_image_and_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], image_file
) -> None:
    def sample(key: str, target: bytes | None, extension: str = "seg.png") -> EncodedSample:
        return _sample(key, image_file(1), -1, target, extension if target else "")

    fine = np.arange(30 * 40).reshape(30, 40) % 3
    shard = [
        sample("fine", _mask(fine)),
        sample("value", _mask(fine + 1)),
        sample("size", _mask(fine.T)),
        sample("torn", _mask(fine)[:-30]),
        sample("none", None),
        sample("other", b"{}", "json"),
    ]
    folder = _write_set(tmp_path / "set", [shard], "segmentation", MASKS)
    assert main([str(folder)]) == 1
    found = [line.removeprefix("damaged: train/shard-000000.tar: ") for line in _damages(capsys)]
    assert found[:2] == [
        "'value': the mask holds the value 3; allowed are 1 to 2 and 0 (ignored)",
        "'size': the mask is 30x40 and the image, upright, 40x30; if EXIF says that the image is to be turned, "
        "turn its pixels and remove the note, or turn the target",
    ]
    assert found[2].startswith("'torn': the mask is damaged: ")
    assert found[3:] == [
        "'none': it has no target, and index.json promises .seg.png",
        "'other': it has a target .json, and index.json promises .seg.png",
    ]


def test_annotations_are_read_and_ids_must_be_unique_in_the_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], image_file
) -> None:
    def sample(key: str, *arguments: Any, **changes: Any) -> EncodedSample:
        return _sample(key, image_file(1), -1, _objects(*arguments, **changes), "json")

    first = [sample("a", 1, [10, 11]), sample("b", 2, []), sample("outside", 3, [12], box=(41, 0, 2, 2))]
    second = [sample("c", 1, [13]), sample("d", 4, [11]), sample("size", 5, [14], width=39)]
    folder = _write_set(tmp_path / "set", [first, second], "detection", OBJECTS)
    assert main([str(folder)]) == 1
    found = [line.removeprefix("damaged: train/shard-00000") for line in _damages(capsys)]
    assert found == [
        "0.tar: 'outside': annotation 12: its box [41, 0, 2, 2] lies outside of the image of 40x30",
        "1.tar: 'size': the image that the annotations describe is 39x30 and the image, upright, 40x30",
        "0.tar: image id 1: occurs again in train/shard-000001.tar",
        "0.tar: annotation id 11: occurs again in train/shard-000001.tar",
    ]


def test_a_sound_set_is_sound_without_the_optional_packages(
    shard_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("simplejpeg", "rich.console"):
        monkeypatch.setitem(sys.modules, package, None)
    assert main([str(shard_folder)]) == 0
    assert capsys.readouterr().err == "verifying: 35 images (for a progress bar: pip install rich)\n"


def test_restart_rows_that_are_not_those_of_the_image_are_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], image_file
) -> None:
    image, rows = restart_rows.insert(image_file(1, height=60))
    fine = replace(_sample("fine", image), restart_rows=rows)
    wrong = replace(_sample("wrong", image), restart_rows=(*rows[:-1], rows[-1] + 1))
    none = replace(_sample("none", image_file(1, height=60)), restart_rows=(0, 200))
    folder = _write_set(tmp_path / "set", [[fine, wrong, none]])
    assert main([str(folder)]) == 1
    message = "the restart rows in the index are not those of the image"
    assert _damages(capsys) == [f"damaged: train/shard-000000.tar: '{key}': {message}" for key in ("wrong", "none")]


def test_checksums_of_restart_rows_are_compared_without_decoding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], image_file
) -> None:
    image, rows = restart_rows.insert(image_file(1, height=60))
    folder = _write_set(tmp_path / "set", [[replace(_sample("rows", image), restart_rows=rows)]])
    assert main([str(folder), "--no-decode"]) == 0
    path = folder / "train" / "shard-000000.idx"
    index = shard_index.load(path)
    table = index.rows.copy()
    table["crc32"][2] ^= 1
    packed = shard_index.pack(index.records, list(index.keys), [table], index.header.tar_bytes, index.header.tar_sha256)
    path.write_bytes(packed)
    capsys.readouterr()
    assert main([str(folder), "--no-decode"]) == 1
    (damage,) = _damages(capsys)
    assert damage.endswith("'rows': the restart rows in the index are not those of the image")


def test_the_report_for_programs_says_the_same(copy: Path, tmp_path: Path, flip) -> None:
    report = tmp_path / "report.json"
    assert main([str(copy), "--json", str(report), "--jobs", "3"]) == 0
    sound = json.loads(report.read_bytes())
    assert (sound["sound"], sound["damages"], sound["samples"]) == (True, [], {"train": 24, "val": 11})
    index = shard_index.load(copy / "train" / "shard-000001.idx")
    flip(copy / "train" / "shard-000001.tar", int(index.records[0]["offset"]) + 50)
    assert main([str(copy), "--json", str(report), "--jobs", "3"]) == 1
    damaged = json.loads(report.read_bytes())
    what = "the image's bytes were changed (checksum differs)"
    assert damaged["damages"] == [{"shard": "train/shard-000001.tar", "key": index.keys[0], "what": what}]
    assert damaged["sound"] is False


@pytest.mark.ffcv
def test_beton_files_are_read_and_damage_in_them_is_found(
    tmp_path: Path, shard_source: Path, capsys: pytest.CaptureFixture[str], flip
) -> None:
    from data_pipeline.prepare import main as prepare

    out = tmp_path / "out"
    assert prepare(["imagefolder", "--src", str(shard_source), "--out", str(out), "--format", "ffcv"]) == 0
    assert main([str(out)]) == 0
    assert "samples: train 24, val 11" in capsys.readouterr().out
    path = out / "val.beton"
    intact = path.read_bytes()
    image = intact.index(b"\xff\xd8\xff")
    flip(path, image + 2)
    assert main([str(out)]) == 1
    found = _damages(capsys)
    assert found[0] == "damaged: val.beton: its bytes were changed (SHA-256 differs)"
    assert len(found) == 2
    assert "the image's bytes were changed (checksum differs)" in found[1]
    path.write_bytes(intact[:-1])
    assert main([str(out)]) == 1
    assert f"has {len(intact) - 1:,} bytes instead of {len(intact):,}" in capsys.readouterr().err
    path.write_bytes(intact)
    (out / "index.json").unlink()  # as the ffcv package leaves its files
    assert main([str(out)]) == 0
    capsys.readouterr()
    flip(path, image + 2)
    assert main([str(out)]) == 1
    (only,) = _damages(capsys)
    assert "cannot be decoded" in only
