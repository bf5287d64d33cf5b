from __future__ import annotations

import errno
import hashlib
import io
import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.config import DataConfig
from data_pipeline.prepare import folder, main, shapes
from data_pipeline.prepare.shapes_outlines import Outline, border, filled, placed, runs
from data_pipeline.prepare.shapes_scene import _OUTLINES, BLOB, CLASSES, OTHER, Scene, compose
from data_pipeline.shards import open_source, set_index
from data_pipeline.shards.files import TEMPORARY_PREFIX
from data_pipeline.targets import rle
from data_pipeline.verify import main as verify

SMALL = ("--train", "6", "--val", "3", "--size", "64", "--jobs", "1")


def _prepare(task: str, out: Path, *more: str) -> int:
    return main(["shapes", "--task", task, "--out", str(out), *SMALL, *more])


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [compose(0, "train", number, 128, varied=number % 2 == 1) for number in range(120)]


def _inside(outline: Outline, x: int, y: int) -> bool:
    """The even-odd rule, for one point, with exact fractions."""
    crossings = 0
    for contour in outline:
        points = contour.tolist()
        for (ax, ay), (bx, by) in zip(points, [*points[1:], points[0]], strict=True):
            if (ay <= y) != (by <= y):
                crossings += x > ax + Fraction((y - ay) * (bx - ax), by - ay)
    return crossings % 2 == 1


@pytest.mark.parametrize("name", CLASSES)
def test_a_pixel_belongs_to_an_outline_that_its_centre_lies_in(name: str) -> None:
    outline = placed(_OUTLINES[name], (64 * 15 + 7, 64 * 12 + 40), 64 * 11 + 5, 83, 17)
    mask = filled(outline, 20, 24)  # cut below
    expected = [[_inside(outline, 64 * column + 32, 64 * row + 32) for column in range(24)] for row in range(20)]
    assert (mask == np.array(expected)).all()
    assert mask[-1].any()
    assert not mask.all()
    assert mask[12, 15] == (name != "ring")


def test_pixels_and_masks_are_the_same_on_every_machine() -> None:
    digest = hashlib.sha256()
    for number, varied in ((0, False), (7, True), (40, True)):
        scene = compose(3, "val", number, 96, varied)
        digest.update(repr(scene.pixels.shape).encode() + scene.pixels.tobytes() + shapes.mask_of(scene).tobytes())
    assert digest.hexdigest() == "c166b0aeff22f483f5a894dd0d1da5b16090f58d8ab5338b7bbff5cd784cb8c8"


def test_nearer_objects_cover_those_behind_them_and_most_of_each_is_seen(scenes: list[Scene]) -> None:
    covered = 0
    for scene in scenes:
        owner = np.full(scene.pixels.shape[:2], -1)
        for number in sorted(range(len(scene.objects)), key=lambda number: -scene.objects[number].depth):
            owner[scene.objects[number].whole] = number
        for number, found in enumerate(scene.objects):
            assert (found.seen == (owner == number)).all()
            assert found.seen.sum() >= max(40, 0.6 * found.whole.sum())
            covered += not (found.seen == found.whole).all()
            off = [np.abs(scene.pixels[found.seen].astype(int) - np.clip(c, 8, 247)).max(axis=1)
                   for c in (found.texture.light, found.texture.dark)]  # fmt: skip
            assert np.minimum(*off).max() <= 16, "every pixel has one of the texture's colours, with grain"
    assert covered > 20


def test_a_blob_has_the_class_of_the_one_shape_of_its_hue_far_away(scenes: list[Scene]) -> None:
    blobs = [(scene, found) for scene in scenes for found in scene.objects if found.kind == BLOB]
    assert len(blobs) > 20
    assert {found.label for _, found in blobs} == set(range(len(CLASSES)))
    for scene, blob in blobs:
        same = [found for found in scene.objects if found.texture == blob.texture and found is not blob]
        assert [found.label for found in same] == [blob.label]
        assert scene.objects[blob.key] is same[0]
        assert same[0].kind == same[0].label
        distance = np.hypot(*np.subtract(blob.centre, same[0].centre)) / 64
        assert distance >= 0.45 * max(scene.pixels.shape)


