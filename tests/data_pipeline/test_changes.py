from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from data_pipeline.augment import SampleDraws, parse_rand_augment
from data_pipeline.changes import Changes, Recipe, cpu_changes, recipe_of
from data_pipeline.config import AugmentConfig, DataConfig

SIZE = (24, 32)


def recipe(text: str = "", three_augment: bool = False, color_jitter: float = 0.0, erasing: float = 0.0) -> Recipe:
    return Recipe(parse_rand_augment(text) if text else None, three_augment, color_jitter, erasing)


def drawn(recipe: Recipe, count: int) -> list[Changes]:
    draws = SampleDraws(0, 0)
    return [recipe.draw(draws.of(sample), SIZE) for sample in range(count)]


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*SIZE, 3)).astype(np.uint8)


def test_nothing_is_configured_so_there_is_no_recipe() -> None:
    assert recipe_of(DataConfig()) is None
    assert recipe_of(DataConfig(augment=AugmentConfig(color_jitter=0.1))) == recipe(color_jitter=0.1)
    assert recipe_of(DataConfig(augment=AugmentConfig(rand_augment="rand-m5"))) == recipe("rand-m5")


def test_three_augment_takes_each_of_its_operations_as_often() -> None:
    steps = [change.steps for change in drawn(recipe(three_augment=True), 3000)]
    assert {len(step) for step in steps} == {1}
    names = [step[0][0] for step in steps]
    for name in ("Desaturate", "Solarize", "GaussianBlur"):
        assert abs(names.count(name) - 1000) < 5 * np.sqrt(3000 * 2 / 9)
    radii = [step[0][1][0] for step in steps if step[0][0] == "GaussianBlur"]
    assert min(radii) >= 0.1
    assert max(radii) <= 2.0
    assert abs(np.mean(radii) - 1.05) < 5 * 1.9 / np.sqrt(12 * len(radii))


def test_three_augment_is_grayscale_solarization_and_gaussian_blur() -> None:
    apply = cpu_changes(DataConfig())
    image = Image.fromarray(picture())
    expected = {
        "Desaturate": ImageOps.grayscale(image).convert("RGB"),
        "Solarize": ImageOps.solarize(image, 128),
        "GaussianBlur": None,
    }
    for change in drawn(recipe(three_augment=True), 20):
        ((name, arguments, _),) = change.steps
        wanted = expected[name] or image.filter(ImageFilter.GaussianBlur(arguments[0]))
        pixels = picture()
        apply(pixels, change)
        assert np.array_equal(pixels, np.asarray(wanted))


def test_jitter_scales_brightness_contrast_and_saturation_in_random_order() -> None:
    steps = [change.steps for change in drawn(recipe(color_jitter=0.3), 600)]
    orders = {tuple(step[0] for step in sample) for sample in steps}
    assert orders == {
        (a, b, c)
        for a in ("Brightness", "Contrast", "Color")
        for b in ("Brightness", "Contrast", "Color")
        for c in ("Brightness", "Contrast", "Color")
        if len({a, b, c}) == 3
    }
    factors = np.array([step[1][0] for sample in steps for step in sample])
    assert 0.7 <= factors.min() < 0.705
    assert 1.295 < factors.max() <= 1.3
    wide = [step[1][0] for change in drawn(recipe(color_jitter=1.5), 200) for step in change.steps]
    assert min(wide) >= 0
    assert max(wide) > 2


def test_operations_come_in_the_order_rand_augment_three_augment_jitter() -> None:
    both = drawn(recipe("rand-n2-p1", three_augment=True, color_jitter=0.2), 30)
    assert {len(change.steps) for change in both} == {2 + 1 + 3}
    for change in both:
        names = [name for name, _, _ in change.steps]
        assert names[2] in ("Desaturate", "Solarize", "GaussianBlur")
        assert set(names[3:]) == {"Brightness", "Contrast", "Color"}


def test_erasing_happens_as_often_as_configured_and_its_noise_has_a_key_of_its_own() -> None:
    changes = drawn(recipe(erasing=0.25), 2000)
    erased = [change for change in changes if change.erased is not None]
    assert abs(len(erased) - 500) < 5 * np.sqrt(2000 * 0.25 * 0.75)
    assert len({change.noise_key for change in erased}) == len(erased)
    assert all(0 <= change.noise_key < 2**63 for change in erased)


def test_steps_come_before_erasing_and_the_image_is_changed_in_place() -> None:
    config = DataConfig(mean=(0.2, 0.4, 0.6), augment=AugmentConfig(erasing_mode="const"))
    image = picture()
    before = image.copy()
    cpu_changes(config)(image, Changes((("Invert", (), False),), (3, 4, 10, 8), 0))
    expected = 255 - before
    expected[3:13, 4:12] = (51, 102, 153)
    assert np.array_equal(image, expected)


@pytest.mark.parametrize("key", [0, 2**63 - 1])
def test_noise_is_a_function_of_its_key(key: int) -> None:
    apply = cpu_changes(DataConfig())
    one, two, other = picture(), picture(), picture()
    apply(one, Changes((), (0, 0, 20, 20), key))
    apply(two, Changes((), (0, 0, 20, 20), key))
    apply(other, Changes((), (0, 0, 20, 20), key ^ 1))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)
