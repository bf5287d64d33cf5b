"""What happens to an image after crop, resize and flip: drawn once per sample, applied in a thread or on the device.

The draws are numbers, so the same `Changes` mean the same thing wherever they are applied: here with timm's operations
on one image, or in data_pipeline.device_changes on a whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.augment import Box, RandAugment, erasing_box, parse_rand_augment
from data_pipeline.config import DataConfig

Image = npt.NDArray[np.uint8]
Step = tuple[str, tuple[float, ...], bool]
"""(timm's name of an operation, its arguments, resample bicubically instead of bilinearly)"""

_SOLARIZE_THRESHOLD = 128.0  # this and the next: DeiT III's 3-Augment
_BLUR_RADIUS = (0.1, 2.0)
_JITTERED = ("Brightness", "Contrast", "Color")


@dataclass(frozen=True)
class Changes:
    """One sample's changes, in the order in which they are applied."""

    steps: tuple[Step, ...]

    erased: Box | None
    """(top, left, height, width) in pixels, after the steps."""

    noise_key: int
    """Seeds the noise that fills the erased box."""


UNCHANGED = Changes((), None, 0)


@dataclass(frozen=True)
class Recipe:
    """What is drawn for every sample; made by `recipe_of`."""

    rand_augment: RandAugment | None
    three_augment: bool
    color_jitter: float
    random_erasing: float

    def draw(self, rng: np.random.Generator, size: tuple[int, int]) -> Changes:
        """The changes of one sample of `size` (height, width): RandAugment, 3-Augment, colour jitter, erasing."""
        steps = self.rand_augment.draw(rng) if self.rand_augment else []
        if self.three_augment:
            steps.append(_draw_three_augment(rng))
        if self.color_jitter:
            steps += _draw_jitter(rng, self.color_jitter)
        erased, noise_key = None, 0
        if self.random_erasing and rng.random() < self.random_erasing:
            erased = erasing_box(rng, size)
            noise_key = int(np.frombuffer(rng.bytes(8), "<u8")[0] >> 1)  # fits what torch takes as a seed
        return Changes(tuple(steps), erased, noise_key)


def recipe_of(config: DataConfig) -> Recipe | None:
    """The recipe that a configuration asks for; None where it asks for nothing.

    Raises ValueError for a RandAugment string that is not understood.
    """
    augment = config.augment
    rand_augment = parse_rand_augment(augment.rand_augment) if augment.rand_augment else None
    recipe = Recipe(rand_augment, augment.three_augment, augment.color_jitter, augment.random_erasing)
    return recipe if any((rand_augment, recipe.three_augment, recipe.color_jitter, recipe.random_erasing)) else None


def _draw_three_augment(rng: np.random.Generator) -> Step:
    """One of grayscale, solarization and Gaussian blur with equal odds (Touvron et al., "DeiT III", 2022, sec. 3)."""
    choice_draw, radius_draw = rng.random(2).tolist()
    radius = _BLUR_RADIUS[0] + (_BLUR_RADIUS[1] - _BLUR_RADIUS[0]) * radius_draw
    choices: tuple[Step, ...] = (
        ("Desaturate", (1.0,), False),
        ("Solarize", (_SOLARIZE_THRESHOLD,), False),
        ("GaussianBlur", (radius,), False),
    )
    return choices[int(choice_draw * len(choices))]


def _draw_jitter(rng: np.random.Generator, strength: float) -> list[Step]:
    """Brightness, contrast and saturation in random order, each with its own factor (torchvision's ColorJitter)."""
    low, high = max(0.0, 1.0 - strength), 1.0 + strength
    draws = rng.random((len(_JITTERED), 2))
    names = [_JITTERED[index] for index in np.argsort(draws[:, 0], kind="stable")]
    return [
        (name, (low + (high - low) * share,), False) for name, share in zip(names, draws[:, 1].tolist(), strict=True)
    ]


def cpu_changes(config: DataConfig) -> Callable[[Image, Changes], None]:
    """A function that applies changes to one image, uint8 (H, W, 3), in place.

    Rotations and shifts uncover `config.mean`. An erased box is filled with `config.mean` ("const"), which
    normalisation turns into 0, or ("pixel") with what it turns into standard normal noise, rounded to bytes and cut off
    at black and white.
    """
    fill = mean_colour(config)
    mean = np.asarray(config.mean, np.float32) * 255
    std = np.asarray(config.std, np.float32) * 255

    def apply(image: Image, changes: Changes) -> None:
        if changes.steps:
            image[...] = _apply_steps(image, changes.steps, fill)
        if changes.erased is None:
            return
        top, left, height, width = changes.erased
        patch = image[top : top + height, left : left + width]
        if config.augment.erasing_mode == "const":
            patch[...] = fill
        else:
            patch[...] = _noise(changes.noise_key, height, width, mean, std)

    return apply


def mean_colour(config: DataConfig) -> tuple[int, int, int]:
    """The mean colour in bytes."""
    red, green, blue = (round(255 * channel) for channel in config.mean)
    return red, green, blue


def _apply_steps(image: Image, steps: tuple[Step, ...], fill: tuple[int, int, int]) -> Image:
    from PIL import Image as pil
    from timm.data.auto_augment import NAME_TO_OP

    picture = pil.fromarray(image)
    for name, arguments, bicubic in steps:
        # given one filter only, timm has nothing left to draw
        resample = pil.Resampling.BICUBIC if bicubic else pil.Resampling.BILINEAR
        picture = NAME_TO_OP[name](picture, *arguments, fillcolor=fill, resample=resample)
    return np.asarray(picture)


def _noise(
    key: int, height: int, width: int, mean: npt.NDArray[np.float32], std: npt.NDArray[np.float32]
) -> npt.NDArray[np.uint8]:
    """Normal noise per pixel and channel on the scale 0 to 255, uint8 (height, width, 3)."""
    rng = np.random.Generator(np.random.Philox(key=key))
    noise = rng.standard_normal((height, width * 3), dtype=np.float32)  # long rows are several times faster to scale
    noise *= np.tile(std, width)
    noise += np.tile(mean + 0.5, width)  # the conversion to bytes cuts the fraction off
    np.clip(noise, 0, 255, out=noise)
    return noise.astype(np.uint8).reshape(height, width, 3)
