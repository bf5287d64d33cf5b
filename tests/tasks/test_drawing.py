"""Pictures of class maps and instances: colours and places by value."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest

from data_pipeline.targets.instances import Instances
from data_pipeline.targets.objects import ImageObject, ImageObjects
from dgt.tasks import drawing
from dgt.tasks.detections import Detected
from dgt.tasks.drawing import (
    MARGIN,
    WHITE,
    class_map,
    colours,
    detections,
    fitted,
    guesses,
    instances,
    objects,
    with_legend,
)

NAMES = ["sky", "road", "car"]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is written onto pictures."""
    words: list[str] = []
    real = drawing.ImageDraw.ImageDraw.text

    def text(self: Any, at: Any, said: str, *rest: Any, **options: Any) -> None:
        words.append(said)
        real(self, at, said, *rest, **options)

    monkeypatch.setattr(drawing.ImageDraw.ImageDraw, "text", text)
    return words


def grey(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 100, np.uint8)


def at(picture: np.ndarray, y: int, x: int) -> list[int]:
    """A pixel of the image in the picture, as it is drawn."""
    return picture[MARGIN + y, MARGIN + x].tolist()


def blend(share: float, label: int) -> list[int]:
    return ((1 - share) * 100 + share * colours(label + 1)[label].astype(float)).round().astype(int).tolist()


def as_text(mask: np.ndarray) -> dict[str, Any]:
    """A mask in COCO's run-length encoding, as numbers."""
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs}


def test_colours_differ_and_do_not_depend_on_how_many_there_are() -> None:
    palette = colours(256).astype(int)
    apart = np.abs(palette[:, None] - palette[None]).sum(axis=-1) + 999 * np.eye(256, dtype=int)
    assert apart.min() >= 12
    assert apart[:20, :20].min() >= 60
    np.testing.assert_array_equal(colours(7), colours(256)[:7])
    assert colours(300)[256:].tolist() == colours(44).tolist()


def test_images_are_enlarged_by_whole_numbers_and_shrunk_to_the_longest_side() -> None:
    enlarged, scale = fitted(np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3))
    assert (enlarged.shape, scale) == ((240, 320, 3), 5.0)
    assert enlarged[49, 14].tolist() == enlarged[45, 10].tolist() == [(9 * 64 + 2) * 3 % 256 + i for i in range(3)]
    for size, expected in (
        ((64, 48), (320, 240)),
        ((200, 321), (200, 321)),
        ((100, 1280), (50, 640)),
        ((3, 1300), (1, 640)),
    ):
        assert fitted(grey(*size))[0].shape[:2] == expected
    assert fitted(grey(319, 10), longest=500)[0].shape == (319, 10, 3)


def test_a_class_map_is_blended_with_the_image_where_it_has_a_class(written: list[str]) -> None:
    classes = np.full((40, 400), 255, np.uint8)
    classes[:, 100:200], classes[:, 200:] = 2, 7
    picture = class_map(grey(40, 400), classes, NAMES)
    assert at(picture, 20, 50) == [100, 100, 100]
    assert at(picture, 20, 150) == blend(0.55, 2)
    assert at(picture, 20, 300) == blend(0.55, 7)
    border = (0.55 * np.array(0.45 * 100 + 0.55 * colours(3)[2])).round().tolist()
    assert at(picture, 20, 199) == border
    assert written == ["7  67 %", "car  33 %"]  # of the pixels that have a class, the most frequent first
    assert picture[40 + 2 * MARGIN + 8, MARGIN + 6].tolist() == colours(8)[7].tolist()


def test_detections_below_the_threshold_are_not_drawn_and_the_first_is_uppermost(written: list[str]) -> None:
    masks = np.zeros((3, 320, 320), bool)
    masks[0, 100:200, 100:200] = masks[1, 150:250, 150:250] = masks[2, 10:60, 10:60] = True
    boxes = np.array([[100, 100, 200, 200], [150, 150, 250, 250], [10, 10, 60, 60]], np.float32)
    found = Detected(boxes, np.array([0.9, 0.5, 0.49], np.float32), np.array([2, 1, 0]), tuple(map(as_text, masks)))
    picture = detections(grey(320, 320), found, NAMES)
    assert at(picture, 35, 35) == [100, 100, 100]
    assert at(picture, 130, 130) == blend(0.45, 2)
    assert at(picture, 230, 230) == blend(0.45, 1)
    for y, x in ((100, 150), (199, 150), (150, 100), (150, 199)):
        assert at(picture, y, x) == colours(3)[2].tolist()
    assert written == ["car 0.90", "road 0.50", "road  1", "car  1"]
    plain = detections(grey(320, 320), Detected(boxes, found.scores, found.labels, None), NAMES, threshold=0.3)
    assert at(plain, 130, 130) == [100, 100, 100]
    assert at(plain, 59, 30) == colours(1)[0].tolist()


def test_masks_of_a_large_image_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[weakref.ref[np.ndarray]] = []
    real = drawing.rle.decode

    def decode(segmentation: dict[str, Any]) -> np.ndarray:
        assert not any(mask() is not None for mask in there)
        there.append(weakref.ref(mask := real(segmentation)))
        return mask

    monkeypatch.setattr(drawing.rle, "decode", decode)
    mask = np.zeros((1300, 40), bool)
    mask[650:, 20:] = True
    boxes = np.array([[20, 650, 40, 1300]] * 3, np.float32)
    found = Detected(boxes, np.ones(3, np.float32), np.array([0, 1, 2]), (as_text(mask),) * 3)
    things = tuple(ImageObject(i, i, (20, 650, 20, 650), 13000, False, as_text(mask)) for i in range(3))
    for picture in (
        detections(grey(1300, 40), found, NAMES),
        objects(grey(1300, 40), ImageObjects(7, "7.jpg", mask.shape, things), NAMES),
    ):
        assert at(picture, 600, 15) != [100, 100, 100]
        assert at(picture, 300, 5) == [100, 100, 100]
    assert len(there) == 6