def test_shapes_of_an_image_have_different_hues_and_some_images_hold_nothing(scenes: list[Scene]) -> None:
    for scene in scenes:
        colours = [found.texture.light for found in scene.objects if found.kind != BLOB]
        assert len(set(colours)) == len(colours)
    assert 0 < sum(not scene.objects for scene in scenes) < len(scenes) / 4
    assert any(found.kind == OTHER for scene in scenes for found in scene.objects)


def test_images_for_detection_have_any_aspect_and_others_are_square(scenes: list[Scene]) -> None:
    sizes = [scene.pixels.shape[:2] for scene in scenes]
    assert set(sizes[0::2]) == {(128, 128)}
    varied = sizes[1::2]
    assert all(max(size) == 128 and min(size) >= 72 for size in varied)
    assert sum(h < w for h, w in varied) > 10 < sum(h > w for h, w in varied)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pycocotools' own
def test_boxes_areas_and_segmentations_are_those_of_what_is_seen(scenes: list[Scene]) -> None:
    coder = pytest.importorskip("pycocotools.mask")
    kinds = set()
    for scene in scenes:
        objects = [found for found in scene.objects if found.kind != OTHER]
        height, width = scene.pixels.shape[:2]
        for entry, found in zip(shapes.annotations_of(scene, 1, 1), objects, strict=True):
            segmentation = entry["segmentation"]
            kinds.add(type(segmentation))
            encoded = coder.frPyObjects(segmentation, height, width)
            encoded = coder.merge(encoded) if isinstance(encoded, list) else encoded
            assert (coder.decode(encoded) == found.seen).all()
            assert (coder.toBbox(encoded).tolist(), coder.area(encoded)) == (entry["bbox"], entry["area"])
            assert entry["category_id"] == found.label + 1
    assert kinds == {list, dict}


def test_a_line_around_a_mask_is_given_only_where_it_tells_the_mask() -> None:
    mask = np.zeros((6, 7), bool)
    mask[1:4, 2:6] = True
    mask[3, 5] = False
    assert border(mask) == [6, 1, 6, 3, 5, 3, 5, 4, 2, 4, 2, 1]
    hole, parts, corner = mask.copy(), mask.copy(), mask.copy()
    hole[2, 3] = False
    parts[5, 0] = True
    corner[4, 1] = True
    assert [border(other) for other in (hole, parts, corner, np.zeros((3, 3), bool))] == [None] * 4
    for other in (mask, hole, parts, ~mask):
        assert (rle.decode({"size": [6, 7], "counts": runs(other)}) == other).all()


def test_masks_in_the_shards_are_those_that_were_drawn(tmp_path: Path) -> None:
    out = tmp_path / "set"
    assert _prepare("segmentation", out) == 0
    index = set_index.load(out)
    assert (index.kind, index.classes) == ("segmentation", ("background", *CLASSES))
    assert index.targets == {"extension": "seg.png", "first_label": 1, "ignore": [0]}
    assert {name: split.total for name, split in index.splits.items()} == {"train": 6, "val": 3}
    source = open_source(DataConfig(path=str(out), num_classes=7), "train", "segmentation")
    for sample in map(source.read, range(6)):
        scene = compose(0, "train", int(sample.key), 64, varied=False)
        mask = np.asarray(Image.open(io.BytesIO(sample.target)))
        expected = np.ones((64, 64), int)
        for found in scene.objects:
            expected[found.seen] = 0 if found.kind == OTHER else found.label + 2
        assert (mask == expected).all()
        pixels = np.asarray(Image.open(io.BytesIO(sample.image))).astype(int)
        assert np.abs(pixels - scene.pixels).mean() < 4
    assert verify([str(out)]) == 0


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_the_kept_source_is_in_an_official_layout_and_gives_the_same_shards(task: str, tmp_path: Path) -> None:
    out, again = tmp_path / "set", tmp_path / "again"
    assert _prepare(task, out) == 0
    command = ["coco", "--src", f"{out}-source"]
    if task == "segmentation":
        names = tmp_path / "names.txt"
        names.write_text("\n".join(("background", *CLASSES)))
        command = ["segmentation", "--src", f"{out}-source", "--splits", "training", "validation"]
        command += ["--class-names", str(names), "--first-label", "1", "--ignore", "0"]
    assert main([*command, "--out", str(again), "--jobs", "1"]) == 0
    for split in ("train", "val"):
        other = {"train": "training", "val": "validation"}[split] if task == "segmentation" else split
        shard = "shard-000000.tar"
        assert (again / other / shard).read_bytes() == (out / split / shard).read_bytes()
    assert verify([str(out)]) == 0


