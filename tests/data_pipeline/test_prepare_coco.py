from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.config import DataConfig
from data_pipeline.prepare import main
from data_pipeline.prepare.coco_file import PLACE, read_coco_file
from data_pipeline.shards import DataError, open_source, set_index
from data_pipeline.verify import main as verify

TRIANGLE = [[1.5, 1, 9, 1, 9, 9.25]]
CROWD = {"size": [30, 40], "counts": [600, 300, 300]}


def _annotation(number: int, image: int, category: int = 18, **changes: Any) -> dict[str, Any]:
    entry = {"id": number, "image_id": image, "category_id": category, "bbox": [1.5, 1, 7.5, 8.25], "area": 30.5}
    return {**entry, "iscrowd": 0, "segmentation": TRIANGLE, "attributes": {"dropped": True}, **changes}


def _content() -> dict[str, Any]:
    images = [{"license": 1, "id": n, "file_name": f"{n:012d}.jpg", "width": 40, "height": 30} for n in (139, 7, 8, 9)]
    annotations = [
        _annotation(1, 7),
        _annotation(2, 139, 90),
        _annotation(3, 7, 1, iscrowd=1, segmentation=CROWD, bbox=[20, 0, 10, 30]),
        _annotation(4, 8, bbox=[38, 25, 9, 9], segmentation=[[38, 25, 47, 25, 47, 34]]),  # reaches beyond the border
        _annotation(5, 8, bbox=[5, 5, 0, 3]),  # flat
    ]
    categories = [
        {"id": 90, "name": "brush"},
        {"id": 1, "name": "café"},
        {"id": 18, "name": "dog", "supercategory": "x"},
    ]
    return {"info": {"year": 2017}, "images": images, "annotations": annotations, "categories": categories}


Coco = Callable[..., Path]


@pytest.fixture
def coco(tmp_path: Path, image_file) -> Coco:
    """coco(change): COCO in miniature, with `change` applied to the content of the training split's file."""

    def write(change: Callable[[dict[str, Any]], object] = lambda content: None) -> Path:
        root = tmp_path / "COCO"
        (root / "annotations").mkdir(parents=True)
        for split in ("train2017", "val2017"):
            content = _content()
            (root / split).mkdir()
            for image in content["images"]:
                (root / split / image["file_name"]).write_bytes(image_file(image["id"]))
            if split == "train2017":
                change(content)
            text = json.dumps(content, ensure_ascii=False, indent=1 if split == "train2017" else None)
            (root / "annotations" / f"instances_{split}.json").write_text(text, "utf-8")
        return root

    return write


def _prepare(source: Path, *more: str) -> tuple[int, Path]:
    out = source.parent / "out"
    return main(["coco", "--src", str(source), "--out", str(out), "--jobs", "1", *more]), out


def _targets(out: Path, split: str = "train") -> dict[str, Any]:
    with tarfile.open(out / split / "shard-000000.tar") as tar:
        members = [member for member in tar.getmembers() if member.name.endswith(".json")]
        return {member.name.removesuffix(".json"): json.load(tar.extractfile(member)) for member in members}


def _left_out(out: Path) -> dict[str, str]:
    lines = (out / "left_out.jsonl").read_text().splitlines()
    return {entry["path"].rsplit("/", 1)[-1]: entry["reason"] for entry in map(json.loads, lines)}


def test_each_image_gets_its_annotations_with_contiguous_categories_and_original_ids(coco: Coco) -> None:
    source = coco()
    status, out = _prepare(source)
    assert status == 0
    index = set_index.load(out)
    assert (index.kind, index.classes) == ("detection", ("café", "dog", "brush"))
    assert index.targets == {"extension": "json", "category_ids": [1, 18, 90], "masks": True}
    assert {name: split.total for name, split in index.splits.items()} == {"train": 4, "val": 4}
    targets = _targets(out)
    assert targets["000000000007"] == {
        "image_id": 7,
        "file_name": "000000000007.jpg",
        "width": 40,
        "height": 30,
        "annotations": [
            {"id": 1, "category": 1, "bbox": [1.5, 1, 7.5, 8.25], "area": 30.5, "iscrowd": 0, "segmentation": TRIANGLE},
            {"id": 3, "category": 0, "bbox": [20, 0, 10, 30], "area": 30.5, "iscrowd": 1, "segmentation": CROWD},
        ],
    }
    assert targets["000000000009"]["annotations"] == [], "an image without annotations is kept"
    boxes = [entry["bbox"] for entry in targets["000000000008"]["annotations"]]
    assert boxes == [[38, 25, 9, 9], [5, 5, 0, 3]], "evaluation needs boxes as they were annotated"
    assert verify([str(out)]) == 0
    sample = open_source(DataConfig(path=str(out), num_classes=3), "train", "detection").read(0)
    assert sample.image == (source / "train2017" / f"{sample.key}.jpg").read_bytes()
    with pytest.raises(DataError, match="is a set for detection"):
        open_source(DataConfig(path=str(out), num_classes=3), "train")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pycocotools' own
