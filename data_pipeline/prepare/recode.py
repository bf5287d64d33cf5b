"""Changing an image file on its way into a shard: made smaller, or given restart markers."""

from __future__ import annotations

import io

import numpy as np

from data_pipeline import restart_rows
from data_pipeline.decode import decode_image
from data_pipeline.shards.source import DataError

_REDUCING_GAP = 3.0
"""Pillow averages whole blocks until the image is this many times larger than wanted, then resamples: faster where an
image is far too large, and not to be told from resampling it all (Pillow's documentation of Image.resize)."""


def smaller(image: bytes, short_side: int, quality: int, grey: bool) -> bytes:
    """The image, upright, with its shorter side scaled to `short_side` pixels, as a JPEG (4:2:0).

    Exact decoding, then Lanczos. EXIF and colour profile are not kept: the pixels are upright, and training looks at
    neither. `grey` makes a JPEG of one component.
    """
    from PIL import Image

    pixels = decode_image(image, "exact")
    height, width = pixels.shape[:2]
    scale = short_side / min(height, width)
    size = (max(short_side, round(width * scale)), max(short_side, round(height * scale)))
    picture = Image.fromarray(pixels[:, :, 0] if grey else pixels)
    resized = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=_REDUCING_GAP)
    file = io.BytesIO()
    resized.save(file, "JPEG", quality=quality)
    return file.getvalue()


def with_restart_rows(image: bytes) -> tuple[bytes, tuple[int, ...]]:
    """The JPEG with restart markers after every row of blocks and within it, and where its pieces begin.

    Without offsets, and as it was, where it cannot take them; a pixel that would not be the same is no price for speed.
    """
    made, rows = restart_rows.insert(image)
    if rows and not np.array_equal(decode_image(made, "exact"), decode_image(image, "exact")):
        return image, ()
    return made, rows


def require_tool() -> None:
    """Raises DataError where the program that inserts restart markers is missing."""
    try:
        restart_rows.insert(b"")
    except FileNotFoundError as error:
        raise DataError(f"--restart-rows: {error}.") from error
