from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.prepare import main
from data_pipeline.prepare.listing import Item, ShardSize, cut_into_shards, hold_out, mixed, unique_keys
from data_pipeline.shards import open_source, set_index
from data_pipeline.shards.writer import member_bytes


def _prepare(source: Path, out: Path, *more: str) -> int:
    return main(["imagefolder", "--src", str(source), "--out", str(out), "--jobs", "1", *more])


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _keys(out: Path, split: str) -> dict[str, int]:
    source = open_source(DataConfig(path=str(out), num_classes=len(set_index.load(out).classes)), split)
    samples = [source.read(index) for index in range(len(source))]
    return {sample.key: sample.label for sample in samples}


def test_output_is_the_same_bytes_for_one_and_two_processes(
    shard_folder: Path, shard_source: Path, tmp_path: Path
) -> None:
    assert _prepare(shard_source, tmp_path / "two", "--shard-size", "6", "--jobs", "2") == 0
    assert _contents(tmp_path / "two") == _contents(shard_folder)
    assert set(_contents(shard_folder)) == {"index.json", "prepare.json"} | {
        f"{split}/shard-{number:06d}.{extension}"
        for split, count in (("train", 4), ("val", 2))
        for number in range(count)
        for extension in ("tar", "idx")
    }


def test_a_second_run_on_a_finished_output_says_so_and_touches_nothing(
    shard_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _prepare(shard_source, tmp_path / "out") == 0
    assert "2 shards written, 0 kept" in capsys.readouterr().out
    before = {path: path.stat() for path in (tmp_path / "out").rglob("*")}
    assert _prepare(shard_source, tmp_path / "out") == 0
    assert "was complete already; nothing was done" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == {
        path: status.st_mtime_ns for path, status in before.items()
    }


def test_shards_taken_away_from_a_finished_output_are_rebuilt_and_the_rest_kept(
    shard_folder: Path, shard_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert _prepare(shard_source, out, "--shard-size", "6") == 0
    (out / "train" / "shard-000001.tar").unlink()
    os.truncate(out / "train" / "shard-000002.tar", 700)
    (out / "val" / "shard-000000.idx").write_bytes(b"TARINDEX")
    capsys.readouterr()
    assert _prepare(shard_source, out, "--shard-size", "6") == 0
    assert "3 shards written, 3 kept" in capsys.readouterr().out
    assert _contents(out) == _contents(shard_folder)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shard-size", "7"], "shard-size was 64MB, now 7"),
        (["--splits", "train"], "splits was train val, now train"),
    ],
)
def test_other_options_into_an_existing_output_are_refused(
    shard_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert _prepare(shard_source, tmp_path / "out") == 0
    before = _contents(tmp_path / "out")
    assert _prepare(shard_source, tmp_path / "out", *more) == 1
    assert message in capsys.readouterr().err
    assert _contents(tmp_path / "out") == before


def test_another_or_a_changed_source_is_refused_and_a_copied_one_is_not(
    shard_source: Path, tmp_path: Path, image_tree, image_file, capsys: pytest.CaptureFixture[str]
) -> None:
    source = image_tree(tmp_path / "source", {"train": {"cat": 3}, "val": {"cat": 2}})
    assert _prepare(source, tmp_path / "out") == 0
    before = _contents(tmp_path / "out")
    assert _prepare(shard_source, tmp_path / "out") == 1
    assert "a source of 5 images; this one has 35" in capsys.readouterr().err

    victim = source / "train" / "cat" / "0001.jpg"
    original = victim.read_bytes()
    later = (tmp_path / "out" / "train" / "shard-000000.tar").stat().st_mtime + 60
    os.utime(victim, (later, later))
    assert _prepare(source, tmp_path / "out") == 0, "same content, only touched"
    victim.write_bytes(original[:-3] + b"\0" + original[-2:])
    os.utime(victim, (later, later))
    assert _prepare(source, tmp_path / "out") == 1
    assert "has changed since that was finished" in capsys.readouterr().err
    victim.write_bytes(image_file(99, width=90, height=90))
    assert _prepare(source, tmp_path / "out") == 1
    assert "has changed since that was finished" in capsys.readouterr().err
    assert _contents(tmp_path / "out") == before


@pytest.mark.parametrize("damaged", ["tar", "idx"])
def test_a_shard_of_a_finished_output_is_not_rebuilt_from_a_changed_source(
    shard_source: Path, tmp_path: Path, image_tree, capsys: pytest.CaptureFixture[str], damaged: str
) -> None:
    source = image_tree(tmp_path / "source", {"train": {"cat": 3}, "val": {"cat": 2}})
    assert _prepare(source, tmp_path / "out") == 0
    (tmp_path / "out" / "train" / f"shard-000000.{damaged}").unlink()
    before = _contents(tmp_path / "out")
    victim = source / "train" / "cat" / "0001.jpg"
    original = victim.read_bytes()
    victim.write_bytes((source / "train" / "cat" / "0002.jpg").read_bytes())
    assert _prepare(source, tmp_path / "out") == 1
    assert "has changed since that was finished (images of train/shard-000000.tar)" in capsys.readouterr().err
    assert _contents(tmp_path / "out") == before
    victim.write_bytes(original)
    assert _prepare(source, tmp_path / "out") == 0
    assert "1 shards written, 1 kept" in capsys.readouterr().out
    assert {name: content for name, content in _contents(tmp_path / "out").items() if name in before} == before


def test_other_shards_than_those_of_a_finished_output_are_refused(
    tmp_path: Path, image_tree, image_file, capsys: pytest.CaptureFixture[str]
) -> None:
    source = image_tree(tmp_path / "source", {"train": {"cat": 3}, "val": {"cat": 2}})
    assert _prepare(source, tmp_path / "out", "--shard-size", "10KB") == 0
    before = _contents(tmp_path / "out")
    for number in range(3):
        (source / "train" / "cat" / f"{number:04d}.jpg").write_bytes(image_file(number, 400, 400, "BMP"))
    assert _prepare(source, tmp_path / "out", "--shard-size", "10KB") == 1
    assert "(3 shards for 'train' instead of 1)" in capsys.readouterr().err
    assert _contents(tmp_path / "out") == before


def test_without_an_index_a_shard_whose_source_was_replaced_by_an_older_file_is_written_again(
    tmp_path: Path, image_tree, capsys: pytest.CaptureFixture[str]
) -> None:
    source = image_tree(tmp_path / "source", {"train": {"cat": 3}, "val": {"cat": 2}})
    assert _prepare(source, tmp_path / "out") == 0
    (tmp_path / "out" / "index.json").unlink()
    victim = source / "train" / "cat" / "0001.jpg"
    status, content = victim.stat(), bytearray(victim.read_bytes())
    assert content.count(b"JFIF") == 1
    content[content.index(b"JFIF") + 6] ^= 1  # the minor version: of the same size, and still an image
    victim.write_bytes(content)
    os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))
    capsys.readouterr()
    assert _prepare(source, tmp_path / "out") == 0
    assert "1 shards written, 1 kept" in capsys.readouterr().out
    opened = open_source(DataConfig(path=str(tmp_path / "out"), num_classes=1), "train")
    assert bytes(content) in [opened.read(index).image for index in range(3)]