def test_pycocotools_counts_the_same_from_the_shards_as_from_the_file(coco: Coco, tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO

    source = coco()
    _, out = _prepare(source)
    index = set_index.load(out)
    ids = index.targets["category_ids"]
    images, annotations = [], []
    for target in _targets(out, "val").values():
        images.append({"id": target["image_id"], "width": target["width"], "height": target["height"]})
        for entry in target["annotations"]:
            annotations.append({**entry, "image_id": target["image_id"], "category_id": ids[entry["category"]]})
    categories = [{"id": number, "name": name} for number, name in zip(ids, index.classes, strict=True)]
    path = tmp_path / "restored.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    original, restored = COCO(str(source / "annotations" / "instances_val2017.json")), COCO(str(path))
    assert sorted(original.getAnnIds()) == sorted(restored.getAnnIds())
    for number in original.getAnnIds():
        ours, theirs = restored.anns[number], original.anns[number]
        for name in ("image_id", "category_id", "bbox", "area", "iscrowd"):
            assert ours[name] == theirs[name]
        assert (restored.annToMask(ours) == original.annToMask(theirs)).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"category_id": 2}, "annotation 1: its category 2 is none that the file lists"),
        ({"category_id": [18]}, "annotation 1: its category [18] is none that the file lists"),
        ({"bbox": [41, 0, 3, 3]}, "annotation 1: its box [41, 0, 3, 3] lies outside of the image of 40x30"),
        ({"bbox": [4, 4, -3, 3]}, "annotation 1: its box [4, 4, -3, 3] has a negative side"),
        ({"bbox": None}, "annotation 1: its box is None instead of [x, y, width, height]"),
        ({"area": None}, "annotation 1: its area is None, and evaluation needs it"),
        ({"segmentation": []}, "annotation 1: it has no segmentation (with --boxes-only none is needed)"),
        ({"segmentation": {**CROWD, "counts": "1"}}, "annotation 1: the runs of its mask do not cover 30 x 40 pixels"),
    ],
)  # fmt: skip
def test_an_image_with_a_wrong_annotation_is_left_out_with_the_id(coco: Coco, change, reason: str) -> None:
    status, out = _prepare(coco(lambda content: content["annotations"][0].update(change)))
    assert status == 3
    assert _left_out(out) == {"000000000007.jpg": reason}
    assert set(_targets(out)) == {"000000000139", "000000000008", "000000000009"}
    assert verify([str(out)]) == 0