def test_masks_and_boxes_are_enlarged_with_their_image() -> None:
    mask = np.zeros((32, 32), bool)
    mask[8:20, 4:10] = True
    found = Detected(np.array([[4, 8, 10, 20]], np.float32), np.ones(1, np.float32), np.array([1]), (as_text(mask),))
    picture = detections(grey(32, 32), found, NAMES)
    tinted = np.abs(picture[MARGIN : MARGIN + 320, MARGIN : MARGIN + 320].astype(int) - 100).sum(axis=-1) > 0
    rows, columns = np.flatnonzero(tinted[100:].any(axis=1)) + 100, np.flatnonzero(tinted[100:].any(axis=0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (100, 199, 40, 99)
    assert at(picture, 150, 70) == blend(0.45, 1)


def test_instances_of_training_have_masks_of_their_boxes_and_no_scores(written: list[str]) -> None:
    corner = np.tri(50, 40, dtype=np.uint8)
    targets = Instances(np.array([[60.5, 80, 99.7, 130]], np.float32), np.array([2]), (corner,))
    picture = instances(grey(200, 400), targets, NAMES)
    assert at(picture, 120, 70) == blend(0.45, 2)
    assert at(picture, 83, 90) == [100, 100, 100]
    assert at(picture, 100, 80) == colours(3)[2].tolist()  # the outline along the diagonal
    assert written == ["car", "car  1"]
    nothing = instances(grey(9, 9), Instances(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), ()), NAMES)
    assert nothing.shape[2] == 3


def test_annotated_objects_are_drawn_with_polygons_and_run_lengths_but_not_crowds(written: list[str]) -> None:
    left = ImageObject(1, 2, (10, 10, 100, 80), 8000, False, [[10, 10, 110, 10, 110, 90, 10, 90]])
    mask = np.zeros((320, 320), bool)
    mask[100:180, 200:300] = True
    right = ImageObject(2, 1, (200, 100, 100, 80), 8000, False, as_text(mask))
    crowd = ImageObject(3, 0, (0, 200, 300, 100), 30000, True, as_text(mask))
    boxed = ImageObject(4, 0, (20, 200, 50, 50), 2500, False, None)
    picture = objects(grey(320, 320), ImageObjects(7, "7.jpg", (320, 320), (left, right, crowd, boxed)), NAMES)
    for top, bottom, first, last, label in ((10, 90, 10, 110, 2), (100, 180, 200, 300, 1)):
        for y, x in ((top + 20, first + 5), (bottom - 4, last - 4), (top + 40, last - 5)):
            assert at(picture, y, x) == blend(0.45, label)
        assert at(picture, bottom - 1, last - 1) == colours(3)[label].tolist()
        assert at(picture, bottom, last - 5) == at(picture, top + 20, last) == [100, 100, 100]
    assert at(picture, 240, 60) == [100, 100, 100]
    assert at(picture, 240, 20) == colours(1)[0].tolist()
    assert at(picture, 299, 299) == [100, 100, 100]
    assert sorted(written) == ["car", "car  1", "road", "road  1", "sky", "sky  1"]


def test_of_a_single_class_every_instance_has_a_colour_of_its_own() -> None:
    boxes = np.array([[0, 30, 50, 80], [100, 30, 150, 80]], np.float32)
    picture = instances(grey(320, 320), Instances(boxes, np.zeros(2, np.int64), None), ["nucleus"])
    assert at(picture, 60, 0) == colours(1)[0].tolist()
    assert at(picture, 60, 100) == colours(2)[1].tolist()


def test_tags_do_not_cover_each_other(written: list[str]) -> None:
    boxes = np.array([[50, 50, 150, 150]] * 3 + [[50, 200, 150, 300]], np.float32)
    found = Detected(boxes, np.array([0.9, 0.8, 0.7, 0.6], np.float32), np.zeros(4, np.int64), None)
    detections(grey(320, 320), found, NAMES)
    assert written == ["sky 0.90", "sky 0.80", "sky 0.60", "sky  4"]  # above the box, within it, and no third place


def test_a_legend_counts_the_classes_that_have_no_room(written: list[str]) -> None:
    picture = with_legend(grey(100, 100), [((1, 2, 3), f"a class with a long name {i}") for i in range(20)])
    assert written[-1] == "and 13 more"
    assert len(written) == 8
    assert picture.shape == (100 + 3 * MARGIN + 8 * 20, 200 + 2 * MARGIN, 3)
    assert picture[0, 0].tolist() == list(WHITE)


def test_guesses_are_bars_as_long_as_their_probabilities(written: list[str]) -> None:
    picture = guesses(grey(400, 400), [("cat", 0.75), ("dog", 0.05)])
    bar = (picture[400 + 2 * MARGIN + 1] == (150, 190, 228)).all(axis=1)
    assert (bar.sum(), bar.argmax()) == (300, MARGIN)
    assert written == ["cat", "75 %", "dog", "5.0 %"]
