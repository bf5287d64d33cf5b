"""The UCI handwritten digits that scikit-learn carries: 1,797 real images, nothing to download.

E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

from __future__ import annotations

import argparse
import io

import numpy as np
import numpy.typing as npt

from data_pipeline.prepare.listing import Item, Listing, SourceFiles, hold_out
from data_pipeline.shards.source import DataError

NAME = "digits"
HELP = "1,797 handwritten digits that come with scikit-learn; no download"

VALIDATION_IMAGES = 360
IMAGE_SIZE = 64
_JPEG_QUALITY = 95
_BRIGHTEST = 16  # each of the 8x8 values counts the set pixels of a 4x4 block of the scan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There is nothing to choose."""
    parser.description = "The UCI handwritten digits as 64x64 JPEGs: 1,437 to train on, 360 held out. No download."


def list_source(arguments: argparse.Namespace) -> Listing:
    """The digits as grayscale JPEGs of 64x64: 1,437 to train on and 360 held out, every class in proportion."""
    scans, labels = _scans()
    items = []
    for number, (scan, label) in enumerate(zip(scans, labels, strict=True)):
        key, image = f"digit-{number:04d}", _jpeg(scan)
        items.append(Item(key, f"{key}.jpg", int(label), len(image), place=image))
    train, val = hold_out(items, VALIDATION_IMAGES)
    classes = tuple(str(digit) for digit in range(10))
    return Listing(NAME, {}, classes, {"train": train, "val": val}, _read)


def _read(item: Item) -> SourceFiles:
    return SourceFiles(item.place)


def _jpeg(scan: npt.NDArray[np.uint8]) -> bytes:
    """A scan enlarged smoothly (bicubic), as a JPEG file."""
    from PIL import Image

    enlarged = Image.fromarray(scan).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    enlarged.save(file, "JPEG", quality=_JPEG_QUALITY)
    return file.getvalue()


def _scans() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images (1797, 8, 8) on the scale 0 to 255, and labels (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "The digits come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    bunch = load_digits()
    scaled = np.rint(bunch.images * (255 / _BRIGHTEST)).astype(np.uint8)
    return scaled, bunch.target.astype(np.int64)
