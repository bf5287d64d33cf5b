from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_sets import annotation, detection_config, detection_set, objects_of, rectangle
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data_pipeline.batch import Batch
from data_pipeline.changes import mean_colour
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.dense_geometry import fitted
from data_pipeline.detection_transforms import instances
from data_pipeline.loader import build_loader
from data_pipeline.targets.instances import Instances

coco = pytest.importorskip("pycocotools.mask")

TRIANGLE = [[3.5, 2.0, 20.25, 4.0, 9.0, 17.5]]
STAR = [[5, 5, 20, 7, 9, 15], [22.5, 3, 30, 12, 18, 20, 15, 12]]  # an object in two parts


def _drawn(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """The stored mask as pycocotools has it, uint8 (height, width)."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        whole = segmentation if isinstance(counts, str) else coco.frPyObjects(segmentation, *size)
        return coco.decode(whole)
    return coco.decode(coco.merge(coco.frPyObjects(segmentation, *size)))


def _whole(found: Instances, number: int, size: tuple[int, int]) -> np.ndarray:
    """An object's mask in its image, uint8 (height, width)."""
    assert found.masks is not None
    canvas = np.zeros(size, np.uint8)
    left, top = np.floor(found.boxes[number, :2]).astype(int)
    height, width = found.masks[number].shape
    canvas[top : top + height, left : left + width] = found.masks[number]
    assert top + height == np.ceil(found.boxes[number, 3])
    assert left + width == np.ceil(found.boxes[number, 2])
    return canvas


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_rectangle_becomes_the_rectangle_that_is_drawn_at_scaled_coordinates(mirrored: bool) -> None:
    boxes = [(3, 2, 15, 10), (0, 0, 30, 20), (7, 5, 8, 20), (4, 3, 29, 4)]
    found = instances(objects_of((20, 30), map(annotation, range(4), boxes)), (60, 45), mirrored=mirrored)
    assert found.labels.tolist() == [0, 1, 0, 1]
    for number, (left, top, right, bottom) in enumerate(boxes):
        left, right = left * 1.5, right * 1.5
        if mirrored:
            left, right = 45 - right, 45 - left
        assert found.boxes[number].tolist() == [left, top * 3, right, bottom * 3]
        expected = np.zeros((60, 45), np.uint8)
        centres = np.arange(45) + 0.5
        inside = (centres > left) & (centres < right)
        # a centre on the edge of two stored pixels belongs to the right one of them
        inside[centres == (right if mirrored else left)] = True
        expected[top * 3 : bottom * 3, inside] = 1
        assert np.array_equal(_whole(found, number, (60, 45)), expected)


RUNS = {"size": [24, 36], "counts": [30, 9, 15, 11, 300, 24, 475]}
SEGMENTATIONS = {
    "triangle": TRIANGLE,
    "two parts": STAR,
    "runs": RUNS,
    "text": {**RUNS, "counts": coco.frPyObjects(RUNS, 24, 36)["counts"].decode()},
}


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("size", [(24, 36), (31, 47), (48, 72), (11, 17)])
@pytest.mark.parametrize("segmentation", SEGMENTATIONS.values(), ids=SEGMENTATIONS)
def test_masks_are_the_stored_ones_as_pycocotools_draws_them_resized_to_the_nearest(
    segmentation: Any, size: tuple[int, int], mirrored: bool
) -> None:
    stored = _drawn(segmentation, (24, 36))
    rows, columns = np.flatnonzero(stored.any(axis=1)), np.flatnonzero(stored.any(axis=0))
    box = (columns[0] - 0.25, rows[0] - 0.5, columns[-1] + 1.25, rows[-1] + 1.75)  # holds the mask at any size
    box = tuple(float(side) for side in np.clip(box, 0, (36, 24, 36, 24)))
    found = instances(objects_of((24, 36), [annotation(2, box, segmentation)]), size, mirrored=mirrored)
    mask = tv_tensors.Image(torch.from_numpy(stored)[None])
    mask = F.resize_image(mask, list(size), interpolation=InterpolationMode.NEAREST_EXACT)
    expected = F.horizontal_flip(mask)[0] if mirrored else mask[0]
    assert stored.any()
    assert np.array_equal(_whole(found, 0, size), expected.numpy())


def test_a_mask_is_cut_at_its_box() -> None:
    found = instances(
        objects_of((20, 30), [annotation(0, (3.5, 2.25, 8, 9), [rectangle(0, 0, 30, 20)])]), (20, 30), mirrored=False
    )
    assert found.boxes.tolist() == [[3.5, 2.25, 8, 9]]
    assert found.masks is not None
    assert np.array_equal(found.masks[0], np.ones((7, 5), np.uint8)), "rows 2 to 8, columns 3 to 7"


def test_crowds_and_what_is_less_than_a_pixel_are_left_out_and_boxes_are_cut_at_the_border() -> None:
    whole = [rectangle(0, 0, 30, 20)]
    things = [
        annotation(0, (2, 2, 12, 12), RUNS | {"size": [20, 30], "counts": [0, 600]}, iscrowd=1),
        annotation(1, (-5, -3, 10, 12), whole),
        annotation(2, (5, 5, 5, 9), whole),  # flat
        annotation(3, (29.5, 4, 40, 14), whole),  # half a pixel of it is visible
        annotation(4, (20, 15, 50, 60), whole),
        annotation(5, (6, 6, 7.5, 16), whole),  # less than a pixel wide once it is resized
    ]
    found = instances(objects_of((20, 30), things), (10, 15), mirrored=False)
    assert found.boxes.tolist() == [[0, 0, 5, 6], [10, 7.5, 15, 10]]
    assert found.labels.tolist() == [1, 0]
    larger = instances(objects_of((20, 30), things), (40, 60), mirrored=False)
    assert larger.boxes.tolist() == [[0, 0, 20, 24], [40, 30, 60, 40], [12, 12, 15, 32]]


def test_objects_of_which_no_pixel_of_mask_is_left_in_the_box_are_left_out() -> None:
    things = [
        annotation(0, (2, 2, 12, 12), [rectangle(12.5, 3, 20, 11)]),  # half a pixel beside its box
        annotation(1, (4, 4, 14, 14)),
        annotation(2, (20, 4, 26, 10), {"size": [20, 30], "counts": [527, 1, 72]}),  # one pixel: row 7, column 26
        annotation(3, (20, 4, 26, 10), {"size": [20, 30], "counts": [507, 1, 92]}),  # row 7, column 25
    ]
    found = instances(objects_of((20, 30), things), (20, 30), mirrored=False)
    assert found.boxes.tolist() == [[4, 4, 14, 14], [20, 4, 26, 10]]
    assert found.labels.tolist() == [1, 1]
    assert found.masks is not None
    assert [int(mask.sum()) for mask in found.masks] == [100, 1]
    smaller = instances(
        objects_of((20, 30), things), (8, 12), mirrored=False
    )  # none of whose pixels has its centre there
    assert smaller.labels.tolist() == [1]
    boxes = instances(objects_of((20, 30), things, masks=False), (20, 30), mirrored=False, with_masks=False)
    assert len(boxes) == 4


def test_no_box_leaves_an_image_by_rounding() -> None:
    """1333 / 640 and 801 / 479 are no exact numbers."""
    found = instances(objects_of((479, 640), [annotation(0, (0, 0, 640, 479))]), (801, 1333), mirrored=True)
    assert found.boxes.tolist() == [[0, 0, 1333, 801]]
    assert found.masks is not None
    assert found.masks[0].shape == (801, 1333)


@pytest.mark.parametrize("masks", [True, False])
def test_an_image_without_objects_teaches_empty_arrays(masks: bool) -> None:
    found = instances(objects_of((20, 30), [], masks), (40, 60), with_masks=masks, mirrored=True)
    assert len(found) == 0
    assert (found.boxes.shape, found.boxes.dtype) == ((0, 4), np.float32)
    assert (found.labels.shape, found.labels.dtype) == ((0,), np.int64)
    assert found.masks == (() if masks else None)


def test_a_set_of_boxes_has_no_masks() -> None:
    things = [annotation(0, (3, 2, 15, 10)), annotation(1, (1, 1, 9, 9))]
    found = instances(objects_of((20, 30), things, masks=False), (20, 30), with_masks=False, mirrored=False)
    assert found.masks is None
    assert found.boxes.tolist() == [[3, 2, 15, 10], [1, 1, 9, 9]]


@pytest.mark.parametrize("kind", ["polygons", "runs"])
def test_hundreds_of_objects_in_a_large_image_take_the_memory_of_their_own_pixels(kind: str) -> None:
    height, width = 1500, 2000
    places = [(40 * (n % 40) + 100, 90 * (n // 40) + 60) for n in range(400)]
    boxes = [(left, top, left + 24, top + 30) for left, top in places]
    segmentations: list[Any] = [[rectangle(*box)] for box in boxes]
    if kind == "runs":
        segmentations = [
            {"size": [height, width], "counts": coco.frPyObjects(one, height, width)[0]["counts"].decode()}
            for one in segmentations
        ]
    things = objects_of((height, width), map(annotation, range(400), boxes, segmentations))
    tracemalloc.start()
    found = instances(things, (height, width), mirrored=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.masks is not None
    assert all(mask.shape == (30, 24) and mask.all() for mask in found.masks)
    assert peak < height * width, "the pixels of one image, where all masks as one array would be four hundred"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return detection_set(tmp_path_factory.mktemp("detection"))


def _epoch(config: DataConfig, epoch: int = 0, flip: float = 0.5, **more: Any) -> list[Batch]:
    config = replace(config, augment=AugmentConfig(horizontal_flip=flip))
    kwargs = {"train": True, "global_batch_size": 2, "rank": 0, "world_size": 1, "seed": 5, **more}
    with build_loader(config, "train", kind="detection", **kwargs) as loader:
        loader.set_epoch(epoch)
        return list(loader)


def test_served_objects_lie_on_what_the_image_shows(folder: Path) -> None:
    """Images are black and objects white."""
    mirrored = 0
    for batch in _epoch(detection_config(folder)):
        for image, (height, width), target in zip(batch.images, batch.sizes, batch.targets, strict=True):
            pixels = image.numpy()[:height, :width, 0]
            shown = np.zeros((height, width), np.uint8)
            for number in range(len(target)):
                shown |= _whole(target, number, (height, width))
            assert np.array_equal((pixels > 250)[shown == 0], np.zeros((shown == 0).sum(), np.bool_))
            assert (pixels[shown == 1] < 5).sum() == 0
            assert len(target) == 0 or (pixels > 250).sum() > 0.5 * shown.sum()
            mirrored += len(target) > 0 and target.boxes[0, 0] > width / 3
    assert mirrored > 0


def test_images_lie_at_the_upper_left_and_the_rest_has_the_mean_colour(folder: Path) -> None:
    config = detection_config(folder)
    for batch in _epoch(config):
        canvas = tuple(batch.images.shape[1:3])
        assert [side % 32 for side in canvas] == [0, 0]
        assert batch.short_side in (32, 48)
        for image, size in zip(batch.images.numpy(), batch.sizes, strict=True):
            assert min(size) == batch.short_side or max(size) == 80
            assert size[0] <= canvas[0]
            assert size[1] <= canvas[1]
            outside = np.ones(canvas, np.bool_)
            outside[: size[0], : size[1]] = False
            assert (image[outside] == mean_colour(config)).all()
            assert not (image[~outside] == mean_colour(config)).all(axis=-1).any()


def test_evaluation_gives_whole_images_and_objects_as_stored(folder: Path) -> None:
    kwargs = {"train": False, "global_batch_size": 4, "rank": 0, "world_size": 1, "seed": 0}
    with build_loader(detection_config(folder), "val", kind="detection", **kwargs) as loader:
        batches = list(loader)
    served = [
        place
        for b in batches
        for place in zip(b.ids.tolist(), b.valid.tolist(), b.images, b.sizes, b.targets, strict=True)
    ]
    assert [place[0] for place in served] == [0, 1, 2, 3, 4, -1, -1, -1]
    for number, valid, image, size, target in served:
        assert image.dtype == torch.uint8
        assert tuple(image.shape) == (*size, 3)
        if number < 0:
            assert (valid, size, target, int(image.max())) == (False, (64, 64), None, 0)
            continue
        assert valid
        assert target.size == size
        for thing in target.objects:
            left, top, width, height = thing.box
            assert image[int(top) : int(top + height), int(left) : int(left + width)].min() == 255
    assert sorted(place[3] for place in served[:5]) == [(30, 50), (36, 40), (36, 40), (40, 36), (50, 30)]


def test_masks_are_served_or_not_as_the_set_says_also_of_images_without_objects(tmp_path: Path, folder: Path) -> None:
    boxes_only = detection_set(tmp_path, [(30, 40)] * 5, masks=False)
    targets = [target for batch in _epoch(detection_config(boxes_only)) for target in batch.targets]
    assert sum(map(len, targets)) > 0
    assert [target.masks for target in targets] == [None] * 4
    served = [target for epoch in range(3) for b in _epoch(detection_config(folder), epoch) for target in b.targets]
    empty = [target for target in served if not len(target)]
    assert empty
    assert all(target.masks == () for target in empty)


def test_the_flip_mirrors_image_boxes_and_masks(folder: Path) -> None:
    plain, mirrored = (_epoch(detection_config(folder), flip=flip) for flip in (0.0, 1.0))
    for one, other in zip(plain, mirrored, strict=True):
        assert one.sizes == other.sizes
        for place, (height, width) in enumerate(one.sizes):
            assert torch.equal(one.images[place][:height, :width].flip(1), other.images[place][:height, :width])
            first, second = one.targets[place], other.targets[place]
            assert np.allclose(
                width - first.boxes[:, [2, 1, 0, 3]] * [1, -1, 1, -1] - [0, width, 0, width], second.boxes, atol=1e-5
            )
            for number in range(len(first)):
                masks = [_whole(found, number, (height, width)) for found in (first, second)]
                assert np.array_equal(masks[0][:, ::-1], masks[1])


def test_a_short_image_is_as_long_as_the_long_side_allows() -> None:
    assert fitted((24, 60), 48, 80) == (32, 80)
