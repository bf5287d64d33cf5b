from __future__ import annotations

import io
import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.config import DataConfig
from data_pipeline.prepare import main
from data_pipeline.shards import DataError, open_source, set_index
from data_pipeline.verify import main as verify


def _png(values: np.ndarray, mode: str | None = None) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(values)
    (image.convert(mode) if mode else image).save(file, "PNG")
    return file.getvalue()


def _mask(seed: int, height: int = 30, width: int = 40, highest: int = 150) -> bytes:
    return _png(np.random.default_rng(seed).integers(0, highest + 1, (height, width), dtype=np.uint8))


@pytest.fixture
def ade(tmp_path: Path, image_file) -> Path:
    """ADEChallengeData2016 in miniature: five images to train on, two to validate."""
    root = tmp_path / "ADEChallengeData2016"
    for split, count in (("training", 5), ("validation", 2)):
        for folder in ("images", "annotations"):
            (root / folder / split).mkdir(parents=True)
        for number in range(count):
            (root / "images" / split / f"ADE_{number:08d}.jpg").write_bytes(image_file(number))
            (root / "annotations" / split / f"ADE_{number:08d}.png").write_bytes(_mask(number))
    lines = ["Idx\tRatio\tTrain\tVal\tName "]
    lines += [f"{number}\t0.1\t9\t1\tname {number}, other {number}        " for number in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(lines) + "\n")
    return root


def _prepare(ade: Path, *more: str) -> tuple[int, Path]:
    out = ade.parent / "out"
    return main(["ade20k", "--src", str(ade), "--out", str(out), "--jobs", "1", *more]), out


def _left_out(out: Path) -> dict[str, str]:
    lines = (out / "left_out.jsonl").read_text().splitlines()
    return {entry["path"]: entry["reason"] for entry in map(json.loads, lines)}


def test_images_and_masks_lie_in_the_shards_byte_by_byte(ade: Path) -> None:
    status, out = _prepare(ade)
    assert status == 0
    index = set_index.load(out)
    assert (index.kind, len(index.classes), index.classes[149]) == ("segmentation", 150, "name 150, other 150")
    assert index.targets == {"extension": "seg.png", "first_label": 1, "ignore": [0]}
    assert {name: split.total for name, split in index.splits.items()} == {"train": 5, "val": 2}
    with tarfile.open(out / "train" / "shard-000000.tar") as tar:
        content = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
    expected = {}
    for number in range(5):
        key = f"ADE_{number:08d}"
        expected[f"{key}.jpg"] = (ade / "images" / "training" / f"{key}.jpg").read_bytes()
        expected[f"{key}.seg.png"] = (ade / "annotations" / "training" / f"{key}.png").read_bytes()
    assert content == expected
    assert verify([str(out)]) == 0
    source = open_source(DataConfig(path=str(out), num_classes=150), "val", "segmentation")
    sample = source.read(0)
    assert (sample.label, sample.target) == (
        -1,
        (ade / "annotations" / "validation" / f"{sample.key}.png").read_bytes(),
    )


def test_a_task_of_classification_is_told_what_the_set_is_for(ade: Path) -> None:
    _, out = _prepare(ade)
    with pytest.raises(DataError, match="is a set for segmentation, and one for classification is needed"):
        open_source(DataConfig(path=str(out), num_classes=150), "train")


def test_images_whose_masks_are_missing_or_wrong_are_left_out_with_the_reason(
    ade: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masks = ade / "annotations" / "training"
    (masks / "ADE_00000000.png").unlink()
    (masks / "ADE_00000001.png").write_bytes(_mask(1, width=41))
    (masks / "ADE_00000002.png").write_bytes(_png(np.full((30, 40), 151, np.uint8)))
    (masks / "ADE_00000003.png").write_bytes(_png(np.zeros((30, 40), np.uint8), "RGB"))
    (masks / "ADE_00000009.png").write_bytes(_mask(9))
    status, out = _prepare(ade)
    assert status == 3
    assert _left_out(out) == {
        "images/training/ADE_00000000.jpg": "there is no mask annotations/training/ADE_00000000.png",
        "images/training/ADE_00000001.jpg": "the mask is 41x30 and the image, upright, 40x30",
        "images/training/ADE_00000002.jpg": "the mask holds the value 151; allowed are 1 to 150 and 0 (ignored)",
        "images/training/ADE_00000003.jpg": "the mask holds RGB colours: store label values (8 bits)",
    }
    assert set_index.load(out).splits["train"].total == 1
    assert "masks without an image in train (1)" in capsys.readouterr().out
    assert verify([str(out)]) == 0


def test_two_images_of_one_mask_are_named(ade: Path, image_file, capsys: pytest.CaptureFixture[str]) -> None:
    (ade / "images" / "training" / "ADE_00000001.png").write_bytes(image_file(1, kind="PNG"))
    assert _prepare(ade)[0] == 0
    assert (
        "warning: images/training/ADE_00000001.jpg and images/training/ADE_00000001.png have the same mask, "
        "annotations/training/ADE_00000001.png\n"
    ) in capsys.readouterr().err


def test_a_faulty_mask_stops_the_work_where_that_was_asked_for(ade: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (ade / "annotations" / "training" / "ADE_00000003.png").unlink()
    status, _ = _prepare(ade, "--on-error", "stop")
    assert status == 1
    assert "images/training/ADE_00000003.jpg cannot be used: there is no mask" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "fits"), [((40, 30), True), ((30, 40), False)])
