from __future__ import annotations

import contextlib
import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.targets import TargetError, rle, target_check
from data_pipeline.targets.masks import IGNORED, MaskLabels, check_mask, class_table, read_mask, resize_mask
from data_pipeline.targets.objects import ObjectLabels, check_objects, read_objects


def _png(values: Any, mode: str | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(np.asarray(values))
    (image.convert(mode) if mode else image).save(file, "PNG", **options)
    return file.getvalue()


def _palette(values: np.ndarray, bits: int) -> bytes:
    image = Image.fromarray(values.astype(np.uint8), "P")
    image.putpalette([255 - i % 256 for i in range(3 * 2**bits)])
    file = io.BytesIO()
    image.save(file, "PNG", bits=bits)
    return file.getvalue()


VALUES = (np.arange(12 * 9).reshape(12, 9) % 4).astype(np.uint8)


@pytest.mark.parametrize("data", [_png(VALUES), *(_palette(VALUES, bits) for bits in (2, 4, 8))])
def test_values_of_a_mask_are_read_as_stored_and_never_as_colours(data: bytes) -> None:
    assert (read_mask(data) == VALUES).all()
    assert (check_mask(data, (12, 9), MaskLabels(4)) == VALUES).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_png(VALUES, "RGB"), "the mask holds RGB colours: store label values"),
        (_png(VALUES, "LA"), "grey with transparency"),
        (_png(VALUES, "1"), "the mask has 1 bits per pixel"),
        (_png(VALUES.astype(np.uint16)), "the mask has 16 bits per pixel"),
        (b"", "is no PNG file"),
        (b"\xff\xd8\xff" + bytes(100), "is no PNG file"),
        (_png(VALUES)[:50], "the mask is damaged"),
    ],
)
def test_what_is_no_mask_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        check_mask(data, (12, 9), MaskLabels(4))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_changed_byte_of_a_mask_leads_to_anything_but_its_values_or_the_documented_error(data) -> None:
    whole = bytearray(_png(VALUES))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(TargetError):
        assert check_mask(bytes(whole), (12, 9), MaskLabels(4)).shape == (12, 9)


def test_values_are_compared_with_the_classes_and_the_ignored() -> None:
    labels = MaskLabels(2, first_label=1, ignore=(0, 255))
    assert class_table(labels)[[0, 1, 2, 3, 255]].tolist() == [IGNORED, 0, 1, IGNORED, IGNORED]
    check_mask(_png(np.array([[0, 1], [2, 255]], np.uint8)), (2, 2), labels)
    with pytest.raises(TargetError, match=r"the value 3, 9; allowed are 1 to 2 and 0, 255 \(ignored\)"):
        check_mask(_png(np.array([[9, 1], [2, 3]], np.uint8)), (2, 2), labels)


@pytest.mark.parametrize(
    "arguments", [(0,), (257,), (256, 1), (3, -1), (3, 0, (2,)), (3, 0, (256,)), (3, 0, (-1,)), (3, 1, (1,))]
)
def test_labels_that_cannot_be_stored_are_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"fit into the values|cannot be ignored"):
        MaskLabels(*arguments)


def test_a_smaller_mask_has_the_nearest_values_and_no_others() -> None:
    mask = np.kron(np.array([[0, 9], [200, 255]], np.uint8), np.ones((6, 8), np.uint8))
    small = read_mask(resize_mask(_png(mask), (12, 16), (4, 6)))
    assert small.tolist() == [[0] * 3 + [9] * 3] * 2 + [[200] * 3 + [255] * 3] * 2
    with pytest.raises(TargetError, match="the mask is 16x12 and the image, upright, 13x12"):
        resize_mask(_png(mask), (12, 13), (4, 6))


masks = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(0, 1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pycocotools' own
@settings(max_examples=150, deadline=None)
@given(masks)
def test_run_lengths_are_decoded_as_pycocotools_does(drawn: tuple[int, int, int, float]) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    height, width, seed, density = drawn
    mask = np.random.default_rng(seed).random((height, width)) < density
    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    text = {"size": encoded["size"], "counts": encoded["counts"].decode()}
    assert (rle.decode(text) == mask).all()
    numbers = {"size": [height, width], "counts": rle.runs_of(text).tolist()}
    assert (rle.decode(numbers) == mask).all()
    assert (coco.decode(coco.frPyObjects(numbers, height, width)) == mask).all()


@pytest.mark.parametrize(
    "counts", [[12, 2, 16], [8, 5, 17], [0, 30], [3, 0, 9, 1, 4, 2, 11], [29, 1], [0, 0, 7, 2, 21]]
)
def test_the_bounds_of_runs_are_those_of_their_pixels(counts: list[int]) -> None:
    mask = rle.decode({"size": [5, 6], "counts": counts})
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    assert rle.bounds_of(np.array(counts), 5) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)


