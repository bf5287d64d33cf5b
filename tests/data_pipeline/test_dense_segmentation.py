from __future__ import annotations

import colorsys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_sets import MASK_SHADES, Pixels, mask_of, segmentation_config, segmentation_set
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data_pipeline.augment import SampleDraws
from data_pipeline.batch import Batch
from data_pipeline.changes import mean_colour
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.dense_geometry import fitted, nearest
from data_pipeline.dense_targets import ClassMaps
from data_pipeline.loader import build_loader
from data_pipeline.photometric import distorted, recoloured
from data_pipeline.shards.source import RawSample


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return segmentation_set(tmp_path_factory.mktemp("segmentation"))


def _epoch(config: DataConfig, flip: float | None = None) -> list[Batch]:
    if flip is not None:
        config = replace(config, augment=AugmentConfig(horizontal_flip=flip))
    kwargs = {"train": True, "global_batch_size": 4, "rank": 0, "world_size": 1, "seed": 5}
    with build_loader(config, "train", kind="segmentation", **kwargs) as loader:
        return list(loader)


def _places(batches: list[Batch]) -> list[tuple[int, Pixels, tuple[int, int], Pixels]]:
    """(sample id, image, size, target) of each place."""
    return [
        (int(sample), image.numpy(), size, target)
        for batch in batches
        for sample, image, size, target in zip(batch.ids, batch.images, batch.sizes, batch.targets, strict=True)
    ]


def _stored(folder: Path) -> list[Pixels]:
    """The training masks by sample id, as maps of classes: the converter mixes the order of the images."""
    config = segmentation_config(folder)
    kwargs = {"train": False, "global_batch_size": 12, "rank": 0, "world_size": 1, "seed": 0}
    with build_loader(config, "train", kind="segmentation", **kwargs) as loader:
        return next(iter(loader)).targets


@pytest.mark.parametrize(
    ("size", "short", "long", "factor", "expected"),
    [
        ((480, 640), 512, 2048, 1.0, (512, 683)),  # 640 * 512 / 480 = 682.67
        ((640, 480), 512, 2048, 0.5, (341, 256)),
        ((100, 1000), 512, 2048, 1.0, (205, 2048)),  # the long side is the limit: 2.048 times
        ((427, 640), 800, 1333, 1.0, (800, 1199)),  # 640 * 800 / 427 = 1199.06
        ((3, 300), 32, 64, 1.0, (1, 64)),
    ],
)
def test_images_keep_their_ratio_between_a_short_and_a_long_side(size, short, long, factor, expected) -> None:
    assert fitted(size, short, long, factor) == expected


def test_an_image_too_large_for_its_canvas_is_made_to_fit_with_its_ratio() -> None:
    assert fitted((100, 50), 50, 200, within=(64, 64)) == (64, 32)
    assert fitted((100, 50), 50, 200, within=(100, 64)) == (100, 50)


@pytest.mark.parametrize(("before", "after"), [(7, 7), (10, 20), (10, 33), (45, 16), (101, 64), (64, 101)])
def test_each_pixel_takes_the_label_under_its_centre(before: int, after: int) -> None:
    centres = [(pixel + 0.5) * before / after for pixel in range(after)]
    assert nearest(before, after).tolist() == [int(centre) for centre in centres]
    row = torch.arange(before, dtype=torch.float32).view(1, 1, before).expand(1, 3, before)
    drawn = F.resize_image(row, [3, after], interpolation=InterpolationMode.NEAREST_EXACT)
    assert nearest(before, after).tolist() == drawn[0, 0].int().tolist()


def test_image_and_mask_stay_together_and_no_label_is_invented(folder: Path) -> None:
    for _, image, (height, width), target in _places(_epoch(segmentation_config(folder))):
        inside = target[:height, :width]
        assert set(np.unique(inside)) <= {0, 1, 2, 3, 255}
        brightness = image[:height, :width, 0].astype(int)
        around = np.lib.stride_tricks.sliding_window_view(brightness, (3, 3))
        flat = around.max(axis=(2, 3)) == around.min(axis=(2, 3))  # no edge near, where shades mix
        assert flat.mean() > 0.5
        expected = MASK_SHADES[np.minimum(inside, 4)][1:-1, 1:-1]
        assert np.abs(brightness[1:-1, 1:-1] - expected)[flat].max() <= 1


def test_what_a_crop_lacks_is_the_mean_colour_and_teaches_nothing(folder: Path) -> None:
    config = segmentation_config(folder, scale=(0.5, 0.5), photometric_distortion=True)
    for _, image, (height, width), target in _places(_epoch(config)):
        assert height < 40
        assert width < 40
        assert image.shape == (40, 40, 3)
        assert target.shape == (40, 40)
        outside = np.ones((40, 40), np.bool_)
        outside[:height, :width] = False
        assert (image[outside] == mean_colour(config)).all()
        assert (target[outside] == 255).all()
        assert (target[:height, :width] != 255).any()


