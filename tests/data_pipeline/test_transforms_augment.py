from __future__ import annotations

import math
import random
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from torchvision.transforms import RandomResizedCrop

from data_pipeline import augment
from data_pipeline.augment import (
    RandAugment,
    SampleDraws,
    erasing_box,
    parse_rand_augment,
    random_crop_box,
)
from data_pipeline.changes import Changes, Step, cpu_changes
from data_pipeline.config import AugmentConfig, DataConfig, ErasingMode

Pixels = npt.NDArray[np.uint8]

FILL = (124, 116, 104)
OPERATION_SETS = ("rand", "rand-inc1", "rand-tweights", "rand-t3a", "rand-t3aw")
OPERATIONS = sorted({name for text in OPERATION_SETS for name in parse_rand_augment(text).operations})


def erased(image: Pixels, sample: int, mode: ErasingMode, mean: tuple[float, ...], std: tuple[float, ...]) -> Pixels:
    """A copy of the image in which the box that is drawn for a sample is erased."""
    config = DataConfig(mean=mean, std=std, augment=AugmentConfig(erasing_mode=mode))  # type: ignore[arg-type]
    result = image.copy()
    box = erasing_box(SampleDraws(0, 0).of(sample), image.shape[:2])
    cpu_changes(config)(result, Changes((), box, sample))
    return result


def applied(image: Pixels, steps: list[Step]) -> Pixels:
    """A copy of the image to which operations were applied."""
    result = image.copy()
    cpu_changes(DataConfig())(result, Changes(tuple(steps), None, 0))
    return result


class Scripted:
    """A generator whose uniform draws are written down."""

    def __init__(self, *draws: float) -> None:
        self._draws: Iterator[float] = iter(draws)

    def random(self, count: int) -> npt.NDArray[np.float64]:
        return np.array([next(self._draws) for _ in range(count)])


def picture(seed: int = 0, height: int = 24, width: int = 32) -> Pixels:
    return SampleDraws(seed, 0).of(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_equal_seed_epoch_and_id_give_equal_draws_in_any_order() -> None:
    draws = SampleDraws(4, 2)
    forward = [draws.of(sample).random(5).tolist() for sample in (0, 1, 2**40)]
    other = SampleDraws(4, 2)
    other.of(1).standard_normal(7, dtype=np.float32)  # leaves half-used words behind
    backward = [other.of(sample).random(5).tolist() for sample in (2**40, 1, 0)]
    assert forward == backward[::-1]


def test_another_seed_epoch_or_id_gives_other_draws() -> None:
    places = [(0, 1, 0), (1, 0, 0), (0, 0, 1), (0, 0, 0), (1, 1, 0), (0, 1, 1)]
    draws = [SampleDraws(seed, epoch).of(sample).random() for seed, epoch, sample in places]
    assert len(set(draws)) == len(places)


def test_crop_box_is_computed_from_its_four_draws() -> None:
    # area share 0.5 of [0.25, 0.75] -> 0.5; aspect at 0.5 of the log range -> 1; places at 0.5
    rng = Scripted(0.5, 0.5, 0.5, 0.5)
    box = random_crop_box(rng, (100, 200), (0.25, 0.75), (0.5, 2.0))  # type: ignore[arg-type]
    assert box == (0, 50, 100, 100)
    # area share 0.25; aspect 2: width sqrt(20000 / 4 * 2), height half of it
    rng = Scripted(0.0, 1.0, 0.0, 0.999)
    box = random_crop_box(rng, (100, 200), (0.25, 0.75), (0.5, 2.0))  # type: ignore[arg-type]
    assert box == (0, 100, 50, 100)


def test_crop_box_that_does_not_fit_is_drawn_again() -> None:
    rng = Scripted(1.0, 1.0, 0.0, 0.0, 0.0, 0.5, 0.25, 0.75)
    assert random_crop_box(rng, (100, 100), (0.25, 1.0), (0.5, 2.0)) == (12, 38, 50, 50)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(64, 64), (375, 500), (500, 333), (7, 90), (1, 1)])