def test_a_mask_must_have_the_size_of_the_image_as_it_is_shown(ade: Path, image_file, size, fits: bool) -> None:
    turned = Image.open(io.BytesIO(image_file(1)))
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it: 30 wide, 40 high
    turned.save(ade / "images" / "training" / "ADE_00000001.jpg", exif=exif)
    (ade / "annotations" / "training" / "ADE_00000001.png").write_bytes(_mask(1, *size))
    status, out = _prepare(ade)
    assert status == (0 if fits else 3)
    if not fits:
        reason = _left_out(out)["images/training/ADE_00000001.jpg"]
        assert reason.startswith("the mask is 40x30 and the image, upright, 30x40; if EXIF says")


def test_another_run_keeps_the_shards_and_notices_a_changed_mask(ade: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out = _prepare(ade)
    before = {path: path.read_bytes() for path in out.rglob("*.tar")}
    assert _prepare(ade)[0] == 0
    assert "was complete already" in capsys.readouterr().out
    mask = ade / "annotations" / "training" / "ADE_00000002.png"
    mask.write_bytes(_mask(77))
    later = (out / "train" / "shard-000000.tar").stat().st_mtime + 10
    os.utime(mask, (later, later))
    assert _prepare(ade)[0] == 1
    assert f"The source of {out} has changed since that was finished" in capsys.readouterr().err
    (out / "index.json").unlink()
    assert _prepare(ade)[0] == 0
    assert [path.parent.name for path in before if path.read_bytes() != before[path]] == ["train"]
    assert verify([str(out)]) == 0


def test_masks_of_images_made_smaller_are_made_smaller_by_nearest_values(ade: Path) -> None:
    status, out = _prepare(ade, "--max-size", "15")
    assert status == 0
    source = open_source(DataConfig(path=str(out), num_classes=150), "train", "segmentation")
    for number in range(5):
        sample = source.read(number)
        before = np.asarray(Image.open(ade / "annotations" / "training" / f"{sample.key}.png"))
        after = np.asarray(Image.open(io.BytesIO(sample.target)))
        assert Image.open(io.BytesIO(sample.image)).size == (20, 15)
        assert (after == before[1::2, 1::2]).all()
    assert verify([str(out)]) == 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda ade: (ade / "objectInfo150.txt").unlink(), "objectInfo150.txt cannot be read"),
        (lambda ade: (ade / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n"), "names 1"),
        (lambda ade: (ade / "images" / "validation").rename(ade / "elsewhere"), "There is no folder .*validation"),
        (lambda ade: [path.unlink() for path in (ade / "images" / "training").iterdir()], "holds no images"),
    ],
)
def test_an_archive_that_is_not_whole_is_refused_before_anything_is_written(
    ade: Path, damage, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(ade)
    status, out = _prepare(ade)
    assert status == 1
    assert re.search(message, capsys.readouterr().err)
    assert not out.exists()


@pytest.fixture
def street(tmp_path: Path, image_file) -> Path:
    """Folders as Cityscapes has them: nested, with long suffixes, ignored pixels 255."""
    root = tmp_path / "street"
    for split in ("train", "val"):
        for town in ("aachen", "bonn"):
            for folder, suffix in (("left", "_leftImg8bit.png"), ("fine", "_labelTrainIds.png")):
                (root / folder / split / town).mkdir(parents=True, exist_ok=True)
                data = image_file(len(town), kind="PNG") if folder == "left" else _mask(3, highest=1)
                (root / folder / split / town / f"{town}_0001{suffix}").write_bytes(data)
            (root / "fine" / split / town / f"{town}_0001_color.png").write_bytes(b"not looked at")
    (root / "names.txt").write_text("road\nsidewalk\n\n")
    return root


LAYOUT = ["--images", "left/{split}", "--masks", "fine/{split}", "--image-suffix", "_leftImg8bit.png"]


def test_other_folders_are_described_by_patterns_and_suffixes(street: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    named = ["--class-names", str(street / "names.txt"), "--mask-suffix", "_labelTrainIds.png"]
    assert main(["segmentation", "--src", str(street), "--out", str(out), *LAYOUT, *named, "--jobs", "1"]) == 0
    index = set_index.load(out)
    assert (index.classes, index.targets["first_label"], index.targets["ignore"]) == (("road", "sidewalk"), 0, [255])
    source = open_source(DataConfig(path=str(out), num_classes=2), "train", "segmentation")
    assert {source.read(number).key for number in range(2)} == {"aachen/aachen_0001", "bonn/bonn_0001"}
    assert verify([str(out)]) == 0


def test_ignored_values_and_names_that_make_no_sense_are_refused(
    street: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["segmentation", "--src", str(street), "--out", str(tmp_path / "out"), *LAYOUT]
    assert main([*start, "--class-names", str(street / "names.txt"), "--ignore", "1"]) == 1
    assert "--first-label, --ignore: 1 cannot be ignored" in capsys.readouterr().err
    (street / "names.txt").write_text("road\n\nsidewalk\n")
    assert main([*start, "--class-names", str(street / "names.txt")]) == 1
    assert "should hold the name of a class in each line; one is empty" in capsys.readouterr().err
    assert main([*start, "--class-names", str(street / "nowhere.txt")]) == 1
    assert "nowhere.txt cannot be read" in capsys.readouterr().err


def test_class_names_may_be_typed_with_commas_between(
    street: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["segmentation", "--src", str(street), "--out", str(tmp_path / "out"), *LAYOUT, "--jobs", "1"]
    start += ["--mask-suffix", "_labelTrainIds.png"]
    assert main([*start, "--class-names", "road,,sidewalk"]) == 1
    assert "--class-names road,,sidewalk: there is nothing between two of the commas" in capsys.readouterr().err
    assert main([*start, "--class-names", "road, side walk"]) == 0
    assert set_index.load(tmp_path / "out").classes == ("road", "side walk")
