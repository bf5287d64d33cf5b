from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP

from data_pipeline.augment import _STRENGTHS, SampleDraws
from data_pipeline.changes import Changes, Step, cpu_changes, mean_colour, recipe_of
from data_pipeline.config import AugmentConfig, DataConfig, SyntheticConfig
from data_pipeline.device_changes import _OPERATIONS, apply_changes
from data_pipeline.loader import build_loader

Pixels = npt.NDArray[np.uint8]
HEIGHT, WIDTH = 40, 56
MOVING = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


def config(**augment: Any) -> DataConfig:
    return DataConfig(backend="synthetic", image_size=WIDTH, augment=AugmentConfig(**augment))


def pictures() -> Pixels:
    """Noise, noise of low contrast, a gradient, waves, one colour: uint8 (5, HEIGHT, WIDTH, 3)."""
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3))
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    gradient = np.stack([6 * y, 4 * x, 2 * (x + y)], axis=2)
    waves = np.stack([128 + 60 * np.sin(y / 9) * np.cos(x / 7), 3 * x, 2 * y + x], axis=2)
    plain = np.full((HEIGHT, WIDTH, 3), 77)
    return np.clip(np.stack([noise, noise // 4 + 50, gradient, waves, plain]), 0, 255).astype(np.uint8)


def with_pillow(image: Pixels, step: Step) -> npt.NDArray[np.int64]:
    name, arguments, bicubic = step
    resample = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    fill = mean_colour(config())
    picture = NAME_TO_OP[name](Image.fromarray(image), *arguments, fillcolor=fill, resample=resample)
    return np.asarray(picture).astype(np.int64)


def on_device(images: Pixels, changes: list[Changes], settings: DataConfig | None = None) -> npt.NDArray[np.int64]:
    return apply_changes(torch.from_numpy(images), changes, settings or config()).numpy().astype(np.int64)


def test_every_operation_that_can_be_drawn_exists_on_the_device() -> None:
    assert set(_OPERATIONS) == set(_STRENGTHS)


@pytest.mark.parametrize("level", [0.0, 0.3, 0.7, 1.0, 1.5])
@pytest.mark.parametrize("name", sorted(set(_OPERATIONS) - {"GaussianBlur", *MOVING}))
def test_operation_on_colours_gives_the_pixels_of_pillow(name: str, level: float) -> None:
    images = pictures()
    for sign in (-1, 1):
        step: Step = (name, _STRENGTHS[name](level, sign), False)
        result = on_device(images, [Changes((step,), None, 0)] * len(images))
        for image, got in zip(images, result, strict=True):
            assert np.array_equal(got, with_pillow(image, step))


@pytest.mark.parametrize("name", MOVING)
def test_operation_that_moves_pixels_gives_those_of_pillow(name: str) -> None:
    images = pictures()
    for level in (0.0, 0.25, 0.6, 1.0):
        for sign in (-1, 1):
            step: Step = (name, _STRENGTHS[name](level, sign), False)
            result = on_device(images, [Changes((step,), None, 0)] * len(images))
            for image, got in zip(images, result, strict=True):
                # both round down, so a value on a whole number may fall to the one below in Pillow
                difference = got - with_pillow(image, step)
                assert np.abs(difference).max() <= 1
                assert (difference != 0).mean() < 0.1


@pytest.mark.parametrize("name", MOVING)
def test_bicubic_differs_from_pillow_by_its_other_kernel_only(name: str) -> None:
    waves = pictures()[3:4]
    step: Step = (name, _STRENGTHS[name](0.6, 1), True)
    difference = np.abs(on_device(waves, [Changes((step,), None, 0)])[0] - with_pillow(waves[0], step))
    assert difference[..., 0].max() <= 1  # the smooth channel; the others have edges where they are cut off at 255
    assert not np.array_equal(
        on_device(pictures()[:1], [Changes((step,), None, 0)]),
        on_device(pictures()[:1], [Changes(((name, step[1], False),), None, 0)]),
    )


def test_blur_is_a_gaussian_of_the_given_deviation() -> None:
    impulse = np.zeros((1, HEIGHT, WIDTH, 3), np.uint8)
    impulse[0, 20, 28] = 255
    for deviation in (0.5, 1.0, 2.0):
        (blurred,) = on_device(impulse, [Changes((("GaussianBlur", (deviation,), False),), None, 0)])
        y, x = np.mgrid[:HEIGHT, :WIDTH]
        expected = np.exp(-((y - 20) ** 2 + (x - 28) ** 2) / (2 * deviation**2))
        expected *= 255 / expected.sum()
        assert np.abs(blurred - expected[..., None]).max() <= 1  # rounding, and what lies beyond the cut-off
    waves = pictures()[3]
    step: Step = ("GaussianBlur", (1.5,), False)
    (blurred,) = on_device(waves[None], [Changes((step,), None, 0)])
    assert np.abs(blurred - with_pillow(waves, step)).mean() < 0.5  # three boxes approximate it


@pytest.mark.parametrize("name", sorted(_OPERATIONS))
def test_autocast_changes_no_pixel(name: str) -> None:
    images = pictures()
    changes = [Changes(((name, _STRENGTHS[name](0.6, 1), bicubic),), None, 0) for bicubic in [True, False] * 2 + [True]]
    expected = on_device(images, changes)
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(on_device(images, changes), expected)


def test_samples_with_different_changes_in_one_batch_do_not_touch_each_other() -> None:
    settings = config(rand_augment="rand-m9-n3-mstd0.5-inc1", three_augment=True, color_jitter=0.4, random_erasing=0.5)
    recipe = recipe_of(settings)
    assert recipe is not None
    draws = SampleDraws(3, 1)
    changes = [recipe.draw(draws.of(sample), (HEIGHT, WIDTH)) for sample in range(40)]
    images = np.resize(pictures(), (40, HEIGHT, WIDTH, 3))
    together = on_device(images, changes, settings)
    for place in range(40):
        assert np.array_equal(
            together[place], on_device(images[place : place + 1], changes[place : place + 1], settings)[0]
        )
    assert len({len(change.steps) for change in changes}) > 1
    assert {change.erased is None for change in changes} == {True, False}


def test_batch_that_came_in_is_not_written() -> None:
    images = torch.from_numpy(pictures())
    before = images.clone()
    change = Changes((("Invert", (), False),), (2, 3, 10, 12), 5)
    for mode in ("const", "pixel"):
        result = apply_changes(images, [change] * 5, config(erasing_mode=mode))
        assert torch.equal(images, before)
        assert result.data_ptr() != images.data_ptr()
        assert result.shape == images.shape


def test_const_erasing_fills_exactly_the_box_as_on_the_cpu() -> None:
    settings = config(erasing_mode="const")
    images = pictures()
    change = Changes((("Invert", (), False),), (2, 3, 10, 12), 5)
    result = on_device(images, [change] * 5, settings)
    for image, got in zip(images, result, strict=True):
        expected = image.copy()
        cpu_changes(settings)(expected, change)
        assert np.array_equal(got, expected)


def test_pixel_erasing_is_keyed_noise_of_the_configured_mean_and_deviation() -> None:
    settings = DataConfig(backend="synthetic", mean=(0.4, 0.5, 0.6), std=(0.08, 0.10, 0.07))
    images = np.zeros((3, 100, 100, 3), np.uint8)
    changes = [Changes((), (10, 20, 80, 60), key) for key in (1, 1, 2)]
    first, again, other = on_device(images, changes, settings)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    inside = other[10:90, 20:80].reshape(-1, 3)
    noise = (inside / 255 - settings.mean) / settings.std
    assert np.abs(noise.mean(axis=0)).max() < 5 / np.sqrt(len(noise))
    assert np.abs(noise.std(axis=0) - 1).max() < 0.05
    other[10:90, 20:80] = 0
    assert not other.any()


def test_numbers_of_images_and_changes_must_agree() -> None:
    with pytest.raises(ValueError, match="5 images and 1 changes"):
        apply_changes(torch.from_numpy(pictures()), [Changes((), None, 0)], config())


def test_batches_are_the_same_whether_threads_or_the_device_change_them() -> None:
    def epoch(place: str) -> list[torch.Tensor]:
        settings = DataConfig(
            backend="synthetic",
            num_classes=4,
            image_size=32,
            num_threads=2,
            synthetic=SyntheticConfig(train_samples=24),
            augment=AugmentConfig(color_jitter=0.5, random_erasing=0.5, erasing_mode="const", place=place),  # type: ignore[arg-type]
        )
        pieces = []
        with build_loader(settings, "train", train=True, global_batch_size=8, rank=0, world_size=1, seed=3) as loader:
            for batch in loader:
                assert len(batch.changes) == (8 if place == "device" else 0)
                pieces.append(apply_changes(batch.images, batch.changes, settings) if batch.changes else batch.images)
        return pieces

    in_threads, afterwards = epoch("cpu"), epoch("device")
    assert len(in_threads) == 3
    assert all(torch.equal(one, other) for one, other in zip(in_threads, afterwards, strict=True))


def test_evaluation_is_never_changed() -> None:
    settings = DataConfig(
        backend="synthetic", num_classes=4, image_size=32, augment=AugmentConfig(color_jitter=0.5, place="device")
    )
    with build_loader(settings, "val", train=False, global_batch_size=8, rank=0, world_size=1, seed=3) as loader:
        assert next(iter(loader)).changes == []
