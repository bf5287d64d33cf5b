from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.prepare import main
from data_pipeline.shards import open_source, set_index

_COUNTS = {"n00004475": 3, "n00005787": 6, "n02119789": 8, "n12345678": 1}


def _tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.fixture(scope="session")
def images(image_file) -> dict[str, dict[str, bytes]]:
    """wnid -> file name -> bytes."""
    return {
        wnid: {f"{wnid}_{number}.JPEG": image_file(_seed(wnid) + number) for number in range(count)}
        for wnid, count in _COUNTS.items()
    }


def _seed(wnid: str) -> int:
    return int(wnid[1:]) % 10_000


@pytest.fixture
def release(tmp_path: Path, images) -> Path:
    """A folder of class tars."""
    folder = tmp_path / "winter21_whole"
    folder.mkdir()
    for wnid, files in images.items():
        (folder / f"{wnid}.tar").write_bytes(_tar(files))
    return folder


def _prepare(source: Path, out: Path, *more: str) -> int:
    return main(["imagenet22k", "--src", str(source), "--out", str(out), "--jobs", "1", *more])


def _samples(out: Path, split: str = "train") -> dict[str, tuple[int, bytes]]:
    source = open_source(DataConfig(path=str(out), num_classes=len(set_index.load(out).classes)), split)
    samples = [source.read(index) for index in range(len(source))]
    return {sample.key: (sample.label, bytes(sample.image)) for sample in samples}


def _expected(images: dict[str, dict[str, bytes]], classes: list[str]) -> dict[str, tuple[int, bytes]]:
    return {
        f"{wnid}/{name.removesuffix('.JPEG')}": (label, data)
        for label, wnid in enumerate(classes)
        for name, data in images[wnid].items()
    }