def test_images_that_are_missing_or_of_another_size_are_left_out(coco: Coco, image_file) -> None:
    source = coco(lambda content: content["images"][0].update(height=31))
    (source / "train2017" / "000000000008.jpg").unlink()
    (source / "train2017" / "000000000009.jpg").write_bytes(image_file(1)[:300])
    status, out = _prepare(source)
    assert status == 3
    left_out = _left_out(out)
    assert left_out["000000000139.jpg"] == (
        "the image that the annotations describe is 40x31 and the image, upright, 40x30"
    )
    assert left_out["000000000008.jpg"] == "No such file or directory"
    assert "damaged" in left_out["000000000009.jpg"]
    assert set(_targets(out)) == {"000000000007"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"].append(_annotation(2, 9)), "1 annotation ids occur more than once, such as 2"),
        (lambda c: c["images"].append({**c["images"][0]}), "1 image ids occur more than once, such as 139"),
        (lambda c: c["images"][0].update(file_name="./000000000007.jpg"), "the images 139 and 7 are both the file"),
        (lambda c: c["categories"].append({"id": 18, "name": "cat"}), "the category id 18 occurs twice"),
        (
            lambda c: c["annotations"].append(_annotation(6, 10)),
            "1 annotations belong to images that the file does not",
        ),
        (lambda c: c["images"][0].update(file_name="../../x.jpg"), "leads out of the folder"),
        (lambda c: c["images"][0].update(file_name="/etc/x.jpg"), "leads out of the folder"),
        (lambda c: c["images"][0].update(id="139"), "id is '139' instead of a number"),
        (lambda c: c["images"][0].pop("width"), "an entry of 'images' has no 'width'"),
        (lambda c: c["annotations"].append(3), "is damaged or no annotation file"),
        (lambda c: c.pop("categories"), "lists no categories"),
        (lambda c: c.update(images=[], annotations=[]), "lists no images:"),
        (lambda c: c.pop("annotations"), "lists no annotations:"),
        (lambda c: c["categories"].pop(), None),
    ],
)
def test_a_file_that_contradicts_itself_is_refused_before_anything_is_written(
    coco: Coco, change, message: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    source = coco(change)
    status, out = _prepare(source)
    assert status == 1
    error = capsys.readouterr().err
    assert (message or "has other categories than the split 'train2017'") in error
    assert ("instances_train2017.json" if message else "instances_val2017.json") in error
    assert not out.exists()


def test_a_split_none_of_whose_images_has_an_object_is_prepared(coco: Coco) -> None:
    status, out = _prepare(coco(lambda content: content.update(annotations=[])))
    assert status == 0
    targets = _targets(out)
    assert len(targets) == 4
    assert all(target["annotations"] == [] for target in targets.values())


@pytest.mark.parametrize("end", [0, 1, 100, 700, -1])
def test_a_file_that_was_cut_short_is_refused(coco: Coco, capsys: pytest.CaptureFixture[str], end: int) -> None:
    source = coco()
    path = source / "annotations" / "instances_train2017.json"
    path.write_bytes(path.read_bytes().rstrip()[:end])
    status, _ = _prepare(source)
    assert status == 1
    assert "instances_train2017.json is damaged or no annotation file: " in capsys.readouterr().err


@pytest.mark.parametrize("indent", [None, 2])
def test_places_are_those_of_the_annotations_whatever_surrounds_them(tmp_path: Path, indent: int | None) -> None:
    content = _content()
    content = {"note": ["[{", {"images": "ä\\u00e4"}], **content, "licenses": [], "end": None}
    path = tmp_path / "file.json"
    path.write_text(json.dumps(content, ensure_ascii=False, indent=indent), "utf-8")
    found = read_coco_file(path)
    assert found.categories == {1: "café", 18: "dog", 90: "brush"}
    assert [image.id for image in found.images] == [139, 7, 8, 9]
    data = path.read_bytes()
    read = {
        image: [json.loads(data[start : start + size]) for start, size in np.frombuffer(packed, PLACE).tolist()]
        for image, packed in found.places.items()
    }
    expected: dict[int, list[Any]] = {}
    for annotation in content["annotations"]:
        expected.setdefault(annotation["image_id"], []).append(annotation)
    assert read == expected


def test_names_may_be_written_with_escapes(tmp_path: Path) -> None:
    content = _content()
    content["images"][0]["file_name"] = "Zürich/日本.jpg"
    path = tmp_path / "file.json"
    for ascii_only in (True, False):
        path.write_text(json.dumps(content, ensure_ascii=ascii_only), "utf-8")
        found = read_coco_file(path)
        assert (found.images[0].file_name, found.categories[1]) == ("Zürich/日本.jpg", "café")


def test_boxes_only_leaves_segmentations_out_and_needs_none(coco: Coco) -> None:
    status, out = _prepare(coco(lambda content: content["annotations"][0].pop("segmentation")), "--boxes-only")
    assert status == 0
    assert set_index.load(out).targets["masks"] is False
    assert all("segmentation" not in entry for target in _targets(out).values() for entry in target["annotations"])
    assert verify([str(out)]) == 0


def test_files_elsewhere_are_found_by_patterns(coco: Coco) -> None:
    source = coco()
    for split in ("train", "val"):
        (source / f"{split}2017").rename(source / split)
        path = source / "annotations" / f"instances_{split}2017.json"
        path.rename(source / split / "_annotations.coco.json")
    places = ["--splits", "train", "val", "--annotations", "{split}/_annotations.coco.json"]
    assert _prepare(source, *places)[0] == 0


def test_images_cannot_be_made_smaller_and_splits_need_different_names(
    coco: Coco, capsys: pytest.CaptureFixture[str]
) -> None:
    source = coco()
    assert _prepare(source, "--max-size", "20")[0] == 1
    assert "--max-size cannot be used with coco" in capsys.readouterr().err
    assert _prepare(source, "--splits", "train2017", "train2014")[0] == 1
    assert "two of them would get the same name" in capsys.readouterr().err
    assert _prepare(source, "--splits", "test2017")[0] == 1
    assert "There is no" in capsys.readouterr().err


def test_parts_give_the_bytes_of_one_run_and_a_changed_annotation_is_noticed(coco: Coco) -> None:
    source = coco()
    size = ["--shard-size", "2"]
    _, out = _prepare(source, *size)
    parted = source.parent / "parted"
    for part in ("--part=1/2", "--part=2/2", "--merge"):
        assert main(["coco", "--src", str(source), "--out", str(parted), "--jobs", "1", *size, part]) == 0
    for path in sorted(out.rglob("*")):
        if path.is_file():
            assert (parted / path.relative_to(out)).read_bytes() == path.read_bytes(), path
    before = {path: path.read_bytes() for path in out.rglob("*.tar")}
    (out / "index.json").unlink()
    annotations = source / "annotations" / "instances_train2017.json"
    content = json.loads(annotations.read_text("utf-8"))
    content["annotations"][0]["bbox"] = [2, 2, 3, 3]
    annotations.write_text(json.dumps(content), "utf-8")
    assert _prepare(source, *size)[0] == 0
    assert [path.parent.name for path in before if path.read_bytes() != before[path]] == ["train"]


def test_two_processes_make_what_one_makes(coco: Coco) -> None:
    source = coco()
    _, out = _prepare(source)
    both = source.parent / "both"
    assert main(["coco", "--src", str(source), "--out", str(both), "--jobs", "2"]) == 0
    assert (both / "train" / "shard-000000.tar").read_bytes() == (out / "train" / "shard-000000.tar").read_bytes()
    assert (both / "index.json").read_bytes() == (out / "index.json").read_bytes()
