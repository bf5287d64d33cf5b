"""The changes of a whole batch (data_pipeline.changes) as tensor operations, on the device that holds the images.

Samples that share an operation go through it together, each with its own arguments; nothing waits for the device. The
operations have Pillow's definitions and, but for resampling and blur, Pillow's results to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_pipeline.changes import Changes, Step, mean_colour
from data_pipeline.config import DataConfig

_LEVELS = 256
_LUMA = (19595, 38470, 7471)  # of 65536: ITU-R 601 as Pillow converts to grey
_ROUNDING = 1 / 64  # above the error of a resampled value: 255 * some 2**-23 * the width in pixels
_BLUR_REACH = 6  # pixels: three times the largest deviation that is drawn


def apply_changes(images: Tensor, changes: Sequence[Changes], config: DataConfig) -> Tensor:
    """Apply one Changes to each of `images`, uint8 (n, H, W, 3) on any device; returns new memory of that shape.

    The noise in erased boxes is the device's own: a function of (seed, epoch, sample) and the kind of device. Computes
    in float32 also where autocast is on. Raises ValueError where the numbers of images and changes differ.
    """
    if len(images) != len(changes):
        raise ValueError(f"{len(images)} images and {len(changes)} changes do not fit together")
    with torch.autocast(images.device.type, enabled=False):
        return _changed(images.clone(), changes, config)


def _changed(images: Tensor, changes: Sequence[Changes], config: DataConfig) -> Tensor:
    """`images`, which are written, after one Changes each."""
    fill = mean_colour(config)
    for layer in range(max((len(change.steps) for change in changes), default=0)):
        for name, members in _by_operation(changes, layer).items():
            chosen = _sent(np.array(members, np.int64), images.device)
            steps = [changes[member].steps[layer] for member in members]
            images.index_copy_(0, chosen, _OPERATIONS[name](images.index_select(0, chosen), steps, fill))
    for image, change in zip(images, changes, strict=True):
        if change.erased is not None:
            _erase(image, change, config)
    return images


def _by_operation(changes: Sequence[Changes], layer: int) -> dict[str, list[int]]:
    """Operation -> places in the batch whose step number `layer` it is."""
    groups: dict[str, list[int]] = {}
    for place, change in enumerate(changes):
        if layer < len(change.steps):
            groups.setdefault(change.steps[layer][0], []).append(place)
    return groups


def _sent(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """The array on the device, without waiting for what the device is doing."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _column(steps: Sequence[Step]) -> npt.NDArray[np.float64]:
    """The first argument of each step, (n,)."""
    return np.array([step[1][0] for step in steps], np.float64)


def _factors(steps: Sequence[Step], device: torch.device) -> Tensor:
    """The first argument of each step, float32 (n, 1, 1, 1)."""
    return _sent(_column(steps).astype(np.float32), device).view(-1, 1, 1, 1)


_TableOf = Callable[[npt.NDArray[np.int64], npt.NDArray[np.float64]], npt.NDArray[np.generic]]

# Operations that look a pixel up in a table. Tables are uint8 (n, 1, 256), or (n, 3, 256) with one for each channel.


def _look_up(images: Tensor, tables: Tensor) -> Tensor:
    count, height, width, channels = images.shape
    values = images.permute(0, 3, 1, 2).reshape(count, channels, -1).long()
    found = tables.expand(count, channels, _LEVELS).gather(2, values)
    return found.view(count, channels, height, width).permute(0, 2, 3, 1)


def _by_table(
    table_of: Callable[[npt.NDArray[np.int64], npt.NDArray[np.float64]], npt.NDArray[np.generic]],
) -> _Operation:
    """An operation given as table_of(levels (256,), arguments (n, 1)) -> (n, 256)."""

    def operation(images: Tensor, steps: Sequence[Step], fill: tuple[int, int, int]) -> Tensor:
        tables = table_of(np.arange(_LEVELS), _column(steps)[:, None])
        return _look_up(images, _sent(tables.astype(np.uint8), images.device).unsqueeze(1))

    return operation


def _invert(images: Tensor, steps: Sequence[Step], fill: tuple[int, int, int]) -> Tensor:
    return 255 - images


def _histograms(images: Tensor) -> Tensor:
    """How often each level occurs, int64 (n, 3, 256)."""
    count, _, _, channels = images.shape
    values = images.permute(0, 3, 1, 2).reshape(count, channels, -1).long()
    histograms = torch.zeros(count, channels, _LEVELS, dtype=torch.int64, device=images.device)
    return histograms.scatter_add_(2, values, torch.ones_like(values))  # sums of integers: the same in any order