def test_the_whole_resized_image_is_torchvision_s(folder: Path) -> None:
    config = segmentation_config(folder, scale=(1.0, 1.0), crop_size=64)
    masks = _stored(folder)
    for sample, image, size, target in _places(_epoch(config, flip=0.0)):
        classes = masks[sample]
        assert size == fitted(classes.shape, 32, 64)
        pixels = np.repeat(MASK_SHADES[np.minimum(classes, 4)][None], 3, axis=0)
        expected = F.resize(tv_tensors.Image(torch.from_numpy(pixels)), list(size), antialias=True)
        height, width = size
        # torch rounds rows and columns in another order for other strides: by one at most
        assert np.abs(image[:height, :width].astype(int) - expected.permute(1, 2, 0).numpy()).max() <= 1
        labels = tv_tensors.Image(torch.from_numpy(classes)[None])
        drawn = F.resize_image(labels, list(size), interpolation=InterpolationMode.NEAREST_EXACT)[0].numpy()
        assert np.array_equal(target[:height, :width], drawn)


def test_a_flip_mirrors_image_and_mask_and_changes_nothing_else(folder: Path) -> None:
    config = segmentation_config(folder)
    plain, mirrored = (_places(_epoch(config, flip)) for flip in (0.0, 1.0))
    for (_, image, size, target), (_, other, other_size, other_target) in zip(plain, mirrored, strict=True):
        assert size == other_size
        height, width = size
        assert np.array_equal(image[:height, :width][:, ::-1], other[:height, :width])
        flipped = F.horizontal_flip(tv_tensors.Mask(torch.from_numpy(target[:height, :width].copy()))).numpy()
        assert np.array_equal(flipped, other_target[:height, :width])


def test_half_of_the_images_are_mirrored(folder: Path) -> None:
    config = segmentation_config(folder, crop_size=64, scale=(1.0, 1.0))
    plain, drawn = _places(_epoch(config, 0.0)), _places(_epoch(config))
    same = [np.array_equal(one[3], other[3]) for one, other in zip(plain, drawn, strict=True)]
    assert 2 <= sum(same) <= 10


def _shares(labels: Pixels) -> float:
    counts = np.array([(labels == number).sum() for number in range(4)])
    return float(counts.max() / counts.sum()) if counts.sum() else 1.0


def test_a_crop_is_drawn_anew_ten_times_while_one_class_has_too_much_of_it(folder: Path) -> None:
    config = segmentation_config(folder, crop_size=32, scale=(1.5, 3.0), max_class_share=0.5)
    masks, redrawn = _stored(folder), []
    for sample, _, size, target in _places(_epoch(config, 0.0)):
        draws = SampleDraws(5, 0).of(sample).random(24)
        resized = fitted(masks[sample].shape, 32, 64, 1.5 + 1.5 * draws[0])
        labels = tv_tensors.Image(torch.from_numpy(masks[sample])[None])
        whole = F.resize_image(labels, list(resized), interpolation=InterpolationMode.NEAREST_EXACT)
        number = -1
        for row, column in draws[2:].reshape(11, 2):
            number += 1
            top, left = int(row * (resized[0] - size[0] + 1)), int(column * (resized[1] - size[1] + 1))
            crop = F.crop(whole, top, left, *size)[0].numpy()
            if _shares(crop) <= 0.5:
                break
        assert np.array_equal(target[: size[0], : size[1]], crop)
        redrawn.append(number)
    assert min(redrawn) == 0
    assert max(redrawn) >= 1


