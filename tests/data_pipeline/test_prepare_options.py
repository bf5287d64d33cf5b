"""Options that all converters share: how shards are cut, images made smaller, and what is said at the end."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline import restart_rows
from data_pipeline.config import DataConfig
from data_pipeline.decode import decode_image
from data_pipeline.prepare import build, main, make_shard, recode
from data_pipeline.prepare.examine import UnreadableImageError
from data_pipeline.prepare.listing import Item, SourceFiles, cut_evenly
from data_pipeline.prepare.load import Loading, usable
from data_pipeline.prepare.options import Recode
from data_pipeline.shards import open_source, set_index, shard_index
from data_pipeline.shards.writer import member_bytes


def _prepare(source: Path, out: Path, *more: str) -> int:
    return main(["imagefolder", "--src", str(source), "--out", str(out), "--jobs", "1", *more])


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _images(out: Path, split: str = "train") -> dict[str, bytes]:
    source = open_source(DataConfig(path=str(out), num_classes=len(set_index.load(out).classes)), split)
    samples = [source.read(index) for index in range(len(source))]
    return {sample.key: bytes(sample.image) for sample in samples}


def _rotated(image: bytes, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    with Image.open(io.BytesIO(image)) as opened:
        opened.save(file, "JPEG", exif=exif, quality=95)
    return file.getvalue()


def _encoded(image: bytes, **options: object) -> bytes:
    file = io.BytesIO()
    with Image.open(io.BytesIO(image)) as opened:
        opened.save(file, "JPEG", **options)
    return file.getvalue()


@pytest.fixture
def mixed_sizes(tmp_path: Path, image_tree, image_file) -> dict[str, bytes]:
    """Images of all kinds in tmp_path/source, by key."""
    image_tree(tmp_path / "source", {"train": {"cat": 0}, "val": {"cat": 1}})
    images = {
        "wide.jpg": image_file(1, 300, 100),
        "tall.jpg": image_file(2, 90, 200),
        "exact.jpg": image_file(3, 64, 80),
        "small.png": image_file(4, 30, 20, "PNG"),
        "large.png": image_file(5, 101, 77, "PNG"),
        "turned.jpg": _rotated(image_file(6, 200, 100), 6),
        "small-turned.jpg": _rotated(image_file(6, 60, 40), 6),
        "grey.jpg": image_file(7, 128, 128, mode="L"),
        "cmyk.jpg": image_file(8, 100, 90, mode="CMYK"),
        "progressive.jpg": _encoded(image_file(9, 130, 100), progressive=True),
    }
    for name, content in images.items():
        (tmp_path / "source" / "train" / "cat" / name).write_bytes(content)
    return {f"cat/{name.split('.')[0]}": content for name, content in images.items()}


def test_max_size_makes_the_shorter_side_that_long_and_leaves_smaller_images_as_they_are(
    tmp_path: Path, mixed_sizes: dict[str, bytes]
) -> None:
    assert _prepare(tmp_path / "source", tmp_path / "out", "--max-size", "64") == 0
    found = _images(tmp_path / "out")
    assert found.keys() == mixed_sizes.keys()
    for name in ("cat/exact", "cat/small", "cat/small-turned"):
        assert found[name] == mixed_sizes[name]
    sizes = {name: Image.open(io.BytesIO(image)).size for name, image in found.items()}
    assert {name: size for name, size in sizes.items() if found[name] != mixed_sizes[name]} == {
        "cat/wide": (192, 64),
        "cat/tall": (64, 142),
        "cat/large": (84, 64),
        "cat/turned": (64, 128),
        "cat/grey": (64, 64),
        "cat/cmyk": (71, 64),
        "cat/progressive": (83, 64),
    }


def test_an_image_made_smaller_shows_the_same_picture_upright_in_the_quality_asked_for(
    tmp_path: Path, mixed_sizes: dict[str, bytes]
) -> None:
    by_quality = {}
    for quality in ("50", "95"):
        out = tmp_path / quality
        assert _prepare(tmp_path / "source", out, "--max-size", "64", "--quality", quality) == 0
        by_quality[quality] = _images(out)
    for name in ("cat/wide", "cat/large", "cat/turned", "cat/grey", "cat/cmyk", "cat/progressive"):
        made = decode_image(by_quality["95"][name])
        whole = Image.fromarray(decode_image(mixed_sizes[name]))  # upright
        wanted = np.asarray(whole.resize((made.shape[1], made.shape[0]), Image.Resampling.LANCZOS), dtype=float)
        assert np.abs(made - wanted).mean() < 6, name  # 4:2:0 and quality 95; another picture differs by some 80
        assert len(by_quality["50"][name]) < len(by_quality["95"][name])
        with Image.open(io.BytesIO(by_quality["95"][name])) as image:
            assert image.format == "JPEG"
            assert image.mode == ("L" if name == "cat/grey" else "RGB")
            assert image.getexif().get(0x0112, 1) == 1
    assert _images(tmp_path / "50", "val") == _images(tmp_path / "95", "val"), "these were small enough"


def test_an_image_is_made_smaller_from_its_exact_pixels(image_file) -> None:
    image, expected = image_file(1, 300, 200), io.BytesIO()
    with Image.open(io.BytesIO(image)) as opened:
        opened.resize((96, 64), Image.Resampling.LANCZOS, reducing_gap=3.0).save(expected, "JPEG", quality=77)
    assert recode.smaller(image, 64, 77, grey=False) == expected.getvalue()


def test_a_target_is_fitted_to_the_upright_image_that_was_made_smaller(image_file) -> None:
    def fitted(target: bytes, before: tuple[int, int], after: tuple[int, int]) -> bytes:
        return f"{target.decode()} {before} {after}".encode()

    loading = Loading(lambda item: SourceFiles(b""), "segmentation", "seg.png", fitted, Recode(max_size=50))
    turned = _rotated(image_file(1, 200, 100), 6)
    loaded = usable(SourceFiles(turned, b"mask"), loading)
    assert loaded.files.target == b"mask (200, 100) (100, 50)"
    small = image_file(1, 80, 40)
    assert usable(SourceFiles(small, b"mask"), loading).files == SourceFiles(small, b"mask")
    with pytest.raises(UnreadableImageError, match=r"there is no seg\.png for it"):
        usable(SourceFiles(small), loading)


def test_the_index_notes_the_orientation_of_what_it_holds(tmp_path: Path, mixed_sizes: dict[str, bytes]) -> None:
    for chosen, expected in [((), {"cat/turned", "cat/small-turned"}), (("--max-size", "64"), {"cat/small-turned"})]:
        out = tmp_path / f"out{len(chosen)}"
        assert _prepare(tmp_path / "source", out, *chosen) == 0
        index = shard_index.load(out / "train" / "shard-000000.idx")
        noted = dict(zip(index.keys, index.records["orientation"].tolist(), strict=True))
        assert {key for key, orientation in noted.items() if orientation == 6} == expected
        assert set(noted.values()) == {1, 6}


def test_the_summary_counts_what_is_unusual(
    tmp_path: Path, mixed_sizes: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _prepare(tmp_path / "source", tmp_path / "out", "--max-size", "64") == 0
    assert (
        "of 11 images: 1 CMYK, 1 grayscale, 7 made smaller, 2 not JPEG, 1 progressive, 2 rotated by EXIF\n"
        in capsys.readouterr().out
    )


def test_options_that_change_images_are_remembered_and_others_refused(
    tmp_path: Path, mixed_sizes: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ("--max-size", "64", "--num-shards", "3")
    assert _prepare(tmp_path / "source", tmp_path / "out", *chosen) == 0
    options = json.loads((tmp_path / "out" / "prepare.json").read_text())["options"]
    assert options == {"splits": "train val", "num_shards": "3", "max_size": "64", "quality": "90"}
    before = _contents(tmp_path / "out")
    for other, message in [
        (("--max-size", "65", "--num-shards", "3"), "max-size was 64, now 65"),
        (("--max-size", "64", "--quality", "80", "--num-shards", "3"), "quality was 90, now 80"),
        (("--num-shards", "3"), "max-size was 64, now not given"),
        (("--max-size", "64"), "num-shards was 3, now not given"),
    ]:
        assert _prepare(tmp_path / "source", tmp_path / "out", *other) == 1
        assert message in capsys.readouterr().err
    assert _prepare(tmp_path / "source", tmp_path / "out", *chosen) == 0
    assert "nothing was done" in capsys.readouterr().out
    assert _contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--quality", "80"), "--quality is that of images made smaller by --max-size"),
        (("--max-size", "64", "--quality", "0"), "'0' is no JPEG quality; give 1 to 100"),
        (("--max-size", "0"), "'0' is no number of 1 or more"),
        (("--num-shards", "2", "--shard-size", "5"), "not allowed with argument"),
        (("--num-shards", "many"), "'many' is no number of 1 or more"),
        (("--part", "0/4"), "there is no part 0/4"),
        (("--part", "5/4"), "there is no part 5/4: parts are counted from 1/4 to 4/4"),
        (("--part", "half"), "'half' is no part"),
        (("--part", "1/4", "--merge"), "not allowed with argument"),
        (("--format", "ffcv", "--restart-rows"), "--restart-rows is for tar shards"),
    ],
)
def test_choices_that_make_no_sense_are_wrong_usage(
    shard_source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as ended:
        _prepare(shard_source, tmp_path / "out", *arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_continued_run_keeps_changed_images_without_making_them_again_and_notices_another_source(
    tmp_path: Path, mixed_sizes: dict[str, bytes], monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    chosen = ("--max-size", "64", "--shard-size", "4")
    with monkeypatch.context() as patch:
        patch.setattr(build, "_conclude", interrupt)
        assert _prepare(tmp_path / "source", tmp_path / "out", *chosen) == 130
    assert len(list((tmp_path / "out").rglob("*.idx"))) == 4
    with monkeypatch.context() as patch:
        for module, name in ((recode, "smaller"), (make_shard, "usable"), (build, "_conclude")):
            patch.setattr(module, name, interrupt)
        assert _prepare(tmp_path / "source", tmp_path / "out", *chosen) == 130  # at the end, as before
    capsys.readouterr()
    (tmp_path / "source" / "train" / "cat" / "wide.jpg").write_bytes(mixed_sizes["cat/tall"])
    assert _prepare(tmp_path / "source", tmp_path / "out", *chosen) == 0
    printed = capsys.readouterr().out
    assert "1 shards written, 3 kept" in printed
    assert "of 11 images: 1 CMYK, 1 grayscale, 7 made smaller, 2 not JPEG, 1 progressive, 2 rotated by EXIF" in printed
    assert _prepare(tmp_path / "source", tmp_path / "fresh", *chosen) == 0
    assert _contents(tmp_path / "out") == _contents(tmp_path / "fresh")


def test_changed_images_of_which_nothing_is_remembered_are_made_again(
    tmp_path: Path, mixed_sizes: dict[str, bytes], image_file, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _prepare(tmp_path / "source", tmp_path / "out", "--max-size", "64") == 0
    (tmp_path / "out" / "index.json").unlink()
    victim = tmp_path / "source" / "train" / "cat" / "wide.jpg"
    status = victim.stat()
    victim.write_bytes(image_file(99, 300, 100))
    os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))
    capsys.readouterr()
    assert _prepare(tmp_path / "source", tmp_path / "out", "--max-size", "64") == 0
    assert "2 shards written, 0 kept" in capsys.readouterr().out


def test_shards_beyond_the_last_one_are_removed_from_an_unfinished_set(
    tmp_path: Path, mixed_sizes: dict[str, bytes]
) -> None:
    assert _prepare(tmp_path / "source", tmp_path / "out") == 0
    before = _contents(tmp_path / "out")
    (tmp_path / "out" / "index.json").unlink()
    for name in ("shard-000001.tar", "shard-000001.idx", ".unfinished-shard-000002.tar-node-7"):
        (tmp_path / "out" / "train" / name).write_bytes(b"from when images were larger")
    assert _prepare(tmp_path / "source", tmp_path / "out") == 0
    assert _contents(tmp_path / "out") == before


def test_the_source_of_a_finished_set_of_changed_images_is_compared_by_content(
    tmp_path: Path, mixed_sizes: dict[str, bytes], image_file, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ("--max-size", "64")
    assert _prepare(tmp_path / "source", tmp_path / "out", *chosen) == 0
    victim = tmp_path / "source" / "train" / "cat" / "wide.jpg"
    later = (tmp_path / "out" / "train" / "shard-000000.tar").stat().st_mtime + 60
    os.utime(victim, (later, later))
    assert _prepare(tmp_path / "source", tmp_path / "out", *chosen) == 0, "only touched"
    victim.write_bytes(image_file(99, 300, 100))
    os.utime(victim, (later, later))
    assert _prepare(tmp_path / "source", tmp_path / "out", *chosen) == 1
    assert "has changed since that was finished" in capsys.readouterr().err


def test_a_number_of_shards_is_met_by_the_largest_split_and_the_others_have_shards_about_as_large(
    tmp_path: Path, image_tree, capsys: pytest.CaptureFixture[str]
) -> None:
    source = image_tree(tmp_path / "source", {"train": {"cat": 30, "dog": 30}, "val": {"cat": 9, "dog": 8}})
    assert _prepare(source, tmp_path / "out", "--num-shards", "7") == 0
    splits = set_index.load(tmp_path / "out").splits
    assert {name: len(split) for name, split in splits.items()} == {"train": 7, "val": 2}
    assert (splits["train"].samples.min(), splits["train"].samples.max()) == (8, 9)
    assert _prepare(source, tmp_path / "out2", "--num-shards", "61") == 1
    assert "--num-shards 61: the split 'train' has only 60 images" in capsys.readouterr().err
    assert not (tmp_path / "out2" / "train").exists()
    assert _prepare(source, tmp_path / "out3", "--num-shards", "60") == 0
    assert set_index.load(tmp_path / "out3").splits["train"].samples.tolist() == [1] * 60


def test_cutting_evenly_gives_every_shard_something_and_equal_bytes() -> None:
    items = [Item(f"k{number}", "", 0, size) for number, size in enumerate([10_000_000, *[1000] * 99])]
    shards = cut_evenly(items, 5)
    assert [item for shard in shards for item in shard] == items
    assert len(shards) == 5
    assert min(len(shard) for shard in shards) >= 1
    assert [len(shard) for shard in cut_evenly(items[1:], 4)] == [25, 25, 25, 24]
    assert [len(shard) for shard in cut_evenly(items[:3], 3)] == [1, 1, 1]
    varied = [Item(f"k{number}", "", 0, (number * 7919) % 50_000) for number in range(1000)]
    weights = [sum(member_bytes(item.size) for item in shard) for shard in cut_evenly(varied, 13)]
    assert max(weights) - min(weights) <= 2 * member_bytes(50_000)


def test_a_disk_that_fills_up_is_said_in_one_sentence_and_the_work_goes_on_when_there_is_room(
    tmp_path: Path, small_disk: Path, image_tree, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = image_tree(tmp_path / "source", {"train": {"cat": 40}, "val": {"cat": 2}})
    out, filler = small_disk / "out", small_disk / "filler"
    monkeypatch.setattr(build, "_require_space", lambda *arguments: None)  # as where others fill the disk meanwhile
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 24 * 4096))
    assert _prepare(source, out, "--shard-size", "5") == 1
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed.startswith("error: The disk is full: ")
    assert "run the same command again" in printed
    kept = len(list(out.rglob("*.idx")))
    assert 0 < kept < 9
    filler.unlink()
    assert _prepare(source, out, "--shard-size", "5") == 0
    assert f"{9 - kept} shards written, {kept} kept" in capsys.readouterr().out
    assert _prepare(source, tmp_path / "fresh", "--shard-size", "5") == 0
    assert _contents(out) == _contents(tmp_path / "fresh")


def test_a_disk_that_may_not_be_written_is_said_in_one_sentence(
    small_disk: Path, shard_source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _prepare(shard_source, small_disk / "set") == 0
    before = _contents(small_disk / "set")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    capsys.readouterr()
    assert _prepare(shard_source, small_disk / "new") == 1
    assert capsys.readouterr().err == f"error: {small_disk / 'new'} cannot be used: Read-only file system.\n"
    assert _prepare(shard_source, small_disk / "set") == 0, "nothing needs to be written"
    assert "nothing was done" in capsys.readouterr().out
    assert _contents(small_disk / "set") == before


def test_help_names_every_converter_and_every_common_option(capsys: pytest.CaptureFixture[str]) -> None:
    from data_pipeline.prepare.cli import CONVERTERS

    with pytest.raises(SystemExit):
        main(["--help"])
    listed = capsys.readouterr().out
    for converter in CONVERTERS:
        assert f"\n  {converter.NAME} " in listed
        with pytest.raises(SystemExit) as ended:
            main([converter.NAME, "--help"])
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        for option in (
            "--out",
            "--shard-size",
            "--num-shards",
            "--max-size",
            "--quality",
            "--jobs",
            "--part",
            "--merge",
        ):
            assert option in shown, (converter.NAME, option)
        assert "exit codes:" in shown


def test_restart_rows_change_no_pixel_and_are_noted_in_the_index(
    tmp_path: Path, mixed_sizes: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _prepare(tmp_path / "source", tmp_path / "out", "--restart-rows") == 0
    assert "9 given restart rows" in capsys.readouterr().out
    found = _images_with_rows(tmp_path / "out")
    index = shard_index.load(tmp_path / "out" / "train" / "shard-000000.idx")
    for number, key in enumerate(index.keys):
        rows = index.rows_of(number)["offset"].tolist()
        if key in ("cat/small", "cat/large"):
            assert (found[key], rows) == (mixed_sizes[key], [])
            continue
        assert rows == list(restart_rows.find_rows(found[key])), key
        assert len(rows) > 2, key
        assert found[key] != mixed_sizes[key]
        for decoding in ("exact", "fast"):
            assert np.array_equal(decode_image(found[key], decoding), decode_image(mixed_sizes[key], decoding)), key
    before = _contents(tmp_path / "out")
    assert _prepare(tmp_path / "source", tmp_path / "out", "--restart-rows") == 0
    assert "nothing was done" in capsys.readouterr().out
    assert _prepare(tmp_path / "source", tmp_path / "out") == 1
    assert "restart-rows was yes, now not given" in capsys.readouterr().err
    assert _contents(tmp_path / "out") == before


def test_an_image_that_restart_rows_would_change_is_left_as_it_is(image_file, monkeypatch) -> None:
    image, other = image_file(1, 100, 80), restart_rows.insert(image_file(2, 100, 80))
    assert recode.with_restart_rows(image) == restart_rows.insert(image) != (image, ())
    monkeypatch.setattr(restart_rows, "insert", lambda jpeg: other)
    assert recode.with_restart_rows(image) == (image, ())


def test_restart_rows_that_are_there_already_are_noted_without_being_asked_for(
    tmp_path: Path, mixed_sizes: dict[str, bytes]
) -> None:
    image, rows = restart_rows.insert(mixed_sizes["cat/wide"])
    (tmp_path / "source" / "train" / "cat" / "wide.jpg").write_bytes(image)
    for chosen in ((), ("--restart-rows",)):
        out = tmp_path / f"out{len(chosen)}"
        assert _prepare(tmp_path / "source", out, *chosen) == 0
        index = shard_index.load(out / "train" / "shard-000000.idx")
        assert _images_with_rows(out)["cat/wide"] == image
        assert tuple(index.rows_of(index.keys.index("cat/wide"))["offset"]) == rows


def test_without_jpegtran_restart_rows_are_refused_before_anything_is_written(
    tmp_path: Path, mixed_sizes: dict[str, bytes], monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _prepare(tmp_path / "source", tmp_path / "out", "--restart-rows") == 1
    assert "error: --restart-rows: restart rows need the program jpegtran: install" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def _images_with_rows(out: Path) -> dict[str, bytes]:
    import tarfile

    with tarfile.open(out / "train" / "shard-000000.tar") as tar:
        files = {member.name: tar.extractfile(member) for member in tar if not member.name.endswith(".cls")}
        return {name.split(".")[0]: file.read() for name, file in files.items() if file is not None}
