"""Photometric distortion of training images for segmentation: brightness, contrast, saturation and hue.

NumPy alone, in operations that IEEE 754 rounds one way: the same pixels on every machine, whatever is installed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]
Plane = npt.NDArray[np.float32]

_BRIGHTNESS = 32.0
_FACTOR = (0.5, 1.5)
_HUE_DEGREES = 36.0  # hue_delta 18 of mmsegmentation, which adds it to OpenCV's bytes of two degrees each
_BAND_PIXELS = 16384  # worked on at once: what lies between fits into a core's cache


def distorted(pixels: Image, rng: np.random.Generator) -> Image:
    """mmsegmentation's PhotoMetricDistortion of uint8 (H, W, 3); each change is made with probability 1/2.

    Brightness moves by up to 32 levels, contrast and saturation are multiplied by 0.5 to 1.5, hue turns by up to 36
    degrees; all uniform. Contrast is changed before or after saturation and hue, by a draw. Brightness and contrast end
    in bytes each, rounded and cut off at black and white; so do saturation and hue, those of HSV, together.
    """
    draws = rng.random(9).tolist()
    shift = _BRIGHTNESS * (2 * draws[1] - 1) if draws[0] < 0.5 else 0.0
    contrast, saturation = (
        _FACTOR[0] + (_FACTOR[1] - _FACTOR[0]) * strength if apply < 0.5 else 1.0
        for apply, strength in ((draws[2], draws[3]), (draws[4], draws[5]))
    )
    degrees = _HUE_DEGREES * (2 * draws[7] - 1) if draws[6] < 0.5 else 0.0
    early = draws[8] < 0.5
    brightened, stretched = _bytes(np.arange(256) + shift), _bytes(np.arange(256) * contrast)
    pixels = (stretched[brightened] if early else brightened)[pixels]
    if saturation != 1.0 or degrees:
        pixels = recoloured(pixels, saturation, degrees)
    return pixels if early else stretched[pixels]


def recoloured(pixels: Image, saturation: float, degrees: float) -> Image:
    """HSV's saturation times a factor, at most 1, and its hue turned, of uint8 (H, W, 3); rounded once, at the end."""
    colours = np.ascontiguousarray(pixels).reshape(-1, 3)
    found = np.empty_like(colours)
    for start in range(0, len(colours), _BAND_PIXELS):
        part = slice(start, start + _BAND_PIXELS)
        planes = np.ascontiguousarray(colours[part].T, np.float32)
        found[part] = np.rint(_turned(planes, saturation, degrees) if degrees else _saturated(planes, saturation)).T
    return found.reshape(pixels.shape)


def _saturated(planes: Plane, saturation: float) -> Plane:
    """Levels of red, green and blue (3, n) with more or less saturation."""
    value = planes.max(axis=0)
    chroma = np.maximum(
        value - planes.min(axis=0), np.float32(1)
    )  # levels are whole: that of grey is 0, others are not
    return value - (value - planes) * np.minimum(value / chroma, np.float32(saturation))


def _turned(planes: Plane, saturation: float, degrees: float) -> Plane:
    """Levels of red, green and blue (3, n) with another saturation and hue."""
    red, green, blue = planes
    value = planes.max(axis=0)
    chroma = value - planes.min(axis=0)
    # In sixths of the circle, from -1 to 5: red lies at 0, green at 2, blue at 4. Products with 0 and 1 choose between
    # them, because np.where waits for each pixel's branch.
    is_red = (red == value).astype(np.float32)
    is_green = (green == value).astype(np.float32) * (1 - is_red)
    hue = is_red * (green - blue) + is_green * (blue - red) + (1 - is_red - is_green) * (red - green)
    hue /= np.maximum(chroma, np.float32(1))
    hue += 4 - 4 * is_red - 2 * is_green
    hue += np.float32(degrees / 60)
    hue += 6 * (hue < 0).astype(np.float32)
    chroma = np.minimum(chroma * np.float32(saturation), value)
    lacks = np.abs(hue - np.array([[3], [2], [4]], np.float32))  # of the chroma, for each of the three
    np.subtract(2, lacks[0], out=lacks[0])
    lacks[1:] -= 1
    np.clip(lacks, 0, 1, out=lacks)
    lacks *= chroma
    return value - lacks


def _bytes(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