def test_crop_box_lies_inside_the_image_with_the_asked_area_and_ratio(size: tuple[int, int]) -> None:
    height, width = size
    scale, ratio = (0.2, 0.9), (3 / 4, 4 / 3)
    for sample in range(300):
        top, left, box_height, box_width = random_crop_box(SampleDraws(0, 0).of(sample), size, scale, ratio)
        assert 0 <= top <= top + box_height <= height
        assert 0 <= left <= left + box_width <= width
        assert min(box_height, box_width) > 0
        if min(size) > 50:  # each side is rounded to a pixel
            rounding = 1 / box_height + 1 / box_width
            assert scale[0] * (1 - rounding) <= box_height * box_width / (height * width) <= scale[1] * (1 + rounding)
            assert ratio[0] * (1 - rounding) <= box_width / box_height <= ratio[1] * (1 + rounding)


@pytest.mark.parametrize("size", [(64, 64), (10, 100), (100, 10), (60, 70)])
def test_crop_box_falls_back_to_the_centre_as_torchvision_does(size: tuple[int, int]) -> None:
    ratio = (3 / 4, 4 / 3)
    never_fits = (2.0, 2.0)
    expected = RandomResizedCrop.get_params(torch.zeros(3, *size), list(never_fits), list(ratio))
    assert random_crop_box(SampleDraws(0, 0).of(0), size, never_fits, ratio) == tuple(expected)


def test_crop_boxes_are_distributed_as_torchvision_draws_them() -> None:
    scale, ratio, size, count = (0.08, 1.0), (3 / 4, 4 / 3), (120, 160), 800
    image = torch.zeros(3, *size)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)])
    ours = np.array([random_crop_box(SampleDraws(0, 0).of(sample), size, scale, ratio) for sample in range(count)])
    for column in range(4):  # five standard errors of the difference of two means
        error = math.sqrt((theirs[:, column].var() + ours[:, column].var()) / count)
        assert abs(theirs[:, column].mean() - ours[:, column].mean()) < 5 * error


def test_erasing_box_lies_inside_the_image_with_the_asked_area() -> None:
    shares = []
    for sample in range(500):
        box = erasing_box(SampleDraws(0, 0).of(sample), (60, 80))
        assert box is not None
        top, left, height, width = box
        assert 0 <= top <= top + height <= 60
        assert 0 <= left <= left + width <= 80
        assert height < 60
        assert width < 80
        shares.append(height * width / 4800)
    assert 0.01 < min(shares) < 0.04  # 0.02 up to rounding
    assert 0.28 < max(shares) < 0.35  # 1/3 up to rounding


def test_erasing_box_is_computed_from_its_four_draws() -> None:
    # area share 0.02 of 10,000, aspect 1 -> 14 x 14; (100 - 14 + 1) * 0.5 = 43.5
    assert erasing_box(Scripted(0.0, 0.5, 0.5, 0.0), (100, 100)) == (43, 0, 14, 14)  # type: ignore[arg-type]


def test_nothing_is_erased_where_no_box_fits() -> None:
    # a third of the area, 3.3 times as high as wide: 33 rows of 10
    assert erasing_box(Scripted(*[1.0, 1.0, 0.0, 0.0] * 10), (10, 100)) is None  # type: ignore[arg-type]
    image = picture(height=1, width=1)
    assert (erased(image, 0, "const", (0.5,) * 3, (0.1,) * 3) == image).all()


def test_const_erasing_fills_exactly_the_box_with_the_mean() -> None:
    mean = (0.485, 0.456, 0.406)
    before = picture()
    for sample in range(20):
        image = erased(before, sample, "const", mean, (0.2,) * 3)
        top, left, height, width = erasing_box(SampleDraws(0, 0).of(sample), (24, 32)) or (0, 0, 0, 0)
        expected = before.copy()
        expected[top : top + height, left : left + width] = (124, 116, 104)
        assert (image == expected).all()