@pytest.mark.parametrize(("share", "redrawn"), [(1.0, False), (0.999, True)])
def test_no_crop_is_drawn_anew_where_one_class_may_have_all_of_it(
    folder: Path, share: float, redrawn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three quarters of each image are ignored: a first crop often has no labelled pixel."""

    def classes(self: ClassMaps, sample: RawSample, size: tuple[int, int]) -> Pixels:
        mask = np.full(size, 255, np.uint8)
        mask[size[0] // 2 :, size[1] // 2 :] = np.arange(size[1] - size[1] // 2) % 4
        return mask

    monkeypatch.setattr(ClassMaps, "of", classes)
    masks, firsts = _stored(folder), []
    config = segmentation_config(folder, crop_size=32, scale=(3.0, 3.0), max_class_share=share)
    for sample, _, size, target in _places(_epoch(config, 0.0)):
        stored = masks[sample]
        resized = fitted(stored.shape, 32, 64, 3.0)
        draws = SampleDraws(5, 0).of(sample).random(24)[2:4]
        top, left = (int(draw * (whole - part + 1)) for draw, whole, part in zip(draws, resized, size, strict=True))
        rows, columns = nearest(stored.shape[0], resized[0]), nearest(stored.shape[1], resized[1])
        mask = classes(None, None, stored.shape)  # type: ignore[arg-type]
        crop = mask[rows[top : top + size[0], None], columns[left : left + size[1]]]
        firsts.append(np.array_equal(target[: size[0], : size[1]], crop))
    assert all(firsts) != redrawn


class _Numbers:
    """A generator that gives the numbers it was made with."""

    def __init__(self, *numbers: float) -> None:
        self._numbers = np.array(numbers)

    def random(self, count: int) -> np.ndarray:
        assert count == len(self._numbers)
        return self._numbers


def _distorted(pixels: Pixels, **draws: float) -> Pixels:
    """Distorted by the draws that are named; without one, that change is not made."""
    names = ("shift", "shift_by", "contrast", "contrast_by", "saturation", "saturation_by", "turn", "turn_by", "late")
    numbers = dict.fromkeys(names, 0.9) | draws
    return distorted(pixels, _Numbers(*(numbers[name] for name in names)))  # type: ignore[arg-type]


def test_brightness_and_contrast_end_in_bytes_each() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    level = pixels.astype(float)
    assert np.array_equal(_distorted(pixels), pixels)
    brighter = np.clip(np.rint(level + 32 * 0.5), 0, 255)
    assert np.array_equal(_distorted(pixels, shift=0.1, shift_by=0.75), brighter)
    stretched = np.clip(np.rint(brighter * 1.25), 0, 255)
    both = {"shift": 0.1, "shift_by": 0.75, "contrast": 0.1, "contrast_by": 0.75}
    assert np.array_equal(_distorted(pixels, **both), stretched)
    assert np.array_equal(_distorted(pixels, **both, late=0.1), stretched)


@pytest.mark.parametrize(
    ("saturation", "degrees"), [(0.75, 0.0), (1.5, 0.0), (1.0, 36.0), (1.0, -36.0), (0.5, -20.5), (1.5, 7.0)]
)
def test_hue_is_turned_and_saturation_scaled_as_in_hsv_and_rounded_once(saturation: float, degrees: float) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    pixels[0] = [(0, 0, 0), (255,) * 3, (7, 7, 7), (255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 3)]
    found = recoloured(pixels, saturation, degrees)
    assert found.dtype == np.uint8
    for place in np.ndindex(9, 7):
        hue, strength, value = colorsys.rgb_to_hsv(*(pixels[place] / 255))
        expected = colorsys.hsv_to_rgb((hue + degrees / 360) % 1, min(strength * saturation, 1), value)
        # float32 errs by a few of 2^-24 of 255 before it is rounded
        assert np.abs(np.array(expected) * 255 - found[place]).max() <= 0.5 + 1e-3


def test_large_images_are_recoloured_as_small_ones() -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (150, 230, 3), dtype=np.uint8)  # of several bands
    rows = [recoloured(pixels[row : row + 1], 1.2, -10.0) for row in range(150)]
    assert np.array_equal(recoloured(pixels, 1.2, -10.0), np.concatenate(rows))


def test_hue_turns_by_up_to_36_degrees_and_saturation_by_up_to_a_half() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    for by, degrees, saturation in ((0.0, -36.0, 0.5), (0.75, 18.0, 1.25), (1.0, 36.0, 1.5)):
        assert np.array_equal(_distorted(pixels, turn=0.2, turn_by=by), recoloured(pixels, 1.0, degrees))
        assert np.array_equal(_distorted(pixels, saturation=0.2, saturation_by=by), recoloured(pixels, saturation, 0.0))


def test_contrast_may_come_after_hue_and_saturation() -> None:
    pixels = np.full((4, 4, 3), (200, 100, 50), np.uint8)
    changes = {"contrast": 0.1, "contrast_by": 1.0, "saturation": 0.1, "saturation_by": 0.0}
    early, late = _distorted(pixels, **changes, late=0.1), _distorted(pixels, **changes, late=0.9)
    # at first 200 * 1.5 is cut off at 255, so that less of it is left once half of the saturation is gone
    assert early[0, 0, 0] == 255
    assert late[0, 0, 0] == 255
    assert early[0, 0, 2] == pytest.approx(165, abs=2)  # 255 - (255 - 75) / 2
    assert late[0, 0, 2] == pytest.approx(188, abs=2)  # (200 - (200 - 50) / 2) * 1.5


def test_distortion_is_off_where_the_configuration_says_so(folder: Path) -> None:
    plain = _places(_epoch(segmentation_config(folder)))
    changed = _places(_epoch(segmentation_config(folder, photometric_distortion=True)))
    different = 0
    for (_, image, size, target), (_, other, other_size, other_target) in zip(plain, changed, strict=True):
        assert size == other_size
        assert np.array_equal(target, other_target)
        different += not np.array_equal(image, other)
    assert different >= 8, "each of four changes has a chance of one half"


def test_masks_are_those_of_the_source(folder: Path) -> None:
    assert sorted(mask.tobytes() for mask in _stored(folder)) == sorted(mask_of(n).tobytes() for n in range(12))
