"""Keyed random draws: crop boxes, RandAugment's operations with their strengths, boxes to erase.

Nothing here touches a pixel. All draws come from a generator that is passed in and belongs to one sample.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data_pipeline.order import STREAM_AUGMENT, keyed_seed

Box = tuple[int, int, int, int]
"""(top, left, height, width) in pixels"""

_CROP_ATTEMPTS = 10  # torchvision's RandomResizedCrop
_ERASING_ATTEMPTS = 10  # this and the next two: timm's RandomErasing
_ERASING_AREA = (0.02, 1 / 3)
_ERASING_LOG_RATIO = (math.log(0.3), math.log(1 / 0.3))
_FULL_LEVEL = 10.0  # RandAugment counts magnitudes in tenths


class SampleDraws:
    """Random generators for the samples of one epoch: equal (seed, epoch, sample id) gives equal draws, always.

    Philox is a function of (key, counter): the key stands for (seed, epoch) and the counter's high word is the sample's
    id, so that no two samples of an epoch share a number. Setting the counter of an existing generator takes 2 µs and
    making a new one 20 µs, therefore one generator is reused. It belongs to one thread.
    """

    def __init__(self, seed: int, epoch: int) -> None:
        key = keyed_seed(seed, epoch, STREAM_AUGMENT).generate_state(2, np.uint64)
        bit_generator = np.random.Philox(key=key)
        self._state = bit_generator.state
        self._bit_generator = bit_generator
        self._generator = np.random.Generator(bit_generator)

    def of(self, sample_id: int, copy: int = 0) -> np.random.Generator:
        """The generator at the start of the draws of a sample's copy; valid until the next call."""
        self._state["state"]["counter"][2] = copy
        self._state["state"]["counter"][3] = sample_id
        self._bit_generator.state = self._state
        return self._generator