def test_a_damaged_index_is_written_again_from_the_shards(shard_source: Path, tmp_path: Path) -> None:
    assert _prepare(shard_source, tmp_path / "out") == 0
    before = _contents(tmp_path / "out")
    (tmp_path / "out" / "index.json").write_bytes(before["index.json"][:-40])
    assert _prepare(shard_source, tmp_path / "out") == 0
    assert _contents(tmp_path / "out") == before


def test_a_folder_with_strangers_in_it_is_not_written_into(
    shard_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    assert _prepare(shard_source, tmp_path / "out") == 1
    assert "is not empty (it holds thesis.txt)" in capsys.readouterr().err
    assert _contents(tmp_path / "out") == {"thesis.txt": b"precious"}
    assert _prepare(shard_source, shard_source / "shards") == 1
    assert "lies inside --src" in capsys.readouterr().err


def test_unreadable_images_are_reported_by_path_counted_and_left_out(
    tmp_path: Path, image_tree, image_file, capsys: pytest.CaptureFixture[str]
) -> None:
    source = image_tree(tmp_path / "source", {"train": {"cat": 6, "dog": 3}, "val": {"cat": 2}})
    whole = image_file(1)
    bad = {"0001": b"", "0002": b"this is no image", "0003": whole[: len(whole) // 2], "0004": None}
    for stem, content in bad.items():
        path = source / "train" / "cat" / f"{stem}.jpg"
        path.unlink()
        if content is None:
            path.symlink_to(tmp_path / "nowhere.jpg")
        else:
            path.write_bytes(content)
    assert _prepare(source, tmp_path / "out", "--shard-size", "3") == 3
    printed = capsys.readouterr()
    assert "train: 5 images in 3 shards" in printed.out
    assert ", 4 images left out" in printed.out
    assert "val: 2 images in 1 shard," in printed.out
    report = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    assert {entry["path"] for entry in report} == {f"train/cat/{stem}.jpg" for stem in bad}
    assert {entry["split"] for entry in report} == {"train"}
    for entry in report:
        assert f"left out: {entry['path']}: {entry['reason']}" in printed.err
    reasons = {Path(entry["path"]).stem: entry["reason"] for entry in report}
    assert reasons["0001"] == "the file is empty"
    assert reasons["0002"].endswith("cannot identify image file")
    assert "damaged JPEG" in reasons["0003"]
    assert reasons["0004"] == "No such file or directory"
    assert _keys(tmp_path / "out", "train") == {
        "cat/0000": 0,
        "cat/0005": 0,
        "dog/0000": 1,
        "dog/0001": 1,
        "dog/0002": 1,
    }
    assert set_index.load(tmp_path / "out").splits["train"].left_out == 4
    before = _contents(tmp_path / "out")
    assert _prepare(source, tmp_path / "out", "--shard-size", "3") == 3, "a second run reports them again"
    assert "nothing was done" in capsys.readouterr().out
    assert _contents(tmp_path / "out") == before


def test_on_error_stop_ends_at_an_unreadable_image_and_goes_on_when_it_is_repaired(
    shard_folder: Path, shard_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(shard_source, source)
    victim = source / "val" / "dog" / "0001.jpg"
    content = victim.read_bytes()
    victim.write_bytes(content[:-20])
    arguments = ("--shard-size", "6", "--on-error", "stop")
    assert _prepare(source, out, *arguments) == 1
    assert "val/dog/0001.jpg cannot be used" in capsys.readouterr().err
    assert not (out / "index.json").exists()
    victim.write_bytes(content)
    assert _prepare(source, out, *arguments) == 0
    assert "kept" in capsys.readouterr().out
    assert _contents(out) == _contents(shard_folder)


def test_a_split_without_one_readable_image_is_an_error(
    tmp_path: Path, image_tree, capsys: pytest.CaptureFixture[str]
) -> None:
    source = image_tree(tmp_path / "source", {"train": {"cat": 2}, "val": {"cat": 1}})
    (source / "val" / "cat" / "0000.jpg").write_bytes(b"broken")
    assert _prepare(source, tmp_path / "out") == 1
    assert "None of the 1 images of the split 'val' can be read" in capsys.readouterr().err
    assert not (tmp_path / "out" / "index.json").exists()


def test_keys_have_no_dot_and_are_unique_where_names_collide(tmp_path: Path, image_tree, image_file) -> None:
    source = image_tree(tmp_path / "source", {"train": {"v1.0": 0}, "val": {"v1.0": 1}})
    folder = source / "train" / "v1.0"
    for name in (
        "a.b.jpg",
        "a_b.jpg",
        "same.jpg",
        "same.PNG",
        "UPPER.JPEG",
        "with space.jpg",
        "grün.jpg",
        "sub/same.jpg",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(image_file(5, kind="PNG" if name.endswith("PNG") else "JPEG"))
    assert _prepare(source, tmp_path / "out") == 0
    stems = {"a_b", "a_b~2", "same", "same~2", "UPPER", "with space", "grün", "sub/same"}
    assert set(_keys(tmp_path / "out", "train")) == {f"v1_0/{stem}" for stem in stems}
    import tarfile

    with tarfile.open(tmp_path / "out" / "train" / "shard-000000.tar") as tar:
        extensions = {member.name.split(".", 1)[1] for member in tar}
    assert extensions == {"jpg", "png", "cls"}


def test_an_image_gets_the_extension_of_its_content_whatever_its_file_is_called(
    tmp_path: Path, image_tree, image_file
) -> None:
    import tarfile

    source = image_tree(tmp_path / "source", {"train": {"cat": 0}, "val": {"cat": 1}})
    kinds = {"disguised.jpg": "PNG", "disguised.png": "JPEG", "w.JPG": "WEBP", "b.tif": "BMP", "p.pgm": "PPM"}
    for name, kind in {**kinds, "t.jpeg": "TIFF"}.items():
        (source / "train" / "cat" / name).write_bytes(image_file(3, kind=kind))
    assert _prepare(source, tmp_path / "out") == 0
    with tarfile.open(tmp_path / "out" / "train" / "shard-000000.tar") as tar:
        names = {member.name for member in tar if not member.name.endswith(".cls")}
    stems = {"disguised.png", "disguised~2.jpg", "w.webp", "b.bmp", "p.ppm", "t.tif"}
    assert names == {f"cat/{name}" for name in stems}


def test_other_files_are_counted_and_named_not_taken_for_images(
    tmp_path: Path, image_tree, capsys: pytest.CaptureFixture[str]
) -> None:
    source = image_tree(tmp_path / "source", {"train": {"cat": 2}, "val": {"cat": 1}})
    for name in ("notes.txt", "more.TXT", "._0000.jpg", "README"):
        (source / "train" / "cat" / name).write_text("x")
    (source / "train" / "cat" / "loop").symlink_to(source / "train" / "cat")
    os.mkfifo(source / "train" / "cat" / "pipe.jpg")
    assert _prepare(source, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "passed over, being no images: .jpg (1), .txt (2), hidden (1), without extension (1)" in printed
    assert set_index.load(tmp_path / "out").splits["train"].total == 2


def test_files_beside_the_class_folders_are_counted_and_images_among_them_named(
    tmp_path: Path, image_tree, image_file, capsys: pytest.CaptureFixture[str]
) -> None:
    source = image_tree(tmp_path / "source", {"train": {"cat": 2}, "val": {"cat": 1}})
    (source / "train" / "stray.jpg").write_bytes(image_file(7))
    (source / "train" / "labels.csv").write_text("x")
    (source / "val" / "labels.csv").write_text("x")
    (source / "val" / ".hidden").write_text("x")
    assert _prepare(source, tmp_path / "out") == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == "passed over, being in no class folder: train/stray.jpg"
    assert "passed over, being no images: .csv (2)\n" in printed.out
    assert _keys(tmp_path / "out", "train") == {"cat/0000": 0, "cat/0001": 0}


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_link_that_leads_nowhere_is_an_error(
    tmp_path: Path, image_tree, capsys: pytest.CaptureFixture[str], split: str
) -> None:
    source = image_tree(tmp_path / "source", {"train": {"cat": 2}, "val": {"cat": 1}})
    (source / split / "dog").symlink_to(tmp_path / "nowhere")
    assert _prepare(source, tmp_path / "out") == 1
    assert f"{source / split / 'dog'} is a link that leads nowhere" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_links_to_one_folder_give_the_same_keys_in_whatever_order_a_disk_names_them(
    tmp_path: Path, image_tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    import contextlib

    from data_pipeline.prepare.imagefolder import list_image_folder

    source = image_tree(tmp_path / "source", {"train": {"cat": 1}, "val": {"cat": 1}, "more": {"": 2}})
    for name in ("one", "two"):
        (source / "train" / "cat" / name).symlink_to(source / "more")
    scandir, keys = os.scandir, []
    for backwards in (False, True):

        @contextlib.contextmanager
        def ordered(path, backwards=backwards):
            with scandir(path) as entries:
                yield iter(sorted(entries, key=lambda entry: entry.name, reverse=backwards))

        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", ordered)
            listing = list_image_folder(source, None, None)
        keys.append([item.key for item in listing.splits["train"]])
    assert keys[0] == keys[1]
    assert len(keys[0]) == 3


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])
def test_other_formats_pass_through_untouched_under_their_extension(
    tmp_path: Path, image_tree, image_file, kind: str
) -> None:
    source = image_tree(tmp_path / "source", {"train": {"cat": 0}, "val": {"cat": 1}})
    data = image_file(3, kind=kind)
    (source / "train" / "cat" / f"x.{kind}").write_bytes(data)
    assert _prepare(source, tmp_path / "out") == 0
    assert open_source(DataConfig(path=str(tmp_path / "out"), num_classes=1), "train").read(0).image == data


def test_classes_of_the_first_split_number_the_later_ones(
    tmp_path: Path, image_tree, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = {"train": {"ant": 1, "bee": 1, "cat": 1}, "val": {"cat": 1, "bee": 1}}
    assert _prepare(image_tree(tmp_path / "good", splits), tmp_path / "out") == 0
    assert _keys(tmp_path / "out", "val") == {"bee/0000": 1, "cat/0000": 2}
    splits = {"train": {"ant": 1}, "val": {"ant": 1, "zebra": 1}}
    assert _prepare(image_tree(tmp_path / "bad", splits), tmp_path / "out2") == 1
    assert "bad/val has classes that" in (error := capsys.readouterr().err)
    assert "zebra" in error
    assert not (tmp_path / "out2").exists()


def test_a_tree_without_splits_is_split_by_a_fraction_of_each_class(tmp_path: Path, image_tree) -> None:
    source = image_tree(tmp_path, {"all": {"cat": 20, "dog": 10}}) / "all"
    assert _prepare(source, tmp_path / "out", "--val-fraction", "0.2") == 0
    train, val = _keys(tmp_path / "out", "train"), _keys(tmp_path / "out", "val")
    assert [list(val.values()).count(label) for label in (0, 1)] == [4, 2]
    assert len(train) == 24
    assert not train.keys() & val.keys()


def test_empty_or_missing_folders_end_in_one_sentence(
    tmp_path: Path, image_tree, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat" / "cat").mkdir(parents=True)
    image_tree(tmp_path / "half", {"train": {"cat": 1}})
    image_tree(tmp_path / "hollow", {"train": {"cat": 1, "dog": 0}, "val": {"cat": 1}})
    image_tree(tmp_path / "no_val", {"train": {"cat": 1}, "val": {"cat": 0}})
    for source, arguments, message in [
        (tmp_path / "nowhere", (), "There is no folder"),
        (tmp_path / "empty", (), "neither train/ nor val/"),
        (tmp_path / "flat", (), "neither train/ nor val/"),
        (tmp_path / "flat", ("--val-fraction", "0.5"), "holds no images"),
        (tmp_path / "empty", ("--val-fraction", "0.5"), "is empty"),
        (tmp_path / "half", (), "has no folder val; it has train"),
        (tmp_path / "half", ("--splits", "../half/train"), "no name of a split"),
        (tmp_path / "half" / "train", ("--val-fraction", "0.5"), "leaves a split without images"),
        (tmp_path / "hollow", (), "dog: no image of this class"),
        (tmp_path / "no_val", (), "no images for the split 'val'"),
    ]:
        code = _prepare(source, tmp_path / "out", *arguments)
        error = capsys.readouterr().err
        assert (code, error.count("\n")) == (1, 1), error
        assert message in error
        assert not (tmp_path / "out").exists()


def test_a_full_disk_is_said_in_one_sentence_and_loses_nothing(
    shard_folder: Path, shard_source: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import errno

    from data_pipeline.shards import files

    real, calls = os.fsync, []

    def full_after_two_shards(descriptor: int) -> None:
        calls.append(stat.S_ISREG(os.fstat(descriptor).st_mode))
        if sum(calls) > 8:  # prepare.json, then a tar, an index and a note for each shard
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", full_after_two_shards)
    assert _prepare(shard_source, tmp_path / "out", "--shard-size", "6") == 1
    error = capsys.readouterr().err
    assert "The disk is full" in error
    assert "shard-000002.tar could not be written" in error
    assert sorted(path.name for path in (tmp_path / "out" / "train").iterdir()) == [
        f"shard-00000{number}.{extension}" for number in (0, 1) for extension in ("idx", "tar")
    ] + ["shard-000002.tar"]
    monkeypatch.undo()
    assert _prepare(shard_source, tmp_path / "out", "--shard-size", "6") == 0
    assert "4 shards written, 2 kept" in capsys.readouterr().out
    assert _contents(tmp_path / "out") == _contents(shard_folder)


def test_no_permission_to_write_is_said_in_one_sentence(
    shard_source: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)  # tests may run as root, whom no file mode stops
    assert _prepare(shard_source, tmp_path / "out") == 1
    assert f"error: {tmp_path / 'out'} cannot be used: Permission denied." in capsys.readouterr().err


def test_two_runs_into_one_output_at_a_time_are_refused(
    shard_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    assert _prepare(shard_source, tmp_path / "out") == 0
    descriptor = os.open(tmp_path / "out" / "prepare.json", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert _prepare(shard_source, tmp_path / "out") == 1
    assert "Another run is preparing" in capsys.readouterr().err
    os.close(descriptor)
    assert _prepare(shard_source, tmp_path / "out") == 0


@pytest.mark.parametrize("text", ["0", "-5", "12 apples", "MB", "", "1.5GB"])
def test_a_shard_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no shard size"):
        ShardSize.parse(text)


def test_shard_sizes_are_samples_or_bytes() -> None:
    sizes = [ShardSize.parse(text) for text in ("10000", "64MB", "256 mib", "1GB")]
    assert [(size.limit, size.in_bytes) for size in sizes] == [
        (10000, False),
        (64_000_000, True),
        (256 * 2**20, True),
        (10**9, True),
    ]


def _items(sizes: list[int]) -> list[Item]:
    return [Item(f"k{number}", f"k{number}.jpg", 0, size) for number, size in enumerate(sizes)]


def test_shards_are_about_equal_and_never_above_the_limit() -> None:
    assert [len(shard) for shard in cut_into_shards(_items([1] * 10), ShardSize.parse("4"))] == [3, 4, 3]
    assert [len(shard) for shard in cut_into_shards(_items([1] * 5), ShardSize.parse("100"))] == [5]
    assert cut_into_shards([], ShardSize.parse("100")) == []
    sizes = [(number * 7919) % 50_000 for number in range(1000)] + [2_000_000] + [100] * 50
    shards = cut_into_shards(_items(sizes), ShardSize.parse("1MB"))
    assert [item for shard in shards for item in shard] == _items(sizes)
    weights = [sum(member_bytes(item.size) for item in shard) for shard in shards]
    assert all(weight <= 1_000_000 or len(shard) == 1 for weight, shard in zip(weights, shards, strict=True))
    assert len(shards) <= 32


def test_order_of_samples_mixes_classes_and_is_pinned() -> None:
    items = [Item(key, key, 0, 1) for key in ("a", "b", "c", "d", "e", "f")]
    assert [item.key for item in mixed(items)] == [item.key for item in mixed(reversed(items))]
    assert "".join(item.key for item in mixed(items)) == "efcabd"


def test_unique_keys_keeps_the_first_and_numbers_the_rest() -> None:
    assert unique_keys(["a.b", "a_b", "a_b~2", "x\n\udcff"]) == ["a_b", "a_b~2", "a_b~2~2", "x__"]


def test_hold_out_takes_each_class_in_proportion() -> None:
    items = [Item(f"k{number}", "", number % 3, 1) for number in range(100)]  # 34, 33 and 33 of a class
    rest, held = hold_out(items, 10)
    assert len(rest) == 90
    assert sorted(rest + held, key=lambda item: item.key) == sorted(items, key=lambda item: item.key)
    assert [sum(item.label == label for item in held) for label in range(3)] == [4, 3, 3]