def test_run_lengths_of_a_known_mask() -> None:
    mask = np.array([[0, 1, 1], [1, 1, 0]], bool)
    assert (rle.decode({"size": [2, 3], "counts": [1, 4, 1]}) == mask).all()
    assert (rle.decode({"size": [2, 3], "counts": "141"}) == mask).all()


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [2, 3], "counts": [1, 4]}, r"do not cover 2 x 3 pixels"),
        ({"size": [2, 3], "counts": [7, -1]}, "neither text nor numbers"),
        ({"size": [2, 3], "counts": None}, "neither text nor numbers"),
        ({"size": [2, 3], "counts": "1P"}, "ends within a number"),
        ({"size": [2, 3], "counts": "1é"}, "characters that no mask has"),
        ({"size": [2, 3], "counts": "1 4"}, "characters that no mask has"),
        ({"size": [2, 3], "counts": "o" * 40 + "0"}, "too large"),
        ({"size": [4, 11], "counts": ":a0_0`oooooO"}, "too large"),  # -16 in 7 groups, which pycocotools takes for -8
        ({"size": [2, 3], "counts": ""}, "do not cover"),
        ({"size": [0, 3], "counts": []}, r"instead of \[height, width\]"),
        ({"counts": [1]}, r"instead of \[height, width\]"),
    ],
)
def test_run_lengths_that_make_no_mask_are_refused(segmentation: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        rle.decode(segmentation)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=20), st.integers(1, 5), st.integers(1, 5))
def test_whatever_the_text_run_lengths_give_a_mask_or_the_documented_error(text: str, height: int, width: int) -> None:
    with contextlib.suppress(TargetError):
        assert rle.decode({"size": [height, width], "counts": text}).shape == (height, width)


LABELS = ObjectLabels((7, 9))
POLYGON = [[1, 1, 5, 1, 5, 5]]


def _objects(**changes: Any) -> bytes:
    entry = {"id": 4, "category": 1, "bbox": [1, 2.5, 3, 4], "area": 6, "iscrowd": 0, "segmentation": POLYGON}
    image = {"image_id": 3, "file_name": "a.jpg", "width": 20, "height": 10}
    own = {name: changes.pop(name) for name in list(changes) if name in (*image, "annotations")}
    return json.dumps({**image, "annotations": [{**entry, **changes}], **own}).encode()