def test_images_without_objects_and_keys_of_blobs_are_in_the_annotations(tmp_path: Path) -> None:
    out = tmp_path / "set"
    assert _prepare("detection", out, "--train", "40") == 0
    content = json.loads((tmp_path / "set-source" / "annotations" / "instances_train2017.json").read_text())
    category = {entry["id"]: entry["category_id"] for entry in content["annotations"]}
    assert len(category) == len(content["annotations"])
    blobs = [entry for entry in content["annotations"] if "key" in entry]
    assert blobs
    assert all(entry["category_id"] == category[entry["key"]] for entry in blobs)
    assert {image["id"] for image in content["images"]} > {entry["image_id"] for entry in content["annotations"]}


def _files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_a_drawing_that_was_stopped_goes_on_to_the_same_files(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole" / "set", tmp_path / "stopped" / "set"
    for place in (whole, out):
        place.parent.mkdir()
    assert _prepare(task, whole) == 0
    drawn: list[int] = []

    def stopping(seed: int, split: str, number: int, *more: Any, **also: Any) -> Scene:
        drawn.append(number)
        if len(drawn) == 5:
            raise KeyboardInterrupt
        return compose(seed, split, number, *more, **also)

    monkeypatch.setattr(shapes, "compose", stopping)
    assert _prepare(task, out) == 130
    image = next((tmp_path / "stopped" / "set-source").rglob("*.jpg"))
    image.with_name(f"{TEMPORARY_PREFIX}half-host-1").write_bytes(b"half")  # SIGKILL leaves such a file
    image.write_bytes(image.read_bytes()[:100])
    assert not out.exists()
    assert _prepare(task, out) == 0
    assert _files(tmp_path / "stopped") == _files(tmp_path / "whole")
    capsys.readouterr()
    drawn.clear()
    assert _prepare(task, out) == 0
    assert not drawn
    assert "was complete already" in capsys.readouterr().out


def test_a_full_disk_is_said_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 10_000))  # type: ignore[attr-defined]
        assert _prepare("detection", tmp_path / "set") == 1
    assert f"The disk of {tmp_path / 'set-source'} has 0.0 MB free" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

    def full(path: Path, content: bytes) -> None:
        if path.name == "000000000002.jpg":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        folder.write_if_changed(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(shapes, "write_if_changed", full)
        assert _prepare("detection", tmp_path / "set") == 1
    assert "The disk is full: " in capsys.readouterr().err
    assert _prepare("detection", tmp_path / "set") == 0


def test_parts_give_the_bytes_of_one_run(tmp_path: Path) -> None:
    whole, parted = tmp_path / "set", tmp_path / "parted"
    assert _prepare("detection", whole, "--shard-size", "2") == 0
    for part in ("--part=2/2", "--part=1/2", "--merge"):
        assert _prepare("detection", parted, "--shard-size", "2", part) == 0
    assert _files(parted) == _files(whole)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--size", "63"), "--size 63: give 64 to 1024 pixels"),
        (("--seed", "1"), "was drawn with other options than these"),
        (("--task", "segmentation"), "was drawn with other options than these"),
        (("--source", "{tmp}"), "lies inside --source"),
        (("--source", "{tmp}/set/source"), "lies inside --out"),
        (("--source", "{tmp}/other"), "is not empty (it holds mine.txt) and no source of shapes"),
    ],
)
def test_what_would_mix_with_something_else_is_refused_before_it_is_drawn(
    more: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    if "other options" in message:
        assert _prepare("detection", tmp_path / "set") == 0
    before = _files(tmp_path)
    assert _prepare("detection", tmp_path / "set", *(text.replace("{tmp}", str(tmp_path)) for text in more)) == 1
    assert message in capsys.readouterr().err
    assert _files(tmp_path) == before