def test_pixel_erasing_is_standard_normal_noise_after_normalisation() -> None:
    mean, std = (0.4, 0.5, 0.6), (0.08, 0.10, 0.07)  # five deviations lie between black and white: nothing is cut off
    before = np.zeros((120, 120, 3), np.uint8)
    patches = []
    for sample in range(12):
        image = erased(before, sample, "pixel", mean, std)
        top, left, height, width = erasing_box(SampleDraws(0, 0).of(sample), (120, 120)) or (0, 0, 0, 0)
        patches.append(image[top : top + height, left : left + width].reshape(-1, 3).copy())
        image[top : top + height, left : left + width] = 0
        assert not image.any()
    noise = (np.concatenate(patches) / 255 - mean) / std
    count = len(noise)
    # standard errors of a mean, a deviation and a correlation of `count` normal numbers; rounding to bytes adds 1/12
    # of a squared step to the variance
    step = 1 / (255 * np.array(std))
    assert np.abs(noise.mean(axis=0)).max() < 5 / math.sqrt(count)
    assert np.abs(noise.var(axis=0) - 1 - step**2 / 12).max() < 5 * math.sqrt(2 / count)
    correlation = np.corrcoef(noise.T)[np.triu_indices(3, 1)]
    assert np.abs(correlation).max() < 5 / math.sqrt(count)


def test_pixel_erasing_is_cut_off_at_black_and_white_instead_of_wrapping() -> None:
    image = erased(np.full((64, 64, 3), 128, np.uint8), 0, "pixel", (0.0, 1.0, 0.502), (0.01, 0.01, 1e-6))
    changed = image[(image != 128).any(axis=2)]
    assert len(changed) > 50
    assert changed[:, 0].max() < 15
    assert changed[:, 1].min() > 240
    assert (changed[:, 2] == 128).all()


@pytest.mark.parametrize("text", OPERATION_SETS)
def test_every_operation_exists_in_timm_and_has_a_strength(text: str) -> None:
    parsed = parse_rand_augment(text)
    assert parsed.operations
    assert set(parsed.operations) <= set(auto_augment.NAME_TO_OP)
    assert set(parsed.operations) <= set(augment._STRENGTHS)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", sorted(augment._STRENGTHS))
def test_strengths_are_those_of_timm(name: str, sign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value: sign * value)
    level_to_argument = auto_augment.LEVEL_TO_ARG[name]
    for tenths in range(21):
        expected = level_to_argument(tenths / 2, {}) if level_to_argument else ()
        if name.startswith("Posterize"):
            expected = (max(1, expected[0]),)  # timm's 0 bits would be a black image, which Pillow 13 refuses
        assert augment._STRENGTHS[name](tenths / 20, sign) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_is_applied_as_timm_would_without_touching_global_generators(name: str) -> None:
    only = RandAugment(operations=(name,), magnitude=7.0, num_layers=1, prob=1.0)
    image = picture()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    for sample in range(4):
        steps = only.draw(SampleDraws(0, 0).of(sample))
        result = applied(image, steps)
        ((drawn, strength, bicubic),) = steps
        assert drawn == name
        expected = auto_augment.NAME_TO_OP[name](
            Image.fromarray(image),
            *strength,
            fillcolor=FILL,
            resample=Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR,
        )
        assert (result == np.asarray(expected)).all()
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_even_the_strongest_operations_accept_the_image() -> None:
    for text in OPERATION_SETS:
        for magnitude in ("-m0", "-m10", "-m20-mmax20"):
            strongest = parse_rand_augment(text + magnitude + "-n3-p1")
            for sample in range(30):
                steps = strongest.draw(SampleDraws(0, 0).of(sample))
                assert applied(picture(), steps).shape == (24, 32, 3)


