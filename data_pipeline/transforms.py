"""A picture -> one slot of a batch: crop, resize, augment; and normalisation of a whole batch on its device."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch

from data_pipeline.augment import random_crop_box
from data_pipeline.changes import Changes, cpu_changes, recipe_of
from data_pipeline.config import DataConfig, Interpolation
from data_pipeline.decode import Box, Picture, Size

Image = npt.NDArray[np.uint8]
Transform = Callable[[Picture, np.random.Generator, Image], Changes | None]
"""(picture, the sample's generator, slot of the batch uint8 (S, S, 3) to write) -> what is still to be done to the slot
on the device, if anything. Decodes the box that it draws, and no more; raises what Picture.region raises."""


def train_transform(config: DataConfig) -> Transform:
    """Random crop resized to the batch's size, flip, and the further changes that are configured, in this order.

    With `config.augment.place` "device" the further changes are drawn and returned, not made. Raises ValueError for a
    RandAugment string that is not understood.
    """
    augment = config.augment
    recipe, change = recipe_of(config), cpu_changes(config)

    def transform(picture: Picture, rng: np.random.Generator, out: Image) -> Changes | None:
        box = random_crop_box(rng, picture.size, augment.scale, augment.ratio)
        mirrored = rng.random() < augment.horizontal_flip
        pixels = picture.region(box, (out.shape[0], out.shape[1]))
        resize(pixels, out, augment.interpolation, mirrored=mirrored)
        changes = recipe.draw(rng, (out.shape[0], out.shape[1])) if recipe else None
        if changes is None or augment.place == "device":
            return changes
        change(out, changes)
        return None

    return transform


def eval_transform(config: DataConfig) -> Transform:
    """Short side resized to image_size / eval_crop_pct (rounded down), then the central square; nothing is random.

    Of an image longer than four short sides only the middle is resized, so that memory does not grow with its length.
    """
    short_side = math.floor(config.image_size / config.eval_crop_pct)

    def transform(picture: Picture, rng: np.random.Generator, out: Image) -> Changes | None:
        box = _middle(picture.size)
        height, width = box[2:]
        scale = short_side / min(height, width)
        resized_height, resized_width = max(short_side, int(height * scale)), max(short_side, int(width * scale))
        resized = np.empty((resized_height, resized_width, 3), np.uint8)
        resize(picture.region(box, resized.shape[:2]), resized, config.augment.interpolation)
        top, left = round((resized_height - out.shape[0]) / 2), round((resized_width - out.shape[1]) / 2)
        out[...] = resized[top : top + out.shape[0], left : left + out.shape[1]]
        return None

    return transform


def _middle(size: Size) -> Box:
    """An image without what lies more than about two short sides from its centre."""
    height, width = size
    # As much is cut at either end, so the centre stays; the square's neighbours within a filter's reach stay as well.
    cut = max(0, max(height, width) - 4 * min(height, width)) // 2
    return (cut, 0, height - 2 * cut, width) if height > width else (0, cut, height, width - 2 * cut)


def resize(image: Image, out: Image, interpolation: Interpolation, *, mirrored: bool = False) -> None:
    """Resample `image`, uint8 (H, W, 3), onto `out`, uint8 (H', W', 3); equal sizes are copied unchanged.

    "antialias" averages over the pixels that fall on one, as Pillow's bilinear filter does (torch); "linear" reads
    four neighbours (OpenCV, or torch where OpenCV is missing); "area" is OpenCV's INTER_AREA. All run in the caller's
    thread. `mirrored`: left and right are exchanged.
    """
    cv2 = _cv2()
    if image.shape == out.shape:
        resized = image
    elif cv2 is not None and interpolation != "antialias":
        method = cv2.INTER_LINEAR if interpolation == "linear" else cv2.INTER_AREA
        size = (out.shape[1], out.shape[0])
        if not mirrored:
            cv2.resize(image, size, dst=out, interpolation=method)
            return
        resized = cv2.resize(image, size, interpolation=method)
    elif interpolation == "area":
        raise ImportError("interpolation 'area' needs OpenCV: pip install opencv-python, or use 'antialias'")
    else:
        resized = _resized_by_torch(image, (out.shape[0], out.shape[1]), antialias=interpolation == "antialias")
    if not mirrored:
        out[...] = resized
    elif cv2 is not None:
        cv2.flip(resized, 1, dst=out)
    else:
        out[...] = resized[:, ::-1]


def _resized_by_torch(image: Image, size: Size, antialias: bool) -> Image:
    # Torch has a fast path for bytes, five times as fast, that needs strides which say "channels last" beyond doubt: no
    # gaps between rows, and the batch axis added before the channels are moved. It would close the gaps itself, but
    # with a team of OpenMP threads for each thread that calls it. It also warns of read-only memory.
    if not (image.flags.c_contiguous and image.flags.writeable):
        image = image.copy()
    pixels = torch.from_numpy(image).unsqueeze(0).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(pixels, size=size, mode="bilinear", antialias=antialias)
    result: Image = resized.permute(0, 2, 3, 1).numpy()[0]
    return result


def normalize(
    images: torch.Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """uint8 (n, H, W, 3) on any device -> (n, 3, H, W), channels_last, (x / 255 - mean) / std per channel.

    Computed in at least float32 and then rounded to `dtype`. Raises TypeError for images that are not uint8.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"normalize takes uint8 images, not {images.dtype}")
    precise = torch.promote_types(dtype, torch.float32)
    scale, shift = _affine(tuple(mean), tuple(std), images.device, precise)
    pixels = images.to(precise)  # (n, H, W, 3) in memory, which is what channels_last means for (n, 3, H, W)
    pixels.mul_(scale).sub_(shift)
    return pixels.to(dtype).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=16)
def _affine(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor and offset per channel, kept on the device: a copy from the host per batch would wait for the GPU."""
    scale = 1 / (255 * torch.tensor(std, dtype=torch.float64))
    shift = torch.tensor(mean, dtype=torch.float64) * 255 * scale
    return scale.to(device, dtype), shift.to(device, dtype)


@functools.cache
def _cv2() -> ModuleType | None:
    """OpenCV, told not to start threads of its own beside the loader's; None where it is not installed."""
    try:
        import cv2
    except ImportError:
        return None
    cv2.setNumThreads(0)
    return cv2
