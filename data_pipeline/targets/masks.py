"""Masks of semantic segmentation: an 8-bit PNG of one channel whose pixels are label values."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.targets.fault import TargetError, require_same_size

EXTENSION = "seg.png"
IGNORED = 255
"""In a map of classes: this pixel teaches nothing."""

_PNG_START = b"\x89PNG\r\n\x1a\n"
_GREY, _PALETTE = 0, 3
_COLOUR_TYPES = {0: "grey", 2: "RGB colours", 3: "a palette", 4: "grey with transparency", 6: "RGB with transparency"}
_SHOWN_VALUES = 5


@dataclass(frozen=True)
class MaskLabels:
    """What the values in a mask mean: class c is stored as `first_label` + c, and some values teach nothing."""

    num_classes: int
    first_label: int = 0
    """1 where 0 is not a class, as in ADE20K (whose training calls it reduce_zero_label)."""

    ignore: tuple[int, ...] = ()
    """Values of pixels that belong to no class."""

    def __post_init__(self) -> None:
        last = self.first_label + self.num_classes - 1
        if not (self.num_classes >= 1 and self.first_label >= 0 and last <= 255):
            raise ValueError(
                f"{self.num_classes} classes from {self.first_label} on do not fit into the values 0 to 255"
            )
        for value in self.ignore:
            if not 0 <= value <= 255 or self.first_label <= value <= last:
                raise ValueError(
                    f"{value} cannot be ignored: it is no value from 0 to 255 beside the classes' own, "
                    f"{self.first_label} to {last}"
                )

    def to_json(self) -> dict[str, Any]:
        """What index.json says."""
        return {"first_label": self.first_label, "ignore": list(self.ignore)}

    @classmethod
    def from_json(cls, num_classes: int, meaning: Mapping[str, Any]) -> MaskLabels:
        """Raises ValueError where `meaning` makes no sense."""
        try:
            return cls(num_classes, int(meaning["first_label"]), tuple(int(value) for value in meaning["ignore"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"what the masks' values mean is not said ({type(error).__name__}: {error})") from error

    def __str__(self) -> str:
        ignored = f" and {', '.join(map(str, self.ignore))} (ignored)" if self.ignore else ""
        return f"{self.first_label} to {self.first_label + self.num_classes - 1}{ignored}"


@functools.lru_cache(maxsize=8)
def class_table(labels: MaskLabels) -> npt.NDArray[np.uint8]:
    """Class index of each value of a mask, uint8 (256,); IGNORED for values that teach nothing.

    `class_table(labels)[mask]` is the map of classes.
    """
    table = np.full(256, IGNORED, np.uint8)
    table[labels.first_label : labels.first_label + labels.num_classes] = np.arange(labels.num_classes)
    table.flags.writeable = False
    return table


def read_mask(data: bytes) -> npt.NDArray[np.uint8]:
    """The values of a mask, uint8 (H, W), exactly as stored: of a palette, the numbers and not the colours.

    Raises TargetError for anything but an undamaged PNG with 8-bit values or a palette.
    """
    from PIL import Image

    _png_size(data)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.load()
            return np.array(image)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise TargetError(f"the mask is damaged: {error}") from error


def _png_size(data: bytes) -> tuple[int, int]:
    """(height, width) from a PNG's first chunk, which must promise label values; raises TargetError."""
    if data[:8] != _PNG_START or data[12:16] != b"IHDR" or len(data) < 33:
        raise TargetError("the mask is no PNG file")
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    if colour not in (_GREY, _PALETTE):
        raise TargetError(f"the mask holds {_COLOUR_TYPES.get(colour, 'unknown colours')}: store label values (8 bits)")
    if colour == _GREY and depth != 8:  # fewer bits are shades, which decoders stretch to 255; more are cut off
        raise TargetError(f"the mask has {depth} bits per pixel: store label values in 8 bits")
    return height, width


def check_mask(data: bytes, size: tuple[int, int], labels: MaskLabels) -> npt.NDArray[np.uint8]:
    """Read a mask that must be as large as its upright image `size` (height, width) and hold known values only.

    Raises TargetError.
    """
    require_same_size("the mask", _png_size(data), size)  # before any of its pixels are unpacked
    mask = read_mask(data)
    present = np.bincount(mask.ravel(), minlength=256) > 0
    known = class_table(labels) != IGNORED
    known[list(labels.ignore)] = True
    unknown = np.flatnonzero(present & ~known).tolist()
    if unknown:
        more = ", ..." if len(unknown) > _SHOWN_VALUES else ""
        shown = ", ".join(map(str, unknown[:_SHOWN_VALUES]))
        raise TargetError(f"the mask holds the value {shown}{more}; allowed are {labels}")
    return mask


def resize_mask(data: bytes, before: tuple[int, int], after: tuple[int, int]) -> bytes:
    """The mask at another (height, width): each pixel takes the value of the nearest one, so no value is invented."""
    from PIL import Image

    require_same_size("the mask", _png_size(data), before)
    resized = Image.fromarray(read_mask(data)).resize((after[1], after[0]), Image.Resampling.NEAREST)
    file = io.BytesIO()
    resized.save(file, "PNG")
    return file.getvalue()
