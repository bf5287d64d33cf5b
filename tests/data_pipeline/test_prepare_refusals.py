"""What the command refuses, when, and what it says: of options, names, links, space and readers that have left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.prepare import left_out, main
from data_pipeline.prepare.left_out import LeftOut, printable
from data_pipeline.shards import set_index
from data_pipeline.shards.source import DataError


def _prepare(source: Path, out: Path, *more: str) -> int:
    return main(["imagefolder", "--src", str(source), "--out", str(out), "--jobs", "1", *more])


def _limit_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, free))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ((), "MB free; 0.1 MB are needed"),
        (("--part", "1/1"), "MB free; 0.1 MB are needed"),
        (("--num-shards", "25"), "--num-shards 25: the split 'train' has only 24 images"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_output_is_claimed_so_that_other_options_may_be_tried(
    shard_source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    error: str,
) -> None:
    _limit_disk(monkeypatch, 60_000)
    assert _prepare(shard_source, tmp_path / "deep" / "out", *more) == 1
    assert error in capsys.readouterr().err
    assert not (tmp_path / "deep").exists()
    assert _prepare(shard_source, tmp_path / "deep" / "out", "--max-size", "16") == 0


def test_a_disk_that_has_become_too_small_for_what_is_missing_is_noticed(
    shard_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _prepare(shard_source, tmp_path / "out", "--shard-size", "6") == 0
    (tmp_path / "out" / "index.json").unlink()
    (tmp_path / "out" / "train" / "shard-000001.idx").unlink()
    _limit_disk(monkeypatch, 5_000)
    assert _prepare(shard_source, tmp_path / "out", "--shard-size", "6") == 1
    assert "0.0 MB free; 0.0 MB are needed" in capsys.readouterr().err


@pytest.mark.parametrize("fraction", ["0", "1", "2", "nan", "-0.1", "1e-1", "half"])
@pytest.mark.parametrize("converter", ["imagefolder", "webdataset", "imagenet22k"])
def test_a_part_to_hold_out_is_checked_before_the_source_is_read(
    converter: str, fraction: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(
            [
                converter,
                "--src",
                str(tmp_path / "nothing"),
                "--out",
                str(tmp_path / "out"),
                f"--val-fraction={fraction}",
            ]
        )
    assert f"'{fraction}' is no part to hold out; give a number between 0 and 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["index.json", "tr\udcff", "a b", "left_out.jsonl"])
@pytest.mark.parametrize("converter", ["imagefolder", "webdataset"])
def test_a_folder_whose_name_can_be_no_split_is_named_as_such(
    converter: str,
    name: str,
    shard_folder: Path,
    shard_source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "source"
    shutil.copytree((shard_source if converter == "imagefolder" else shard_folder) / "val", source / name)
    more = ["--splits", name] if converter == "imagefolder" else []
    assert main([converter, "--src", str(source), "--out", str(tmp_path / "out"), *more]) == 1
    printed = capsys.readouterr().err
    assert f"{name!r} in {source} can be no split" in printed
    assert not (tmp_path / "out").exists()


def test_a_link_to_itself_is_an_unreadable_image_and_not_the_end(
    tmp_path: Path, image_tree: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source = image_tree(tmp_path / "source", {"train": {"cat": 3}, "val": {"cat": 1}})
    for name in ("loop.jpg", "loop", "loop.txt"):
        (source / "train" / "cat" / name).symlink_to(name)
    assert _prepare(source, tmp_path / "out") == 3
    assert "left out: train/cat/loop.jpg: Too many levels of symbolic links" in capsys.readouterr().err
    assert set_index.load(tmp_path / "out").splits["train"].total == 3


def test_a_name_with_control_characters_does_not_reach_the_terminal(
    tmp_path: Path, image_tree: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source = image_tree(tmp_path / "source", {"train": {"cat": 3}, "val": {"cat": 1}})
    (source / "train" / "cat" / "a\x1b[2J\nleft out: b.jpg").write_bytes(b"")
    assert _prepare(source, tmp_path / "out") == 3
    assert "left out: train/cat/a\\x1b[2J\\nleft out: b.jpg: the file is empty\n" in capsys.readouterr().err
    assert printable("é 猫 \udcff\t") == "é 猫 \\udcff\\t"


def test_a_split_without_a_readable_image_names_the_first_of_them(
    tmp_path: Path, image_tree: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source = image_tree(tmp_path / "source", {"train": {"cat": 3}, "val": {"cat": 1}})
    (source / "train" / "cat" / "0000.jpg").write_bytes(b"")
    (source / "val" / "cat" / "0000.jpg").write_bytes(b"")
    assert _prepare(source, tmp_path / "out") == 1
    expected = "None of the 1 images of the split 'val' can be read; the first: val/cat/0000.jpg: the file is empty."
    assert expected in capsys.readouterr().err


def test_a_reader_of_the_summary_that_left_is_no_error(shard_source: Path, shard_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data_pipeline.prepare", "imagefolder", "--src", str(shard_source), "--jobs", "1"]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as nobody:
        done = subprocess.run(
            [*command, "--out", str(tmp_path / "out")], stdout=nobody, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, "Traceback" in done.stderr, "BrokenPipe" in done.stderr) == (0, False, False)
    assert set_index.load(tmp_path / "out").splits["train"].total == 24


def test_the_list_of_what_was_left_out_is_read_as_it_was_written(tmp_path: Path) -> None:
    entries = [LeftOut("train", "a\udcff\n.jpg", "the file is empty"), LeftOut("val", "é.jpg", "damaged")]
    path = tmp_path / left_out.LEFT_OUT_FILE
    assert left_out.read_lines(path) == []
    path.write_bytes(left_out.to_lines(entries))
    assert left_out.read_lines(path) == entries
    path.write_bytes(b'{"split": "train"}\n')
    with pytest.raises(DataError, match=r"left_out\.jsonl is damaged"):
        left_out.read_lines(path)


@pytest.mark.parametrize(("index", "classes"), [(None, ("bird", "cat", "dog")), ("{}", ("0", "1", "2"))])
def test_a_set_that_was_prepared_here_keeps_its_class_names_when_it_is_cut_anew(
    copy: Path, tmp_path: Path, index: str | None, classes: tuple[str, ...]
) -> None:
    if index is not None:  # another program's
        (copy / "index.json").write_text(index)
    assert main(["webdataset", "--src", str(copy), "--out", str(tmp_path / "out"), "--jobs", "1"]) == 0
    assert set_index.load(tmp_path / "out").classes == classes