def test_rand_augment_strings_are_read_as_timm_means_them() -> None:
    increasing = parse_rand_augment("rand-m9-mstd0.5-inc1")
    assert (increasing.magnitude, increasing.magnitude_std, increasing.num_layers, increasing.prob) == (9, 0.5, 2, 0.5)
    assert "PosterizeIncreasing" in increasing.operations
    plain = parse_rand_augment("rand-m7-n3-p0.7-mmax12")
    assert (plain.magnitude, plain.num_layers, plain.prob, plain.magnitude_max) == (7, 3, 0.7, 12)
    assert "Posterize" in plain.operations
    assert plain.weights is None
    weighted = parse_rand_augment("rand-mstd101-tweights")
    assert math.isinf(weighted.magnitude_std)
    assert weighted.magnitude == 10
    assert weighted.weights is not None
    assert dict(zip(weighted.operations, weighted.weights, strict=True))["Rotate"] == 3


@pytest.mark.parametrize(
    "text",
    [
        "augmix-m3",
        "original-mstd0.5",
        "-m9",
        "rand-",
        "rand-m",
        "rand-m-9",
        "rand-m9x",
        "rand-x3",
        "rand-n2.5",
        "rand-inc0.5",
        "rand-p2",
        "rand-tother",
        "rand-n99-tweights",
    ],
)
def test_unsupported_rand_augment_strings_are_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=f"rand_augment '{text}'"):
        parse_rand_augment(text)


def test_number_and_share_of_applied_operations_are_as_configured() -> None:
    draws = SampleDraws(0, 0)
    assert all(len(parse_rand_augment("rand-n3-p1").draw(draws.of(sample))) == 3 for sample in range(50))
    assert not any(parse_rand_augment("rand-n3-p0").draw(draws.of(sample)) for sample in range(50))
    applied = sum(len(parse_rand_augment("rand-n2").draw(draws.of(sample))) for sample in range(1000))
    assert abs(applied - 1000) < 5 * math.sqrt(2000 / 4)


def test_image_is_returned_unchanged_where_no_operation_applies() -> None:
    image = picture()
    assert (applied(image, parse_rand_augment("rand-p0").draw(SampleDraws(0, 0).of(0))) == image).all()


def test_magnitudes_are_fixed_normal_or_uniform_as_configured() -> None:
    def degrees(magnitude_std: float) -> npt.NDArray[np.float64]:
        rotate = RandAugment(("Rotate",), None, 5.0, 1, 1.0, magnitude_std)
        return np.array([rotate.draw(SampleDraws(0, 0).of(sample))[0][1][0] for sample in range(2000)])

    assert set(degrees(0.0).tolist()) == {-15.0, 15.0}
    normal = np.abs(degrees(0.5)) / 3
    assert abs(normal.mean() - 5) < 5 * 0.5 / math.sqrt(2000)
    assert abs(normal.std() - 0.5) < 5 * 0.5 / math.sqrt(2 * 2000)
    uniform = np.abs(degrees(math.inf)) / 3
    assert uniform.max() <= 5
    assert abs(uniform.mean() - 2.5) < 5 * (5 / math.sqrt(12)) / math.sqrt(2000)
    assert abs((degrees(0.5) > 0).sum() - 1000) < 5 * math.sqrt(2000 / 4)


def test_weighted_operations_are_drawn_in_proportion_and_never_twice() -> None:
    weighted = RandAugment(("Rotate", "ShearX", "Invert"), (6.0, 3.0, 1.0), num_layers=2, prob=1.0)
    drawn = [[step[0] for step in weighted.draw(SampleDraws(0, 0).of(sample))] for sample in range(3000)]
    assert all(len(set(names)) == 2 for names in drawn)
    for name, share in (("Rotate", 0.6), ("ShearX", 0.3), ("Invert", 0.1)):
        first = sum(names[0] == name for names in drawn)
        assert abs(first - 3000 * share) < 5 * math.sqrt(3000 * share * (1 - share))