def _auto_contrast(images: Tensor, steps: Sequence[Step], fill: tuple[int, int, int]) -> Tensor:
    present = _histograms(images) > 0
    levels = torch.arange(_LEVELS, device=images.device, dtype=torch.float64)
    low = present.int().argmax(2, keepdim=True).double()
    high = _LEVELS - 1 - present.flip(2).int().argmax(2, keepdim=True).double()
    # "255 / tensor" is 255 * (1 / tensor), which rounds twice
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)
    stretched = (levels * scale + -low * scale).trunc().clamp(0, 255)
    return _look_up(images, torch.where(high > low, stretched, levels).to(torch.uint8))


def _equalize(images: Tensor, steps: Sequence[Step], fill: tuple[int, int, int]) -> Tensor:
    histograms = _histograms(images)
    levels = torch.arange(_LEVELS, device=images.device)
    last = _LEVELS - 1 - (histograms > 0).flip(2).int().argmax(2, keepdim=True)
    step = (histograms.sum(2, keepdim=True) - histograms.gather(2, last)) // 255
    before = histograms.cumsum(2) - histograms
    # a table entry beyond 255 belongs to a level above all that occur
    spread = ((step // 2 + before) // step.clamp(min=1)).clamp(max=255)
    return _look_up(images, torch.where(step > 0, spread, levels).to(torch.uint8))


# Operations that mix an image with a poorer version of itself: poorer + factor * (image - poorer), as ImageEnhance.


def _blended(poorer: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    poorer = poorer.float()
    return (poorer + factors * (images.float() - poorer)).clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """Luminance, int32 (n, H, W, 1) in 0 to 255."""
    red, green, blue = images.int().unbind(3)
    weighted = red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2] + 0x8000
    return (weighted >> 16).unsqueeze(3)


def _color(images: Tensor, steps: Sequence[Step], fill: tuple[int, int, int]) -> Tensor:
    return _blended(_grey(images), images, _factors(steps, images.device))


def _desaturate(images: Tensor, steps: Sequence[Step], fill: tuple[int, int, int]) -> Tensor:
    factors = np.clip(1.0 - _column(steps), 0, 1).astype(np.float32)
    return _blended(_grey(images), images, _sent(factors, images.device).view(-1, 1, 1, 1))


def _contrast(images: Tensor, steps: Sequence[Step], fill: tuple[int, int, int]) -> Tensor:
    mean = (_grey(images).double().mean((1, 2, 3), keepdim=True) + 0.5).floor()
    return _blended(mean, images, _factors(steps, images.device))


def _brightness(images: Tensor, steps: Sequence[Step], fill: tuple[int, int, int]) -> Tensor:
    return _blended(images.new_zeros(1), images, _factors(steps, images.device))


def _sharpness(images: Tensor, steps: Sequence[Step], fill: tuple[int, int, int]) -> Tensor:
    """Against Pillow's SMOOTH filter: weight 5 for a pixel and 1 for each of its eight neighbours; the edge stays."""
    wide = images.int()
    smooth = wide.clone()
    if min(images.shape[1:3]) > 2:
        rows = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
        around = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
        smooth[:, 1:-1, 1:-1] = (2 * (around + 4 * wide[:, 1:-1, 1:-1]) + 13) // 26  # divided by 13, to the nearest
    return _blended(smooth, images, _factors(steps, images.device))


def _gaussian_blur(images: Tensor, steps: Sequence[Step], fill: tuple[int, int, int]) -> Tensor:
    """A true Gaussian of the given deviation, which Pillow approximates by three box filters."""
    deviations = _column(steps)[:, None]
    reach = _BLUR_REACH
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (offsets / np.maximum(deviations, 1e-3)) ** 2)
    weights /= weights.sum(1, keepdims=True)
    count, height, width, channels = images.shape
    kernels = _sent(np.repeat(weights.astype(np.float32), channels, axis=0), images.device)
    planes = images.permute(0, 3, 1, 2).reshape(1, count * channels, height, width).float()
    padded = torch.nn.functional.pad(planes, (reach, reach, reach, reach), mode="replicate")
    groups = count * channels
    rows = torch.nn.functional.conv2d(padded, kernels.view(groups, 1, 1, -1), groups=groups)
    both = torch.nn.functional.conv2d(rows, kernels.view(groups, 1, -1, 1), groups=groups)
    return both.add_(0.5).clamp_(0, 255).to(torch.uint8).view(count, channels, height, width).permute(0, 2, 3, 1)


# Operations that move pixels. A matrix (a, b, c, d, e, f) says where the pixel at (x, y) comes from, measured from the
# corner of the image: (ax + by + c, dx + ey + f).

_Matrix = tuple[float, float, float, float, float, float]


def _by_matrix(matrix_of: Callable[[float, int, int], _Matrix]) -> _Operation:
    """An operation given as matrix_of(argument, height, width)."""

    def operation(images: Tensor, steps: Sequence[Step], fill: tuple[int, int, int]) -> Tensor:
        height, width = images.shape[1:3]
        matrices = np.array([matrix_of(step[1][0], height, width) for step in steps], np.float32)
        bicubic = _sent(np.array([step[2] for step in steps]), images.device).view(-1, 1, 1, 1)
        return _moved(images, _sent(matrices, images.device), bicubic, fill)

    return operation


def _moved(images: Tensor, matrices: Tensor, bicubic: Tensor, fill: tuple[int, int, int]) -> Tensor:
    """Resample `images` by `matrices`, float32 (n, 6); what comes from outside of an image has the colour `fill`."""
    height, width = images.shape[1:3]
    y, x = torch.meshgrid(
        torch.arange(height, device=images.device) + 0.5, torch.arange(width, device=images.device) + 0.5, indexing="ij"
    )
    a, b, c, d, e, f = (column.view(-1, 1, 1) for column in matrices.unbind(1))
    from_x, from_y = a * x + b * y + c, d * x + e * y + f
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    grid = torch.stack([from_x * (2 / width) - 1, from_y * (2 / height) - 1], dim=3)
    planes = images.permute(0, 3, 1, 2).float()
    sample = torch.nn.functional.grid_sample
    linear = sample(planes, grid, mode="bilinear", padding_mode="border", align_corners=False)
    cubic = sample(planes, grid, mode="bicubic", padding_mode="border", align_corners=False)
    # Pillow rounds down; a whole number must not lose one to the rounding of float32.
    moved = torch.where(bicubic, cubic, linear).permute(0, 2, 3, 1).add_(_ROUNDING).clamp_(0, 255).to(torch.uint8)
    colour = _sent(np.array(fill, np.uint8), images.device)
    return torch.where(inside.unsqueeze(3), moved, colour)


def _rotation(degrees: float, height: int, width: int) -> _Matrix:
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return cosine, -sine, x - cosine * x + sine * y, sine, cosine, y - sine * x - cosine * y


def _erase(image: Tensor, change: Changes, config: DataConfig) -> None:
    """Fill the erased box of one image, uint8 (H, W, 3), in place."""
    assert change.erased is not None
    top, left, height, width = change.erased
    patch = image[top : top + height, left : left + width]
    if config.augment.erasing_mode == "const":
        patch.copy_(_sent(np.array(mean_colour(config), np.uint8), image.device).expand_as(patch))
        return
    generator = torch.Generator(image.device).manual_seed(change.noise_key)
    noise = torch.randn((height, width, 3), generator=generator, device=image.device)
    scale = _sent(np.asarray(config.std, np.float32) * 255, image.device)
    shift = _sent(np.asarray(config.mean, np.float32) * 255 + np.float32(0.5), image.device)
    patch.copy_((noise * scale + shift).clamp_(0, 255))  # the conversion to bytes cuts the fraction off


_Operation = Callable[[Tensor, Sequence[Step], tuple[int, int, int]], Tensor]
"""(images uint8 (n, H, W, 3), their steps, fill colour) -> images"""

_posterize = _by_table(lambda levels, bits: levels & (256 - 2 ** (8 - bits.astype(np.int64))))
_solarize = _by_table(lambda levels, threshold: np.where(levels < threshold, levels, 255 - levels))

_OPERATIONS: dict[str, _Operation] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Rotate": _by_matrix(_rotation),
    "Posterize": _posterize,
    "PosterizeIncreasing": _posterize,
    "Solarize": _solarize,
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": _by_table(
        lambda levels, added: np.where(levels < 128, np.minimum(255, levels + added.astype(np.int64)), levels)
    ),
    "Color": _color,
    "ColorIncreasing": _color,
    "Contrast": _contrast,
    "ContrastIncreasing": _contrast,
    "Brightness": _brightness,
    "BrightnessIncreasing": _brightness,
    "Sharpness": _sharpness,
    "SharpnessIncreasing": _sharpness,
    "ShearX": _by_matrix(lambda factor, height, width: (1, factor, 0, 0, 1, 0)),
    "ShearY": _by_matrix(lambda factor, height, width: (1, 0, 0, factor, 1, 0)),
    "TranslateXRel": _by_matrix(lambda share, height, width: (1, 0, share * width, 0, 1, 0)),
    "TranslateYRel": _by_matrix(lambda share, height, width: (1, 0, 0, 0, 1, share * height)),
    "Desaturate": _desaturate,
    "GaussianBlur": _gaussian_blur,
}
