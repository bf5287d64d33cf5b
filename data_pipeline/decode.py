"""Bytes of an image file -> RGB pixels, strictly: a damaged file is an error and never a grey area."""

from __future__ import annotations

import functools
import io
import struct
from types import ModuleType

import numpy as np
import numpy.typing as npt

from data_pipeline.restart_rows import RestartRows

Image = npt.NDArray[np.uint8]

_JPEG_START = b"\xff\xd8"
_ORIENTATION_TAG = 0x0112
# EXIF orientation -> (swap rows and columns first, then reverse rows, then reverse columns); 1 is upright
_ORIENTATIONS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


class DecodeError(Exception):
    """The bytes are not a complete, undamaged image. The message says what was found."""


def decode_image(image: bytes | Image | RestartRows) -> Image:
    """Decode an image file to RGB, uint8 (H, W, 3), as a viewer would show it.

    JPEG goes through simplejpeg (libjpeg-turbo) with the fast DCT and fast chroma upsampling, or through Pillow where
    simplejpeg is not installed; CMYK that simplejpeg can check but not convert to RGB, and every other format, goes
    through Pillow. Grayscale and palette images become RGB, the upper 8 of 16 bits are kept, transparency is
    dropped, and a rotation noted in EXIF is applied. An array is taken as decoded pixels and returned as it is.

    Raises DecodeError for damaged or unknown data and for pixels of 32-bit integers or floats. With simplejpeg, any
    oddity that libjpeg reports counts as damage; Pillow alone reports less: it notices a cut-off file, but not every
    changed byte.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise DecodeError(f"decoded pixels must be uint8 (H, W, 3), not {image.dtype} {image.shape}")
        return image
    if isinstance(image, RestartRows):
        image = image.whole()
    simplejpeg = _simplejpeg()
    if simplejpeg is not None and image[:2] == _JPEG_START:
        return _decode_jpeg(simplejpeg, image)
    return _decode_with_pillow(image)


@functools.cache
def _simplejpeg() -> ModuleType | None:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def _decode_jpeg(simplejpeg: ModuleType, data: bytes) -> Image:
    try:
        pixels: Image = simplejpeg.decode_jpeg(data, "RGB", fastdct=True, fastupsample=True, strict=True)
    except ValueError as error:
        if not _is_cmyk(simplejpeg, data):
            raise DecodeError(f"damaged JPEG: {error}") from error
        return _decode_cmyk(simplejpeg, data)
    orientation = _exif_orientation(data)
    return pixels if orientation == 1 else _turn_upright(pixels, orientation)


def _is_cmyk(simplejpeg: ModuleType, data: bytes) -> bool:
    try:
        return str(simplejpeg.decode_jpeg_header(data)[2]).upper() in ("CMYK", "YCCK")
    except ValueError:
        return False


def _decode_cmyk(simplejpeg: ModuleType, data: bytes) -> Image:
    try:  # only for its complaints: Pillow can always make RGB of these colours, but keeps libjpeg's warnings quiet
        simplejpeg.decode_jpeg(data, "CMYK", strict=True)
    except ValueError as error:
        raise DecodeError(f"damaged JPEG: {error}") from error
    return _decode_with_pillow(data)


def _decode_with_pillow(data: bytes) -> Image:
    from PIL import Image as pil
    from PIL import ImageOps

    try:
        with pil.open(io.BytesIO(data)) as opened:
            if opened.mode in ("I", "F"):
                raise DecodeError(f"pixels of mode {opened.mode} say nothing of where white lies: store 8 or 16 bits")
            upright = ImageOps.exif_transpose(opened)
            if upright.mode.startswith("I;16"):  # Pillow would cut everything above 255 off
                grey = (np.asarray(upright) >> 8).astype(np.uint8)
                return np.stack([grey] * 3, axis=-1)
            return np.array(upright.convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, pil.DecompressionBombError) as error:
        raise DecodeError(f"damaged or unknown image: {error}") from error


def _exif_orientation(data: bytes) -> int:
    """The EXIF orientation (1 to 8) of a JPEG; 1 where there is none. Looks at the segments before the pixels only."""
    if b"Exif\0\0" not in data:  # nearly always, and much faster than walking the segments
        return 1
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xDA:  # start of scan: compressed data follows
            break
        (length,) = struct.unpack_from(">H", data, position + 2)
        if marker == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            return _tiff_orientation(data[position + 10 : position + 2 + length])
        position += 2 + length
    return 1


def _tiff_orientation(tiff: bytes) -> int:
    """The orientation tag in the first directory of a TIFF header (EXIF data is one); 1 if it cannot be read."""
    byte_order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    try:
        if byte_order is None:
            return 1
        (directory,) = struct.unpack_from(byte_order + "I", tiff, 4)
        (entries,) = struct.unpack_from(byte_order + "H", tiff, directory)
        for entry in range(entries):
            offset = directory + 2 + 12 * entry
            tag, _, _, value = struct.unpack_from(byte_order + "HHIH", tiff, offset)
            if tag == _ORIENTATION_TAG:
                return value if 1 <= value <= 8 else 1
    except struct.error:  # a directory that points outside its segment: the tag is unreadable, the pixels are not
        return 1
    return 1


def _turn_upright(pixels: Image, orientation: int) -> Image:
    transpose, reverse_rows, reverse_columns = _ORIENTATIONS[orientation]
    if transpose:
        pixels = pixels.transpose(1, 0, 2)
    if reverse_rows:
        pixels = pixels[::-1]
    if reverse_columns:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
