from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.config import DataConfig
from data_pipeline.decode import decode_image
from data_pipeline.prepare import main
from data_pipeline.shards import open_source, set_index

scipy_io = pytest.importorskip("scipy.io")

# As in meta.mat: ILSVRC2012_ID, WNID, words, num_children, images to train on. The order is not that of the WNIDs.
_SYNSETS = [
    (1, "n02119789", "kit fox, Vulpes macrotis", 0, 3),
    (2, "n01440764", "tench, Tinca tinca", 0, 4),
    (3, "n02012849", "crane", 0, 2),
    (4, "n03126707", "crane", 0, 3),
    (1001, "n00001740", "entity", 4, 0),
]
_WNIDS = ["n01440764", "n02012849", "n02119789", "n03126707"]
_CLASSES = (
    "n01440764 tench, Tinca tinca",
    "n02012849 crane",
    "n02119789 kit fox, Vulpes macrotis",
    "n03126707 crane",
)
_TRUTH = [4, 2, 1, 1, 3]


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _tar(path: Path, files: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            _add(tar, name, data)


def _meta(synsets: list[tuple[Any, ...]]) -> bytes:
    """meta.mat with the fields, types and shape (synsets, 1) of the development kit's."""
    names = [
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    ]
    array = np.empty((len(synsets), 1), dtype=[(name, object) for name in names])
    for row, (number, wnid, words, children, images) in enumerate(synsets):
        below = np.arange(1, children + 1, dtype=np.float64)
        array[row, 0] = (float(number), wnid, words, f"what {words} is", float(children), below, 0.0, float(images))
    file = io.BytesIO()
    scipy_io.savemat(file, {"synsets": array})
    return file.getvalue()


def _devkit(truth: list[int] | None = None, synsets: list[tuple[Any, ...]] | None = None) -> dict[str, bytes]:
    lines = "".join(f"{number}\n" for number in truth or _TRUTH)
    return {
        "ILSVRC2012_devkit_t12/readme.txt": b"read me",
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": lines.encode(),
        "ILSVRC2012_devkit_t12/data/meta.mat": _meta(synsets or _SYNSETS),
    }


@pytest.fixture(scope="session")
def train_images(image_file) -> dict[str, dict[str, bytes]]:
    """wnid -> file name -> bytes; among them a CMYK JPEG and a PNG in disguise, as in the real set."""
    counts = {wnid: count for _, wnid, _, children, count in _SYNSETS if not children}
    images = {
        wnid: {f"{wnid}_{7 * number + 3}.JPEG": image_file(ord(wnid[-1]) * 10 + number) for number in range(count)}
        for wnid, count in counts.items()
    }
    images["n02012849"]["n02012849_3.JPEG"] = image_file(900, mode="CMYK")
    images["n02119789"]["n02119789_10.JPEG"] = image_file(901, kind="PNG")
    return images


@pytest.fixture(scope="session")
def val_images(image_file) -> dict[str, bytes]:
    return {f"ILSVRC2012_val_{number:08d}.JPEG": image_file(500 + number) for number in range(1, len(_TRUTH) + 1)}


@pytest.fixture
def official(tmp_path: Path, train_images, val_images) -> Path:
    """The three files as they are downloaded, in miniature."""
    source = tmp_path / "downloads"
    source.mkdir()
    class_tars = {}
    for wnid, files in sorted(train_images.items(), reverse=True):
        _tar(tmp_path / "class.tar", files)
        class_tars[f"{wnid}.tar"] = (tmp_path / "class.tar").read_bytes()
    _tar(source / "ILSVRC2012_img_train.tar", class_tars)
    _tar(source / "ILSVRC2012_img_val.tar", val_images)
    _tar(source / "ILSVRC2012_devkit_t12.tar.gz", _devkit(), "w:gz")
    return source


def _prepare(source: Path, out: Path, *more: str) -> int:
    return main(["imagenet", "--src", str(source), "--out", str(out), "--jobs", "1", *more])


def _samples(out: Path, split: str) -> dict[str, tuple[int, bytes]]:
    classes = set_index.load(out).classes
    source = open_source(DataConfig(path=str(out), num_classes=len(classes)), split)
    samples = [source.read(index) for index in range(len(source))]
    return {sample.key: (sample.label, bytes(sample.image)) for sample in samples}


def _contents(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != "prepare.json"
    }


def test_the_official_tars_become_shards_labelled_in_the_order_of_wordnet_ids(
    official: Path, tmp_path: Path, train_images, val_images, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert _prepare(official, out) == 0
    assert set_index.load(out).classes == _CLASSES
    assert _samples(out, "train") == {
        f"{wnid}/{name.removesuffix('.JPEG')}": (_WNIDS.index(wnid), data)
        for wnid, files in train_images.items()
        for name, data in files.items()
    }
    by_number = dict(enumerate(["n03126707", "n01440764", "n02119789", "n02119789", "n02012849"], start=1))
    assert _samples(out, "val") == {
        f"{wnid}/ILSVRC2012_val_{number:08d}": (
            _WNIDS.index(wnid),
            val_images[f"ILSVRC2012_val_{number:08d}.JPEG"],
        )
        for number, wnid in by_number.items()
    }
    assert "warning" not in capsys.readouterr().err


def test_webdataset_reads_the_shards(official: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    assert _prepare(official, tmp_path / "out", "--shard-size", "5") == 0
    shards = sorted(str(path) for path in (tmp_path / "out" / "train").glob("*.tar"))
    assert len(shards) == 3
    read = {}
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        (image,) = [sample[name] for name in ("jpg", "png") if name in sample]
        read[sample["__key__"]] = (int(sample["cls"]), image)
    assert read == _samples(tmp_path / "out", "train")


def test_the_cmyk_jpeg_and_the_png_in_disguise_are_stored_as_they_are_and_decode_to_rgb(
    official: Path, tmp_path: Path, train_images
) -> None:
    assert _prepare(official, tmp_path / "out") == 0
    with tarfile.open(tmp_path / "out" / "train" / "shard-000000.tar") as tar:
        names = tar.getnames()
    assert "n02119789/n02119789_10.png" in names
    assert "n02012849/n02012849_3.jpg" in names
    samples = _samples(tmp_path / "out", "train")
    png = train_images["n02119789"]["n02119789_10.JPEG"]
    expected = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    np.testing.assert_array_equal(decode_image(samples["n02119789/n02119789_10"][1]), expected)
    cmyk = decode_image(samples["n02012849/n02012849_3"][1])
    assert (cmyk.shape, cmyk.dtype) == ((30, 40, 3), np.uint8)


def _unpacked(source: Path, folder: Path, flat_val: bool, class_tars: bool) -> Path:
    (folder / "train").mkdir(parents=True)
    with tarfile.open(source / "ILSVRC2012_img_train.tar") as tar:
        tar.extractall(folder / "train", filter="data")
    if not class_tars:
        for path in (folder / "train").glob("*.tar"):
            with tarfile.open(path) as tar:
                tar.extractall(path.with_suffix(""), filter="data")
            path.unlink()
    (folder / "val").mkdir()
    with tarfile.open(source / "ILSVRC2012_img_val.tar") as tar:
        tar.extractall(folder / "val", filter="data")
    if not flat_val:
        wnids = {number: wnid for number, wnid, *_ in _SYNSETS}
        for path, number in zip(sorted((folder / "val").iterdir()), _TRUTH, strict=True):
            (folder / "val" / wnids[number]).mkdir(exist_ok=True)
            path.rename(folder / "val" / wnids[number] / path.name)
    with tarfile.open(source / "ILSVRC2012_devkit_t12.tar.gz") as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize(("flat_val", "class_tars"), [(True, False), (False, False), (True, True)])
def test_unpacked_folders_give_the_same_shards_as_the_tars(
    official: Path, tmp_path: Path, flat_val: bool, class_tars: bool
) -> None:
    folder = _unpacked(official, tmp_path / "unpacked", flat_val, class_tars)
    assert _prepare(official, tmp_path / "from_tars") == 0
    assert _prepare(folder, tmp_path / "from_folders") == 0
    assert _contents(tmp_path / "from_folders") == _contents(tmp_path / "from_tars")


def test_two_processes_and_two_parts_give_the_same_bytes_as_one_process(official: Path, tmp_path: Path) -> None:
    options = ["--shard-size", "3"]
    assert _prepare(official, tmp_path / "one", *options) == 0
    assert _prepare(official, tmp_path / "two", *options, "--jobs", "2") == 0
    for part in ("1/2", "2/2"):
        assert _prepare(official, tmp_path / "parts", *options, "--part", part) == 0
    assert _prepare(official, tmp_path / "parts", *options, "--merge") == 0
    assert _contents(tmp_path / "one") == _contents(tmp_path / "two") == _contents(tmp_path / "parts")


@pytest.mark.parametrize("split", ["train", "val"])
def test_one_split_alone_needs_only_its_own_tar_and_the_development_kit(
    official: Path, tmp_path: Path, split: str
) -> None:
    other = "val" if split == "train" else "train"
    (official / f"ILSVRC2012_img_{other}.tar").unlink()
    assert _prepare(official, tmp_path / "out", "--splits", split) == 0
    index = set_index.load(tmp_path / "out")
    assert (list(index.splits), index.classes) == ([split], _CLASSES)


def test_files_that_are_missing_are_named_with_where_to_get_them(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (official / "ILSVRC2012_img_val.tar").unlink()
    (official / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    assert _prepare(official, tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert "lacks ILSVRC2012_img_val.tar (or the folder val/), ILSVRC2012_devkit_t12.tar.gz" in message
    assert "https://image-net.org/download-images" in message
    assert "ILSVRC2012_img_train.tar" not in message
    assert not (tmp_path / "out").exists()
    assert _prepare(tmp_path / "nowhere", tmp_path / "out") == 1
    assert "There is no folder" in capsys.readouterr().err


def test_fewer_images_than_the_development_kit_states_are_a_warning_and_with_stop_an_error(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _unpacked(official, tmp_path / "unpacked", flat_val=True, class_tars=False)
    (folder / "train" / "n01440764" / "n01440764_3.JPEG").unlink()
    (folder / "val" / "ILSVRC2012_val_00000003.JPEG").unlink()
    assert _prepare(folder, tmp_path / "stopped", "--on-error", "stop") == 1
    assert "train has 11 images instead of 12: n01440764 (3 of 4)." in capsys.readouterr().err
    assert not (tmp_path / "stopped").exists()
    assert _prepare(folder, tmp_path / "out") == 0
    message = capsys.readouterr().err
    assert "warning: train has 11 images instead of 12: n01440764 (3 of 4)." in message
    assert "warning: val has 4 images instead of 5: n02119789 (1 of 2)." in message
    assert _samples(tmp_path / "out", "val")["n02119789/ILSVRC2012_val_00000004"][0] == 2, "labels go by the number"


def test_a_missing_or_strange_class_is_an_error(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _unpacked(official, tmp_path / "unpacked", flat_val=True, class_tars=False)
    shutil.rmtree(folder / "train" / "n02012849")
    assert _prepare(folder, tmp_path / "out") == 1
    assert "has no images of 1 of the 4 classes: n02012849" in capsys.readouterr().err
    (folder / "train" / "n02012849").mkdir()
    (folder / "train" / "n99999999").mkdir()
    assert _prepare(folder, tmp_path / "out") == 1
    assert "has classes that the development kit has not: n99999999" in capsys.readouterr().err


def test_a_class_that_comes_twice_is_an_error(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(official / "ILSVRC2012_img_train.tar") as tar:
        one = tar.extractfile("n01440764.tar").read()  # type: ignore[union-attr]
    _tar(official / "ILSVRC2012_img_train.tar", {"n01440764.tar": one, "again/n01440764.tar": one})
    assert _prepare(official, tmp_path / "out") == 1
    assert "holds more than one tar of the class n01440764" in capsys.readouterr().err


@pytest.mark.parametrize("archive", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"])
@pytest.mark.parametrize("left", [0.3, 0.7])
def test_a_download_that_was_cut_short_is_an_error_before_anything_is_written(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], archive: str, left: float
) -> None:
    os.truncate(official / archive, int((official / archive).stat().st_size * left))
    assert _prepare(official, tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert f"{official / archive}, at byte " in message
    assert "cut short" in message
    assert not (tmp_path / "out").exists()


def test_damage_inside_a_class_tar_names_the_class(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = official / "ILSVRC2012_img_train.tar"
    data = bytearray(path.read_bytes())
    at = data.index(b"n02119789_10.JPEG")
    data[at + 3] ^= 1
    path.write_bytes(data)
    assert _prepare(official, tmp_path / "out") == 1
    assert f"n02119789.tar is damaged: {path}, at byte {at}: there is no tar header" in capsys.readouterr().err


def test_a_compressed_train_tar_is_refused_with_what_to_do(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _tar(official / "ILSVRC2012_img_train.tar", {"n01440764.tar": b"x"}, "w:gz")
    assert _prepare(official, tmp_path / "out") == 1
    assert "it is compressed (gzip)" in capsys.readouterr().err


def test_files_that_are_no_images_and_names_without_a_number_are_reported(
    official: Path, tmp_path: Path, val_images, image_file, capsys: pytest.CaptureFixture[str]
) -> None:
    strange = {"readme.txt": b"hello", "extra.JPEG": image_file(7), "._ILSVRC2012_val_00000001.JPEG": b"macOS"}
    _tar(official / "ILSVRC2012_img_val.tar", {**val_images, **strange})
    assert _prepare(official, tmp_path / "out") == 0
    captured = capsys.readouterr()
    assert "passed over, being no images: .txt (1), hidden (1)" in captured.out
    assert "extra.JPEG" in captured.err
    assert len(_samples(tmp_path / "out", "val")) == len(val_images)


def test_a_damaged_image_is_left_out_and_named(
    official: Path, tmp_path: Path, val_images, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "ILSVRC2012_val_00000002.JPEG"
    _tar(official / "ILSVRC2012_img_val.tar", {**val_images, name: val_images[name][:300]})
    assert _prepare(official, tmp_path / "out") == 3
    assert f"left out: {name}: " in capsys.readouterr().err
    (line,) = (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()
    assert (json.loads(line)["split"], json.loads(line)["path"]) == ("val", name)
    assert "n01440764/ILSVRC2012_val_00000002" not in _samples(tmp_path / "out", "val")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (_devkit(truth=[1, 2, 77]), "has the class 77, which meta.mat does not know"),
        (_devkit(truth=[1, 1001]), "has the class 1001, which meta.mat does not know"),
        (_devkit(truth=[1]), "is image 2, but the development kit has the classes of 1"),
        ({**_devkit(), "x/data/meta.mat": b"MATLAB 5.0" * 50}, "meta.mat is not what it should be"),
        ({**_devkit(), "x/data/meta.mat": b""}, "meta.mat is not what it should be"),
        ({"x/ILSVRC2012_validation_ground_truth.txt": b"1\n2"}, "holds no meta.mat"),
        ({**_devkit(), "x/ILSVRC2012_validation_ground_truth.txt": b"1\nfox\n"}, "should hold one number per line"),
    ],
)
def test_a_development_kit_that_is_not_what_it_should_be_is_an_error(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], files: dict[str, bytes], message: str
) -> None:
    replaced = {name.rsplit("/", 1)[-1]: data for name, data in files.items()}
    _tar(official / "ILSVRC2012_devkit_t12.tar.gz", {f"kit/data/{name}": d for name, d in replaced.items()}, "w:gz")
    assert _prepare(official, tmp_path / "out", "--splits", "val") == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("left", [0, 0.1, 0.9])
def test_a_development_kit_that_was_cut_short_is_an_error(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], left: float
) -> None:
    path = official / "ILSVRC2012_devkit_t12.tar.gz"
    os.truncate(path, int(path.stat().st_size * left))
    assert _prepare(official, tmp_path / "out") == 1
    assert "ILSVRC2012_devkit_t12.tar.gz cannot be read" in capsys.readouterr().err


def test_a_development_kit_with_an_absurd_size_in_it_is_an_error(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = official / "ILSVRC2012_devkit_t12.tar.gz"
    _tar(path, _devkit())
    data = bytearray(path.read_bytes())
    data[124:136] = b"\x80" + b"\xff" * 11
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    assert _prepare(official, tmp_path / "out") == 1
    assert "ILSVRC2012_devkit_t12.tar.gz cannot be read" in capsys.readouterr().err


def test_without_scipy_one_sentence_says_what_to_install(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert _prepare(official, tmp_path / "out") == 1
    assert "pip install scipy" in capsys.readouterr().err