def test_objects_are_read_as_annotated() -> None:
    found = check_objects(_objects(), (10, 20), LABELS)
    assert (found.image_id, found.file_name, found.size) == (3, "a.jpg", (10, 20))
    (thing,) = found.objects
    assert (thing.id, thing.category, thing.box, thing.area, thing.crowd) == (4, 1, (1, 2.5, 3, 4), 6, False)
    assert thing.segmentation == POLYGON
    assert read_objects(_objects(annotations=[]), LABELS).objects == ()
    beside = [[-3, 1, 5, 1, 5, 12], [21, 1, 25, 1, 25, 5]]
    assert read_objects(_objects(segmentation=beside), LABELS).objects[0].segmentation == beside
    boxes = read_objects(_objects(segmentation=None), ObjectLabels((7, 9), masks=False))
    assert boxes.objects[0].segmentation is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"category": 2}, "annotation 4: its category 2 is none of the 2 classes"),
        ({"category": "1"}, "its category '1'"),
        ({"category": True}, "its category True"),
        ({"bbox": [1, 2, 3]}, r"its box \[1, 2, 3\] instead of|its box is"),
        ({"bbox": [1, 2, 3, float("nan")]}, "its box is"),
        ({"bbox": [1, 2, 3, 10**400]}, "its box is"),
        ({"bbox": [1, 2, -1, 3]}, "has a negative side"),
        ({"bbox": [21, 2, 1, 3]}, "lies outside of the image of 20x10"),
        ({"bbox": [-9, 2, 8, 3]}, "lies outside"),
        ({"area": None}, "its area is None"),
        ({"area": -1}, "its area is -1"),
        ({"iscrowd": 2}, "iscrowd is 2"),
        ({"segmentation": []}, "has no segmentation"),
        ({"segmentation": [[1, 2, 3, 4]]}, "a polygon that is no list of three or more points"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "a polygon that is no list"),
        ({"segmentation": [[1, 2, 3, 4, 5, "6"]]}, "a polygon that is no list"),
        (
            {"segmentation": {"size": [20, 10], "counts": [200]}},
            r"made for \[height, width\] \[20, 10\], not \[10, 20\]",
        ),
        ({"segmentation": {"size": [10, 20], "counts": [199]}}, "do not cover 10 x 20 pixels"),
        ({"segmentation": {"size": [10, 20], "counts": [200]}}, "annotation 4: its mask holds no pixel"),
        ({"segmentation": [[1, 2, 3, 4, 5, float("nan")]]}, "a polygon that is no list"),
        ({"segmentation": [[1, 1, 40.5, 1, 5, 5]]}, "annotation 4: .* a point far outside of the image of 20x10"),
        ({"segmentation": [[1, 1, 5, -1e9, 5, 5]]}, "annotation 4: .* a point far outside of the image of 20x10"),
        ({"segmentation": [[21, 1, 25, 1, 25, 5], [1, 11, 5, 11, 5, 15]]}, "lies outside of the image of 20x10"),
        (
            {"segmentation": [[7, 3, 9, 3, 9, 6]]},
            r"annotation 4: its mask, from \(7, 3\) to \(9, 6\), lies beside its box \[1, 2.5, 3, 4\]",
        ),
        ({"segmentation": [[1, 8, 4, 8, 4, 9]]}, "annotation 4: its mask, .* lies beside its box"),
        (
            {"segmentation": {"size": [10, 20], "counts": [61, 3, 136]}},
            r"annotation 4: its mask, from \(6, 1\) to \(7, 4\), lies beside its box",
        ),
        ({"id": None}, "an annotation has no id"),
        ({"image_id": "3"}, "do not say the image's id"),
        ({"width": 0}, "state an image of 0 x 10 pixels"),
        ({"annotations": None}, "no list of objects"),
        ({"annotations": [3]}, "an annotation has no id"),
        ({"height": 11}, "the image that the annotations describe is 20x11 and the image, upright, 20x10"),
    ],
)
def test_annotations_that_are_wrong_are_refused_with_the_id(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        check_objects(_objects(**changes), (10, 20), LABELS)


def test_run_lengths_are_parsed_once_and_may_be_left_out_again() -> None:
    found = read_objects(_objects(segmentation={"size": [10, 20], "counts": [13, 4, 183]}), LABELS)
    assert found.objects[0].runs is not None
    assert found.objects[0].runs.tolist() == [13, 4, 183]
    assert found.without_runs().objects[0].runs is None
    assert found.without_runs() == found, "runs say nothing that the encoding does not"


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_what_is_no_annotation_is_refused(data: bytes) -> None:
    with pytest.raises(TargetError, match="the annotations are"):
        read_objects(data, LABELS)


def test_two_annotations_with_one_id_are_refused() -> None:
    entry = json.loads(_objects())["annotations"][0]
    with pytest.raises(TargetError, match="two of the annotations have the same id"):
        read_objects(_objects(annotations=[entry, entry]), LABELS)


@pytest.mark.parametrize(
    ("box", "visible"),
    [
        ([1, 2, 3, 4], (1, 2, 4, 6)),
        ([-2, -1, 5, 4], (0, 0, 3, 3)),
        ([18, 8, 9, 9], (18, 8, 20, 10)),
        ([5, 5, 0, 4], None),
        ([5, 5, 4, 0.5], None),
        ([19.5, 5, 9, 4], None),
    ],
)
def test_what_is_seen_of_a_box_is_cut_at_the_border_and_flat_ones_are_none(box: list[float], visible: Any) -> None:
    (thing,) = read_objects(_objects(bbox=box), ObjectLabels((7, 9), masks=False)).objects
    assert thing.visible_box((10, 20)) == visible


def test_the_check_follows_from_what_the_index_says() -> None:
    assert target_check("classification", 3, {}) is None
    masks = target_check("segmentation", 4, MaskLabels(4).to_json())
    assert masks is not None
    assert (masks(_png(VALUES), (12, 9)) == VALUES).all()
    objects = target_check("detection", 2, LABELS.to_json())
    assert objects is not None
    assert objects(_objects(), (10, 20)).image_id == 3
    for kind, meaning in (("segmentation", {}), ("detection", {"masks": True}), ("detection", LABELS.to_json())):
        with pytest.raises(ValueError, match=r"is not said|as many different category ids"):
            target_check(kind, 3, meaning)