def random_crop_box(
    rng: np.random.Generator, size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """A random box of a given share of the area and aspect ratio, as torchvision's RandomResizedCrop draws it.

    `size` is (height, width). Area share uniform in `scale`, width / height log-uniform in `ratio`; after ten boxes
    that do not fit, the largest central box whose aspect ratio is allowed.
    """
    height, width = size
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(_CROP_ATTEMPTS):
        area_draw, ratio_draw, top_draw, left_draw = rng.random(4).tolist()
        area = height * width * _between(scale, area_draw)
        aspect = math.exp(_between(log_ratio, ratio_draw))
        box_width = round(math.sqrt(area * aspect))
        box_height = round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(top_draw * (height - box_height + 1))
            left = int(left_draw * (width - box_width + 1))
            return top, left, box_height, box_width
    box_width = min(width, max(1, round(height * ratio[1])))
    box_height = min(height, max(1, round(width / ratio[0])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def erasing_box(rng: np.random.Generator, size: tuple[int, int]) -> Box | None:
    """A random box of 2 to 33 % of the area, as timm's RandomErasing draws it; None after ten that do not fit.

    `size` is (height, width); the box is strictly smaller than the image in both directions.
    """
    height, width = size
    for _ in range(_ERASING_ATTEMPTS):
        area_draw, ratio_draw, top_draw, left_draw = rng.random(4).tolist()
        area = height * width * _between(_ERASING_AREA, area_draw)
        aspect = math.exp(_between(_ERASING_LOG_RATIO, ratio_draw))
        box_height = round(math.sqrt(area * aspect))
        box_width = round(math.sqrt(area / aspect))
        if box_height < height and box_width < width:
            top = int(top_draw * (height - box_height + 1))
            left = int(left_draw * (width - box_width + 1))
            return top, left, box_height, box_width
    return None


# How strong an operation is at `level` in [0, 1] (more where the magnitude's bound is raised) with a random `sign`, in
# the units that timm's function of that name takes; the same values as timm's LEVEL_TO_ARG, except that posterizing
# keeps one bit at least: with none the image is black, which Pillow refuses since version 13.
_Strength = Callable[[float, int], tuple[float, ...]]


def _nothing(level: float, sign: int) -> tuple[float, ...]:
    return ()


def _shear(level: float, sign: int) -> tuple[float, ...]:
    return (sign * 0.3 * level,)


def _translate(level: float, sign: int) -> tuple[float, ...]:
    return (sign * 0.45 * level,)


def _enhance(level: float, sign: int) -> tuple[float, ...]:
    return (0.1 + 1.8 * level,)


def _enhance_increasing(level: float, sign: int) -> tuple[float, ...]:
    return (max(0.1, 1.0 + sign * 0.9 * level),)


_STRENGTHS: dict[str, _Strength] = {
    "AutoContrast": _nothing,
    "Equalize": _nothing,
    "Invert": _nothing,
    "Rotate": lambda level, sign: (sign * 30.0 * level,),
    "Posterize": lambda level, sign: (max(1, int(4 * level)),),
    "PosterizeIncreasing": lambda level, sign: (max(1, 4 - int(4 * level)),),
    "Solarize": lambda level, sign: (min(256, int(256 * level)),),
    "SolarizeIncreasing": lambda level, sign: (256 - min(256, int(256 * level)),),
    "SolarizeAdd": lambda level, sign: (min(128, int(110 * level)),),
    "Color": _enhance,
    "ColorIncreasing": _enhance_increasing,
    "Contrast": _enhance,
    "ContrastIncreasing": _enhance_increasing,
    "Brightness": _enhance,
    "BrightnessIncreasing": _enhance_increasing,
    "Sharpness": _enhance,
    "SharpnessIncreasing": _enhance_increasing,
    "ShearX": _shear,
    "ShearY": _shear,
    "TranslateXRel": _translate,
    "TranslateYRel": _translate,
    "Desaturate": lambda level, sign: (min(1.0, 0.5 + 0.5 * level),),
    "GaussianBlur": lambda level, sign: (min(2.0, 0.1 + 1.9 * level),),
}


@dataclass(frozen=True)
class RandAugment:
    """Which operations RandAugment draws from and how; made by `parse_rand_augment`."""

    operations: tuple[str, ...]
    """timm's names."""

    weights: tuple[float, ...] | None = None
    """Relative odds of the operations, drawn without repetition; None: equal odds, with repetition."""

    magnitude: float = 10.0
    num_layers: int = 2
    """Operations drawn for an image."""

    prob: float = 0.5
    """Probability that a drawn operation is applied."""

    magnitude_std: float = 0.0
    """Deviation of the normal noise on each operation's magnitude; infinity: uniform in [0, magnitude]."""

    magnitude_max: float = _FULL_LEVEL

    def draw(self, rng: np.random.Generator) -> list[tuple[str, tuple[float, ...], bool]]:
        """(operation, its arguments, resample bicubically instead of bilinearly) of each operation to apply."""
        steps = []
        for index in self._choose(rng):
            apply_draw, sign_draw, filter_draw, uniform = rng.random(4).tolist()
            noise = rng.standard_normal() if self.magnitude_std > 0 else 0.0
            if apply_draw >= self.prob:
                continue
            if math.isinf(self.magnitude_std):
                magnitude = uniform * self.magnitude
            else:
                magnitude = self.magnitude + self.magnitude_std * noise
            level = max(0.0, min(magnitude, self.magnitude_max)) / _FULL_LEVEL
            name = self.operations[index]
            steps.append((name, _STRENGTHS[name](level, -1 if sign_draw < 0.5 else 1), filter_draw >= 0.5))
        return steps

    def _choose(self, rng: np.random.Generator) -> list[int]:
        count = len(self.operations)
        if self.weights is None:
            return [int(draw * count) for draw in rng.random(self.num_layers).tolist()]
        # The first arrivals of processes with these rates: draws without repetition, in proportion to the weights
        # (Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006).
        arrivals = -np.log1p(-rng.random(count)) / np.asarray(self.weights)
        return [int(index) for index in np.argsort(arrivals)[: self.num_layers]]


_NUMBER = r"(\d+(?:\.\d*)?|\.\d+|inf)"
_INTEGER_PARTS = ("n", "inc")


def parse_rand_augment(text: str) -> RandAugment:
    """Read timm's notation, such as "rand-m9-mstd0.5-inc1" or "rand-m9-n2-mstd0.5-tweights".

    Parts, in any order: m magnitude (10), n operations per image (2), p probability of each (0.5), mstd deviation of
    the magnitude (0; above 100: uniform magnitudes), mmax bound of the magnitude (10), inc1 operations that grow
    stronger with the magnitude, t set of operations ("weights", "3a", "3aw"). Raises ValueError for anything else.
    """
    from timm.data.auto_augment import rand_augment_choices

    head, *parts = text.split("-")
    if head != "rand":
        raise ValueError(f"rand_augment '{text}': only 'rand-...' is supported, not '{head}'")
    numbers = {"m": _FULL_LEVEL, "n": 2.0, "p": 0.5, "mstd": 0.0, "mmax": _FULL_LEVEL, "inc": 0.0}
    operation_set = ""
    for part in parts:
        match = re.fullmatch("([a-z]+?)" + _NUMBER, part)
        if part in ("tweights", "t3a", "t3aw"):
            operation_set = part[1:]
        elif match and match[1] in numbers and not (match[1] in _INTEGER_PARTS and not match[2].isdigit()):
            numbers[match[1]] = float(match[2])
        else:
            raise ValueError(
                f"rand_augment '{text}': '{part}' is not known; the parts are m, n, p, mstd, mmax, inc followed by a "
                "number, and tweights, t3a, t3aw"
            )
    choices = rand_augment_choices(operation_set, increasing=bool(numbers["inc"]))
    weights = tuple(float(weight) for weight in choices.values()) if isinstance(choices, dict) else None
    num_layers = int(numbers["n"])
    if weights is not None and num_layers > len(weights):
        raise ValueError(f"rand_augment '{text}': n{num_layers} is more than the {len(weights)} operations of the set")
    if not 0 <= numbers["p"] <= 1:
        raise ValueError(f"rand_augment '{text}': p is a probability, in [0, 1]")
    return RandAugment(
        operations=tuple(choices),
        weights=weights,
        magnitude=numbers["m"],
        num_layers=num_layers,
        prob=numbers["p"],
        magnitude_std=math.inf if numbers["mstd"] > 100 else numbers["mstd"],
        magnitude_max=numbers["mmax"] or _FULL_LEVEL,
    )


def _between(bounds: tuple[float, float], draw: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * draw