def _shards(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.*") if path.name != "prepare.json"}


def test_class_tars_become_shards_labelled_in_the_order_of_wordnet_ids(release: Path, tmp_path: Path, images) -> None:
    assert _prepare(release, tmp_path / "out") == 0
    assert set_index.load(tmp_path / "out").classes == tuple(sorted(_COUNTS))
    assert _samples(tmp_path / "out") == _expected(images, sorted(_COUNTS))


@pytest.mark.parametrize("layout", ["tar", "folder within the tar", "folder with the tar"])
def test_one_tar_of_class_tars_gives_the_same_shards_as_the_folder(
    release: Path, tmp_path: Path, images, layout: str
) -> None:
    prefix = "fall11_whole/" if layout == "folder within the tar" else ""
    whole = tmp_path / "download" / "fall11_whole.tar"
    whole.parent.mkdir()
    whole.write_bytes(_tar({f"{prefix}{wnid}.tar": _tar(files) for wnid, files in reversed(images.items())}))
    assert _prepare(release, tmp_path / "from_folder") == 0
    assert _prepare(whole.parent if layout == "folder with the tar" else whole, tmp_path / "from_tar") == 0
    assert _shards(tmp_path / "from_tar") == _shards(tmp_path / "from_folder")


def test_min_images_leaves_small_classes_out_and_says_so(
    release: Path, tmp_path: Path, images, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _prepare(release, tmp_path / "out", "--min-images", "6") == 0
    assert _samples(tmp_path / "out") == _expected(images, ["n00005787", "n02119789"])
    assert (
        "warning: 2 of 4 classes have fewer than 6 images, left out: n00004475, n12345678." in capsys.readouterr().err
    )
    assert _prepare(release, tmp_path / "none", "--min-images", "9") == 1
    assert "has no class with 9 or more images" in capsys.readouterr().err


def test_a_file_of_classes_gives_the_order_of_the_labels_and_names(release: Path, tmp_path: Path, images) -> None:
    (tmp_path / "classes.txt").write_text("n02119789\tkit fox, Vulpes macrotis\nn00004475\n")
    assert _prepare(release, tmp_path / "out", "--classes", str(tmp_path / "classes.txt")) == 0
    assert set_index.load(tmp_path / "out").classes == ("n02119789 kit fox, Vulpes macrotis", "n00004475")
    assert _samples(tmp_path / "out") == _expected(images, ["n02119789", "n00004475"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("n02119789\nn99999999\n", "has no images of 1 of the 2 classes: n99999999"),
        ("n02119789\nn02119789\n", r"line 2 ('n02119789') names a class again"),
        ("fox\n", "line 1 ('fox') does not begin with a WordNet id"),
        ("", "names no classes"),
    ],
)
def test_a_file_of_classes_that_does_not_fit_is_an_error(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (tmp_path / "classes.txt").write_text(content)
    assert _prepare(release, tmp_path / "out", "--classes", str(tmp_path / "classes.txt")) == 1
    assert message in capsys.readouterr().err


def test_a_part_of_each_class_is_held_out(release: Path, tmp_path: Path, images) -> None:
    assert _prepare(release, tmp_path / "out", "--val-fraction", "0.34", "--min-images", "3") == 0
    train, val = _samples(tmp_path / "out"), _samples(tmp_path / "out", "val")
    assert {**train, **val} == _expected(images, ["n00004475", "n00005787", "n02119789"])
    assert [sum(label == wanted for label, _ in val.values()) for wanted in range(3)] == [1, 2, 3]
    assert not train.keys() & val.keys()


def test_files_that_are_no_images_and_damaged_images_are_left_out_and_reported(
    release: Path, tmp_path: Path, images, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "n00005787_2.JPEG"
    files = {**images["n00005787"], name: b"<html>not found</html>", "urls.txt": b"http://"}
    (release / "n00005787.tar").write_bytes(_tar(files))
    (release / "readme.md").write_text("hello")
    assert _prepare(release, tmp_path / "out") == 3
    captured = capsys.readouterr()
    assert "passed over, being no images: .md (1), .txt (1)" in captured.out
    assert f"left out: n00005787.tar/{name}: " in captured.err
    expected = _expected(images, sorted(_COUNTS))
    del expected["n00005787/n00005787_2"]
    assert _samples(tmp_path / "out") == expected


def test_a_damaged_class_tar_gives_the_images_before_the_damage_and_is_reported(
    release: Path, tmp_path: Path, images, capsys: pytest.CaptureFixture[str]
) -> None:
    path = release / "n02119789.tar"
    data = bytearray(path.read_bytes())
    at = data.index(b"n02119789_5.JPEG")
    data[at] ^= 1
    path.write_bytes(data)
    assert _prepare(release, tmp_path / "stopped", "--on-error", "stop") == 1
    assert f"n02119789.tar, from its damage on cannot be used: {path}, at byte {at}" in capsys.readouterr().err
    assert _prepare(release, tmp_path / "out") == 3
    expected = _expected(images, sorted(_COUNTS))
    for number in (5, 6, 7):
        del expected[f"n02119789/n02119789_{number}"]
    assert _samples(tmp_path / "out") == expected
    (line,) = (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"].startswith(f"{path}, at byte {at}: there is no tar header")


def test_a_class_that_damage_leaves_without_images_is_named(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (release / "n12345678.tar").write_bytes(b"")
    assert _prepare(release, tmp_path / "out") == 0
    assert "1 of 4 classes have fewer than 1 images, left out: n12345678, damaged." in capsys.readouterr().err
    (tmp_path / "classes.txt").write_text("n12345678\n")
    assert _prepare(release, tmp_path / "other", "--classes", str(tmp_path / "classes.txt")) == 1
    assert "n12345678 (damaged)" in capsys.readouterr().err


def test_a_compressed_release_is_refused_with_what_to_do(
    tmp_path: Path, images, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "in" / "winter21_whole.tar.gz"
    whole.parent.mkdir()
    whole.write_bytes(_tar({f"{wnid}.tar": _tar(files) for wnid, files in images.items()}, "w:gz"))
    for source in (whole, whole.parent):
        assert _prepare(source, tmp_path / "out") == 1
        assert (
            f"it is compressed (gzip), and images are read from anywhere in it; decompress it first: gunzip {whole}"
            in (capsys.readouterr().err)
        )


def test_sources_without_class_tars_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert _prepare(tmp_path / "empty", tmp_path / "out") == 1
    assert "holds no class tars" in capsys.readouterr().err
    assert _prepare(tmp_path / "nowhere", tmp_path / "out") == 1
    assert "There is no" in capsys.readouterr().err
    (tmp_path / "empty" / "n00004475.tar").mkdir()
    assert _prepare(tmp_path / "empty", tmp_path / "out") == 1
    assert "holds no class tars" in capsys.readouterr().err


def test_webdataset_reads_the_shards(release: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    assert _prepare(release, tmp_path / "out", "--shard-size", "7") == 0
    shards = sorted(str(path) for path in (tmp_path / "out" / "train").glob("*.tar"))
    read = {
        sample["__key__"]: (int(sample["cls"]), sample["jpg"])
        for sample in webdataset.WebDataset(shards, shardshuffle=False)
    }
    assert read == _samples(tmp_path / "out")
